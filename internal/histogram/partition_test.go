// SPDX-License-Identifier: Apache-2.0

package histogram

import (
	"math/rand/v2"
	"testing"
)

func TestTimePartition(t *testing.T) {
	p := Time()
	if len(p.Native) != MaxIndex-MinIndex+1 {
		t.Fatalf("%d native cuts", len(p.Native))
	}
	for i := 1; i < len(p.Cuts); i++ {
		if p.Cuts[i] <= p.Cuts[i-1] {
			t.Fatalf("cut %d: %d after %d", i, p.Cuts[i], p.Cuts[i-1])
		}
	}
	for _, want := range []struct {
		index int
		ns    uint64
	}{{-160, 953}, {-8, 500_000_000}, {0, 1_000_000_000}, {1, 1_090_507_732}, {48, 64_000_000_000}} {
		if got := p.Cuts[p.Native[want.index-MinIndex]]; got != want.ns {
			t.Errorf("native index %d: %d ns, want %d", want.index, got, want.ns)
		}
	}
	if got := p.Le(p.Classic[0]); got != 1e-6 {
		t.Errorf("first le %v", got)
	}
	if got := p.Le(p.Classic[len(p.Classic)-1]); got != 50 {
		t.Errorf("last le %v", got)
	}
}

func TestCellBounds(t *testing.T) {
	for _, p := range []*Partition{Time(), Size()} {
		for i, c := range p.Cuts {
			if got := p.Cell(c); got != i {
				t.Errorf("cell of cut %d: %d, want %d", c, got, i)
			}
			if got := p.Cell(c + 1); got != i+1 {
				t.Errorf("cell of cut %d + 1: %d, want %d", c, got, i+1)
			}
		}
	}
}

func TestIndexTable(t *testing.T) {
	tab := NewIndex(Time())
	for range 1_000_000 {
		v := rand.Uint64() >> (1 + rand.IntN(63))
		if got, want := tab.Cell(v), Time().Cell(v); got != want {
			t.Fatalf("index of %d: %d, want %d", v, got, want)
		}
	}
	for _, c := range Time().Cuts {
		for _, v := range []uint64{c - 1, c, c + 1} {
			if got, want := tab.Cell(v), Time().Cell(v); got != want {
				t.Fatalf("index of %d: %d, want %d", v, got, want)
			}
		}
	}
}
