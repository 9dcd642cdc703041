// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"cmp"
	"io"
	"slices"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/overlap"
)

const (
	perfMapChunk   = 256 << 10
	perfMapAtOnce  = 32 << 20  // bytes read in one call; the rest in the next
	perfMapBytes   = 512 << 20 // bytes read of one file in all
	perfMapTail    = 64        // bytes by which a file is recognized
	perfMapRowSize = 16
)

// perfTable is what was read of a perf map: non-overlapping ranges, sorted. What comes
// later goes into a small second level, which hides the first and is merged into it
// before it gets big, so that following a file costs little for each new function.
type perfTable struct {
	resident
	limit        int64
	older, newer []perfRow
	names        []byte
	lines        map[uint32][]Line // by name offset
	held         int64             // bytes of lines
	demangle     demangler

	// Of a jitdump; there rows have numbers of codes for names.
	dump     bool
	codes    []jitCode
	jitLines []jitLine
	nextLine uint32 // the first of jitLines that no code has yet
	linesOf  uint64 // where the code starts that they are of
	timeless bool   // the times of codes are of a clock that we do not know
	v8       bool   // V8 wrote it
	last     uint64 // time of the last record read
	behind   bool   // the last call has not read all that there was

	off      int64 // what lies before is read
	tail     []byte
	skipping bool // inside of a line that is too long
	full     bool // a limit was hit; nothing more is read
}

type perfRow struct {
	start uint64
	size  uint32
	name  uint32 // where the name starts in names; it ends with a NUL
}

func newPerfTable(limit int64) *perfTable {
	return &perfTable{limit: limit, lines: map[uint32][]Line{}}
}

// continues is whether the file still begins with what was read of it.
func (t *perfTable) continues(r io.ReaderAt, size int64) bool {
	if size < t.off {
		return false
	}
	if size == t.off || len(t.tail) == 0 {
		return true
	}
	b := make([]byte, len(t.tail))
	_, err := r.ReadAt(b, t.off-int64(len(b)))
	return err == nil && bytes.Equal(b, t.tail)
}

// readOn reads the lines between what was read and size. An unfinished line waits.
func (t *perfTable) readOn(r io.ReaderAt, size int64) error {
	if t.full || size <= t.off {
		return nil
	}
	end := min(size, t.off+perfMapAtOnce)
	buf := make([]byte, min(perfMapChunk, end-t.off))
	var spans []overlap.Span
	var err error
	for t.off < end && !t.full {
		var n int
		n, err = r.ReadAt(buf[:min(int64(len(buf)), end-t.off)], t.off)
		b := buf[:n]
		if n == 0 {
			break
		}
		last := bytes.LastIndexByte(b, '\n')
		if last < 0 {
			if n <= maxName+64 && !t.skipping {
				break // unfinished
			}
			t.skipping = true
			t.consumed(b)
			continue
		}
		b = b[:last+1]
		t.consumed(b)
		for line := range bytes.Lines(b) {
			if t.skipping {
				t.skipping = false
				continue
			}
			spans = t.add(spans, line[:len(line)-1])
		}
		if t.bytes()+int64(len(spans))*24 > t.limit || t.off > perfMapBytes {
			t.full = true
		}
	}
	t.merge(spans)
	if err == io.EOF {
		err = nil
	}
	return err
}

// consumed moves on by b.
func (t *perfTable) consumed(b []byte) {
	t.off += int64(len(b))
	t.tail = append(t.tail[:0], b[max(0, len(b)-perfMapTail):]...)
}

// add takes a line "START SIZE name", in hex, the name with spaces in it. What is none is
// left out: processes die while they write.
func (t *perfTable) add(spans []overlap.Span, line []byte) []overlap.Span {
	start, rest, ok1 := cutHex(line)
	size, name, ok2 := cutHex(rest)
	name = bytes.TrimRight(name, "\r")
	if !ok1 || !ok2 {
		return spans
	}
	return t.addCode(spans, start, size, name)
}

// addCode adds code that was made.
func (t *perfTable) addCode(spans []overlap.Span, start, size uint64, name []byte) []overlap.Span {
	if size == 0 || size > 1<<32-1 || start+size < start || start+size > kernelHalf {
		return spans
	}
	at, ok := t.addName(name)
	if !ok {
		return spans
	}
	return append(spans, overlap.Span{Start: start, End: start + size, Name: at})
}

