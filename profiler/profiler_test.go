// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/symbolizer"
)

// scripted is a source that delivers what a test puts into it.
type scripted struct {
	mu      sync.Mutex
	samples []bpf.Sample
	drains  int
	err     error // of the next drains
	wake    chan struct{}
}

func newScripted() *scripted { return &scripted{wake: make(chan struct{}, 1)} }

func (s *scripted) put(samples ...bpf.Sample) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.samples = append(s.samples, samples...)
}

func (s *scripted) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *scripted) Wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-s.wake:
	case <-t.C:
	}
	return nil
}

func (s *scripted) Drain(fn func(*bpf.Sample)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drains++
	var reused bpf.Sample
	for _, sample := range s.samples {
		kernel, user := append(reused.Kernel[:0], sample.Kernel...), append(reused.User[:0], sample.User...)
		reused = sample
		reused.Kernel, reused.User = kernel, user
		fn(&reused)
	}
	s.samples = s.samples[:0]
	return s.err
}

// cpuFeed delivers what s has as samples of CPU time.
func cpuFeed(s Source) []Feed {
	return []Feed{{Source: s, Profiles: []bpf.Profile{bpf.ProfileCPU}}}
}

// ownSample is a sample of this process in a function of this test.
func ownSample(t *testing.T) bpf.Sample {
	t.Helper()
	b, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	stat, err := parseStat(b)
	if err != nil {
		t.Fatal(err)
	}
	leaf, caller := uint64(reflect.ValueOf(leafFunction).Pointer()), uint64(reflect.ValueOf(callerFunction).Pointer())
	return bpf.Sample{
		PID: uint32(os.Getpid()), TID: uint32(os.Getpid()), Start: stat.start * nanosPerTick, ExecID: 1,
		Comm: stat.comm, Thread: bpf.MakeComm("thread"), Weight: 1, Value: 10_000_000,
		UserMode: true, UserOutcome: bpf.OutcomeComplete,
		// The return address is the second instruction.
		User: []uint64{bpf.ExactAddr | leaf, caller + 1},
	}
}

//go:noinline
func leafFunction() {}

//go:noinline
func callerFunction() {}

// running is a profiler of a scripted source.
type running struct {
	*Profiler
	source *scripted
	cancel context.CancelFunc
	ended  chan error
}

// run starts a profiler whose windows do not close by themselves, unless change says so.
func run(t *testing.T, change func(*Config), onWindow func(*Window)) running {
	t.Helper()
	s := symbolizer.New(symbolizer.Config{})
	source := newScripted()
	cfg := Config{Feeds: cpuFeed(source), Types: []Type{CPU("", 100)}, Symbolizer: s, Window: time.Hour}
	if change != nil {
		change(&cfg)
	}
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if onWindow != nil {
		p.OnWindow(onWindow)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := running{p, source, cancel, make(chan error, 1)}
	go func() { r.ended <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case <-r.ended:
		case <-time.After(20 * time.Second):
			t.Error("Run does not return")
		}
		s.Close()
	})
	await(t, "ready", p.Ready)
	return r
}

// stop ends Run and returns what it returned.
func (r running) stop(t *testing.T) error {
	t.Helper()
	r.cancel()
	select {
	case err := <-r.ended:
		r.ended <- err
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("Run does not return")
		return nil
	}
}

func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timed out: %s", what)
		}
	}
}

// functions lists the names in the one stack of p, leaf first.
func functions(t *testing.T, p *profile.Profile) []string {
	t.Helper()
	if len(p.Sample) != 1 {
		t.Fatalf("%d samples, want one\n%v", len(p.Sample), p)
	}
	var list []string
	for _, l := range p.Sample[0].Location {
		for _, line := range l.Line {
			list = append(list, line.Function.Name[strings.LastIndexByte(line.Function.Name, '.')+1:])
		}
	}
	return list
}

