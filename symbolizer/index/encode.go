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
	lines []line

	// The block that is being written.
	count            int
	rows             []byte
	low, last, next  uint64
	node, file, line uint32
	partNodes        int
	unit             uint32
}

// line is a row of the line table, or where rows end: File is none then.
type line struct {
	addr uint64
	file uint32
	line uint32
}

// add encodes a unit. The part is in buf, its blocks are in blocks.
func (e *encoder) add(unit uint32, c *dwarf.Code) {
	e.unit = unit
	e.partNodes = len(e.buf)
	e.addNodes(c.Nodes)
	e.orderLines(c)
	e.spans = e.spans[:0]
	for i, s := range c.Spans {
		e.spans = append(e.spans, overlap.Span{Start: s.Low, End: s.High, Name: s.Node, Prio: uint32(i)})
	}
	slices.SortFunc(e.spans, func(a, b overlap.Span) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.Prio, b.Prio))
	})
	rest := e.lines
	pos := uint64(0)
	overlap.Flatten(e.spans, func(s *overlap.Span, low, high uint64) {
		rest = e.merge(rest, pos, low, 0)
		rest = e.merge(rest, low, high, e.nodes[s.Name-1]+1)
		pos = high
	})
	e.merge(rest, pos, ^uint64(0), 0)
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

// orderLines makes one list of a unit's sequences, in which a row without file and line
// ends what another does not go on from. Of sequences that overlap the first counts.
func (e *encoder) orderLines(c *dwarf.Code) {
	e.lines = e.lines[:0]
	pos := uint64(0)
	c.Sequences(func(rows []dwarf.Row, high uint64) {
		for i, r := range rows {
			next := high
			if i+1 < len(rows) {
				next = min(high, rows[i+1].Addr)
			}
			if next <= pos || r.Addr >= next {
				continue
			}
			low := max(r.Addr, pos)
			if n := len(e.lines); n > 0 && e.lines[n-1].addr == low {
				e.lines = e.lines[:n-1] // the end of the one before
			}
			e.lines = append(e.lines, line{low, r.File, r.Line}, line{addr: next})
			pos = next
		}
	})
}

// merge emits rows for the addresses from low to high, which are all of one node, and
// returns the lines from the last one on that began there.
func (e *encoder) merge(lines []line, low, high uint64, node uint32) []line {
	for low < high {
		for len(lines) > 1 && lines[1].addr <= low {
			lines = lines[1:]
		}
		var l line
		end := high
		if len(lines) > 0 {
			if lines[0].addr <= low {
				l = lines[0]
				if len(lines) > 1 {
					end = min(end, lines[1].addr)
				}
			} else {
				end = min(end, lines[0].addr)
			}
		}
		if node != 0 || l.file != 0 || l.line != 0 {
			e.row(low, end, node, l.file, l.line)
		}
		low = end
	}
	return lines
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
