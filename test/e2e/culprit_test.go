// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"testing"

	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/test/workload"
)

// testCulprit takes the profile of two burners on one CPU, who make each other wait. Each gives
// the CPU up when its time is over, wherever it is then: in its functions by their shares.
func (s *stack) testCulprit(t *testing.T) {
	const seconds = 15
	for range 2 { // the other CPU has the ping-pong, which comes between
		burn := workload.Start(t, "taskset", "-c", "0", s.programs[workload.Burn], "1", strconv.Itoa(seconds+5))
		defer burn.Stop()
	}
	status, body, err := s.agent.Get(fmt.Sprintf("/pprof/culprit?seconds=%d&comm=burn&victim=burn", seconds))
	if err != nil || status != http.StatusOK {
		t.Fatalf("status %d, %v: %s", status, err, body)
	}
	p, err := profile.Parse(bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	functions := map[string]*estimate{}
	for name := range workload.BurnShares {
		functions["load::"+name] = new(estimate)
	}
	var all, known, squares float64 // the last of what single samples stand for
	for _, sample := range p.Sample {
		waits, ns := float64(sample.Value[0]), float64(sample.Value[1])
		all += ns
		if name := phaseOf(sample, functions); name != "" {
			functions[name].ns += ns
			known += ns
			// A wait of d stands for less than d and the mean of the draws. Each waits half of
			// the time, and 8 strata of processes that share 100 samples a second have 12.5
			// each: 40 ms.
			squares += ns * (ns/waits + 40e6)
		}
	}
	t.Logf("%.3f s of waiting, in %d rows", all/1e9, len(p.Sample))
	if all == 0 || known < 0.9*all {
		t.Fatalf("%.3f s of %.3f s of waiting are in the burning functions, want nearly all", known/1e9, all/1e9)
	}
	for name, want := range workload.BurnShares {
		got, allowed := 100*functions["load::"+name].ns/known, 4*math.Sqrt(want*(100-want)*squares)/known
		t.Logf("load::%s: %.1f %%, want %g within %.1f", name, got, want, allowed)
		if math.Abs(got-want) > allowed {
			t.Errorf("load::%s has %.1f %% of what others waited for, want %g within %.1f", name, got, want, allowed)
		}
	}
}
