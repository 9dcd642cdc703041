// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"math"
	"net/http"
	"strings"
	"testing"

	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/test/workload"
)

// phaseStates are the functions of the workload phases by what they do, and the state of the
// time in them that is neither on a CPU nor in its run queue.
var phaseStates = map[string]struct{ function, state string }{
	"compute": {"compute", ""},
	"lock":    {"wait_for_mutex", "lock"},
	"pipe":    {"read_pipe", "pipe"},
	"sleep":   {"sleep_a_while", "sleep"},
	"fsync":   {"sync_file", "block_io"},
	"fault":   {"touch_pages", "page_fault"},
}

// testWall holds the profile of all time of a thread against what the program itself has
// measured in each of its functions.
func (s *stack) testWall(t *testing.T) {
	const seconds = 30
	phases := workload.Start(t, s.programs[workload.Phases], "100", s.dir)
	status, body, err := s.agent.Get(fmt.Sprintf("/pprof/wall?seconds=%d&pid=%d", seconds, phases.PID))
	if err != nil || status != http.StatusOK {
		t.Fatalf("status %d, %v: %s", status, err, body)
	}
	said := phases.Stop()
	p, err := profile.Parse(bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	all, functions, states := 0.0, map[string]float64{}, map[string]map[string]float64{}
	variance := map[int64]float64{}
	threads := map[int64]float64{}
	for _, sample := range p.Sample {
		value := float64(sample.Value[0])
		tid := sample.NumLabel["tid"][0]
		threads[tid] += value
		// A row has many samples; if it had one, its variance would be below this.
		variance[tid] += value * 20e6
		if tid != int64(phases.PID) {
			continue
		}
		all += value
		for _, l := range sample.Location {
			if len(l.Line) == 0 {
				continue
			}
			for _, phase := range phaseStates {
				if name := l.Line[0].Function.Name; name == phase.function {
					functions[name] += value
					if states[name] == nil {
						states[name] = map[string]float64{}
					}
					states[name][sample.Label["state"][0]] += value
				}
			}
		}
	}
	if len(threads) != 2 {
		t.Errorf("threads %v, want two", threads)
	}
	wall := float64(p.DurationNanos)
	for tid, ns := range threads {
		t.Logf("thread %d: %.3f s of %.3f s", tid, ns/1e9, wall/1e9)
		if math.Abs(ns-wall) > 0.02*wall+4*math.Sqrt(variance[tid]) {
			t.Errorf("thread %d: %.3f s of %.3f s", tid, ns/1e9, wall/1e9)
		}
	}
	var total float64
	want := map[string]float64{}
	for line := range strings.Lines(said) {
		var name string
		var wall, cpu float64
		if _, err := fmt.Sscanf(line, "%s wall %f cpu %f", &name, &wall, &cpu); err != nil {
			t.Fatalf("phases said %q: %v", line, err)
		}
		want[name] = wall
		total += wall
	}
	for name, phase := range phaseStates {
		got := 100 * functions[phase.function] / all
		t.Logf("%s: %.1f %% of the time, it says %.1f %%; %v", phase.function, got, 100*want[name]/total, states[phase.function])
		if math.Abs(got-100*want[name]/total) > 3 {
			t.Errorf("%s has %.1f %% of the time, want %.1f within 3", phase.function, got, 100*want[name]/total)
		}
		var blocked float64
		for state, ns := range states[phase.function] {
			if state != "cpu" && state != "runqueue" {
				blocked += ns
			}
		}
		if phase.state != "" && states[phase.function][phase.state] < 0.9*blocked || blocked == 0 && phase.state != "" {
			t.Errorf("%s: states %v, want %s", phase.function, states[phase.function], phase.state)
		}
	}
}
