// SPDX-License-Identifier: Apache-2.0

package profiler

import "maps"

// Stats counts, by weight, since the start.
type Stats struct {
	Samples map[string]uint64            // delivered, by profile
	Lost    map[string]map[string]uint64 // lost in user space, by profile and reason
	Stacks  map[string]map[string]uint64 // by profile and outcome; they sum to Samples
}

// reasonUndecodable is the loss of what the ring held but could not be read.
const reasonUndecodable = "undecodable"

// Stats returns the counters. Every reason and outcome is there from the start.
func (p *Profiler) Stats() Stats {
	stacks := make(map[string]uint64, outcomes)
	for o := range outcomes {
		stacks[o.String()] = p.counters.stacks[o].Load()
	}
	return Stats{
		Samples: map[string]uint64{profileCPU: p.counters.samples.Load()},
		Lost:    map[string]map[string]uint64{profileCPU: {reasonUndecodable: p.counters.drainErrors.Load()}},
		Stacks:  map[string]map[string]uint64{profileCPU: stacks},
	}
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
