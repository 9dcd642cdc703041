// SPDX-License-Identifier: Apache-2.0

// Package profiler turns kernel samples into profiles: it drains them, attributes them to
// processes, containers and mappings, merges equal stacks, symbolizes what is left and
// hands out pprof profiles by window and on demand.
//
// Processes are gone soon, so what only a living process can tell (its mappings, its
// files, its cgroup) is asked when a sample of it is drained; names are looked up when a
// window closes. A sample of which something could not be found out is delivered all the
// same, with a frame that says what is missing, and counted by outcome.
package profiler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/profiler/unwind"
	"github.com/hostflame/hostflame/symbolizer"
)

// Source delivers kernel samples. *bpf.CPU is one.
type Source interface {
	// Drain hands every sample that is there to fn. The sample is valid during the call only.
	Drain(fn func(*bpf.Sample)) error
	// Wait returns when draining cannot wait, after d, or, with its error, when ctx ends.
	Wait(ctx context.Context, d time.Duration) error
}

// Config configures a Profiler. The zero value of a limit stands for its default.
type Config struct {
	Source     Source
	Symbolizer *symbolizer.Symbolizer
	Window     time.Duration // what is published together; 10 s if zero
	Frequency  int           // requested samples a second and CPU
	Event      string        // what triggers a sample; cpu-clock if empty
	Logger     *slog.Logger  // nothing is logged if nil
	// Losses returns what the kernel side lost, by reason, since it was loaded. May be nil.
	Losses func() map[string]uint64
	// Tables are the unwind tables that the source's stacks are walked by; they are filled
	// as samples need them. May be nil: then stacks stay as the source delivers them.
	Tables *bpf.Tables
	// Mappings tell what processes map; nil: /proc is read when it is asked for. They are the
	// caller's to close, after Run.
	Mappings MappingEvents
	// TableCache keeps tables on disk; nil for none. It is the caller's to close.
	TableCache *unwind.Cache

	MaxProcesses  int // program images whose mappings are kept; 4096
	MaxStacks     int // different samples of one profile; 16,384, the rest is one "[stacks overflow]"
	MaxContainers int // in CPUByContainer; 200, the rest is in "~other"
}

