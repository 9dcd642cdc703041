// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/kerneltest"
)

// What elfutils can not judge: no CFI for JIT code, musl's trampolines, Go's switches
// between stacks, and Go that is stripped.
var byChains = []string{"gostacks", "gostacks-pie", "gostacks-stripped", "node", "java", "signals-musl", "signals-musl-static"}

// TestKnownStacks holds stacks that the kernel side walks against what the programs do.
func TestKnownStacks(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	l := startLoad(t, byChains, 499)
	l.run(5*time.Second, 20*time.Second)
	for _, r := range l.running {
		outcomes := map[bpf.Outcome]int{}
		for _, s := range r.samples {
			outcomes[s.outcome]++
		}
		t.Logf("%-20s %d samples, %v, late %d, mappings gone %d", r.program.Name, len(r.samples), outcomes, r.late, r.gone)
		l.checkKnown(r)
		if n := len(r.samples); !r.program.Unrooted && float64(outcomes[bpf.OutcomeComplete]) < 0.98*float64(n) {
			t.Errorf("%s: %d of %d stacks end at a known start", r.program.Name, outcomes[bpf.OutcomeComplete], n)
		}
		if testing.Verbose() {
			l.logEnds(r)
		}
	}
}

// logEnds tells which stacks end early, and where.
func (l *load) logEnds(r *running) {
	ends := map[string]int{}
	for i := range r.samples {
		s := &r.samples[i]
		if s.outcome == bpf.OutcomeComplete {
			continue
		}
		perfMap := ""
		if r.program.PerfMap {
			perfMap = perfMapPath(r.process.PID)
		}
		n, err := NewNames(r.sets[s.copy.Set], perfMap)
		if err != nil {
			l.t.Error(err)
			return
		}
		names := n.Stack(s.user)
		root := s.user[len(s.user)-1]
		ends[s.outcome.String()+" at "+l.place(r, s, root)+" "+strings.Join(names[:min(4, len(names))], " > ")]++
	}
	for _, end := range slices.SortedFunc(maps.Keys(ends), func(x, y string) int { return ends[y] - ends[x] })[:min(12, len(ends))] {
		l.t.Logf("%5d times %s", ends[end], end)
	}
}
