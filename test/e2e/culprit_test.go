// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
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
	const captures = 15 // of a second: rows are of a draw each, mostly
	for range 2 {       // the other CPU has the ping-pong, which comes between
		burn := workload.Start(t, "taskset", "-c", "0", s.programs[workload.Burn], "1", strconv.Itoa(2*captures+5))
		defer burn.Stop()
	}
	var rows []*profile.Sample
	for range captures {
		status, body, err := s.agent.Get("/pprof/culprit?seconds=1&comm=burn&victim=burn")
		if err != nil || status != http.StatusOK {
			t.Fatalf("status %d, %v: %s", status, err, body)
		}
		p, err := profile.Parse(bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		rows = append(rows, p.Sample...)
	}
	functions := map[string]*estimate{}
	for name := range workload.BurnShares {
		functions["load::"+name] = new(estimate)
	}
	var all, known, squares float64
	for _, sample := range rows {
		ns := float64(sample.Value[1])
		all += ns
		if name := phaseOf(sample, functions); name != "" {
			functions[name].ns += ns
			known += ns
			// Draws of a row are in one function: the square of their sum is more than the sum
			// of their squares.
			squares += ns * ns
		}
	}
	t.Logf("%.3f s of waiting, in %d rows", all/1e9, len(rows))
	if all == 0 || known < 0.9*all {
		t.Fatalf("%.3f s of %.3f s of waiting are in the burning functions, want nearly all", known/1e9, all/1e9)
	}
	for name, want := range workload.BurnShares {
		got, allowed := 100*functions["load::"+name].ns/known, 4.5*math.Sqrt(want*(100-want)*squares)/known
		t.Logf("load::%s: %.1f %%, want %g within %.1f", name, got, want, allowed)
		if math.Abs(got-want) > allowed {
			t.Errorf("load::%s has %.1f %% of what others waited for, want %g within %.1f", name, got, want, allowed)
		}
	}
}