func (c *Config) setDefaults() error {
	switch {
	case c.Source == nil:
		return errors.New("make profiler: no source")
	case c.Symbolizer == nil:
		return errors.New("make profiler: no symbolizer")
	case c.Frequency < 1:
		return fmt.Errorf("make profiler: frequency %d Hz is not positive", c.Frequency)
	case c.Window < 0:
		return fmt.Errorf("make profiler: window %v is negative", c.Window)
	}
	if c.Window == 0 {
		c.Window = 10 * time.Second
	}
	if c.Event == "" {
		c.Event = string(bpf.EventCPUClock)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Losses == nil {
		c.Losses = func() map[string]uint64 { return nil }
	}
	if c.MaxProcesses <= 0 {
		c.MaxProcesses = 4096
	}
	if c.MaxStacks <= 0 {
		c.MaxStacks = 16 << 10
	}
	if c.MaxContainers <= 0 {
		c.MaxContainers = 200
	}
	return nil
}

const (
	// drainInterval is the longest time that samples wait in the kernel.
	drainInterval = 250 * time.Millisecond
	// lastSymbols bounds the symbolizing of the last window, so that the agent ends soon.
	lastSymbols = 2 * time.Second
	profileCPU  = "cpu"
	// settleWithin is what the end of a window or a capture waits for stacks that are
	// being finished. What takes longer is in the next.
	settleWithin = 200 * time.Millisecond
)

// Profiler makes profiles of one source. Run is called once; the other methods may be
// called from any goroutine.
type Profiler struct {
	cfg        Config
	host       string
	processes  *processTable
	told       *eventMappings // nil without mapping events
	unwinder   *unwinder      // nil without tables
	containers *Containers
	traces     *traces
	symbols    *symbols
	cpu        *cpuTimes
	counters   counters
	window     *window
	captures   []*capture // that are running; of the draining goroutine
	fresh      []Stack    // made since they were last handed to warming
	warming    chan []Stack
	closing    chan closedWindow
	newest     atomic.Pointer[Window]
	ready      atomic.Bool

	mu          sync.Mutex
	state       runState
	wake        context.CancelFunc // ends the wait under way
	pending     []func()           // for the draining goroutine, after its next drain
	subscribers []func(*Window)
}

type runState int

const (
	stateNew = runState(iota)
	stateRunning
	stateEnded
)

// counters are what Stats shows.
type counters struct {
	samples     atomic.Uint64
	drainErrors atomic.Uint64
	stacks      [outcomes]atomic.Uint64
}

// Window is what was sampled between two moments. It is shared: treat it as read-only.
type Window struct {
	Start, End time.Time // wall clock; End is Start plus what passed on the boot clock
	Profile    *profile.Profile
	Samples    uint64            // delivered
	Lost       map[string]uint64 // by reason, those that have none left out
}

// window is the one that is open.
type window struct {
	start  instant
	losses map[string]uint64 // at start
	agg    *aggregate
}

// closedWindow is one that is to be symbolized and published.
type closedWindow struct {
	rows     []row
	meta     meta
	deadline time.Time
}

// New returns a Profiler that does nothing until Run.
func New(cfg Config) (*Profiler, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("make profiler: %w", err)
	}
	var source mappingSource = newProcfs("/proc")
	var told *eventMappings
	if cfg.Mappings != nil {
		if told, err = newEventMappings(cfg.Mappings, newProcfs("/proc"), 4*cfg.MaxProcesses); err != nil {
			return nil, fmt.Errorf("make profiler: %w", err)
		}
		source = told
	}
	p := &Profiler{
		told:       told,
		cfg:        cfg,
		host:       host,
		processes:  newProcessTable(source, cfg.Symbolizer, cfg.MaxProcesses),
		containers: NewContainers(bpf.CPUControllerV1()),
		traces:     newTraces(),
		symbols:    newSymbols(cfg.Symbolizer),
		cpu:        newCPUTimes(cfg.MaxContainers),
		warming:    make(chan []Stack, 1),
		closing:    make(chan closedWindow, 1),
	}
	if cfg.Tables != nil {
		if p.unwinder, err = newUnwinder(&cfg, source); err != nil {
			return nil, fmt.Errorf("make profiler: %w", err)
		}
	}
	return p, nil
}

// OnWindow adds a subscriber; call it before Run. Subscribers are called at each close of
// a window, one after the other, from one goroutine; while they run the next window grows.
func (p *Profiler) OnWindow(fn func(*Window)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.subscribers = append(p.subscribers, fn)
}

// Run drains the source every 250 ms, or earlier when the source asks for it, and closes
// windows, until ctx ends. Then it drains once more, ends the captures that are running,
// closes the last window, hands it to the subscribers and returns nil. The caller stops
// the source's sampling before it ends ctx. It returns an error when the source is closed.
func (p *Profiler) Run(ctx context.Context) error {
	if err := p.begin(); err != nil {
		return err
	}
	var others sync.WaitGroup
	others.Go(func() {
		for w := range p.closing {
			p.publish(w)
		}
	})
	others.Go(func() {
		for stacks := range p.warming {
			p.symbols.warm(stacks)
		}
	})
	// A tenth of a second of work, which the first profile should not have to wait for.
	others.Go(func() { p.cfg.Symbolizer.Kernel(nil) })
	if p.unwinder != nil {
		others.Go(p.unwinder.run)
	}
	follow, stop := context.WithCancel(ctx)
	defer stop()
	if p.told != nil {
		others.Go(func() {
			if err := p.told.run(follow); err != nil {
				p.cfg.Logger.Error("mapping events ended, reading /proc instead", "err", err)
			}
		})
	}
	err := p.loop(ctx)
	stop()
	if p.unwinder != nil {
		p.settle()
		p.unwinder.hurry.Store(true)
		p.settle()
		close(p.unwinder.work)
	}
	p.end()
	close(p.warming)
	p.closing <- p.closeWindow(time.Now().Add(lastSymbols))
	close(p.closing)
	others.Wait()
	if cerr := p.containers.Close(); err == nil {
		err = cerr
	}
	return err
}

