// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/bpf"
)

// Filter selects samples: each field that is not empty must match, and any of its values
// will do.
type Filter struct {
	PIDs       []uint32
	Comms      []string            // of the process, as the kernel has it: 15 bytes at most
	Containers []string            // as ContainerName has them
	Labels     map[string][]string // by the name of one of the type's Labels
	Least      uint64              // of the type's Least, ns
}

// Request asks for one profile.
type Request struct {
	Type     string // the first of Config.Types where it is empty
	Duration time.Duration
	Filter   Filter
}

var (
	errNotRunning = errors.New("profiler is not running yet")
	errEnded      = errors.New("profiler has ended")
)

// capture is a profile in the making, beside the windows.
type capture struct {
	pids       map[uint32]bool
	comms      map[bpf.Comm]bool
	containers map[string]bool
	labels     [maxLabels]map[string]bool
	least      uint64
	duration   time.Duration

	typ    int // index in Profiler.types
	start  instant
	losses map[string]uint64 // at start
	agg    *aggregate
	done   chan captured // takes one
}

type captured struct {
	rows []row
	meta meta
	err  error
}

// symbolsWithin is what is left for symbols of the second that a capture may take longer.
const symbolsWithin = 700 * time.Millisecond

// Capture profiles the next r.Duration: the source is drained when it begins and when it
// ends, so it holds what was sampled in between and nothing else. It returns within a
// second after that; symbols that are not read by then are left out and it says so. It
// returns ctx's error as soon as ctx ends. Any number of captures can run at once.
func (p *Profiler) Capture(ctx context.Context, r Request) (*profile.Profile, error) {
	if r.Duration <= 0 {
		return nil, fmt.Errorf("capture profile: duration %v is not positive", r.Duration)
	}
	typ := 0
	if r.Type != "" {
		typ = slices.IndexFunc(p.types, func(t Type) bool { return t.Name == r.Type })
	}
	if typ < 0 {
		return nil, fmt.Errorf("capture profile: unknown type %q", r.Type)
	}
	c, err := newCapture(&p.types[typ], r, p.cfg.MaxStacks)
	if err != nil {
		return nil, fmt.Errorf("capture profile: %w", err)
	}
	c.typ = typ
	if err := p.do(func() { p.startCapture(c) }); err != nil {
		return nil, fmt.Errorf("capture profile: %w", err)
	}
	select {
	case <-ctx.Done():
		// It makes no difference any more if the profiler has ended.
		_ = p.do(func() { p.dropCapture(c) })
		return nil, ctx.Err()
	case got := <-c.done:
		if got.err != nil {
			return nil, fmt.Errorf("capture profile: %w", got.err)
		}
		return p.profile(got.rows, got.meta, time.Now().Add(symbolsWithin))
	}
}

func newCapture(t *Type, r Request, limit int) (*capture, error) {
	c := &capture{
		pids:       map[uint32]bool{},
		comms:      map[bpf.Comm]bool{},
		containers: map[string]bool{},
		duration:   r.Duration,
		agg:        newAggregate(t, limit, 0),
		done:       make(chan captured, 1),
	}
	for _, pid := range r.Filter.PIDs {
		c.pids[pid] = true
	}
	for _, comm := range r.Filter.Comms {
		c.comms[bpf.MakeComm(comm)] = true
	}
	for _, container := range r.Filter.Containers {
		c.containers[container] = true
	}
	for name, values := range r.Filter.Labels {
		i := slices.IndexFunc(t.Labels, func(l Label) bool { return l.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("%s has no label %q", t.Name, name)
		}
		c.labels[i] = map[string]bool{}
		for _, v := range values {
			if err := t.Labels[i].Check(v); err != nil {
				return nil, err
			}
			c.labels[i][v] = true
		}
	}
	if c.least = r.Filter.Least; c.least > 0 && t.Least == nil {
		return nil, fmt.Errorf("%s has no least value", t.Name)
	}
	return c, nil
}

func (c *capture) matches(s *bpf.Sample, container string) bool {
	t := c.agg.typ
	if !t.takes(s.Profile) || c.least > 0 && t.Least.Of(s) < c.least {
		return false
	}
	for i, values := range c.labels {
		if len(values) > 0 && !values[t.Labels[i].Of(s)] {
			return false
		}
	}
	return (len(c.pids) == 0 || c.pids[s.PID]) &&
		(len(c.comms) == 0 || c.comms[s.Comm]) &&
		(len(c.containers) == 0 || c.containers[container])
}

// end is when the capture is over, on the boot clock.
func (c *capture) end() time.Duration { return c.start.boot + c.duration }

func (c *capture) fail(err error) { c.done <- captured{err: err} }

// The rest is of the draining goroutine.

func (p *Profiler) startCapture(c *capture) {
	c.start, c.losses = now(), p.losses()[c.typ]
	p.captures = append(p.captures, c)
}

func (p *Profiler) dropCapture(c *capture) {
	p.captures = slices.DeleteFunc(p.captures, func(other *capture) bool { return other == c })
}

// endCaptures hands out those whose time is over.
func (p *Profiler) endCaptures() {
	if slices.ContainsFunc(p.captures, func(c *capture) bool { return bootTime() >= c.end() }) {
		p.settle()
	}
	p.captures = slices.DeleteFunc(p.captures, func(c *capture) bool {
		if bootTime() < c.end() {
			return false
		}
		p.completeLate(c.agg)
		c.done <- captured{
			rows: c.agg.result(),
			meta: p.meta(c.agg, c.start, now(), lossesSince(c.losses, p.losses()[c.typ])),
		}
		return true
	})
}
