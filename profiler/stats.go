// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"maps"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/profiler/unwind"
)

// Stats counts, by weight, since the start.
type Stats struct {
	Samples map[string]uint64            // delivered, by profile
	Lost    map[string]map[string]uint64 // lost in user space, by profile and reason
	Stacks  map[string]map[string]uint64 // by profile and outcome; they sum to Samples
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
	stacks := make(map[string]uint64, outcomes)
	for o := range outcomes {
		stacks[o.String()] = p.counters.stacks[o].Load()
	}
	s := Stats{
		Samples: map[string]uint64{profileCPU: p.counters.samples.Load()},
		Lost:    map[string]map[string]uint64{profileCPU: {reasonUndecodable: p.counters.drainErrors.Load()}},
		Stacks:  map[string]map[string]uint64{profileCPU: stacks},
	}
	if p.unwinder != nil {
		s.Unwind = p.unwinder.snapshot()
	}
	return s
}

// losses is what the kernel and we lost by now.
func (p *Profiler) losses() map[string]uint64 {
	l := maps.Clone(p.cfg.Losses())
	if n := p.counters.drainErrors.Load(); n > 0 {
		if l == nil {
			l = map[string]uint64{}
		}
		l[reasonUndecodable] += n
	}
	return l
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