func (p *Profiler) begin() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != stateNew {
		return errors.New("run profiler: it has been run already")
	}
	p.state = stateRunning
	p.openWindow(now())
	return nil
}

// end refuses new captures and ends those that are running.
func (p *Profiler) end() {
	p.mu.Lock()
	p.state = stateEnded
	pending := p.pending
	p.pending = nil
	p.mu.Unlock()
	for _, fn := range pending {
		fn()
	}
	for _, c := range p.captures {
		c.fail(errEnded)
	}
	p.captures = nil
}

func (p *Profiler) loop(ctx context.Context) error {
	failing := false
	for ended := false; !ended; {
		err := p.wait(ctx)
		ended = ctx.Err() != nil
		if derr := p.cfg.Source.Drain(p.take); derr != nil {
			p.counters.drainErrors.Add(1)
			err = derr
		} else {
			p.ready.Store(true)
		}
		if errors.Is(err, os.ErrClosed) {
			return fmt.Errorf("drain samples: %w", err)
		}
		if err != nil && !failing {
			p.cfg.Logger.Error("drain samples failed", "err", err)
		}
		if failing = err != nil; failing {
			p.pause(ctx)
		}
		p.collect()
		p.afterDrain()
	}
	return nil
}

// collect takes the samples whose stacks were finished.
func (p *Profiler) collect() {
	if p.unwinder != nil {
		for _, s := range p.unwinder.collect() {
			p.deliver(s)
		}
	}
}

// settle takes also those whose stacks are being finished, if that is soon.
func (p *Profiler) settle() {
	if p.unwinder != nil {
		p.unwinder.settle(settleWithin)
		p.collect()
	}
}

// wait waits until a drain is due.
func (p *Profiler) wait(ctx context.Context) error {
	d := drainInterval
	// A window that is due already waits for the one before to be published.
	if left := p.window.start.boot + p.cfg.Window - bootTime(); left > 0 {
		d = min(d, left)
	}
	for _, c := range p.captures {
		d = min(d, c.end()-bootTime())
	}
	wait, cancel := context.WithCancel(ctx)
	defer cancel()
	p.mu.Lock()
	p.wake = cancel
	if len(p.pending) > 0 {
		cancel()
	}
	p.mu.Unlock()
	if err := p.cfg.Source.Wait(wait, max(d, 0)); wait.Err() == nil {
		return err
	}
	return nil
}

// pause keeps a source that fails at once from being asked all the time.
func (p *Profiler) pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(drainInterval):
	}
}

// afterDrain does what is due between two drains.
func (p *Profiler) afterDrain() {
	p.mu.Lock()
	pending := p.pending
	p.pending = nil
	p.mu.Unlock()
	for _, fn := range pending {
		fn()
	}
	p.endCaptures()
	if len(p.fresh) > 0 {
		select {
		case p.warming <- p.fresh:
			p.fresh = nil
		default: // it is behind: with the next
		}
	}
	if bootTime() < p.window.start.boot+p.cfg.Window {
		return
	}
	// While the last window is still being published this one goes on growing.
	if len(p.closing) < cap(p.closing) {
		p.settle()
		p.closing <- p.closeWindow(time.Time{})
	}
}

// do runs fn in the draining goroutine, soon, after a drain.
func (p *Profiler) do(fn func()) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch p.state {
	case stateNew:
		return errNotRunning
	case stateEnded:
		return errEnded
	}
	p.pending = append(p.pending, fn)
	if p.wake != nil {
		p.wake()
	}
	return nil
}

// take takes one sample from the source. One whose stack is not finished comes back later.
func (p *Profiler) take(s *bpf.Sample) {
	if p.unwinder != nil && s.UserOutcome == bpf.OutcomeNoTable && len(s.Stack) > 0 {
		if p.unwinder.submit(p.processes.unfinished(s)) {
			return
		}
	}
	p.deliver(s)
}

