// SPDX-License-Identifier: Apache-2.0

package index

import (
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/hostflame/hostflame/internal/dwarf"
	"github.com/hostflame/hostflame/internal/overlap"
)

// block is a block of rows and what it covers. at is its place in the encoder's buffer,
// later in the file.
type block struct {
	low, high uint64
	at        uint32
	unit      uint32
}

// encoder turns units into parts. It is for one goroutine.
type encoder struct {
	base   uint64
	buf    []byte
	blocks []block

	nodes []uint32 // offset of each node of the unit among its nodes
	spans []overlap.Span
	lines lines

	// The block that is being written.
	count            int
	rows             []byte
	low, last, next  uint64
	node, file, line uint32
	partNodes        int
	unit             uint32
}

// lines goes through a unit's line table from low to high addresses.
type lines struct {
	sequences []dwarf.Sequence
	row       int // of the first sequence, the next one
	pos       uint64

	// What holds from low to high; nothing if they are equal.
	low, high  uint64
	file, line uint32
}

// next goes on to the next row. Of sequences that overlap the first counts.
func (l *lines) next() bool {
	for len(l.sequences) > 0 {
		s := &l.sequences[0]
		if l.row == len(s.Rows) {
			l.sequences, l.row = l.sequences[1:], 0
			continue
		}
		r := s.Rows[l.row]
		l.row++
		high := s.High
		if l.row < len(s.Rows) {
			high = min(high, s.Rows[l.row].Addr)
		}
		if low := max(r.Addr, l.pos); low < high {
			l.low, l.high, l.file, l.line, l.pos = low, high, r.File, r.Line, high
			return true
		}
	}
	l.low = l.high
	return false
}

// add encodes a unit. The part is in buf, its blocks are in blocks.
func (e *encoder) add(unit uint32, c *dwarf.Code) {
	e.unit = unit
	e.partNodes = len(e.buf)
	e.addNodes(c.Nodes)
	e.lines = lines{sequences: c.Sequences}
	e.spans = e.spans[:0]
	for i, s := range c.Spans {
		e.spans = append(e.spans, overlap.Span{Start: s.Low, End: s.High, Name: s.Node, Prio: uint32(i)})
	}
	slices.SortFunc(e.spans, func(a, b overlap.Span) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.Prio, b.Prio))
	})
	pos := uint64(0)
	overlap.Flatten(e.spans, func(s *overlap.Span, low, high uint64) {
		e.merge(pos, low, 0)
		e.merge(low, high, e.nodes[s.Name-1]+1)
		pos = high
	})
	e.merge(pos, ^uint64(0), 0)
	e.endBlock()
}

func (e *encoder) addNodes(nodes []dwarf.Node) {
	e.nodes = e.nodes[:0]
	for _, n := range nodes {
		at := uint32(len(e.buf) - e.partNodes)
		e.nodes = append(e.nodes, at)
		e.buf = binary.AppendUvarint(e.buf, uint64(n.Function))
		if n.Parent == 0 {
			e.buf = append(e.buf, 0)
			continue
		}
		e.buf = binary.AppendUvarint(e.buf, uint64(at-e.nodes[n.Parent-1]))
		e.buf = binary.AppendUvarint(e.buf, uint64(n.CallFile))
		e.buf = binary.AppendUvarint(e.buf, uint64(n.CallLine))
	}
}

// merge emits rows for the addresses from low to high, which are all of one node.
func (e *encoder) merge(low, high uint64, node uint32) {
	l := &e.lines
	for low < high {
		for l.high <= low && l.next() {
		}
		end := high
		switch {
		case l.high <= low: // there are no more
			if node != 0 {
				e.row(low, end, node, 0, 0)
			}
		case l.low > low:
			end = min(end, l.low)
			if node != 0 {
				e.row(low, end, node, 0, 0)
			}
		default:
			end = min(end, l.high)
			e.row(low, end, node, l.file, l.line)
		}
		low = end
	}
}

// row adds what holds from low to high.
func (e *encoder) row(low, high uint64, node, file, line uint32) {
	const alignment = 16 // of functions: the bytes between them are padding
	if low-e.base > 1<<32-1 || high-e.base > 1<<32-1 {
		return
	}
	switch gap := low - e.next; {
	case e.count == 0:
	case low < e.next || gap >= alignment || gap > 0 && low%alignment != 0:
		e.endBlock()
	case gap > 0 && e.count+2 <= blockRows:
		e.put(e.next, 0, 0, 0)
	case gap > 0:
		e.endBlock()
	}
	if e.count >= blockRows {
		e.endBlock()
	}
	if e.count > 0 && e.node == node && e.file == file && e.line == line {
		e.next = high
		return
	}
	e.put(low, node, file, line)
	e.next = high
}

func (e *encoder) put(low uint64, node, file, line uint32) {
	if e.count == 0 {
		e.rows, e.low, e.last = e.rows[:0], low, low
		e.node, e.file, e.line = 0, 0, 0
	}
	head := (low - e.last) << 2
	if node != e.node {
		head |= 1
	}
	if file != e.file {
		head |= 2
	}
	e.rows = binary.AppendUvarint(e.rows, head)
	if node != e.node {
		e.rows = binary.AppendUvarint(e.rows, zigzag(int64(node)-int64(e.node)))
	}
	if file != e.file {
		e.rows = binary.AppendUvarint(e.rows, uint64(file))
	}
	e.rows = binary.AppendUvarint(e.rows, zigzag(int64(line)-int64(e.line)))
	e.last, e.node, e.file, e.line = low, node, file, line
	e.count++
}

func (e *encoder) endBlock() {
	if e.count == 0 {
		return
	}
	at := len(e.buf)
	e.blocks = append(e.blocks, block{low: e.low, high: e.next, at: uint32(at), unit: e.unit})
	e.buf = binary.AppendUvarint(e.buf, uint64(at-e.partNodes))
	e.buf = binary.AppendUvarint(e.buf, e.low-e.base)
	e.buf = binary.AppendUvarint(e.buf, uint64(e.count))
	e.buf = append(e.buf, e.rows...)
	e.buf = binary.AppendUvarint(e.buf, e.next-e.last)
	e.count = 0
}
