// SPDX-License-Identifier: Apache-2.0

// Package profiler turns kernel samples into profiles: it drains them, attributes them to
// processes, containers and mappings, merges equal stacks, symbolizes what is left and
// hands out pprof profiles by window and on demand.
//
// Processes are gone soon, so what only a living process can tell (its mappings, its
// files, its cgroup) is asked when a sample of it is drained, and the tables of names are
// read soon after that; names are looked up when somebody asks for a profile. A sample of
// which something could not be found out is delivered all the same, with a frame that says
// what is missing, and counted by outcome.
package profiler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/beat"
	"github.com/hostflame/hostflame/profiler/unwind"
	"github.com/hostflame/hostflame/symbolizer"
)

// Source delivers kernel samples. *bpf.CPU is one. A profiler calls each method from one
// goroutine.
type Source interface {
	// Drain hands every sample that is there to fn. The sample is valid during the call only.
	Drain(fn func(*bpf.Sample)) error
	// Wait returns when draining cannot wait, after d, or, with its error, when ctx ends.
	Wait(ctx context.Context, d time.Duration) error
}

// Feed is a source and what is known of it.
type Feed struct {
	Source   Source
	Profiles []bpf.Profile // what its samples are of
	// Losses returns what the kernel side lost of them, by reason, since it was loaded. May be
	// nil.
	Losses func() map[string]uint64
	// Observe makes samples of what has begun and not ended. It is called before the drain
	// that begins or ends a window or a capture. May be nil.
	Observe func() error
}

// Config configures a Profiler. The zero value of a limit stands for its default.
type Config struct {
	Feeds      []Feed // at least one
	Types      []Type // what is made of the samples; at least one, no two of a name
	Symbolizer *symbolizer.Symbolizer
	Window     time.Duration // what is published together; 10 s if zero
	Logger     *slog.Logger  // nothing is logged if nil
	// Tables are the unwind tables that the sources' stacks are walked by; they are filled
	// as samples need them. May be nil: then stacks stay as the sources deliver them.
	Tables *bpf.Tables
	// Mappings tell what processes map; nil: /proc is read when it is asked for. They are the
	// caller's to close, after Run.
	Mappings MappingEvents
	// TableCache keeps tables on disk; nil for none. It is the caller's to close.
	TableCache *unwind.Cache

	MaxProcesses  int // program images whose mappings are kept; 4096
	MaxStacks     int // different samples of one profile, of each type; 16,384, the rest is one "[stacks overflow]"
	MaxContainers int // in CPUByContainer; 200, the rest is in "~other"
}

