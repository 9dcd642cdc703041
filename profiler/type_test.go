// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/symbolizer"
)

// waitType is a type that has all that a type can have.
func waitType() Type {
	return Type{
		Name:    "wait",
		Samples: []bpf.Profile{bpf.ProfileRunqueue},
		Values: []Value{
			{ValueType{"waits", "count"}, weighed},
			{ValueType{"delay", "nanoseconds"}, func(s *bpf.Sample) uint64 { return s.Value * uint64(s.Weight) }},
		},
		Period:  Period{ValueType{"wait", "count"}, 1},
		Labels:  []Label{{"parity", func(s *bpf.Sample) string { return []string{"even", "odd"}[s.CPU%2] }, []string{"even", "odd"}}},
		Numbers: []Number{{ValueType{"delay_ns", "nanoseconds"}, func(s *bpf.Sample) uint64 { return s.Value }}},
		Least:   &Least{"min_delay", func(s *bpf.Sample) uint64 { return s.Value }},
	}
}

// Each type takes the samples of its profiles from whatever feed, and a sample can be of
// several types.
func TestTypes(t *testing.T) {
	waits, windows, lost := newScripted(), make(chan *Window, 1), uint64(0)
	both := Type{Name: "both", Samples: []bpf.Profile{bpf.ProfileCPU, bpf.ProfileRunqueue}, Values: []Value{{ValueType{"n", "count"}, weighed}}}
	r := run(t, func(c *Config) {
		c.Types = append(c.Types, waitType(), both)
		c.Feeds = append(c.Feeds, Feed{Source: waits, Profiles: []bpf.Profile{bpf.ProfileRunqueue}, Losses: func() map[string]uint64 {
			return map[string]uint64{"ring_full": atomic.AddUint64(&lost, 1)}
		}})
	}, func(w *Window) { windows <- w })
	// A tick that was late by two is three samples that were due; a wait is one, whatever it stands
	// for.
	cpu := ownSample(t)
	cpu.Weight = 3
	wait := func(cpu uint32, value uint64) bpf.Sample {
		s := ownSample(t)
		s.Profile, s.CPU, s.Value, s.Weight = bpf.ProfileRunqueue, cpu, value, 2
		return s
	}
	captured := make(chan error, 1)
	got := new(bytes.Buffer)
	go func() {
		p, err := r.Capture(context.Background(), Request{
			Type: "wait", Duration: 600 * time.Millisecond,
			Filter: Filter{Labels: map[string][]string{"parity": {"even"}}, Least: 65},
		})
		if err == nil {
			err = WriteFolded(got, p, "delay")
		}
		captured <- err
	}()
	await(t, "the capture", func() bool {
		n := make(chan int, 1)
		if err := r.do(func() { n <- len(r.captures) }); err != nil {
			t.Fatal(err)
		}
		return <-n == 1
	})
	r.source.put(cpu)
	waits.put(wait(0, 64), wait(0, 100), wait(1, 70), wait(2, 127), wait(0, 128))
	if err := <-captured; err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(got.String(), " 710\n") || strings.Count(got.String(), "\n") != 1 {
		t.Errorf("captured %q, want one stack of twice 100 + 127 + 128 ns", got)
	}
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	w := <-windows
	for name, want := range map[string]uint64{"cpu": 3, "wait": 5, "both": 8} {
		if of := w.Of(name); of == nil || of.Samples != want || r.Stats().Samples[name] != want {
			t.Errorf("%s: %+v, %d by the counters, want %d samples", name, of, r.Stats().Samples[name], want)
		}
		if got, want := pprofOf(t, w.Of(name)).Comments, fmt.Sprintf("samples: %d delivered, %d lost", want, w.Of(name).Lost["ring_full"]); !slices.Contains(got, want) {
			t.Errorf("%s: comments %q, want %s", name, got, want)
		}
	}
	for name, want := range map[string]uint64{"cpu": 1, "wait": 5, "both": 6} {
		var stacks uint64
		for _, n := range r.Stats().Stacks[name] {
			stacks += n
		}
		if stacks != want {
			t.Errorf("%s: %v, want %d stacks", name, r.Stats().Stacks[name], want)
		}
	}
	if w.Of("cpu").Lost["ring_full"] != 0 || w.Of("wait").Lost["ring_full"] == 0 || w.Of("both").Lost["ring_full"] == 0 {
		t.Errorf("lost %v, %v, %v; want what the feed of waits lost in the types that take them", w.Of("cpu").Lost, w.Of("wait").Lost, w.Of("both").Lost)
	}
	type line struct {
		parity               string
		waits, delay, number int64
	}
	var lines []line
	p := pprofOf(t, w.Of("wait"))
	for _, s := range p.Sample {
		lines = append(lines, line{s.Label["parity"][0], s.Value[0], s.Value[1], s.NumLabel["delay_ns"][0]})
		if s.NumUnit["delay_ns"][0] != "nanoseconds" {
			t.Errorf("unit of delay_ns: %v", s.NumUnit)
		}
	}
	// Those of one power of two are one, with their mean.
	want := []line{{"even", 6, 2 * (64 + 100 + 127), (64 + 100 + 127) / 3}, {"odd", 2, 140, 70}, {"even", 2, 256, 128}}
	if !slices.Equal(lines, want) {
		t.Errorf("rows %+v, want %+v", lines, want)
	}
	if p.PeriodType.Type != "wait" || p.Period != 1 {
		t.Errorf("period %v %d", p.PeriodType, p.Period)
	}
	if w.Of("nothing") != nil {
		t.Error("a window has a profile of a type that there is not")
	}
}

