// SPDX-License-Identifier: Apache-2.0

package overlap

import (
	"cmp"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
)

// TestFlatten compares with painting each address.
func TestFlatten(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for round := range 2000 {
		var spans []Span
		painted := make([]*Span, 64)
		for i := range rnd.IntN(12) {
			start := rnd.Uint64N(60)
			spans = append(spans, Span{Start: start, End: start + rnd.Uint64N(uint64(1+round%20)), Name: uint32(i)})
		}
		for i, prio := range rnd.Perm(len(spans)) {
			spans[i].Prio = uint32(prio)
		}
		Sort(spans, func(a, b *Span) int { return cmp.Compare(a.Prio, b.Prio) })
		for i := range spans {
			for at := spans[i].Start; at < min(spans[i].End, 64); at++ {
				if painted[at] == nil || painted[at].Prio < spans[i].Prio {
					painted[at] = &spans[i]
				}
			}
		}
		got := make([]*Span, 64)
		pos, last := uint64(0), (*Span)(nil)
		Flatten(spans, func(s *Span, start, end uint64) {
			if start < pos || end <= start || s == last && start == pos {
				t.Fatalf("piece %d-%d after %d", start, end, pos)
			}
			pos, last = end, s
			for at := start; at < min(end, 64); at++ {
				got[at] = s
			}
		})
		if !reflect.DeepEqual(got, painted) {
			t.Fatalf("of %+v\n%v\nwant\n%v", spans, got, painted)
		}
	}
}

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
