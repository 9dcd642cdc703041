// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"strings"
	"testing"
)

func TestChain(t *testing.T) {
	for _, test := range []struct {
		chain, stack     string
		match, witnessed bool
	}{
		{"_start ? main a", "_start x main a", true, true},
		{"_start ? main a", "_start main a", false, true},
		{"_start ? main a", "_start x main a b", false, true},
		{"_start ? main a", "x main a", false, true},
		{"_start ? main a", "_start x main b", false, false},
		{"... main ... a", "main a", true, true},
		{"... main ... a", "x y main z main a", true, true},
		{"... main ... a", "x y a", false, true},
		{"main a ...", "main a", true, true},
		{"main a ...", "main a x y", true, true},
		{"main a ...", "main x a", false, true},
		{"goexit* a", "goexit.abi0 a", true, true},
		{"main <x as y>::f", "main <x|as|y>::f", true, true},
		{"main", "", false, false},
	} {
		chain := parse(test.chain)
		stack := strings.Fields(test.stack)
		for i := range stack {
			stack[i] = strings.ReplaceAll(stack[i], "|", " ")
		}
		if got := chain.Match(stack); got != test.match {
			t.Errorf("%v matches %q: %t", chain, test.stack, got)
		}
		if _, got := chain.Witnessed(stack); got != test.witnessed {
			t.Errorf("%v is witnessed in %q: %t", chain, test.stack, got)
		}
	}
}

func TestWitnessed(t *testing.T) {
	for _, test := range []struct{ chain, stack, part string }{
		{"main a", "x main a b c", "x main a"},
		{"main a", "x a main a b", "x a main a"},
		{"main a ...", "x main a b c", "x main a b c"},
	} {
		part, ok := parse(test.chain).Witnessed(strings.Fields(test.stack))
		if got := strings.Join(part, " "); !ok || got != test.part {
			t.Errorf("%s of %q: %q, %t, want %q", test.chain, test.stack, got, ok, test.part)
		}
	}
}

// Every name that a chain waits for is that of one chain, or the chains are told apart.
func TestKnown(t *testing.T) {
	names := map[string]bool{}
	for _, p := range Known() {
		if names[p.Name] {
			t.Errorf("two programs are named %s", p.Name)
		}
		names[p.Name] = true
		if KnownNamed(p.Name).Name != p.Name {
			t.Errorf("%s is not found", p.Name)
		}
		witness := map[string]bool{}
		for _, c := range p.Chains {
			if w := c.Witness(); w == "" || witness[w] {
				t.Errorf("%s: the witness %q of %v is not its own", p.Name, w, c)
			} else {
				witness[w] = true
			}
		}
	}
}