func total(p *profile.Profile) (n int64) {
	for _, s := range p.Sample {
		n += s.Value[0]
	}
	return n
}

func TestNewRefuses(t *testing.T) {
	s := symbolizer.New(symbolizer.Config{})
	defer s.Close()
	for _, cfg := range []Config{
		{Symbolizer: s, Types: []Type{cpuType}},
		{Feeds: cpuFeed(newScripted()), Types: []Type{cpuType}},
		{Feeds: cpuFeed(newScripted()), Symbolizer: s},
		{Feeds: cpuFeed(newScripted()), Symbolizer: s, Types: []Type{cpuType, cpuType}},
		{Feeds: cpuFeed(newScripted()), Symbolizer: s, Types: []Type{{Name: "empty"}}},
		{Feeds: cpuFeed(nil), Symbolizer: s, Types: []Type{cpuType}},
		{Feeds: cpuFeed(newScripted()), Symbolizer: s, Types: []Type{cpuType}, Window: -1},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%+v: no error", cfg)
		}
	}
}

// The last window has what was there when the context ended, and is handed out before
// Run returns.
func TestLastWindow(t *testing.T) {
	var windows []*Window
	r := run(t, func(c *Config) {
		n := uint64(0)
		c.Feeds[0].Losses = func() map[string]uint64 {
			n += 5
			return map[string]uint64{"ring_full": n, "no_ring": 3}
		}
	}, func(w *Window) { windows = append(windows, w) })
	s := ownSample(t)
	heavy := s
	heavy.Weight, heavy.Value = 3, 30_000_000
	r.source.put(s)
	await(t, "first drain", func() bool { return r.Stats().Samples["cpu"] == 1 })
	r.source.put(s, heavy)
	if r.Newest() != nil {
		t.Error("a window is there before one has closed")
	}
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	if len(windows) != 1 || r.Newest() != windows[0] {
		t.Fatalf("%d windows, want one, the newest", len(windows))
	}
	w := windows[0]
	if got := functions(t, pprofOf(t, w.Of("cpu"))); !slices.Equal(got, []string{"leafFunction", "callerFunction"}) {
		t.Errorf("stack %q", got)
	}
	sample := pprofOf(t, w.Of("cpu")).Sample[0]
	if w.Of("cpu").Samples != 5 || sample.Value[0] != 5 || sample.Value[1] != 50_000_000 {
		t.Errorf("%d samples, values %d; want 5", w.Of("cpu").Samples, sample.Value)
	}
	if w.Of("cpu").Lost["ring_full"] != 5 || len(w.Of("cpu").Lost) != 1 {
		t.Errorf("lost %v, want 5 to a full ring", w.Of("cpu").Lost)
	}
	if l := sample.Label; l["comm"][0] != s.Comm.String() || l["thread"][0] != "thread" || len(l["container"]) != 1 {
		t.Errorf("labels %v", l)
	}
	if l := sample.NumLabel; l["pid"][0] != int64(os.Getpid()) || l["tid"][0] != int64(os.Getpid()) {
		t.Errorf("labels %v", l)
	}
	m := sample.Location[0].Mapping
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if m.File != exe || m.BuildID == "" || m.Start == 0 || m.Limit <= m.Start {
		t.Errorf("mapping %+v of %s", m, exe)
	}
	// The addresses are those of the file. This test binary is not relocated.
	if addr := sample.Location[0].Address; addr != s.User[0]&^bpf.ExactAddr {
		t.Errorf("leaf at %#x, want %#x", addr, s.User[0]&^bpf.ExactAddr)
	}
	if d := w.End.Sub(w.Start); d != time.Duration(pprofOf(t, w.Of("cpu")).DurationNanos) || d <= 0 {
		t.Errorf("window of %v, profile of %d ns", d, pprofOf(t, w.Of("cpu")).DurationNanos)
	}
	if since := time.Since(w.End); since < 0 || since > 10*time.Second {
		t.Errorf("window ended %v ago", since)
	}
	st := r.Stats()
	if st.Stacks["cpu"]["complete"] != 3 || st.Samples["cpu"] != 5 {
		t.Errorf("stats %+v", st)
	}
	if err := r.Run(context.Background()); err == nil {
		t.Error("run for a second time: no error")
	}
	if _, err := r.Capture(context.Background(), Request{Duration: time.Second}); !errors.Is(err, errEnded) {
		t.Errorf("capture after the end: %v", err)
	}
}

