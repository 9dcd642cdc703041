// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/google/pprof/profile"
	"github.com/prometheus/common/promslog"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/profiler"
	"github.com/hostflame/hostflame/symbolizer"
)

type record struct {
	duration *time.Duration
	output   *string
	format   *string
	sampling
}

func addRecord(app *kingpin.Application) (string, command) {
	c := app.Command("record", "Record where this host's CPU time goes, once, into a file. Ctrl-C ends it early and writes what there is.")
	r := &record{
		duration: c.Flag("duration", "How long to record.").Short('d').Default("10s").Duration(),
		output:   c.Flag("output", "File to write; - is standard output.").Short('o').Default("cpu.pb.gz").String(),
		format:   c.Flag("format", "pprof or folded; by default folded for names that end in .folded or .txt, else pprof.").Enum(formatPprof, formatFolded),
	}
	r.sampling = samplingFlags(c)
	return "record", r
}

const (
	formatPprof  = "pprof"
	formatFolded = "folded"
)

func (r *record) run(ctx context.Context, env environment) error {
	if err := r.check(); err != nil {
		return err
	}
	if *r.duration <= 0 {
		return usagef("a duration has a unit: -d 10s, -d 2m", "duration %v is not positive", *r.duration)
	}
	// Before the recording: nobody wants to learn afterwards that it can not be written.
	out, err := newOutput(*r.output, env.stdout)
	if err != nil {
		return err
	}
	defer out.discard()

	cpu, err := bpf.NewCPU(r.config())
	if err != nil {
		return hintf(attachHint(err, bpf.Event(*r.event)), "sample CPU: %w", err)
	}
	defer cpu.Close()
	w, err := r.sample(ctx, env, cpu)
	if err != nil {
		return err
	}
	recorded := &w.Profiles[0]
	pp, err := recorded.Pprof()
	if err != nil {
		return err
	}
	if err := out.commit(func(w2 io.Writer) error { return r.encode(w2, pp) }); err != nil {
		return err
	}
	bannerf(env.stderr, "%s", summary(recorded, pp, *r.frequency))
	if out.w == nil {
		bannerf(env.stderr, "wrote %s", *r.output)
	}
	return nil
}

// sample runs the profiler for the duration, or until ctx ends, as one window.
func (r *record) sample(ctx context.Context, env environment, cpu *bpf.CPU) (*profiler.Window, error) {
	sym := symbolizer.New(symbolizer.Config{})
	defer sym.Close()
	log := promslog.New(env.log)
	cache := r.openTableCache(log)
	if cache != nil {
		defer cache.Close()
	}
	typ := profiler.CPU(bpf.Event(*r.event), *r.frequency)
	cfg := profiler.Config{
		Feeds: []profiler.Feed{cpuFeed(cpu, cpu)}, Types: []profiler.Type{typ},
		Symbolizer: sym, Tables: cpu.Tables(), TableCache: cache,
		Window: *r.duration + time.Hour, // never closes by itself
		Logger: log,
	}
	mappings := newMappings(log)
	if mappings != nil {
		defer mappings.Close()
		cfg.Mappings = mappings
	}
	p, err := profiler.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	var window *profiler.Window
	p.OnWindow(func(w *profiler.Window) { window = w })

	// The profiler outlives ctx: what was sampled until then is still wanted.
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- p.Run(run) }()
	go cpu.Follow(run, nil)
	if mappings != nil {
		go mappings.Follow(run, nil)
	}

	r.wait(ctx, env, ended, func() uint64 { return p.Stats().Samples[typ.Name] })
	if err := cpu.Detach(); err != nil {
		return nil, fmt.Errorf("stop sampling: %w", err)
	}
	stop()
	if err := <-ended; err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	if window == nil {
		return nil, errors.New("profile: no window")
	}
	return window, nil
}

// wait returns after the duration, when ctx ends, or when the profiler has ended by
// itself, and shows the progress to who sits at a terminal.
func (r *record) wait(ctx context.Context, env environment, ended chan error, samples func() uint64) {
	begin := time.Now()
	done := time.NewTimer(*r.duration)
	defer done.Stop()
	var tick <-chan time.Time
	if isTerminal(env.stderr) {
		t := time.NewTicker(200 * time.Millisecond)
		defer t.Stop()
		defer fmt.Fprint(env.stderr, "\r\033[K")
		tick = t.C
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-done.C:
			return
		case err := <-ended:
			ended <- err
			return
		case <-tick:
			fmt.Fprintf(env.stderr, "\r\033[Khostflame: %.0fs of %v, %d samples; Ctrl-C writes what there is",
				time.Since(begin).Seconds(), *r.duration, samples())
		}
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func (r *record) encode(w io.Writer, p *profile.Profile) error {
	format := *r.format
	if format == "" {
		format = formatPprof
		if strings.HasSuffix(*r.output, ".folded") || strings.HasSuffix(*r.output, ".txt") {
			format = formatFolded
		}
	}
	if format == formatFolded {
		return profiler.WriteFolded(w, p, "")
	}
	return p.Write(w)
}

// summary is the last line: what was recorded, what is missing, and what is on top.
func summary(p *profiler.Profile, pp *profile.Profile, hz int) string {
	var lost uint64
	for _, n := range p.Lost {
		lost += n
	}
	elapsed := time.Duration(pp.DurationNanos)
	s := fmt.Sprintf("%d samples in %.1f s at %d Hz, %d lost", p.Samples, elapsed.Seconds(), hz, lost)
	if name, share := topFunction(pp); name != "" {
		s += fmt.Sprintf("; on top: %s, %.1f %%", name, 100*share)
	}
	return s
}

// topFunction is the function that most samples were taken in, and its share of them.
func topFunction(p *profile.Profile) (name string, share float64) {
	flat := map[string]int64{}
	var total int64
	for _, s := range p.Sample {
		total += s.Value[0]
		if len(s.Location) > 0 && len(s.Location[0].Line) > 0 && s.Location[0].Line[0].Function != nil {
			flat[s.Location[0].Line[0].Function.Name] += s.Value[0]
		}
	}
	var most int64
	for n, v := range flat {
		if v > most || v == most && n < name {
			name, most = n, v
		}
	}
	if total == 0 {
		return "", 0
	}
	return name, float64(most) / float64(total)
}
