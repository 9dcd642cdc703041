// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"encoding/binary"
	"io"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/overlap"
)

// A jitdump (Linux, tools/perf/Documentation/jitdump-specification.txt) is what some JIT
// compilers write instead of a perf map: records of code that was made, with its bytes, and
// of code that moved. They map the file executable, which tells perf, and us, where it is.
const (
	jitMagic      = 0x4a695444
	jitHeader     = 40
	jitRecord     = 16 // header of a record
	jitLoadSize   = jitRecord + 40
	jitMoveSize   = jitRecord + 48
	jitLoad       = 0
	jitMove       = 1
	maxJITRecord  = 64 << 20
	maxJITRecords = 1 << 20 // read in one call; the rest in the next
)

// readJIT reads the records between what was read and size into t. As in a perf map the
// later record wins: what is read is what was made up to now.
func (t *perfTable) readJIT(r io.ReaderAt, size int64) error {
	if t.full {
		return nil
	}
	var b [jitMoveSize]byte
	read := func(off int64, n int) bool {
		if off > size || int64(n) > size-off {
			return false
		}
		got, err := r.ReadAt(b[:n], off)
		return got == n && (err == nil || err == io.EOF)
	}
	if t.off == 0 {
		if !read(0, jitHeader) {
			return nil
		}
		if binary.LittleEndian.Uint32(b[:]) != jitMagic {
			t.full = true
			return errorf(ReasonMalformed, "not a jitdump")
		}
		header := int64(binary.LittleEndian.Uint32(b[8:]))
		if header < jitHeader || header > maxJITRecord {
			t.full = true
			return errorf(ReasonMalformed, "jitdump with a header of %d bytes", header)
		}
		t.off = header
	}
	var spans []overlap.Span
	for range maxJITRecords {
		if !read(t.off, jitRecord) {
			break
		}
		id, total := binary.LittleEndian.Uint32(b[:]), int64(binary.LittleEndian.Uint32(b[4:]))
		if total < jitRecord || total > maxJITRecord {
			t.full = true // what comes after it can not be found
			break
		}
		if total > size-t.off {
			break // unfinished
		}
		switch {
		case id == jitLoad && total >= jitLoadSize && read(t.off, jitLoadSize):
			start, length := binary.LittleEndian.Uint64(b[jitRecord+16:]), binary.LittleEndian.Uint64(b[jitRecord+24:])
			spans = t.addCode(spans, start, length, t.jitName(r, t.off+jitLoadSize, t.off+total))
		case id == jitMove && total >= jitMoveSize && read(t.off, jitMoveSize):
			from, to := binary.LittleEndian.Uint64(b[jitRecord+16:]), binary.LittleEndian.Uint64(b[jitRecord+24:])
			length := binary.LittleEndian.Uint64(b[jitRecord+32:])
			t.merge(spans)
			spans = nil
			if name, ok := t.nameAt(from); ok {
				spans = t.addCode(spans, to, length, bytes.Clone(name))
			}
		}
		t.off += total
		if t.bytes()+int64(len(spans))*24 > t.limit {
			t.full = true
			break
		}
	}
	t.merge(spans)
	return nil
}

// jitName is the name of a record that begins at off.
func (t *perfTable) jitName(r io.ReaderAt, off, end int64) []byte {
	b := make([]byte, min(end-off, 256))
	for {
		n, err := r.ReadAt(b, off)
		if n < len(b) && err != io.EOF {
			return nil
		}
		if name, ended := elffile.CString(b[:n]); ended || int64(len(b)) == min(end-off, maxName) {
			return name
		}
		b = make([]byte, min(end-off, maxName))
	}
}

// nameAt is the name of the code at an address.
func (t *perfTable) nameAt(addr uint64) ([]byte, bool) {
	for _, rows := range [][]perfRow{t.newer, t.older} {
		if i, ok := findRow(rows, addr); ok {
			return t.name(rows[i].name), true
		}
	}
	return nil, false
}
