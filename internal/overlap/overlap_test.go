// SPDX-License-Identifier: Apache-2.0

package overlap

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestSort(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	before := func(a, b *Span) int { return cmp.Or(cmp.Compare(a.Prio, b.Prio), cmp.Compare(a.Name, b.Name)) }
	for _, reach := range []uint64{1, 100, 1 << 12, 1 << 33, 1<<64 - 1} {
		for _, n := range []int{0, 1, 100, 10_000} {
			spans := make([]Span, n)
			for i := range spans {
				spans[i] = Span{Start: 1<<63 + rnd.Uint64N(reach), Prio: rnd.Uint32N(3), Name: uint32(i)}
			}
			want := slices.SortedFunc(slices.Values(spans), func(a, b Span) int {
				return cmp.Or(cmp.Compare(a.Start, b.Start), before(&a, &b))
			})
			if Sort(spans, before); !slices.Equal(spans, want) {
				t.Errorf("%d spans within %#x are not sorted", n, reach)
			}
		}
	}
}