// addName adds a name that is not empty to the arena.
func (t *perfTable) addName(name []byte) (uint32, bool) {
	if len(name) == 0 || uint64(len(t.names)) > 1<<31 {
		return 0, false
	}
	name = name[:min(len(name), maxName)]
	if !isCleanBytes(name) {
		name = []byte(cleanName(string(name)))
	}
	at := uint32(len(t.names))
	t.names = append(append(t.names, name...), 0)
	return at, true
}

// cutHex cuts a hex number, with or without 0x, and the spaces after it off b.
func cutHex(b []byte) (v uint64, rest []byte, ok bool) {
	if len(b) > 2 && b[0] == '0' && (b[1] == 'x' || b[1] == 'X') {
		b = b[2:]
	}
	v, n := parseHex(b)
	if n == 0 || n == len(b) || b[n] != ' ' {
		return 0, nil, false
	}
	return v, bytes.TrimLeft(b[n:], " "), true
}

// merge adds entries, in the order of the file.
func (t *perfTable) merge(entries []overlap.Span) {
	if len(entries) == 0 {
		return
	}
	t.newer = overlay(t.newer, entries)
	if len(t.newer) <= len(t.older)/4 {
		return
	}
	entries = make([]overlap.Span, 0, len(t.newer))
	for _, r := range t.newer {
		entries = append(entries, overlap.Span{Start: r.start, End: r.start + uint64(r.size), Name: r.name})
	}
	t.older, t.newer = overlay(t.older, entries), nil
	if !t.dump {
		t.compact()
	}
}

// overlay puts entries, the later over the earlier, over rows.
func overlay(rows []perfRow, entries []overlap.Span) []perfRow {
	spans := make([]overlap.Span, 0, len(rows)+len(entries))
	for _, r := range rows {
		spans = append(spans, overlap.Span{Start: r.start, End: r.start + uint64(r.size), Name: r.name})
	}
	spans = append(spans, entries...)
	for i := range spans {
		spans[i].Prio = uint32(i)
	}
	slices.SortFunc(spans, func(a, b overlap.Span) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.Prio, b.Prio))
	})
	out := make([]perfRow, 0, len(spans))
	overlap.Flatten(spans, func(s *overlap.Span, start, end uint64) {
		out = append(out, perfRow{start: start, size: uint32(end - start), name: s.Name})
	})
	return out
}

// compact drops the names of functions that later ones have replaced.
func (t *perfTable) compact() {
	var live int
	for _, r := range t.older {
		live += len(t.name(r.name)) + 1
	}
	if live > len(t.names)/2 {
		return
	}
	names := make([]byte, 0, live)
	for i := range t.older {
		r := &t.older[i]
		at := uint32(len(names))
		names = append(append(names, t.name(r.name)...), 0)
		r.name = at
	}
	t.names = names
	clear(t.lines)
	t.held = 0
}

func (t *perfTable) name(off uint32) []byte {
	s, _ := elffile.CString(t.names[off:])
	return s
}

func (t *perfTable) lookup(addr uint64) Result {
	name, ok := t.rowAt(addr)
	if !ok {
		return t.unknown()
	}
	return Result{Lines: t.linesOfName(name)}
}

func (t *perfTable) unknown() Result {
	if t.full {
		return Result{Reason: ReasonTooLarge}
	}
	return Result{Reason: ReasonNotFound}
}

// linesOfName is the answer for a function by where its name is.
func (t *perfTable) linesOfName(off uint32) []Line {
	lines := t.lines[off]
	if lines == nil {
		name := string(t.name(off))
		lines = []Line{{Function: t.demangle.name(name), SystemName: name}}
		if t.held > maxHeldNames {
			clear(t.lines)
			t.held = 0
		}
		t.lines[off] = lines
		t.held += lineSize + int64(2*len(name))
	}
	return lines
}

// findRow finds the row that covers an address.
func findRow(rows []perfRow, addr uint64) (int, bool) {
	i, found := slices.BinarySearchFunc(rows, addr, func(r perfRow, a uint64) int { return cmp.Compare(r.start, a) })
	if !found {
		i--
	}
	return i, i >= 0 && addr-rows[i].start < uint64(rows[i].size)
}

func (t *perfTable) bytes() int64 {
	return int64(cap(t.older)+cap(t.newer))*perfMapRowSize + int64(cap(t.names)) + t.held + 512 +
		int64(cap(t.codes))*jitCodeBytes + int64(cap(t.jitLines))*jitLineBytes
}
