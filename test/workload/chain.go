// SPDX-License-Identifier: Apache-2.0

package workload

import "strings"

// A Chain is a whole stack: the names of its functions from the root to the leaf, as a
// demangler prints them without parameters. "?" stands for one frame of any name, "..."
// for any number of them; a star at the end of a name for any rest of it.
//
// The last name is the chain's witness: each stack with that function in it must be this
// chain, up to there (a signal can come on top). Where another chain of the program has
// the same witness, one of them.
type Chain []string

// parse reads a chain from its words; a name in angle brackets may have spaces.
func parse(text string) (chain Chain) {
	depth := 0
	for _, word := range strings.Fields(text) {
		if depth > 0 {
			chain[len(chain)-1] += " " + word
		} else {
			chain = append(chain, word)
		}
		depth += strings.Count(word, "<") - strings.Count(word, ">")
	}
	return chain
}

// below makes chains that begin with the same frames.
func below(root string, chains ...string) (all []Chain) {
	for _, text := range chains {
		all = append(all, parse(root+" "+text))
	}
	return all
}

// Witness is the innermost function that the chain names.
func (c Chain) Witness() string {
	for i := len(c) - 1; i >= 0; i-- {
		if c[i] != "?" && c[i] != "..." {
			return c[i]
		}
	}
	return ""
}

// Witnessed returns the part of the stack, root first, that the chain tells of: up to its
// witness, or all of it where the chain goes on. ok is false without the witness.
func (c Chain) Witnessed(stack []string) (part []string, ok bool) {
	witness := c.Witness()
	for i := len(stack) - 1; i >= 0; i-- {
		if !is(witness, stack[i]) {
			continue
		}
		if c[len(c)-1] == witness {
			return stack[:i+1], true
		}
		return stack, true
	}
	return nil, false
}

// Match tells whether the stack, root first, is the chain.
func (c Chain) Match(stack []string) bool {
	if len(c) == 0 {
		return len(stack) == 0
	}
	if c[0] == "..." {
		for i := range len(stack) + 1 {
			if c[1:].Match(stack[i:]) {
				return true
			}
		}
		return false
	}
	return len(stack) > 0 && is(c[0], stack[0]) && c[1:].Match(stack[1:])
}

func is(pattern, name string) bool {
	if pattern == "?" {
		return true
	}
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(name, prefix)
	}
	return pattern == name
}

func (c Chain) String() string { return strings.Join(c, " > ") }