func TestWindowsFollowEachOther(t *testing.T) {
	var mu sync.Mutex
	var windows []*Window
	r := run(t, func(c *Config) { c.Window = 300 * time.Millisecond }, func(w *Window) {
		mu.Lock()
		defer mu.Unlock()
		windows = append(windows, w)
	})
	s := ownSample(t)
	put := 0
	await(t, "five windows", func() bool {
		r.source.put(s)
		put++
		mu.Lock()
		defer mu.Unlock()
		return len(windows) >= 5
	})
	r.stop(t)
	sum := uint64(0)
	for i, w := range windows {
		sum += w.Of("cpu").Samples
		if uint64(total(pprofOf(t, w.Of("cpu")))) != w.Of("cpu").Samples {
			t.Errorf("window %d: %d samples in the profile, %d in the window", i, total(pprofOf(t, w.Of("cpu"))), w.Of("cpu").Samples)
		}
		if i > 0 {
			if gap := w.Start.Sub(windows[i-1].End); gap.Abs() > 5*time.Millisecond {
				t.Errorf("window %d begins %v after the one before", i, gap)
			}
		}
		if d := w.End.Sub(w.Start); i < 4 && (d < 300*time.Millisecond || d > 2*time.Second) {
			t.Errorf("window %d took %v", i, d)
		}
	}
	if sum != uint64(put) {
		t.Errorf("%d samples in windows, %d were there", sum, put)
	}
}

// A subscriber that takes long makes windows longer; nothing is lost.
func TestSlowSubscriber(t *testing.T) {
	release := make(chan struct{})
	var samples uint64
	windows := 0
	r := run(t, func(c *Config) { c.Window = 50 * time.Millisecond }, func(w *Window) {
		<-release
		windows++
		samples += w.Of("cpu").Samples
	})
	s := ownSample(t)
	for range 20 {
		r.source.put(s)
		time.Sleep(30 * time.Millisecond)
	}
	await(t, "drains beside the subscriber", func() bool { return r.Stats().Samples["cpu"] == 20 })
	r.source.mu.Lock()
	if r.source.drains > 100 {
		t.Errorf("%d drains in a second", r.source.drains)
	}
	r.source.mu.Unlock()
	close(release)
	r.stop(t)
	if samples != 20 || windows > 6 {
		t.Errorf("%d samples in %d windows, want 20 in few", samples, windows)
	}
}

// newsOnly is a MappingEvents that tells that there are events, and none.
type newsOnly chan struct{}

func (newsOnly) Drain(func(*bpf.MappingEvent)) (uint64, error) { return uint64(bootTime()), nil }

func (n newsOnly) Wait(ctx context.Context, d time.Duration) error {
	select {
	case <-n:
	case <-time.After(d):
	case <-ctx.Done():
	}
	return ctx.Err()
}

// The source is drained once a second while nothing is new, and soon when something is.
func TestDrainIntervalByNews(t *testing.T) {
	news := make(newsOnly)
	r := run(t, func(c *Config) { c.Mappings = news }, nil)
	drains := func() int {
		r.source.mu.Lock()
		defer r.source.mu.Unlock()
		return r.source.drains
	}
	next := func() time.Duration {
		begin, before := time.Now(), drains()
		await(t, "drain", func() bool { return drains() > before })
		return time.Since(begin)
	}
	await(t, "initial processes", r.told.follows)
	time.Sleep(firstSecond)
	next()
	holdDrains(t, drains, quietInterval, 3)
	least := time.Hour
	for range 5 {
		next()
		news <- struct{}{}
		least = min(least, next())
	}
	if least > quietInterval/2 {
		t.Errorf("%v or longer from news to a drain", least)
	}
}

