// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"math"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

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
	// At the default rate chance alone makes 4 to 7 points of a share in a minute.
	a, err := agent.Start(agent.Config{Path: binary, Args: []string{"--sampling.wait-rate=1000", "--sampling.wait-interval=1ms"}})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Stop()
	checkWall(t, a, program, dir, 60)
}

// checkWall holds the profile of all time of a thread against what the program phases itself
// has measured in each of its functions, in a folder on a real file system.
func checkWall(t *testing.T, a *agent.Agent, program, dir string, seconds int) {
	begin := kerneltest.ReadHostCPU(t)
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
	draws := map[string]map[string]int64{}
	for _, phase := range phaseStates {
		functions[phase.function], states[phase.function] = new(estimate), map[string]float64{}
		draws[phase.function] = map[string]int64{}
	}
	var all, whole estimate
	for _, sample := range p.Sample {
		tid := sample.NumLabel["tid"][0]
		if threads[tid] == nil {
			threads[tid] = new(estimate)
		}
		threads[tid].add(sample)
		whole.add(sample)
		if name := phaseOf(sample, functions); name != "" {
			all.add(sample)
			functions[name].add(sample)
			states[name][sample.Label["state"][0]] += float64(sample.Value[1])
			draws[name][sample.Label["state"][0]] += sample.Value[0]
		}
	}
	wall := float64(p.DurationNanos)
	if len(threads) != 2 {
		t.Errorf("threads %v, want two", threads)
	}
	for tid, e := range threads {
		deviation := whole.deviation(wall - (e.ns - e.drawn))
		t.Logf("thread %d: %.3f s of %.3f s, standard error %.3f s", tid, e.ns/1e9, wall/1e9, deviation/1e9)
		if math.Abs(e.ns-wall) > 0.02*wall+4*deviation {
			t.Errorf("thread %d: %.3f s of %.3f s", tid, e.ns/1e9, wall/1e9)
		}
	}
	type times struct{ wall, off float64 } // ns
	said, total := map[string]times{}, times{}
	for line := range strings.Lines(phases.Wait()) {
		var name string
		var wall, cpu float64
		if _, err := fmt.Sscanf(line, "%s wall %f cpu %f", &name, &wall, &cpu); err != nil {
			t.Fatalf("phases said %q: %v", line, err)
		}
		said[name] = times{wall, wall - cpu}
		total.wall += wall
		total.off += wall - cpu
	}
	host := kerneltest.ReadHostCPU(t).Since(begin)
	others := (host.Busy + host.Stolen - time.Duration(total.wall-total.off)).Seconds() / float64(seconds)
	for name, phase := range phaseStates {
		e, state, truth := functions[phase.function], states[phase.function], said[name]
		got, want := e.ns/all.ns, truth.wall/total.wall
		// Its own error counts in the sum, too.
		its, rest := (1-want)*all.deviation(truth.off), want*all.deviation(total.off-truth.off)
		chance := 4 * math.Hypot(its, rest) / total.wall
		allowed := max(0.03, chance)
		// Others who wait as well share the rate of samples.
		if chance > 0.03 && others < 0.5*float64(runtime.NumCPU()) {
			t.Errorf("%s: chance alone makes %.1f points, although others kept %.1f CPUs busy only", phase.function, 100*chance, others)
		}
		t.Logf("%s: %.1f %% of the time, it says %.1f %% (allowed %.1f, chance %.1f); %.2v", phase.function, 100*got, 100*want, 100*allowed, 100*chance, state)
		if math.Abs(got-want) > allowed {
			t.Errorf("%s has %.1f %% of the time, want %.1f within %.1f", phase.function, 100*got, 100*want, 100*allowed)
		}
		if phase.state == "" {
			continue
		}
		blocked, drawn := e.ns-state["cpu"]-state["runqueue"], int64(0)
		for s, n := range draws[phase.function] {
			if s != "cpu" && s != "runqueue" {
				drawn += n
			}
		}
		// Of few draws an odd one is a large part of the time.
		if drawn >= 30 && state[phase.state] < 0.9*blocked || 2*draws[phase.function][phase.state] < drawn {
			t.Errorf("%s: states %v by %v draws, want %s", phase.function, state, draws[phase.function], phase.state)
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

// estimate is a sum over samples that were drawn by time, in ns.
type estimate struct {
	ns      float64
	drawn   float64 // of it, what was not on a CPU: that comes at a fixed rate
	squares float64
}

// add adds a row: n samples of about one value each.
func (e *estimate) add(s *profile.Sample) {
	n, ns := float64(s.Value[0]), float64(s.Value[1])
	e.ns += ns
	if s.Label["state"][0] != "cpu" {
		e.drawn += ns
		e.squares += ns * ns / n
	}
}

// deviation is the standard deviation of the sum of samples like those of e, when they are
// drawn from ns of time: a time of d is drawn with p = 1 - exp(-d/T) and counts as d/p, the
// variance of which is less than d T. Not that of the samples which came: where there are few,
// it is small whenever the sum is.
func (e *estimate) deviation(ns float64) float64 { return math.Sqrt(max(0, ns) * e.squares / e.drawn) }
