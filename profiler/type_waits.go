// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"time"

	"github.com/hostflame/hostflame/bpf"
)

var minDuration = &Least{"min_duration", func(s *bpf.Sample) uint64 { return s.Lasted }}

// Runqueue is the profile type of the time that threads were runnable and had no CPU.
func Runqueue() Type {
	return Type{
		Name:    "runqueue",
		Title:   "who waits for a CPU, and why",
		Samples: []bpf.Profile{bpf.ProfileRunqueue},
		Values: []Value{
			{ValueType{"waits", "count"}, weighed},
			{ValueType{"delay", "nanoseconds"}, func(s *bpf.Sample) uint64 { return s.Value }},
		},
		Period: Period{ValueType{"runqueue", "nanoseconds"}, 1},
		Labels: []Label{
			{"cause", func(s *bpf.Sample) string { return s.Cause.String() }},
			{"culprit", func(s *bpf.Sample) string {
				if s.ByPID == 0 {
					return ""
				}
				return s.By.String()
			}},
		},
		Least: minDuration,
	}
}

// Culprit is the profile type of the time that threads had the CPU while others waited for it: for
// each wait that Runqueue has a sample of, the stack of the thread that made way, where that is
// of whom it was waited the most for. It counts what of the wait that thread ran.
func Culprit() Type {
	return Type{
		Name:    "culprit",
		Title:   "who ran meanwhile",
		Samples: []bpf.Profile{bpf.ProfileCulprit},
		Values: []Value{
			{ValueType{"waits", "count"}, weighed},
			{ValueType{"caused", "nanoseconds"}, func(s *bpf.Sample) uint64 { return s.Value }},
		},
		Period: Period{ValueType{"culprit", "nanoseconds"}, 1},
		Labels: []Label{
			{"cause", func(s *bpf.Sample) string { return s.Cause.String() }},
			{"victim", func(s *bpf.Sample) string { return s.By.String() }},
		},
		Least:  minDuration,
		Hooked: true,
	}
}

// OffCPU is the profile type of the time that threads neither ran nor were runnable. Their
// states are names's.
func OffCPU(states *States) Type {
	return Type{
		Name:    "offcpu",
		Title:   "who is blocked, and by what",
		Samples: []bpf.Profile{bpf.ProfileOffCPU},
		Values: []Value{
			{ValueType{"sleeps", "count"}, weighed},
			{ValueType{"blocked", "nanoseconds"}, func(s *bpf.Sample) uint64 { return s.Value }},
		},
		Period: Period{ValueType{"offcpu", "nanoseconds"}, 1},
		Labels: states.labels(),
		Least:  minDuration,
	}
}

// Wall is the profile type of all the time of threads, by what they did: the samples of CPU
// time, of waits and of blocked time together. How many stacks a value is from tells how far
// it can be trusted.
func Wall(frequency int, states *States) Type {
	return Type{
		Name:    "wall",
		Title:   "where the time of each thread goes: CPU, waiting, blocked",
		Samples: []bpf.Profile{bpf.ProfileCPU, bpf.ProfileRunqueue, bpf.ProfileOffCPU},
		Values: []Value{
			{ValueType{"stacks", "count"}, func(*bpf.Sample) uint64 { return 1 }},
			{ValueType{"wall", "nanoseconds"}, func(s *bpf.Sample) uint64 { return s.Value }},
		},
		Period: Period{ValueType{"wall", "nanoseconds"}, int64(time.Second) / int64(frequency)},
		Labels: states.labels(),
		Least:  minDuration,
	}
}
