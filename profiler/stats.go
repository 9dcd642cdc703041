// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"maps"
	"slices"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/profiler/unwind"
)

// Stats counts since the start. Samples are counted as losses are, see bpf.Sample.Due, whatever
// they stand for in the profiles.
type Stats struct {
	Samples map[string]uint64            // delivered, by profile
	Lost    map[string]map[string]uint64 // lost in user space, by profile and reason
	Stacks  map[string]map[string]uint64 // that were taken, one a sample, by profile and outcome
	Unwind  *UnwindStats                 // nil where the profiler has no unwind tables
}

// UnwindStats are about the unwind tables.
type UnwindStats struct {
	Kernel   bpf.TableStats
	Cache    unwind.CacheStats // zero without one
	Made     uint64            // tables that were made, one a region of a file
	Finished uint64            // stacks that were finished in user space
	Skipped  map[string]uint64 // what of the files' unwind information could not be used, by reason
}

// snapshot returns current figures.
func (u *unwinder) snapshot() *UnwindStats {
	u.mu.Lock()
	s := u.stats
	s.Skipped = maps.Clone(s.Skipped)
	u.mu.Unlock()
	s.Kernel = u.tables.Stats()
	if u.cache != nil {
		s.Cache = u.cache.Stats()
	}
	return &s
}

// reasonUndecodable is the loss of what the ring held but could not be read.
const reasonUndecodable = "undecodable"

// Stats returns the counters. Every reason and outcome is there from the start.
func (p *Profiler) Stats() Stats {
	s := Stats{Samples: map[string]uint64{}, Lost: map[string]map[string]uint64{}, Stacks: map[string]map[string]uint64{}}
	for i := range p.types {
		t, c := &p.types[i], &p.counters[i]
		stacks := make(map[string]uint64, outcomes)
		for o := range outcomes {
			stacks[o.String()] = c.stacks[o].Load()
		}
		s.Samples[t.Name], s.Stacks[t.Name] = c.samples.Load(), stacks
		s.Lost[t.Name] = map[string]uint64{reasonUndecodable: p.undecodable(t)}
	}
	if p.unwinder != nil {
		s.Unwind = p.unwinder.snapshot()
	}
	return s
}

// undecodable counts the drains that failed of the feeds that have samples of t.
func (p *Profiler) undecodable(t *Type) (n uint64) {
	for i, f := range p.cfg.Feeds {
		if slices.ContainsFunc(f.Profiles, t.takes) {
			n += p.drainErrors[i].Load()
		}
	}
	return n
}

// losses is what the kernel and we lost by now, by type.
func (p *Profiler) losses() []map[string]uint64 {
	all := make([]map[string]uint64, len(p.types))
	for i := range p.types {
		t := &p.types[i]
		all[i] = map[string]uint64{}
		for _, f := range p.cfg.Feeds {
			if f.Losses == nil || !slices.ContainsFunc(f.Profiles, t.takes) {
				continue
			}
			for reason, n := range f.Losses() {
				all[i][reason] += n
			}
		}
		if n := p.undecodable(t); n > 0 {
			all[i][reasonUndecodable] += n
		}
	}
	return all
}

// lossesSince is what was lost between two readings, the reasons without a loss left out.
func lossesSince(before, after map[string]uint64) map[string]uint64 {
	lost := map[string]uint64{}
	for reason, n := range after {
		if n > before[reason] {
			lost[reason] = n - before[reason]
		}
	}
	return lost
}
