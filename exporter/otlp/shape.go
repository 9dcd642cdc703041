// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"github.com/google/pprof/profile"
)

// valueType is what a value counts, and in which unit.
type valueType struct{ name, unit string }

// shape is how one kind of pprof value is sent. A pprof profile has several values a
// sample, an OTLP profile one; each pprof sample type with a shape becomes a profile of
// its own, and the others are not sent, because they follow from those that are.
type shape struct {
	pprof valueType
	// number, if set, is a number label of the samples, whose value each observation had on
	// average, as pprof counts them: what is sent is the sum.
	number string
	sample valueType
	// period is the period type. It is sent even when it is empty: some backends
	// dereference it. Others name the profile after it.
	period valueType
	// each is the period; 0 takes the pprof profile's own, if there is a period type.
	each int64
}

// shapes is chosen so that each profile type is recognised by the backends that exist: cpu
// and offcpu as the OpenTelemetry profiler sends them, the rest with a period type that
// carries the name.
var shapes = []shape{
	{pprof: valueType{"samples", "count"}, sample: valueType{"samples", "count"}, period: valueType{"cpu", "nanoseconds"}},
	{pprof: valueType{"delay", "nanoseconds"}, sample: valueType{"runqueue", "nanoseconds"}, period: valueType{"runqueue", "count"}, each: 1},
	{pprof: valueType{"caused", "nanoseconds"}, sample: valueType{"culprit", "nanoseconds"}, period: valueType{"culprit", "count"}, each: 1},
	{pprof: valueType{"blocked", "nanoseconds"}, sample: valueType{"off_cpu", "nanoseconds"}},
	{pprof: valueType{"latency", "nanoseconds"}, sample: valueType{"blockio", "nanoseconds"}, period: valueType{"blockio", "count"}, each: 1},
	{pprof: valueType{"requests", "count"}, number: "queue_ns", sample: valueType{"blockio_queue", "nanoseconds"}, period: valueType{"blockio_queue", "count"}, each: 1},
	{pprof: valueType{"requests", "count"}, number: "device_ns", sample: valueType{"blockio_device", "nanoseconds"}, period: valueType{"blockio_device", "count"}, each: 1},
	{pprof: valueType{"bytes", "bytes"}, sample: valueType{"blockio_bytes", "bytes"}, period: valueType{"blockio_bytes", "count"}, each: 1},
	{pprof: valueType{"wall", "nanoseconds"}, sample: valueType{"wall", "nanoseconds"}, period: valueType{"wall", "count"}, each: 1},
}

// column is a value of the samples of one pprof profile that has a shape.
type column struct {
	shape
	index int // in Sample.Value
}

// columns returns what of p is sent.
func columns(p *profile.Profile) []column {
	var found []column
	for i, st := range p.SampleType {
		for _, s := range shapes {
			if s.pprof == (valueType{st.Type, st.Unit}) {
				found = append(found, column{s, i})
			}
		}
	}
	return found
}

// value is what of s is sent.
func (c column) value(s *profile.Sample) int64 {
	if c.number == "" {
		return s.Value[c.index]
	}
	if numbers := s.NumLabel[c.number]; len(numbers) > 0 {
		return s.Value[c.index] * numbers[0]
	}
	return 0
}

// periodOf is the period of a column of p, in units of its period type.
func (c column) periodOf(p *profile.Profile) int64 {
	switch {
	case c.each != 0:
		return c.each
	case c.period != valueType{}:
		return p.Period
	}
	return 0
}