func (c *Config) setDefaults() error {
	switch {
	case len(c.Feeds) == 0 || slices.ContainsFunc(c.Feeds, func(f Feed) bool { return f.Source == nil }):
		return errors.New("make profiler: no source")
	case len(c.Types) == 0:
		return errors.New("make profiler: no profile types")
	case c.Symbolizer == nil:
		return errors.New("make profiler: no symbolizer")
	case c.Window < 0:
		return fmt.Errorf("make profiler: window %v is negative", c.Window)
	}
	named := map[string]bool{}
	for i := range c.Types {
		t := &c.Types[i]
		if err := t.check(); err != nil {
			return fmt.Errorf("make profiler: %w", err)
		}
		if named[t.Name] {
			return fmt.Errorf("make profiler: two profile types %s", t.Name)
		}
		named[t.Name] = true
	}
	if c.Window == 0 {
		c.Window = 10 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
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
	// quietInterval is the longest time that samples wait in the kernel, and drainInterval
	// while something is new: processes are gone soon, and what only a living one can tell is
	// asked when a sample of it is drained. What a drain costs does not depend much on how many
	// samples there are.
	quietInterval = time.Second
	drainInterval = 250 * time.Millisecond
	// asLongAsItTakes is for waits that only a ring that fills up ends.
	asLongAsItTakes = time.Hour
	// warmInterval is the longest time that names are not looked up for: long before the
	// symbolizer gives a file up that is not used.
	warmInterval = 10 * time.Second
	firstSecond  = time.Second
	// lastSymbols bounds the symbolizing of the last window, so that the agent ends soon.
	lastSymbols = 2 * time.Second
	// settleWithin is what the end of a window or a capture waits for stacks that are
	// being finished. What takes longer is in the next.
	settleWithin = 200 * time.Millisecond
)

// Profiler makes the profiles of all types. Run is called once; the other methods may be
// called from any goroutine.
type Profiler struct {
	cfg         Config
	host        string
	processes   *processTable
	told        *eventMappings // nil without mapping events
	unwinder    *unwinder      // nil without tables
	containers  *Containers
	charged     *Containers // of the cgroups that block I/O is charged to
	traces      *traces
	symbols     *symbols
	cpu         *cpuTimes
	types       []Type
	counters    []counters // by type
	window      *window
	captures    []*capture    // that are running; of the draining goroutine
	fresh       []Stack       // made since they were last handed to warming
	warmed      time.Duration // boot time of that
	warming     chan []Stack
	closing     chan closedWindow
	urgent      chan error      // a source can not wait, or can not tell
	poked       chan struct{}   // something is pending; takes one
	stirred     chan struct{}   // something is new; takes one
	stir        bool            // it was since the last drain; of the draining goroutine
	drainErrors []atomic.Uint64 // by feed
	newest      atomic.Pointer[Window]
	ready       atomic.Bool

	mu          sync.Mutex
	started     time.Duration // boot time of Run
	state       runState
	pending     []func() // for the draining goroutine, after its next drain
	subscribers []func(*Window)
}

type runState int

const (
	stateNew = runState(iota)
	stateRunning
	stateEnded
)

// counters are what Stats shows of a type.
type counters struct {
	samples atomic.Uint64
	stacks  [outcomes]atomic.Uint64
}

// Window is what was sampled between two moments. It is shared: treat it as read-only.
type Window struct {
	Start, End time.Time // wall clock; End is Start plus what passed on the boot clock
	Profiles   []Profile // one a type, in the order of Config.Types
}

// Profile is what a window has of one type.
type Profile struct {
	Type    string
	Samples uint64            // delivered
	Lost    map[string]uint64 // by reason, those that have none left out
	pprof   func() (*profile.Profile, error)
}

// NewProfile returns a Profile that has pp as its pprof profile.
func NewProfile(typ string, pp *profile.Profile, samples uint64, lost map[string]uint64) Profile {
	return Profile{typ, samples, lost, func() (*profile.Profile, error) { return pp, nil }}
}

// Pprof returns the pprof profile, which is shared. It is made when it is first asked for,
// as nobody looks at most windows: the names are those that there are then.
func (p *Profile) Pprof() (*profile.Profile, error) { return p.pprof() }

// Of returns the profile of a type, by name, nil if w has none.
func (w *Window) Of(name string) *Profile {
	for i := range w.Profiles {
		if w.Profiles[i].Type == name {
			return &w.Profiles[i]
		}
	}
	return nil
}

// window is the one that is open.
type window struct {
	start  instant
	losses []map[string]uint64 // at start, by type
	aggs   []*aggregate        // by type
}

// closedWindow is one that is to be published.
type closedWindow struct {
	start, end instant
	parts      []closedProfile
	deadline   time.Time
}

type closedProfile struct {
	rows []row
	meta meta
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
		told:        told,
		cfg:         cfg,
		host:        host,
		processes:   newProcessTable(source, cfg.Symbolizer, cfg.MaxProcesses),
		containers:  NewContainers("cpu"),
		charged:     NewContainers("blkio"),
		traces:      newTraces(),
		symbols:     newSymbols(cfg.Symbolizer),
		cpu:         newCPUTimes(cfg.MaxContainers),
		types:       cfg.Types,
		counters:    make([]counters, len(cfg.Types)),
		drainErrors: make([]atomic.Uint64, len(cfg.Feeds)),
		warming:     make(chan []Stack, 1),
		closing:     make(chan closedWindow, 1),
		urgent:      make(chan error),
		poked:       make(chan struct{}, 1),
		stirred:     make(chan struct{}, 1),
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

// Run drains the sources every second, every 250 ms while processes begin or map what is new,
// or earlier when one asks for it, and closes windows, until ctx ends. Then it drains once
// more, ends the captures that are running, closes the last window, hands it to the
// subscribers and returns nil. The caller stops the sources' sampling before it ends ctx. It
// returns an error when a source is closed.
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
	for _, f := range p.cfg.Feeds {
		others.Go(func() { p.watch(follow, f.Source) })
	}
	if p.told != nil {
		others.Go(func() {
			if err := p.told.run(follow, p.stirUp); err != nil {
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
	return errors.Join(err, p.containers.Close(), p.charged.Close())
}

func (p *Profiler) begin() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != stateNew {
		return errors.New("run profiler: it has been run already")
	}
	p.state = stateRunning
	p.started = bootTime()
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
		p.observe(ended)
		derr := p.drain()
		if derr != nil {
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

// observe makes the sources tell of what has not ended, if a window or a capture begins or
// ends with the drain that follows.
func (p *Profiler) observe(last bool) {
	p.mu.Lock()
	due := last || len(p.pending) > 0
	p.mu.Unlock()
	due = due || bootTime() >= p.window.start.boot+p.cfg.Window ||
		slices.ContainsFunc(p.captures, func(c *capture) bool { return bootTime() >= c.end() })
	if !due {
		return
	}
	for i := range p.cfg.Feeds {
		if f := &p.cfg.Feeds[i]; f.Observe != nil {
			if err := f.Observe(); err != nil {
				p.drainErrors[i].Add(1)
				p.cfg.Logger.Error("observe what has not ended", "err", err)
			}
		}
	}
}

// drain takes what all sources have.
func (p *Profiler) drain() error {
	p.stir, p.processes.grown = false, false
	if p.told != nil {
		p.told.catchUp()
	}
	var errs []error
	for i := range p.cfg.Feeds {
		if err := p.cfg.Feeds[i].Source.Drain(p.take); err != nil {
			p.drainErrors[i].Add(1)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
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
	t := time.NewTimer(p.untilDrain())
	defer t.Stop()
	for {
		select {
		case <-p.stirred:
			if !p.stir {
				p.stir = true
				t.Reset(p.untilDrain())
			}
			continue
		case err := <-p.urgent:
			return err
		case <-p.poked:
		case <-t.C:
		case <-ctx.Done():
		}
		return nil
	}
}

// untilDrain is how long the next drain can wait.
func (p *Profiler) untilDrain() time.Duration {
	every := quietInterval
	switch {
	case bootTime() < p.started+firstSecond:
		every = drainInterval / 10 // whoever starts the agent wants to see that it works
	case p.stir, p.processes.grown, p.unwinder != nil && p.unwinder.busy(), p.told == nil, !p.told.follows():
		every = drainInterval
	}
	d := beat.Until(every)
	// A window that is due already waits for the one before to be published.
	if left := p.window.start.boot + p.cfg.Window - bootTime(); left > 0 {
		d = min(d, left)
	}
	for _, c := range p.captures {
		d = min(d, c.end()-bootTime())
	}
	return max(d, 0)
}

// stirUp tells the draining goroutine that something is new.
func (p *Profiler) stirUp() {
	select {
	case p.stirred <- struct{}{}:
	default:
	}
}

// watch tells when a source can not wait for the next drain.
func (p *Profiler) watch(ctx context.Context, s Source) {
	for {
		err := s.Wait(ctx, asLongAsItTakes)
		if ctx.Err() != nil {
			return
		}
		select {
		case p.urgent <- err:
		case <-ctx.Done():
			return
		}
	}
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
	at := bootTime()
	due := at >= p.window.start.boot+p.cfg.Window
	// More names of a file that names were looked up in have some time.
	if len(p.fresh) > 0 && (due || p.processes.unnamed || at >= p.warmed+warmInterval) {
		select {
		case p.warming <- p.fresh:
			p.fresh, p.processes.unnamed, p.warmed = nil, false, at
		default: // it is behind: with the next
		}
	}
	if !due {
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
	select {
	case p.poked <- struct{}{}:
	default:
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
	container := p.container(s)
	if s.Profile == bpf.ProfileCPU {
		p.cpu.add(container, s)
	}
	tr := p.trace(s)
	for i := range p.types {
		if !p.types[i].takes(s.Profile) {
			continue
		}
		p.counters[i].samples.Add(weight)
		if p.window.aggs[i].add(s, tr, container) {
			p.counters[i].stacks[tr.outcome].Add(weight)
		} else {
			p.counters[i].stacks[outcomeOverflow].Add(weight)
		}
	}
	for _, c := range p.captures {
		if c.matches(s, container) {
			c.agg.add(s, tr, container)
		}
	}
}

// container is the one that s counts for: that of the task, or the one that its block I/O
// is charged to.
func (p *Profiler) container(s *bpf.Sample) string {
	if s.IO.Cgroup > bpf.RootCgroup {
		return p.charged.Name(s.IO.Cgroup, PID(s.PID))
	}
	return p.containers.Name(s.Cgroup, PID(s.PID))
}

// trace returns the trace of s with its stack, nil where there is no room for it.
func (p *Profiler) trace(s *bpf.Sample) *trace {
	proc := p.processes.lookup(s)
	tr := p.traces.find(proc, s)
	if tr == nil {
		// Those of this window and of the one before, of each type, and of each capture.
		if p.traces.n >= (2*len(p.types)+len(p.captures))*p.cfg.MaxStacks {
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
	last := p.window
	p.window = &window{start: at, losses: p.losses()}
	for i := range p.types {
		room := 0 // for as much as the last window had
		if last != nil {
			room = len(last.aggs[i].rows)
		}
		p.window.aggs = append(p.window.aggs, newAggregate(&p.types[i], p.cfg.MaxStacks, room))
	}
}

// closeWindow ends the open window and opens the next.
func (p *Profiler) closeWindow(deadline time.Time) closedWindow {
	w := p.window
	for _, agg := range w.aggs {
		p.completeLate(agg)
	}
	at := now()
	p.openWindow(at)
	c := closedWindow{start: w.start, end: at, deadline: deadline}
	for i, agg := range w.aggs {
		c.parts = append(c.parts, closedProfile{
			rows: agg.result(),
			meta: p.meta(agg, w.start, at, lossesSince(w.losses[i], p.window.losses[i])),
		})
		// The next window will see most of these stacks again.
		agg.keepTraces()
	}
	for _, running := range p.captures {
		running.agg.keepTraces()
	}
	p.traces.retain()
	return c
}

// completeLate gives the stacks of a what was learned of their processes since.
func (p *Profiler) completeLate(a *aggregate) {
	for i := range a.sources {
		tr := a.sources[i].trace
		if tr.whole {
			continue
		}
		first := tr.sample()
		if proc := p.processes.lookup(first); p.processes.stale(proc, tr) {
			p.processes.complete(proc, tr, first)
		}
	}
}

func (p *Profiler) meta(a *aggregate, start, end instant, lost map[string]uint64) meta {
	return meta{
		typ:      a.typ,
		host:     p.host,
		start:    start.wall,
		duration: end.boot - start.boot,
		samples:  a.samples,
		lost:     lost,
	}
}

// publish hands a window out.
func (p *Profiler) publish(c closedWindow) {
	w := &Window{Start: c.start.wall, End: c.start.wall.Add(c.end.boot - c.start.boot)}
	for _, part := range c.parts {
		w.Profiles = append(w.Profiles, Profile{
			Type: part.meta.typ.Name, Samples: part.meta.samples, Lost: part.meta.lost,
			pprof: sync.OnceValues(func() (*profile.Profile, error) { return p.profile(part.rows, part.meta, c.deadline) }),
		})
	}
	p.mu.Lock()
	subscribers := p.subscribers
	p.mu.Unlock()
	if !c.deadline.IsZero() && len(subscribers) > 0 {
		// Nobody can look names up after the end.
		for i := range w.Profiles {
			w.Profiles[i].Pprof()
		}
	}
	p.newest.Store(w)
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

// Ready tells whether the sources have been drained once.
func (p *Profiler) Ready() bool { return p.ready.Load() }

// Newest returns the window that closed last, nil before the first has closed.
func (p *Profiler) Newest() *Window { return p.newest.Load() }

// CPUByContainer returns the sampled CPU time by container. The host's own, "/", and
// "~other" are always there.
func (p *Profiler) CPUByContainer() []ContainerCPU { return p.cpu.list() }
