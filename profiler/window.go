// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"sync"
	"time"

	"github.com/google/pprof/profile"
)

// Window is what was sampled between two moments. It is shared: treat it as read-only.
type Window struct {
	Start, End time.Time // wall clock; End is Start plus what passed on the boot clock
	Profiles   []Profile // one a type, in the order of Config.Types
}

// Profile is what a window has of one type.
type Profile struct {
	Type    string
	Samples uint64            // delivered, as bpf.Sample.Due counts them
	Lost    map[string]uint64 // likewise, by reason, those that have none left out
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