// Without mapping events the source is drained every 250 ms, and early when it asks for it.
func TestDrainInterval(t *testing.T) {
	r := run(t, nil, nil)
	start := time.Now()
	for i := range uint64(20) {
		r.source.put(ownSample(t))
		r.source.wake <- struct{}{}
		await(t, "drain", func() bool { return r.Stats().Samples["cpu"] == i+1 })
	}
	if d := time.Since(start); d > 20*drainInterval*3/4 {
		t.Errorf("20 early drains took %v", d)
	}
	drains := func() int {
		r.source.mu.Lock()
		defer r.source.mu.Unlock()
		return r.source.drains
	}
	time.Sleep(firstSecond)
	holdDrains(t, drains, drainInterval, 8)
}

// holdDrains holds the drains in a time of n intervals against it, and where the machine stood
// still meanwhile against the beats of a loop of the test itself.
func holdDrains(t *testing.T, drains func() int, interval time.Duration, n int) {
	t.Helper()
	begin, before := time.Now(), drains()
	beats := 0
	for time.Since(begin) < time.Duration(n)*interval {
		time.Sleep(interval)
		beats++
	}
	got, most := drains()-before, int(time.Since(begin)/interval)+1
	t.Logf("%d drains, %d beats, at most %d", got, beats, most)
	if got < beats-2 || got > most {
		t.Errorf("%d drains, want %d to %d", got, beats-2, most)
	}
}

func TestDump(t *testing.T) {
	r := run(t, nil, nil)
	s := ownSample(t)
	r.source.put(s)
	await(t, "drain", func() bool { return r.Stats().Samples["cpu"] == 1 })
	var b bytes.Buffer
	if err := r.Dump(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		fmt.Sprintf("pid %d start %d exec 1 comm %q", s.PID, s.Start, s.Comm),
		fmt.Sprintf("pid %d tid %d comm %q thread \"thread\"", s.PID, s.TID, s.Comm),
		fmt.Sprintf("%#x\n", s.User[1]-1),
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is not in\n%s", want, b.String())
		}
	}
}

func TestCapture(t *testing.T) {
	r := run(t, nil, nil)
	s := ownSample(t)
	before, after := s, s
	before.Thread, after.Thread = bpf.MakeComm("before"), bpf.MakeComm("after")
	// It is still in the ring when the capture begins, but was sampled before.
	r.source.put(before)
	type result struct {
		p   *profile.Profile
		err error
	}
	start := time.Now()
	done := make(chan result, 1)
	go func() {
		p, err := r.Capture(context.Background(), Request{Type: "cpu", Duration: time.Second})
		done <- result{p, err}
	}()
	await(t, "begin", func() bool { return r.Stats().Samples["cpu"] == 1 })
	time.Sleep(50 * time.Millisecond)
	r.source.put(s, s)
	got := <-done
	if got.err != nil {
		t.Fatal(got.err)
	}
	// It promises two seconds, of a host that lets this process run.
	if d := time.Since(start); d < time.Second || d > 5*time.Second {
		t.Errorf("a capture of a second took %v", d)
	}
	r.source.put(after)
	if got := functions(t, got.p); !slices.Equal(got, []string{"leafFunction", "callerFunction"}) {
		t.Errorf("stack %q", got)
	}
	if n := total(got.p); n != 2 {
		t.Errorf("%d samples, want 2", n)
	}
	if d := time.Duration(got.p.DurationNanos); d < time.Second || d > 4*time.Second {
		t.Errorf("duration %v", d)
	}
}

