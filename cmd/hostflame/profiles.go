// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/profiler"
)

// profileTypes are the types that the agent has, the first being what / and /ui/ show, and
// missing says of those that this host can not have why.
func profileTypes(k *kernel, cfg bpf.CPUConfig, states *profiler.States) (types []profiler.Type, missing map[string]error) {
	waits := []profiler.Type{profiler.Runqueue(), profiler.Culprit(), profiler.OffCPU(states), profiler.Wall(cfg.Frequency, states)}
	missing = map[string]error{}
	for _, t := range waits {
		if k.waitsErr != nil {
			missing[t.Name] = k.waitsErr
		}
	}
	switch {
	case k.blockErr != nil:
		missing["blockio"] = k.blockErr
	case k.block != nil && !k.block.HasStacks():
		missing["blockio"] = errors.New("this kernel has no block_io_start (Linux 6.5), at which the stacks are taken")
	}
	types = append([]profiler.Type{profiler.CPU(cfg.Event, cfg.Frequency)}, waits...)
	return append(types, profiler.BlockIO(bpf.DefaultStackRate)), missing
}

// feeds are the sources of the samples of all types; those of CPU time are drained through cpu.
func feeds(k *kernel, cpu profiler.Source) []profiler.Feed {
	list := []profiler.Feed{cpuFeed(k.cpu, cpu)}
	if k.waits != nil {
		list = append(list, profiler.Feed{
			Source: k.waits, Profiles: []bpf.Profile{bpf.ProfileRunqueue, bpf.ProfileCulprit, bpf.ProfileOffCPU},
			Losses:  func(bpf.Profile) map[string]uint64 { return lossesOf(k.waits.Stats) },
			Observe: k.waits.Observe,
		})
	}
	if k.block != nil && k.block.HasStacks() {
		list = append(list, profiler.Feed{
			Source: k.block, Profiles: []bpf.Profile{bpf.ProfileBlockIO},
			Losses: func(bpf.Profile) map[string]uint64 {
				lost, _ := k.block.StackLosses() // as in lossesOf
				return byName(lost)
			},
		})
	}
	return list
}

// cpuFeed are the samples of CPU time, drained through source.
func cpuFeed(c *bpf.CPU, source profiler.Source) profiler.Feed {
	return profiler.Feed{Source: source, Profiles: []bpf.Profile{bpf.ProfileCPU}, Losses: func(bpf.Profile) map[string]uint64 { return lossesOf(c.Stats) }}
}

// lossesOf is what an object lost, by reason.
func lossesOf(stats func() (bpf.Stats, error)) map[string]uint64 {
	// Without counters nothing is known to be lost; the agent collector reports the error.
	s, _ := stats()
	return byName(s.Dropped)
}

func byName(dropped map[bpf.DropReason]uint64) map[string]uint64 {
	lost := make(map[string]uint64, len(dropped))
	for reason, n := range dropped {
		lost[reason.String()] = n
	}
	return lost
}
