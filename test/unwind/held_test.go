// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"strings"
	"testing"

	"github.com/hostflame/hostflame/test/workload"
)

// buildJudge ends the test where elfutils is missing and nobody promised it.
func buildJudge(t *testing.T) string {
	t.Helper()
	path, err := BuildJudge(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// held counts how the stacks of a program are as they have to be.
type held struct {
	chains  []workload.Chain
	matched []int
	witness []int
	wrong   map[string]int
}

func newHeld(chains []workload.Chain) *held {
	return &held{chains, make([]int, len(chains)), make([]int, len(chains)), map[string]int{}}
}

// add takes a stack, root first.
func (h *held) add(stack []string) {
	first := -1
	for i, c := range h.chains {
		part, ok := c.Witnessed(stack)
		if !ok {
			continue
		}
		if c.Match(part) {
			h.matched[i]++
			h.witness[i]++
			return
		}
		if first < 0 {
			first = i
		}
	}
	if first >= 0 {
		h.witness[first]++
		h.wrong[strings.Join(stack, " > ")]++
	}
}

// check wants each chain seen so many times, and this share of them whole.
func (h *held) check(t *testing.T, times int, share float64) {
	t.Helper()
	for i, c := range h.chains {
		got := float64(h.matched[i]) / float64(h.witness[i])
		t.Logf("%4d of %4d: %v", h.matched[i], h.witness[i], c[max(0, len(c)-4):])
		if h.witness[i] < times {
			t.Errorf("seen %d times, want at least %d: %v", h.witness[i], times, c)
		} else if got < share {
			t.Errorf("%.1f %% of %d stacks are %v", 100*got, h.witness[i], c)
		}
	}
	n := 0
	for stack, count := range h.wrong {
		if n++; n <= 5 {
			t.Logf("%d times: %s", count, stack)
		}
	}
}
