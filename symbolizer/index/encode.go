// SPDX-License-Identifier: Apache-2.0

package index

import (
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/hostflame/hostflame/internal/dwarf"
	"github.com/hostflame/hostflame/internal/overlap"
)

// block is a block of rows and what it covers: Name is its place in the encoder's buffer,
// later in the file. Where blocks overlap, the first unit counts, and its last part.
type block overlap.Span

const blockSize = 24 // bytes of a block that waits for its place in the directory

func priority(unit uint32, part int) uint32 {
	return (dwarf.MaxUnits-unit)*dwarf.MaxParts + uint32(part)
}

func (x *block) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, x.Start)
	b = binary.LittleEndian.AppendUint64(b, x.End)
	b = binary.LittleEndian.AppendUint32(b, x.Name)
	return binary.LittleEndian.AppendUint32(b, x.Prio)
}

func decodeBlock(b []byte) overlap.Span {
	return overlap.Span{
		Start: binary.LittleEndian.Uint64(b), End: binary.LittleEndian.Uint64(b[8:]),
		Name: binary.LittleEndian.Uint32(b[16:]), Prio: binary.LittleEndian.Uint32(b[20:]),
	}
}

// encoder turns units into parts. It is for one goroutine.
type encoder struct {
	base   uint64
	buf    []byte
	blocks []block
	full   func() // is to write buf, which is long enough, and the blocks

	// Of the first blocks, so many, the nodes were written before, at this offset.
	away   int
	awayAt int64

	nodes []uint32 // offset of each node of the part among its nodes
	lines lines

	// The block that is being written.
	count            int
	rows             []byte
	low, last, next  uint64
	node, file, line uint32
	partNodes        int  // where the part's nodes are in buf, -1: they are away
	partial          bool // there are other parts, which say more of the other addresses
	prio             uint32
}

// lines is where a unit's line table is at: what holds from Low to High, nothing if they are
// equal.
type lines struct {
	dwarf.Line
	rest *dwarf.Lines
}

// next goes on to the next line.
func (l *lines) next() (ok bool) {
	if l.Line, ok = l.rest.Next(); !ok {
		l.Line = dwarf.Line{}
	}
	return ok
}

// add encodes a unit, or a part of one.
func (e *encoder) add(unit uint32, c *dwarf.Code) {
	e.prio, e.partial = priority(unit, c.Part), c.Part > 0
	e.partNodes = len(e.buf)
	e.addNodes(c.Nodes)
	e.lines = lines{rest: c.Lines}
	slices.SortFunc(c.Spans, func(a, b overlap.Span) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.Prio, b.Prio))
	})
	pos := uint64(0)
	overlap.Flatten(c.Spans, func(s *overlap.Span, low, high uint64) {
		e.merge(pos, low, 0)
		e.merge(low, high, e.nodes[s.Name-1]+1)
		pos = high
	})
	if !e.partial {
		e.merge(pos, ^uint64(0), 0)
	}
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
		for l.High <= low && l.next() {
		}
		end := high
		switch {
		case l.High <= low: // there are no more
			if node != 0 {
				e.row(low, end, node, 0, 0)
			}
		case l.Low > low:
			end = min(end, l.Low)
			if node != 0 {
				e.row(low, end, node, 0, 0)
			}
		default:
			end = min(end, l.High)
			if node != 0 || !e.partial {
				e.row(low, end, node, l.File, l.Line.Line)
			}
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
	case low < e.next || gap >= alignment || gap > 0 && (low%alignment != 0 || e.partial):
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
	e.blocks = append(e.blocks, block{Start: e.low, End: e.next, Name: uint32(at), Prio: e.prio})
	if e.partNodes < 0 {
		e.away++
		e.buf = append(e.buf, make([]byte, distanceSize)...) // place knows it
	} else {
		e.buf = binary.AppendUvarint(e.buf, uint64(at-e.partNodes))
	}
	e.buf = binary.AppendUvarint(e.buf, e.low-e.base)
	e.buf = binary.AppendUvarint(e.buf, uint64(e.count))
	e.buf = append(e.buf, e.rows...)
	e.buf = binary.AppendUvarint(e.buf, e.next-e.last)
	e.count = 0
	if len(e.buf) >= partBuffer {
		e.full()
	}
}

// distanceSize is how many bytes a distance takes that is not known yet.
const distanceSize = 5

// place is called before buf is written to an offset of the file and begins anew.
func (e *encoder) place(off int64) {
	for _, x := range e.blocks[:e.away] {
		distance := uint64(off + int64(x.Name) - e.awayAt)
		for i := range distanceSize {
			e.buf[int(x.Name)+i] = byte(distance&0x7f) | 0x80
			distance >>= 7
		}
		e.buf[int(x.Name)+distanceSize-1] &= 0x7f
	}
	for i := range e.blocks {
		e.blocks[i].Name += uint32(off)
	}
	if e.partNodes >= 0 {
		e.awayAt, e.partNodes = off+int64(e.partNodes), -1
	}
	e.away = 0
}
