// SPDX-License-Identifier: Apache-2.0

package histogram

import (
	"math"
	"math/bits"
)

// IndexSize is the length of Index.First: 64 octaves of 16 linear sub-buckets.
const IndexSize = 64 * 16

// Index finds the cell of a value in a few instructions without a search. A value's
// octave and next four bits select a sub-bucket; First names the cell of its smallest
// value, and as a sub-bucket (at most 1/16 of an octave's start wide) never holds more
// than MaxSteps cuts, that many compares finish the work. The kernel side does the same
// with the same table (bpf/histogram.bpf.h).
type Index struct {
	// First is the cell of the smallest value of each sub-bucket.
	First [IndexSize]uint8
	// Cuts is Partition.Cuts, padded with 2^63 - 1 to 256 entries: so a cut less a value is
	// negative, as a signed integer, where the value is above.
	Cuts [256]uint64
}

// MaxSteps is the largest number of cuts inside one sub-bucket of Time.
const MaxSteps = 2

// NewIndex makes the table for p, which must have fewer than 255 cuts.
func NewIndex(p *Partition) *Index {
	x := new(Index)
	for i := range x.Cuts {
		x.Cuts[i] = math.MaxInt64
	}
	copy(x.Cuts[:], p.Cuts)
	for i := range x.First {
		x.First[i] = uint8(p.Cell(smallest(i)))
	}
	return x
}

func slot(v uint64) int {
	if v < 16 {
		return int(v)
	}
	exp := bits.Len64(v) - 1
	return exp<<4 | int(v>>(exp-4)&15)
}

// smallest is the least value whose slot is i. Slots of octaves below 16 other than
// the first are never looked up.
func smallest(i int) uint64 {
	exp := i >> 4
	if exp < 4 {
		return uint64(i)
	}
	return uint64(16|i&15) << (exp - 4)
}

// Cell returns the cell of v, which is below 2^63.
func (x *Index) Cell(v uint64) int {
	c := int(x.First[slot(v)])
	for range MaxSteps {
		if v > x.Cuts[c] {
			c++
		}
	}
	return c
}
