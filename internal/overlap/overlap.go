// SPDX-License-Identifier: Apache-2.0

// Package overlap sorts out address ranges that overlap.
package overlap

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
