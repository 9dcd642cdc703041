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

	"github.com/hostflame/hostflame/bpf"
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
	container := p.container(s)
	if s.Profile == bpf.ProfileCPU {
		p.cpu.add(container, s)
	}
	tr := p.trace(s)
	for i := range p.types {
		if !p.types[i].takes(s.Profile) {
			continue
		}
		p.counters[i].samples.Add(s.Due())
		if p.window.aggs[i].add(s, tr, container) {
			p.counters[i].stacks[tr.outcome].Add(1)
		} else {
			p.counters[i].stacks[outcomeOverflow].Add(1)
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

// Ready tells whether the sources have been drained once.
func (p *Profiler) Ready() bool { return p.ready.Load() }

// Newest returns the window that closed last, nil before the first has closed.
func (p *Profiler) Newest() *Window { return p.newest.Load() }

// CPUByContainer returns the sampled CPU time by container. The host's own, "/", and
// "~other" are always there.
func (p *Profiler) CPUByContainer() []ContainerCPU { return p.cpu.list() }