func TestCaptureFilters(t *testing.T) {
	r := run(t, nil, nil)
	s := ownSample(t)
	samples := make([]bpf.Sample, 4)
	for i := range samples {
		samples[i] = s
		samples[i].PID = uint32(1_000_000_000 + i)
		samples[i].Comm = bpf.MakeComm(fmt.Sprint("comm", i/2))
	}
	container := r.containers.Name(s.Cgroup, PID(s.PID))
	captures := []struct {
		filter Filter
		want   int64
	}{
		{Filter{}, 4},
		{Filter{PIDs: []uint32{1_000_000_000}}, 1},
		{Filter{PIDs: []uint32{1_000_000_000, 1_000_000_003, 5}}, 2},
		{Filter{Comms: []string{"comm0"}}, 2},
		{Filter{Comms: []string{"comm0", "comm1"}}, 4},
		{Filter{Comms: []string{"comm"}}, 0},
		{Filter{Containers: []string{container}}, 4},
		{Filter{Containers: []string{"other"}}, 0},
		{Filter{PIDs: []uint32{1_000_000_000}, Comms: []string{"comm1"}}, 0},
		{Filter{PIDs: []uint32{1_000_000_002}, Comms: []string{"comm1"}, Containers: []string{container}}, 1},
	}
	var wg sync.WaitGroup
	for _, c := range captures {
		wg.Go(func() {
			p, err := r.Capture(context.Background(), Request{Duration: time.Second, Filter: c.filter})
			if err != nil {
				t.Errorf("%+v: %v", c.filter, err)
				return
			}
			if n := total(p); n != c.want {
				t.Errorf("%+v: %d samples, want %d", c.filter, n, c.want)
			}
		})
	}
	await(t, "all begin", func() bool {
		n := make(chan int, 1)
		if err := r.do(func() { n <- len(r.captures) }); err != nil {
			t.Fatal(err)
		}
		return <-n == len(captures)
	})
	r.source.put(samples...)
	wg.Wait()
}

// Captures that nobody waits for any more are gone, and those that the end overtakes say so.
func TestCaptureEnds(t *testing.T) {
	r := run(t, nil, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := r.Capture(ctx, Request{Duration: time.Hour}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("abandoned: %v", err)
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("abandoned after %v", d)
	}
	n := make(chan int, 1)
	if err := r.do(func() { n <- len(r.captures) }); err != nil {
		t.Fatal(err)
	}
	if n := <-n; n != 0 {
		t.Errorf("%d captures go on", n)
	}
	for _, bad := range []Request{{Type: "wall", Duration: time.Second}, {Duration: 0}, {Duration: -1}} {
		if _, err := r.Capture(context.Background(), bad); err == nil {
			t.Errorf("%+v: no error", bad)
		}
	}
	ended := make(chan error, 1)
	go func() {
		_, err := r.Capture(context.Background(), Request{Duration: time.Hour})
		ended <- err
	}()
	time.Sleep(50 * time.Millisecond)
	r.stop(t)
	if err := <-ended; !errors.Is(err, errEnded) {
		t.Errorf("overtaken by the end: %v", err)
	}
}

func TestCaptureBeforeRun(t *testing.T) {
	s := symbolizer.New(symbolizer.Config{})
	defer s.Close()
	p, err := New(Config{Feeds: cpuFeed(newScripted()), Types: []Type{cpuType}, Symbolizer: s})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Capture(context.Background(), Request{Duration: time.Second}); !errors.Is(err, errNotRunning) {
		t.Errorf("%v, want %v", err, errNotRunning)
	}
	if p.Ready() {
		t.Error("ready before the first drain")
	}
}

// A capture over many windows keeps one row for one stack, also when some windows have
// nothing of it.
func TestCaptureOverWindows(t *testing.T) {
	r := run(t, func(c *Config) { c.Window = 30 * time.Millisecond }, nil)
	s := ownSample(t)
	stop := make(chan struct{})
	go func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(200 * time.Millisecond):
				r.source.put(s)
			}
		}
	}()
	p, err := r.Capture(context.Background(), Request{Duration: 1500 * time.Millisecond})
	close(stop)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Sample) != 1 || total(p) < 3 {
		t.Errorf("%d rows of %d samples, want one of many", len(p.Sample), total(p))
	}
}

