// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/profiler"
)

// profileTypes are the types that the agent has, the first being what / and /ui/ show, and
// missing says of those that this host can not have why.
func profileTypes(k *kernel, cfg bpf.CPUConfig) (types []profiler.Type, missing map[string]error) {
	return []profiler.Type{profiler.CPU(cfg.Event, cfg.Frequency)}, nil
}

// cpuFeed are the samples of CPU time, drained through source.
func cpuFeed(c *bpf.CPU, source profiler.Source) profiler.Feed {
	return profiler.Feed{Source: source, Profiles: []bpf.Profile{bpf.ProfileCPU}, Losses: func(bpf.Profile) map[string]uint64 { return lossesOf(c.Stats) }}
}

// lossesOf is what an object lost, by reason.
func lossesOf(stats func() (bpf.Stats, error)) map[string]uint64 {
	lost := map[string]uint64{}
	// Without counters nothing is known to be lost; the agent collector reports the error.
	s, _ := stats()
	for reason, n := range s.Dropped {
		lost[reason.String()] = n
	}
	return lost
}