// The frames of the hook that took a stack are no part of it.
func TestHookFrames(t *testing.T) {
	frames := []string{"bpf_prog_1_take", "bpf_prog_2_hf_block_start", "bpf_trace_run1", "__traceiter_block_io_start", "blk_account_io_start"}
	found := names{kernelMapping: {}}
	var stack Stack
	for i, name := range frames {
		addr := Addr(kernelHalf) + Addr(16*i)
		stack = append(stack, Location{kernelMapping, addr})
		found[kernelMapping][addr] = symbolizer.Result{Lines: []symbolizer.Line{{Function: name}}}
	}
	typ := waitType()
	for _, test := range []struct {
		hooked bool
		stack  Stack
		want   int
	}{{true, stack[:5], 4}, {true, stack[:3], 3}, {true, stack[4:5], 0}, {true, nil, 0}, {false, stack[:5], 0}} {
		typ.Hooked = test.hooked
		p, err := buildProfile([]row{{stack: test.stack, pid: 1, count: 1}}, found, meta{typ: &typ})
		if err != nil {
			t.Fatal(err)
		}
		if n := len(test.stack) - len(p.Sample[0].Location); n != test.want {
			t.Errorf("%d frames of %d were cut, want %d (hooked: %v)", n, len(test.stack), test.want, test.hooked)
		}
	}
}

// What stacks tell of a thread that is blocked is in the closed set of the label.
func TestBlockedStates(t *testing.T) {
	for _, r := range stateRules {
		if !slices.Contains(blockedStates, r.state) {
			t.Errorf("a rule says %s, which is not in %v", r.state, blockedStates)
		}
	}
	states := NewStates(nil)
	for _, s := range []bpf.State{bpf.StateOther, bpf.StateBlockIO, bpf.StateLock, bpf.StateCondition} {
		if got := states.stateOf(&bpf.Sample{Profile: bpf.ProfileOffCPU, State: s}); !slices.Contains(blockedStates, got) {
			t.Errorf("state %d is %s, which is not in %v", s, got, blockedStates)
		}
	}
	for _, p := range []bpf.Profile{bpf.ProfileCPU, bpf.ProfileRunqueue} {
		if got := states.stateOf(&bpf.Sample{Profile: p}); !slices.Contains(allStates, got) {
			t.Errorf("profile %d is %s, which is not in %v", p, got, allStates)
		}
	}
}

// min_duration is of waits and sleeps; CPU samples of wall time are neither.
func TestWallLeast(t *testing.T) {
	wall := Wall(99, NewStates(nil))
	c, err := newCapture(&wall, Request{Filter: Filter{Least: 1000}}, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		profile bpf.Profile
		lasted  uint64
		want    bool
	}{
		{bpf.ProfileCPU, 0, true},
		{bpf.ProfileRunqueue, 999, false}, {bpf.ProfileRunqueue, 1000, true},
		{bpf.ProfileOffCPU, 999, false}, {bpf.ProfileOffCPU, 1000, true},
	} {
		if got := c.matches(&bpf.Sample{Profile: test.profile, Lasted: test.lasted}, "/"); got != test.want {
			t.Errorf("profile %d of %d ns is in it: %v, want %v", test.profile, test.lasted, got, test.want)
		}
	}
}

func TestCaptureRefusesTypes(t *testing.T) {
	r := run(t, func(c *Config) { c.Types = append(c.Types, waitType()) }, nil)
	for _, q := range []Request{
		{Type: "nothing", Duration: time.Second},
		{Type: "cpu", Duration: time.Second, Filter: Filter{Least: 1}},
		{Type: "cpu", Duration: time.Second, Filter: Filter{Labels: map[string][]string{"parity": {"even"}}}},
		{Type: "wait", Duration: time.Second, Filter: Filter{Labels: map[string][]string{"device": {"vda"}}}},
		{Type: "wait", Duration: time.Second, Filter: Filter{Labels: map[string][]string{"parity": {"even", "both"}}}},
	} {
		if _, err := r.Capture(context.Background(), q); err == nil || errors.Is(err, context.Canceled) {
			t.Errorf("%+v: %v", q, err)
		}
	}
}
