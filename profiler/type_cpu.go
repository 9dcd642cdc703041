// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"fmt"
	"time"

	"github.com/hostflame/hostflame/bpf"
)

// CPU is the profile type of CPU time, sampled by event (bpf.EventCPUClock if empty) at
// frequency Hz on each CPU.
func CPU(event bpf.Event, frequency int) Type {
	if event == "" {
		event = bpf.EventCPUClock
	}
	nanoseconds := ValueType{"cpu", "nanoseconds"}
	return Type{
		Name:    "cpu",
		Title:   "what runs on the CPUs",
		Samples: []bpf.Profile{bpf.ProfileCPU},
		Values: []Value{
			{ValueType{"samples", "count"}, weighed},
			{nanoseconds, func(s *bpf.Sample) uint64 { return s.Value }},
		},
		Period: Period{nanoseconds, int64(time.Second) / int64(frequency)},
		Describe: func(delivered, lost uint64) string {
			rate := 0.0
			if delivered > 0 {
				rate = float64(delivered) / float64(delivered+lost) * float64(frequency)
			}
			return fmt.Sprintf("event: %s, %d Hz requested, %.2f Hz delivered", event, frequency, rate)
		},
	}
}
