// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/test/agent"
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

// testWall does so while others want the CPUs too.
func (s *stack) testWall(t *testing.T) {
	checkWall(t, s.agent, s.programs[workload.Phases], s.dir, 30)
}

// TestWallMinute does so with the CPUs to itself.
func TestWallMinute(t *testing.T) {
	kerneltest.Require(t)
	dir := t.TempDir()
	binary, err := agent.Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	program, err := workload.Compile(dir, workload.Phases)
	if err != nil {
		t.Fatal(err)
	}
	kerneltest.MeasureLock(t)
	a, err := agent.Start(agent.Config{Path: binary})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Stop()
	checkWall(t, a, program, dir, 60)
}

// checkWall holds the profile of all time of a thread against what the program phases itself
// has measured in each of its functions, in a folder on a real file system.
func checkWall(t *testing.T, a *agent.Agent, program, dir string, seconds int) {
	phases := workload.Start(t, program, strconv.Itoa(seconds+2), dir)
	status, body, err := a.Get(fmt.Sprintf("/pprof/wall?seconds=%d&pid=%d", seconds, phases.PID))
	if err != nil || status != http.StatusOK {
		t.Fatalf("status %d, %v: %s", status, err, body)
	}
	p, err := profile.Parse(bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	threads, functions, states := map[int64]*estimate{}, map[string]*estimate{}, map[string]map[string]float64{}
	for _, phase := range phaseStates {
		functions[phase.function], states[phase.function] = new(estimate), map[string]float64{}
	}
	var all estimate
	for _, sample := range p.Sample {
		tid := sample.NumLabel["tid"][0]
		if threads[tid] == nil {
			threads[tid] = new(estimate)
		}
		threads[tid].add(sample)
		if name := phaseOf(sample, functions); name != "" {
			all.add(sample)
			functions[name].add(sample)
			states[name][sample.Label["state"][0]] += float64(sample.Value[1])
		}
	}
	wall := float64(p.DurationNanos)
	if len(threads) != 2 {
		t.Errorf("threads %v, want two", threads)
	}
	for tid, e := range threads {
		t.Logf("thread %d: %.3f s of %.3f s, standard error %.3f s", tid, e.ns/1e9, wall/1e9, e.deviation()/1e9)
		if math.Abs(e.ns-wall) > 0.02*wall+4*e.deviation() {
			t.Errorf("thread %d: %.3f s of %.3f s", tid, e.ns/1e9, wall/1e9)
		}
	}
	said, total := map[string]float64{}, 0.0
	for line := range strings.Lines(phases.Wait()) {
		var name string
		var wall, cpu float64
		if _, err := fmt.Sscanf(line, "%s wall %f cpu %f", &name, &wall, &cpu); err != nil {
			t.Fatalf("phases said %q: %v", line, err)
		}
		said[name] = wall
		total += wall
	}
	for name, phase := range phaseStates {
		e, state := functions[phase.function], states[phase.function]
		got, want := 100*e.ns/all.ns, 100*said[name]/total
		allowed := max(3, 400*e.deviation()/all.ns)
		t.Logf("%s: %.1f %% of the time, it says %.1f %% (allowed %.1f); %.2v", phase.function, got, want, allowed, state)
		if math.Abs(got-want) > allowed {
			t.Errorf("%s has %.1f %% of the time, want %.1f within %.1f", phase.function, got, want, allowed)
		}
		if phase.state == "" {
			continue
		}
		if blocked := e.ns - state["cpu"] - state["runqueue"]; blocked == 0 || state[phase.state] < 0.9*blocked {
			t.Errorf("%s: states %v, want %s", phase.function, state, phase.state)
		}
	}
}

// phaseOf is the one of functions that a sample is in.
func phaseOf(s *profile.Sample, functions map[string]*estimate) string {
	for _, loc := range s.Location {
		for _, line := range loc.Line {
			if functions[line.Function.Name] != nil {
				return line.Function.Name
			}
		}
	}
	return ""
}

// estimate is a sum over samples that were drawn by time, and its variance.
type estimate struct{ ns, variance float64 }

// add adds a row: n samples of about one value each.
func (e *estimate) add(s *profile.Sample) {
	n, ns := float64(s.Value[0]), float64(s.Value[1])
	e.ns += ns
	if s.Label["state"][0] != "cpu" { // those come at a fixed rate
		e.variance += ns * ns / n
	}
}

func (e *estimate) deviation() float64 { return math.Sqrt(e.variance) }
