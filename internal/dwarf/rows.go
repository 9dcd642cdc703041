// SPDX-License-Identifier: Apache-2.0

package dwarf

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// Line says that instructions from Low to High are of a line. File is 0 where it is not
// known.
type Line struct {
	Low, High uint64
	File      uint32 // as the Interner has it
	Line      uint32
}

// Lines goes through the lines of a unit from low to high addresses, without overlap.
type Lines struct {
	reader   *Reader
	sequence int // the next one
	rows     rowReader
	left     uint32 // rows of the sequence before it
	high     uint64 // where that ends
	pos      uint64 // what is below was passed on
}

// Next returns the next line, if there is one. Of sequences that overlap the first counts.
func (l *Lines) Next() (Line, bool) {
	r := l.reader
	for {
		for l.left == 0 {
			if l.sequence == len(r.rows.sequences) {
				return Line{}, false
			}
			s := &r.rows.sequences[l.sequence]
			l.sequence++
			if s.high > l.pos {
				l.rows, l.left, l.high = rowReader{chunks: r.rows.chunks, at: int(s.at), addr: s.low}, s.n, s.high
			}
		}
		l.left--
		start, end := l.rows.next()
		if low, high := max(start, l.pos), min(end, l.high); low < high {
			l.pos = high
			return Line{low, high, r.file(&r.table, uint64(l.rows.file)), l.rows.line}, true
		}
	}
}

const (
	rowChunk = 256 << 10 // bytes
	maxRow   = 24        // bytes that a row takes, and some
)

// lineRows is the rows of a unit's line table, packed, as there can be millions. A row is
//
//	varint  bytes until the next row, or the end of the sequence << 1 | file differs
//	varint  if the file differs: its number in the line table
//	zigzag  the line, less that of the row before
//
// and does not go from a chunk into the next. Before the first row of a sequence file and
// line are 0.
type lineRows struct {
	chunks    [][]byte // of rowChunk bytes, for all units
	at        int      // where the next row goes, all chunks in one
	sequences []sequence

	// The sequence that is being read: the last row, which is not packed yet, and those
	// before it. They are in unsorted from the first on that is not in order.
	n          int
	low        uint64
	start      int // of the rows, as at is
	last       row
	file, line uint32 // of the row that was packed last
	disorder   bool
	unsorted   []row
}

type row struct {
	addr       uint64
	file, line uint32
}

// sequence is a run of n rows, packed from at on, that covers the addresses from low to
// high.
type sequence struct {
	low, high uint64
	at, n     uint32
}

func (w *lineRows) reset() {
	w.at, w.sequences = 0, w.sequences[:0]
	w.begin()
}

// bytes is what the rows take: of sequences there is twice the memory while they grow.
func (w *lineRows) bytes() int { return w.at + 2*24*len(w.sequences) }

// begin begins a sequence.
func (w *lineRows) begin() {
	w.n, w.start, w.file, w.line, w.disorder = 0, w.at, 0, 0, false
}

// add adds a row. Of several at an address the last one counts, and one that says nothing
// new is left out.
func (w *lineRows) add(addr uint64, file, line uint32) {
	switch last := &w.last; {
	case w.n == 0:
		w.low = addr
	case last.addr == addr:
		last.file, last.line = file, line
		return
	case last.addr < addr && last.file == file && last.line == line:
		return
	case !w.disorder && last.addr < addr:
		w.pack(*last, addr)
	default:
		w.unsort()
	}
	w.last = row{addr, file, line}
	w.n++
}

// pack packs a row that holds until the address next.
func (w *lineRows) pack(r row, next uint64) {
	if w.at%rowChunk > rowChunk-maxRow {
		w.at += rowChunk - w.at%rowChunk
	}
	if w.at/rowChunk == len(w.chunks) {
		w.chunks = append(w.chunks, make([]byte, rowChunk))
	}
	b := w.chunks[w.at/rowChunk][w.at%rowChunk:]
	head := (max(next, r.addr) - r.addr) << 1
	line := int64(int32(r.line - w.line))
	var n int
	switch {
	case r.file == w.file && head < 0x80 && line >= -0x40 && line < 0x40: // nearly always
		b[0], b[1], n = byte(head), byte(line<<1^line>>63), 2
	case r.file == w.file:
		n = binary.PutUvarint(b, head)
		n += binary.PutVarint(b[n:], line)
	default:
		n = binary.PutUvarint(b, head|1)
		n += binary.PutUvarint(b[n:], uint64(r.file))
		n += binary.PutVarint(b[n:], line)
	}
	w.at += n
	w.file, w.line = r.file, r.line
}

// unsort adds the last row to those that are to be sorted, at first with all before it.
func (w *lineRows) unsort() {
	if !w.disorder {
		w.disorder, w.unsorted = true, w.unsorted[:0]
		p := rowReader{chunks: w.chunks, at: w.start, addr: w.low}
		for range min(w.n-1, maxUnsorted) {
			addr, _ := p.next()
			w.unsorted = append(w.unsorted, row{addr, p.file, p.line})
		}
	}
	if len(w.unsorted) < maxUnsorted {
		w.unsorted = append(w.unsorted, w.last)
	}
}

// endSequence keeps the rows since the last sequence, if there can be code.
func (w *lineRows) endSequence(d *Data, high uint64) {
	defer w.begin()
	keep := w.n > 0
	switch {
	case !keep:
	case !w.disorder:
		w.pack(w.last, high)
	default:
		w.unsort()
		if keep = w.n <= maxUnsorted; keep {
			w.sort(high)
		}
	}
	if keep && w.low != 0 && w.low < high {
		if end, ok := d.inCode(w.low); ok {
			w.sequences = append(w.sequences, sequence{low: w.low, high: min(high, end), at: uint32(w.start), n: uint32(w.n)})
			return
		}
	}
	w.at = w.start
}

// sort packs the rows of a sequence in order.
func (w *lineRows) sort(high uint64) {
	rows := w.unsorted
	slices.SortStableFunc(rows, func(a, b row) int { return cmp.Compare(a.addr, b.addr) })
	w.at, w.low, w.file, w.line = w.start, rows[0].addr, 0, 0
	for i, r := range rows {
		next := high
		if i+1 < len(rows) {
			next = rows[i+1].addr
		}
		w.pack(r, next)
	}
}

func (w *lineRows) sortSequences() {
	slices.SortStableFunc(w.sequences, func(a, b sequence) int { return cmp.Compare(a.low, b.low) })
}

// rowReader unpacks the rows of a sequence.
type rowReader struct {
	chunks     [][]byte
	at         int
	addr       uint64 // of the next row
	file, line uint32 // of the row
}

// next reads a row, and returns from where to where it holds.
func (p *rowReader) next() (low, high uint64) {
	if p.at%rowChunk > rowChunk-maxRow {
		p.at += rowChunk - p.at%rowChunk
	}
	b := p.chunks[p.at/rowChunk][p.at%rowChunk:]
	low = p.addr
	if b[0]&0x81 == 0 && b[1] < 0x80 {
		p.line += uint32(b[1]>>1) ^ -uint32(b[1]&1)
		p.at += 2
		p.addr += uint64(b[0] >> 1)
		return low, p.addr
	}
	head, n := binary.Uvarint(b)
	if head&1 != 0 {
		file, size := binary.Uvarint(b[n:])
		p.file = uint32(file)
		n += size
	}
	line, size := binary.Varint(b[n:])
	p.line += uint32(line)
	p.at += n + size
	p.addr += head >> 1
	return low, p.addr
}
