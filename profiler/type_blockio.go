// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"fmt"

	"github.com/hostflame/hostflame/bpf"
)

// BlockIO is the profile type of block I/O: the stacks of those who submitted the requests
// that ended. Each CPU takes all requests of a device and operation up to rate a second;
// above it a draw leaves some out, and the others weigh so much more.
//
// The stack is the submitter's: of the kernel's writeback that is a worker's. The container
// is that which the request is charged to, where the kernel knows one (who dirtied the
// pages), else the submitter's.
func BlockIO(rate int) Type {
	nanoseconds := func(name string) ValueType { return ValueType{name, "nanoseconds"} }
	return Type{
		Name:    "blockio",
		Title:   "who issues block I/O, and how long it takes",
		Samples: []bpf.Profile{bpf.ProfileBlockIO},
		Values: []Value{
			{ValueType{"requests", "count"}, weighed},
			{nanoseconds("latency"), func(s *bpf.Sample) uint64 { return s.Value * uint64(s.Weight) }},
			{ValueType{"bytes", "bytes"}, func(s *bpf.Sample) uint64 { return s.IO.Bytes * uint64(s.Weight) }},
		},
		Period: Period{ValueType{"blockio", "count"}, 1},
		Labels: []Label{
			{Name: "device", Of: func(s *bpf.Sample) string { return s.IO.Device }},
			{"operation", func(s *bpf.Sample) string { return s.IO.Operation }, bpf.BlockOperations()},
		},
		Numbers: []Number{
			{nanoseconds("queue_ns"), func(s *bpf.Sample) uint64 { return s.IO.Queue }},
			{nanoseconds("device_ns"), func(s *bpf.Sample) uint64 { return s.IO.DeviceTime }},
		},
		Hooked: true,
		Least:  &Least{"min_latency", func(s *bpf.Sample) uint64 { return s.Value }},
		Describe: func(uint64, uint64) string {
			return fmt.Sprintf("event: block request, all up to %d a second of a device and operation on each CPU, then by weight", rate)
		},
	}
}
