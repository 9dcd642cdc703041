// SPDX-License-Identifier: Apache-2.0

// Package overlap sorts out address ranges that overlap.
package overlap

import (
	"cmp"
	"slices"
)

// Span is an address range that something claims. Where spans overlap, the highest
// priority wins.
type Span struct {
	Start, End uint64 // End is exclusive
	Name       uint32 // the caller's
	Prio       uint32
}

// Flatten calls emit for the pieces of sorted (by start) that are not hidden by spans of
// higher priority, in order of address and without overlap. Priorities are distinct. It
// takes O(n log n) and memory only for spans that overlap.
func Flatten(sorted []Span, emit func(s *Span, start, end uint64)) {
	var active spanHeap // of those that have begun, the highest priority on top
	var pos uint64      // everything below is decided
	var last *Span      // the piece that is not emitted yet, because it may go on
	var lastStart, lastEnd uint64
	advance := func(to uint64) {
		for len(active) > 0 && pos < to {
			top := active[0]
			if top.End <= pos {
				active.pop()
				continue
			}
			end := min(top.End, to)
			if top == last && lastEnd == pos {
				lastEnd = end
			} else {
				if last != nil {
					emit(last, lastStart, lastEnd)
				}
				last, lastStart, lastEnd = top, pos, end
			}
			pos = end
		}
		pos = to
	}
	for i := range sorted {
		s := &sorted[i]
		if s.End <= s.Start {
			continue
		}
		advance(s.Start)
		if (len(active) == 0 || active[0].Prio < s.Prio) && (i+1 == len(sorted) || sorted[i+1].Start >= s.End) {
			// Most spans hide nothing that begins in them.
			if last != nil {
				emit(last, lastStart, lastEnd)
			}
			last, lastStart, lastEnd, pos = s, s.Start, s.End, s.End
			continue
		}
		if len(active) == cap(active) {
			active.drop(pos) // those that are over, below others that are not
		}
		active.push(s)
	}
	advance(^uint64(0))
	if last != nil {
		emit(last, lastStart, lastEnd)
	}
}

// spanHeap is a binary heap by priority.
type spanHeap []*Span

func (h *spanHeap) push(s *Span) {
	*h = append(*h, s)
	a := *h
	for i := len(a) - 1; i > 0; {
		parent := (i - 1) / 2
		if a[parent].Prio > a[i].Prio {
			break
		}
		a[parent], a[i] = a[i], a[parent]
		i = parent
	}
}

// drop removes the spans that end at pos or before.
func (h *spanHeap) drop(pos uint64) {
	kept := (*h)[:0]
	for _, s := range *h {
		if s.End > pos {
			kept.push(s)
		}
	}
	clear((*h)[len(kept):])
	if len(kept) > cap(kept)/2 {
		kept = slices.Grow(kept, cap(kept)) // so that the next time is far
	}
	*h = kept
}

func (h *spanHeap) pop() {
	a := *h
	n := len(a) - 1
	a[0] = a[n]
	a[n] = nil
	a = a[:n]
	*h = a
	for i := 0; ; {
		child := 2*i + 1
		if child >= n {
			return
		}
		if child+1 < n && a[child+1].Prio > a[child].Prio {
			child++
		}
		if a[i].Prio > a[child].Prio {
			return
		}
		a[i], a[child] = a[child], a[i]
		i = child
	}
}

// Sort sorts spans by start, and those that start together by before.
func Sort(spans []Span, before func(a, b *Span) int) {
	byStart(spans)
	for i := 0; i < len(spans); {
		end := i + 1
		for end < len(spans) && spans[end].Start == spans[i].Start {
			end++
		}
		if end > i+1 {
			slices.SortFunc(spans[i:end], func(a, b Span) int { return before(&a, &b) })
		}
		i = end
	}
}

// byStart sorts by start, by digits of 11 bits where there are many: somebody waits for
// the names of a big file. That takes the memory twice, and so is not done for millions.
func byStart(spans []Span) {
	const bits, few, most = 11, 1 << 12, 1 << 19
	if len(spans) < few || len(spans) > most {
		slices.SortFunc(spans, func(a, b Span) int { return cmp.Compare(a.Start, b.Start) })
		return
	}
	low, high := spans[0].Start, spans[0].Start
	for _, s := range spans {
		low, high = min(low, s.Start), max(high, s.Start)
	}
	from, to := spans, make([]Span, len(spans))
	for shift := 0; shift < 64 && (high-low)>>shift > 0; shift += bits {
		var at [1 << bits]int // where the next one of a digit goes
		for i := range from {
			at[(from[i].Start-low)>>shift&(1<<bits-1)]++
		}
		sum := 0
		for i, n := range at {
			at[i], sum = sum, sum+n
		}
		for i := range from {
			digit := (from[i].Start - low) >> shift & (1<<bits - 1)
			to[at[digit]] = from[i]
			at[digit]++
		}
		from, to = to, from
	}
	if &from[0] != &spans[0] {
		copy(spans, from)
	}
}