// Stacks without room are counted, in the profile and in the stats.
func TestStacksOverflow(t *testing.T) {
	var last *Window
	r := run(t, func(c *Config) { c.MaxStacks = 10 }, func(w *Window) { last = w })
	for i := range uint32(100) {
		s := ownSample(t)
		s.User[0] += uint64(i)
		r.source.put(s)
	}
	r.stop(t)
	if last.Of("cpu").Samples != 100 || total(pprofOf(t, last.Of("cpu"))) != 100 || len(pprofOf(t, last.Of("cpu")).Sample) != 11 {
		t.Errorf("%d samples, %d in %d rows of the profile; want 100 in 11", last.Of("cpu").Samples, total(pprofOf(t, last.Of("cpu"))), len(pprofOf(t, last.Of("cpu")).Sample))
	}
	st := r.Stats()
	if st.Stacks["cpu"]["stacks_overflow"] != 90 {
		t.Errorf("stats %v", st.Stacks)
	}
	var sum uint64
	for _, n := range st.Stacks["cpu"] {
		sum += n
	}
	if sum != st.Samples["cpu"] {
		t.Errorf("outcomes sum to %d of %d samples", sum, st.Samples["cpu"])
	}
}

// A source that fails is reported once, counted, and drained on.
func TestFailingSource(t *testing.T) {
	var log bytes.Buffer
	var mu sync.Mutex
	r := run(t, func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(lockedWriter{&mu, &log}, nil))
	}, nil)
	r.source.fail(errors.New("ring is torn"))
	await(t, "two failures", func() bool { return r.Stats().Lost["cpu"]["undecodable"] >= 2 })
	r.source.fail(nil)
	r.source.put(ownSample(t))
	await(t, "recovery", func() bool { return r.Stats().Samples["cpu"] == 1 })
	mu.Lock()
	if n := strings.Count(log.String(), "ring is torn"); n != 1 {
		t.Errorf("reported %d times: %s", n, log.String())
	}
	mu.Unlock()
	r.source.fail(fmt.Errorf("read ring: %w", os.ErrClosed))
	select {
	case err := <-r.ended:
		r.ended <- err
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("closed source: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("Run goes on with a closed source")
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	b  *bytes.Buffer
}

func (w lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

// A known stack of a known process costs no allocation.
func TestTakeDoesNotAllocate(t *testing.T) {
	s := symbolizer.New(symbolizer.Config{})
	defer s.Close()
	p, err := New(Config{Feeds: cpuFeed(newScripted()), Types: []Type{cpuType}, Symbolizer: s})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.begin(); err != nil {
		t.Fatal(err)
	}
	// The container of this process, known by its cgroup.
	sample := ownSample(t)
	p.containers.young[sample.Cgroup] = rootName
	p.take(&sample)
	if n := testing.AllocsPerRun(100, func() { p.take(&sample) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkTake(b *testing.B) {
	s := symbolizer.New(symbolizer.Config{})
	defer s.Close()
	p, err := New(Config{Feeds: cpuFeed(newScripted()), Types: []Type{cpuType}, Symbolizer: s})
	if err != nil {
		b.Fatal(err)
	}
	if err := p.begin(); err != nil {
		b.Fatal(err)
	}
	sample := bpf.Sample{PID: 1 << 30, Weight: 1, KernelOutcome: bpf.OutcomeComplete, Kernel: make([]uint64, 30)}
	p.containers.young[0] = rootName
	for b.Loop() {
		p.take(&sample)
	}
}

func pprofOf(t *testing.T, p *Profile) *profile.Profile {
	t.Helper()
	pp, err := p.Pprof()
	if err != nil {
		t.Fatal(err)
	}
	return pp
}