// deliver attributes and counts one sample. It does no system call for a process, stack and
// container that it knows.
func (p *Profiler) deliver(s *bpf.Sample) {
	weight := uint64(s.Weight)
	p.counters.samples.Add(weight)
	container := p.containers.Name(s.Cgroup, PID(s.PID))
	p.cpu.add(container, s)
	tr := p.trace(s)
	stacked := p.window.agg.add(s, tr, container)
	if stacked {
		p.counters.stacks[tr.outcome].Add(weight)
	} else {
		p.counters.stacks[outcomeOverflow].Add(weight)
	}
	for _, c := range p.captures {
		if c.matches(s, container) {
			c.agg.add(s, tr, container)
		}
	}
}

// trace returns the trace of s with its stack, nil where there is no room for it.
func (p *Profiler) trace(s *bpf.Sample) *trace {
	proc := p.processes.lookup(s)
	tr := p.traces.find(proc, s)
	if tr == nil {
		// Those of this window, of the one before, and of each capture.
		if p.traces.n >= (2+len(p.captures))*p.cfg.MaxStacks {
			return nil
		}
		tr = p.traces.insert(proc, s)
	} else if !p.processes.stale(proc, tr) {
		return tr
	}
	p.processes.complete(proc, tr, s)
	p.fresh = append(p.fresh, tr.stack)
	return tr
}

// openWindow begins a window at the end of the one before.
func (p *Profiler) openWindow(at instant) {
	p.window = &window{start: at, losses: p.losses(), agg: newAggregate(p.cfg.MaxStacks)}
}

// closeWindow ends the open window and opens the next.
func (p *Profiler) closeWindow(deadline time.Time) closedWindow {
	w := p.window
	p.completeLate(w.agg)
	at := now()
	p.openWindow(at)
	c := closedWindow{
		rows:     w.agg.snapshot(),
		meta:     p.meta(w.start, at, w.agg.samples, lossesSince(w.losses, p.window.losses)),
		deadline: deadline,
	}
	p.fresh = nil // these are looked up now
	// The next window will see most of these stacks again.
	w.agg.keepTraces()
	for _, running := range p.captures {
		running.agg.keepTraces()
	}
	p.traces.retain()
	return c
}

// completeLate gives the stacks of a what was learned of their processes since.
func (p *Profiler) completeLate(a *aggregate) {
	for _, tr := range a.traces {
		if tr.whole {
			continue
		}
		if proc := p.processes.lookup(&tr.raw); p.processes.stale(proc, tr) {
			p.processes.complete(proc, tr, &tr.raw)
		}
	}
}

func (p *Profiler) meta(start, end instant, samples uint64, lost map[string]uint64) meta {
	return meta{
		host:      p.host,
		event:     p.cfg.Event,
		frequency: p.cfg.Frequency,
		start:     start.wall,
		duration:  end.boot - start.boot,
		samples:   samples,
		lost:      lost,
	}
}

// publish symbolizes a window and hands it out.
func (p *Profiler) publish(c closedWindow) {
	pp, err := p.profile(c.rows, c.meta, c.deadline)
	if err != nil {
		p.cfg.Logger.Error("close window failed", "err", err)
		return
	}
	w := &Window{
		Start: c.meta.start, End: c.meta.start.Add(c.meta.duration),
		Profile: pp, Samples: c.meta.samples, Lost: c.meta.lost,
	}
	p.newest.Store(w)
	p.mu.Lock()
	subscribers := p.subscribers
	p.mu.Unlock()
	for _, fn := range subscribers {
		fn(w)
	}
}

// profile symbolizes rows, as far as it gets by the deadline, and makes the profile.
func (p *Profiler) profile(rows []row, m meta, deadline time.Time) (*profile.Profile, error) {
	found, late := p.symbols.lookup(rows, deadline)
	m.late = late
	return buildProfile(rows, found, m)
}

// Ready tells whether the source has been drained once.
func (p *Profiler) Ready() bool { return p.ready.Load() }

// Newest returns the window that closed last, nil before the first has closed.
func (p *Profiler) Newest() *Window { return p.newest.Load() }

// CPUByContainer returns the sampled CPU time by container. The host's own, "/", and
// "~other" are always there.
func (p *Profiler) CPUByContainer() []ContainerCPU { return p.cpu.list() }
