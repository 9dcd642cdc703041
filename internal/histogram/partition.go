// SPDX-License-Identifier: Apache-2.0

// Package histogram holds the partitions that the kernel side counts into and
// that every exposition (Prometheus native and classic, OTLP) is an exact sum of.
//
// A partition is a sorted list of integer cut points. Cell i counts the values v
// with Cuts[i-1] < v <= Cuts[i]; the last cell counts what is above the last cut.
// Upper-inclusive cells match the `le` of Prometheus and of OTLP.
package histogram

import (
	"math"
	"math/big"
	"sort"
	"sync"
)

const (
	// Schema is the finest native histogram schema that a time partition holds:
	// eight buckets an octave, boundaries 2^(i/8) seconds.
	Schema = 3
	// MinIndex is the native bucket index (schema 3) of the zero threshold, 2^-20 s.
	// Values up to it are in the zero bucket.
	MinIndex = -160
	// MaxIndex is the index of the last native boundary, 2^6 = 64 s.
	MaxIndex = 48
	// ZeroThreshold is 2^(MinIndex/8) seconds.
	ZeroThreshold = 1.0 / (1 << 20)
)

// Partition is an immutable list of cut points. Safe for concurrent use.
type Partition struct {
	// Cuts are the upper-inclusive integer bounds of all cells but the last, ascending
	// (nanoseconds for Time, bytes for Size, requests for Depth, threads for
	// Length).
	Cuts []uint64
	// Classic are the bounds exposed as classic `le` values, a subset of Cuts.
	Classic []uint64
	// Unit is what one second, byte, request or thread is in units of Cuts: 1e9 or 1.
	Unit float64
	// Native maps native bucket index i (schema 3) to its cut:
	// Native[i-MinIndex] is the position in Cuts of floor(2^(i/8) * 1e9).
	// It is nil for partitions without native boundaries.
	Native []int
}

// Cells is the number of cells, the overflow cell included.
func (p *Partition) Cells() int { return len(p.Cuts) + 1 }

// Cell returns the index of the cell that v falls into.
func (p *Partition) Cell(v uint64) int {
	return sort.Search(len(p.Cuts), func(i int) bool { return v <= p.Cuts[i] })
}

// Le returns the bound of cut i in base units (seconds, bytes or requests), computed so that
// decimal bounds print as the decimal (0.001, not 0.0010000000000000002).
func (p *Partition) Le(cut uint64) float64 { return float64(cut) / p.Unit }

// Time is the partition of every latency histogram: the union of
// floor(2^(i/8) * 1e9) ns for i in [MinIndex, MaxIndex] and 1, 2, 5 x 10^n s from
// 1 us to 50 s. For an integer number of nanoseconds, ns <= floor(b) iff ns <= b, so
// the native boundaries are exact.
var Time = sync.OnceValue(newTime)

// Size is the partition of size histograms: powers of two from 512 B to 64 MiB.
var Size = sync.OnceValue(newSize)

// Depth is the partition of numbers of requests: powers of two from 1 to 8192.
var Depth = sync.OnceValue(newDepth)

// Length is the partition of run-queue lengths: powers of two from 1 to 1,024.
var Length = sync.OnceValue(newLength)

func newTime() *Partition {
	set := map[uint64]bool{}
	native := make([]uint64, 0, MaxIndex-MinIndex+1)
	for i := MinIndex; i <= MaxIndex; i++ {
		c := nativeCut(i)
		native = append(native, c)
		set[c] = true
	}
	p := &Partition{Unit: 1e9}
	for decade := uint64(1_000); decade <= 10_000_000_000; decade *= 10 {
		for _, m := range []uint64{1, 2, 5} {
			p.Classic = append(p.Classic, m*decade)
			set[m*decade] = true
		}
	}
	for c := range set {
		p.Cuts = append(p.Cuts, c)
	}
	sort.Slice(p.Cuts, func(i, j int) bool { return p.Cuts[i] < p.Cuts[j] })
	for _, c := range native {
		p.Native = append(p.Native, p.Cell(c))
	}
	return p
}

// nativeCut is floor(2^(i/8) * 1e9), exact: the eighth power of the result is compared
// in integers, because a float64 can round the product across an integer.
func nativeCut(i int) uint64 {
	guess := uint64(math.Exp2(float64(i)/8) * 1e9)
	// c <= 2^(i/8) * 1e9  <=>  c^8 <= 2^i * 1e72
	fits := func(c uint64) bool {
		l := new(big.Int).Exp(new(big.Int).SetUint64(c), big.NewInt(8), nil)
		r := new(big.Int).Exp(big.NewInt(10), big.NewInt(72), nil)
		if i >= 0 {
			r.Lsh(r, uint(i))
		} else {
			l.Lsh(l, uint(-i))
		}
		return l.Cmp(r) <= 0
	}
	for fits(guess + 1) {
		guess++
	}
	for !fits(guess) {
		guess--
	}
	return guess
}

func newSize() *Partition { return powersOfTwo(512, 64<<20) }

func newDepth() *Partition { return powersOfTwo(1, 8192) }

func newLength() *Partition { return powersOfTwo(1, 1024) }

func powersOfTwo(least, most uint64) *Partition {
	p := &Partition{Unit: 1}
	for n := least; n <= most; n *= 2 {
		p.Cuts = append(p.Cuts, n)
	}
	p.Classic = p.Cuts
	return p
}

// Snapshot is one series as read: cumulative since the agent attached.
type Snapshot struct {
	// Cells has Partition.Cells() elements. The count of the series is their sum.
	Cells []uint64
	// Sum is the exact sum of all values, in the partition's integer unit.
	Sum uint64
}

// Count is the number of values: the sum of the cells.
func (s Snapshot) Count() uint64 {
	var n uint64
	for _, c := range s.Cells {
		n += c
	}
	return n
}

// Add adds other to s. s may be the zero Snapshot.
func (s *Snapshot) Add(other Snapshot) {
	if s.Cells == nil {
		s.Cells = make([]uint64, len(other.Cells))
	}
	for i, c := range other.Cells {
		s.Cells[i] += c
	}
	s.Sum += other.Sum
}
