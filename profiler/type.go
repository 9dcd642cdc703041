// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"github.com/hostflame/hostflame/bpf"
)

// Type is a profile type, as data: which samples it takes, and what its profiles hold of
// them. One more type is one more file like type_cpu.go, with a function that returns a
// Type, and its place in the agent's list: windows, captures, /pprof/NAME with its
// parameters, the web UI, OTLP and the metrics about profiles follow from what it says.
type Type struct {
	Name    string        // in /pprof/NAME and in the metrics' label `profile`
	Title   string        // what it shows, to people
	Samples []bpf.Profile // it takes the samples of these
	Values  []Value       // pprof's sample types, at least one; the first is the default
	Period  Period
	Labels  []Label  // beside comm, thread, container, pid and tid; each is a parameter of a capture as well
	Numbers []Number // likewise, but no parameters
	Least   *Least   // nil: no such parameter
	// Hooked says that the stacks are taken in a tracepoint: the frames of the hook itself are
	// left out of the profiles.
	Hooked bool
	// Describe is the first comment of a profile, after the host, given what was delivered
	// and lost as bpf.Sample.Due counts it; nil for none.
	Describe func(delivered, lost uint64) string
}

// ValueType is a name and a unit of pprof.
type ValueType struct{ Name, Unit string }

// Value is one of the values of a sample.
type Value struct {
	ValueType
	// Of is what a sample adds, for all the observations that it stands for.
	Of func(*bpf.Sample) uint64
}

// Period is pprof's: what one sample is taken for each of. None where the name is empty.
type Period struct {
	ValueType
	Value int64
}

// Label tells samples of one stack apart by a word. There are few different ones.
type Label struct {
	Name   string
	Of     func(*bpf.Sample) string
	Values []string // all that Of returns; nil: any
}

// Check returns an error for people where the label never has the value.
func (l *Label) Check(value string) error {
	if l.Values != nil && !slices.Contains(l.Values, value) {
		return fmt.Errorf("%s=%q: want one of %s", l.Name, value, strings.Join(l.Values, ", "))
	}
	return nil
}

// Number tells samples of one stack apart by a measure of the single observation: those
// share a row whose measures are within the same power of two, and the row has their mean.
// So the sum over rows of first value times number is exact but for rounding, if the first
// value counts the observations.
type Number struct {
	ValueType
	Of func(*bpf.Sample) uint64
}

// Least is a parameter of a capture, a duration: observations below it are left out.
type Least struct {
	Parameter string
	Of        func(*bpf.Sample) uint64 // ns
}

// Bounds of what a type has, so that keys are of fixed size.
const (
	maxValues  = 3
	maxLabels  = 2
	maxNumbers = 2
)

func (t *Type) check() error {
	switch {
	case t.Name == "":
		return errors.New("profile type without a name")
	case len(t.Samples) == 0 || len(t.Values) == 0:
		return fmt.Errorf("profile type %s without samples or values", t.Name)
	case len(t.Values) > maxValues || len(t.Labels) > maxLabels || len(t.Numbers) > maxNumbers:
		return fmt.Errorf("profile type %s has more than %d values, %d labels or %d numbers", t.Name, maxValues, maxLabels, maxNumbers)
	}
	return nil
}

// takes tells whether samples of p are part of the type.
func (t *Type) takes(p bpf.Profile) bool { return slices.Contains(t.Samples, p) }

// SampleTypes are the names of the values.
func (t *Type) SampleTypes() []string {
	names := make([]string, len(t.Values))
	for i, v := range t.Values {
		names[i] = v.Name
	}
	return names
}

// attributes are the labels of one sample, and the powers of two of its numbers.
type attributes struct {
	labels  [maxLabels]string
	numbers [maxNumbers]uint8
}

func (t *Type) attributes(s *bpf.Sample) (a attributes) {
	for i, l := range t.Labels {
		a.labels[i] = l.Of(s)
	}
	for i, n := range t.Numbers {
		a.numbers[i] = uint8(bits.Len64(n.Of(s)))
	}
	return a
}

// weighed is what most values are: one for each observation.
func weighed(s *bpf.Sample) uint64 { return uint64(s.Weight) }
