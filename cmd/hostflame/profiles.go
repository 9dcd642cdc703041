// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/profiler"
)

// profileTypes are the types that the agent has, the first being what / and /ui/ show, and
// missing says of those that this host can not have why.
func profileTypes(k *kernel, cfg bpf.CPUConfig, ioRate int, states *profiler.States) (types []profiler.Type, missing map[string]error) {
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
	case ioRate == 0:
		missing["blockio"] = errIOOff
	case k.block != nil && !k.block.HasStacks():
		missing["blockio"] = errors.New("this kernel has neither block_io_start nor block_getrq, at which the stacks are taken")
	}
	types = append([]profiler.Type{profiler.CPU(cfg.Event, cfg.Frequency)}, waits...)
	return append(types, profiler.BlockIO(ioRate)), missing
}

// feeds are the sources of the samples of all types; those of CPU time are drained through cpu.
func feeds(k *kernel, cpu profiler.Source) []profiler.Feed {
	list := []profiler.Feed{cpuFeed(k.cpu, cpu)}
	if k.waits != nil {
		list = append(list, profiler.Feed{
			Source: k.waits, Profiles: []bpf.Profile{bpf.ProfileRunqueue, bpf.ProfileCulprit, bpf.ProfileOffCPU},
			Losses:  func() map[string]uint64 { return lossesOf(k.waits.Dropped) },
			Observe: k.waits.Observe,
		})
	}
	if k.block != nil && k.block.HasStacks() {
		list = append(list, profiler.Feed{
			Source: k.block, Profiles: []bpf.Profile{bpf.ProfileBlockIO},
			Losses: func() map[string]uint64 { return lossesOf(k.block.StackLosses) },
		})
	}
	return list
}

// cpuFeed are the samples of CPU time, drained through source.
func cpuFeed(c *bpf.CPU, source profiler.Source) profiler.Feed {
	return profiler.Feed{Source: source, Profiles: []bpf.Profile{bpf.ProfileCPU}, Losses: func() map[string]uint64 { return lossesOf(c.Dropped) }}
}

// lossesOf is what was lost, by reason.
func lossesOf(dropped func() (map[bpf.DropReason]uint64, error)) map[string]uint64 {
	// Without counters nothing is known to be lost; the agent collector reports the error.
	all, _ := dropped()
	lost := make(map[string]uint64, len(all))
	for reason, n := range all {
		lost[reason.String()] = n
	}
	return lost
}
