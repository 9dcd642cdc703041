// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/overlap"
)

// A jitdump (Linux, tools/perf/Documentation/jitdump-specification.txt) is what some JIT
// compilers write instead of a perf map: records of code that was made, when, with its lines
// and its bytes, and of code that moved. They map the file executable, which tells perf, and
// us, where it is.
const (
	jitMagic      = 0x4a695444
	jitHeader     = 40
	jitPad        = 16 // where in the header
	jitV8         = 0xdeadbeef
	jitELFHeader  = 64 // what V8 adds to the addresses of lines
	jitFlags      = 32 // where in the header
	jitOwnClock   = 1  // of the flags: times are of the CPU's counter
	jitRecord     = 16 // header of a record
	jitLoadSize   = jitRecord + 40
	jitMoveSize   = jitRecord + 48
	jitLinesSize  = jitRecord + 16
	jitLineSize   = 16 // without the file's name
	jitLoad       = 0
	jitMove       = 1
	jitLines      = 2
	maxJITRecord  = 64 << 20
	jitAtOnce     = 64 << 20 // bytes read in one call, with jitReadCost; the rest in the next
	jitReadCost   = 64       // that a read is counted for beside its bytes
	maxJITLines   = 1 << 20  // bytes of the lines of a piece of code
	maxJITSteps   = 1 << 14  // back in time, in pieces of code
	jitCodeBytes  = 40
	jitLineBytes  = 12
	jitBatchBytes = 24 + 48 // of code that is not merged yet
	noJITFile     = 1<<32 - 1
)

// jitCode is code that was made, or came to a new place.
type jitCode struct {
	start      uint64
	size, name uint32 // where the name starts in names
	made       uint64 // ns of the dump's clock
	line       uint32 // the first of its lines
	lines      uint32
}

// jitLine says from which byte of a piece of code on a line holds. Its file is where the name
// starts in names, or noJITFile: it is in the name of the code.
type jitLine struct{ off, file, line uint32 }

// jitBatch is code that was read and is not merged yet. Moves name code by its start.
type jitBatch struct {
	spans  []overlap.Span
	starts map[uint64]uint32 // numbers of the newest code
}

// budget is a file of which left bytes may still be read.
type budget struct {
	io.ReaderAt
	left int64
}

func (b *budget) ReadAt(p []byte, off int64) (int, error) {
	b.left -= int64(len(p)) + jitReadCost
	return b.ReaderAt.ReadAt(p, off)
}

// readJIT reads the records between what was read and size into t, as far as one call may.
func (t *perfTable) readJIT(file io.ReaderAt, size int64) error {
	if t.full {
		return nil
	}
	r := &budget{file, jitAtOnce}
	var b [jitMoveSize]byte
	read := func(off int64, n int) bool {
		if off > size || int64(n) > size-off {
			return false
		}
		got, err := r.ReadAt(b[:n], off)
		return got == n && (err == nil || err == io.EOF)
	}
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(b[i:]) }
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
		t.off, t.timeless = header, word(jitFlags)&jitOwnClock != 0
		t.v8 = binary.LittleEndian.Uint32(b[jitPad:]) == jitV8
	}
	batch := jitBatch{starts: map[uint64]uint32{}}
	for r.left > 0 {
		if !read(t.off, jitRecord) {
			break
		}
		id, total, made := binary.LittleEndian.Uint32(b[:]), int64(binary.LittleEndian.Uint32(b[4:])), word(8)
		if total < jitRecord || total > maxJITRecord {
			t.full = true // what comes after it can not be found
			break
		}
		if total > size-t.off {
			break // unfinished
		}
		switch {
		case id == jitLoad && total >= jitLoadSize && read(t.off, jitLoadSize):
			c := jitCode{start: word(jitRecord + 16), made: made}
			length := word(jitRecord + 24)
			if at := t.linesOf; at == c.start {
				c.line = t.nextLine
				c.lines = uint32(len(t.jitLines)) - c.line
			}
			t.nextLine = uint32(len(t.jitLines))
			if at, ok := t.addName(t.jitName(r, t.off+jitLoadSize, t.off+total)); ok {
				c.name = at
				t.addJITCode(&batch, c, length)
			}
		case id == jitMove && total >= jitMoveSize && read(t.off, jitMoveSize):
			from, to, length := word(jitRecord+16), word(jitRecord+24), word(jitRecord+32)
			number, ok := batch.starts[from]
			if !ok {
				number, ok = t.rowAt(from)
			}
			if ok {
				c := t.codes[number]
				c.start, c.made = to, made
				t.addJITCode(&batch, c, length)
			}
		case id == jitLines && total >= jitLinesSize && read(t.off, jitLinesSize):
			t.readLines(r, word(jitRecord), word(jitRecord+8), t.off+jitLinesSize, t.off+total)
		}
		t.off += total
		t.last = max(t.last, made)
		if t.bytes()+int64(len(batch.spans))*jitBatchBytes > t.limit {
			t.merge(batch.spans)
			batch = jitBatch{starts: map[uint64]uint32{}}
			if t.relieve(); t.full {
				break
			}
		}
	}
	t.merge(batch.spans)
	t.behind = r.left <= 0
	return nil
}

// addJITCode adds code by its number.
func (t *perfTable) addJITCode(batch *jitBatch, c jitCode, size uint64) {
	if size == 0 || size > 1<<32-1 || c.start+size < c.start || c.start+size > kernelHalf {
		return
	}
	c.size = uint32(size)
	number := uint32(len(t.codes))
	t.codes = append(t.codes, c)
	batch.starts[c.start] = number
	batch.spans = append(batch.spans, overlap.Span{Start: c.start, End: c.start + size, Name: number})
}

// readLines reads the lines of the code that the next record is to be of.
func (t *perfTable) readLines(r io.ReaderAt, start, count uint64, off, end int64) {
	t.jitLines = t.jitLines[:t.nextLine]
	t.linesOf = start
	b := make([]byte, min(end-off, maxJITLines))
	if n, err := r.ReadAt(b, off); n < len(b) && err != io.EOF {
		return
	}
	if t.v8 {
		t.addV8Lines(b, start, count)
	} else {
		t.addLines(b, start, count)
	}
	slices.SortStableFunc(t.jitLines[t.nextLine:], func(a, b jitLine) int { return cmp.Compare(a.off, b.off) })
}

// addLines adds count lines and returns what follows them, and whether there were so many.
func (t *perfTable) addLines(b []byte, start, count uint64) ([]byte, bool) {
	same := []byte{0xff} // the name before
	var before []byte    // nil: there was none
	file := uint32(0)
	for ; count > 0; count-- {
		if len(b) <= jitLineSize {
			return b, false
		}
		at, line := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint32(b[8:])
		name, ended := elffile.CString(b[jitLineSize:])
		if !ended {
			return b, false
		}
		switch {
		case bytes.Equal(name, same):
			if before == nil {
				return b, false
			}
		case before == nil || !bytes.Equal(name, before):
			var ok bool
			if file, ok = t.addName(name); !ok {
				return b, false
			}
			before = name
		}
		b = b[jitLineSize+len(name)+1:]
		if at >= start && at-start < 1<<32 {
			t.jitLines = append(t.jitLines, jitLine{uint32(at - start), file, line})
		}
	}
	return b, true
}

// addV8Lines adds lines that V8 wrote (src/diagnostics/perf-jit.cc): for perf inject, which
// puts an ELF header before the code, it adds the header's size to their addresses. At the
// end are up to seven bytes that fill up to eight. V8 of Node.js 20 writes memory that was
// freed for names of files, as long as the names are, so that what looks like the end of a
// name is none; where all are as long, the lines are found nonetheless.
func (t *perfTable) addV8Lines(b []byte, start, count uint64) {
	const fill = 8
	start += jitELFHeader
	names := len(t.names)
	rest, ok := t.addLines(b, start, count)
	if ok && len(rest) < fill && uint64(len(t.jitLines))-uint64(t.nextLine) == count {
		return
	}
	t.jitLines, t.names = t.jitLines[:t.nextLine], t.names[:names]
	if count == 0 || count > uint64(len(b)/jitLineSize) {
		return
	}
	n := int(count)
	for stride := len(b) / n; stride > jitLineSize && len(b)-n*stride < fill; stride-- {
		before := uint64(0)
		for i := range n {
			e := b[i*stride:][:stride]
			off, line := binary.LittleEndian.Uint64(e)-start, binary.LittleEndian.Uint32(e[8:])
			if off < before || off >= 1<<32 || e[stride-1] != 0 {
				break
			}
			t.jitLines, before = append(t.jitLines, jitLine{uint32(off), noJITFile, line}), off
		}
		if len(t.jitLines)-int(t.nextLine) == n {
			return
		}
		t.jitLines = t.jitLines[:t.nextLine]
	}
}

// v8Script is the file in a name that V8 gives to code: "JS:*get name /app/file.js:3:14".
func v8Script(name string) string {
	at := strings.Index(name, " /")
	if at < 0 {
		at = strings.Index(name, " file:")
	}
	if at < 0 {
		at = strings.IndexByte(name, ' ')
	}
	file := name[at+1:]
	for range 2 {
		i := strings.LastIndexByte(file, ':')
		if i < 0 {
			return ""
		}
		file = file[:i]
	}
	return file
}

// rowAt is the name, or number of the code, of the newest row at an address.
func (t *perfTable) rowAt(addr uint64) (uint32, bool) {
	for _, rows := range [][]perfRow{t.newer, t.older} {
		if i, ok := findRow(rows, addr); ok {
			return rows[i].name, true
		}
	}
	return 0, false
}

// codeAt is the code that was at an address at a time of the dump's clock; of code that was
// only made later the first, as it is noted when it is ready. Time 0 is now. It is looked for
// among the maxJITSteps pieces of code before the newest that is there.
func (t *perfTable) codeAt(addr, at uint64) *jitCode {
	number, ok := t.rowAt(addr)
	if !ok {
		return nil
	}
	found := &t.codes[number]
	for i := int(number) - 1; i >= max(0, int(number)-maxJITSteps) && at != 0 && !t.timeless && found.made > at; i-- {
		if c := &t.codes[i]; addr-c.start < uint64(c.size) {
			found = c
		}
	}
	return found
}

// lookupJIT answers from a jitdump. What is later than the last record read may be of code
// that is not known, in the place of code that is.
func (t *perfTable) lookupJIT(addr, at uint64) Result {
	if (t.full || t.behind) && (at == 0 || at > t.last || t.timeless) {
		return Result{Reason: ReasonTooLarge}
	}
	c := t.codeAt(addr, at)
	if c == nil {
		return t.unknown()
	}
	lines := t.linesOfName(c.name)
	of := t.jitLines[c.line : c.line+c.lines]
	i, found := slices.BinarySearchFunc(of, addr-c.start, func(l jitLine, off uint64) int { return cmp.Compare(uint64(l.off), off) })
	if !found {
		i--
	}
	if i < 0 {
		return Result{Lines: lines}
	}
	for i+1 < len(of) && of[i+1].off == of[i].off {
		i++ // the last one of an address counts
	}
	line := lines[0]
	file := ""
	if of[i].file == noJITFile {
		file = v8Script(line.SystemName)
	} else {
		file = string(t.name(of[i].file))
	}
	line.File, line.Line, line.StartLine = cleanName(file), int64(of[i].line), int64(of[0].line)
	return Result{Lines: []Line{line}}
}

// relieve makes room: of code that other code has taken the place of it keeps what samples
// that are still to be named can have fallen into; if that is too much no lines, and then no
// such code. If what is left is too much the table is full.
func (t *perfTable) relieve() {
	const kept = 2 * time.Minute
	t.forgetReplaced(kept, true)
	if t.bytes() > t.limit/2 {
		t.forgetReplaced(kept, false)
	}
	if t.bytes() > t.limit/2 {
		t.forgetReplaced(0, false)
	}
	t.full = t.bytes() > t.limit/2
}

// forgetReplaced drops code that other code has taken the place of, but for what is younger
// than kept, and lines unless they are to be kept.
func (t *perfTable) forgetReplaced(kept time.Duration, lines bool) {
	newest := uint64(0)
	for _, c := range t.codes {
		newest = max(newest, c.made)
	}
	live := make([]bool, len(t.codes))
	for _, rows := range [][]perfRow{t.older, t.newer} {
		for _, r := range rows {
			live[r.name] = true
		}
	}
	next := &perfTable{limit: t.limit}
	renumbered := make([]uint32, len(t.codes))
	moved := map[uint32]uint32{} // names
	name := func(off uint32) uint32 {
		to, ok := moved[off]
		if !ok {
			to, _ = next.addName(t.name(off))
			moved[off] = to
		}
		return to
	}
	copyLines := func(from []jitLine) {
		for _, l := range from {
			if l.file != noJITFile {
				l.file = name(l.file)
			}
			next.jitLines = append(next.jitLines, l)
		}
	}
	movedLines := map[uint32]uint32{} // first lines: code that has moved shares them
	for i, c := range t.codes {
		if !live[i] && (kept == 0 || newest-c.made > uint64(kept)) {
			continue
		}
		c.name = name(c.name)
		if !lines {
			c.line, c.lines = 0, 0
		}
		if c.lines > 0 {
			to, ok := movedLines[c.line]
			if !ok {
				to = uint32(len(next.jitLines))
				movedLines[c.line] = to
				copyLines(t.jitLines[c.line : c.line+c.lines])
			}
			c.line = to
		}
		renumbered[i] = uint32(len(next.codes))
		next.codes = append(next.codes, c)
	}
	for _, rows := range [][]perfRow{t.older, t.newer} {
		for i := range rows {
			rows[i].name = renumbered[rows[i].name]
		}
	}
	next.nextLine = uint32(len(next.jitLines))
	if lines {
		copyLines(t.jitLines[t.nextLine:]) // of the code that comes next
	}
	t.codes, t.jitLines, t.names, t.nextLine = next.codes, next.jitLines, next.names, next.nextLine
	clear(t.lines)
	t.held = 0
}

// readClock is the time of a clock in ns.
func readClock(clock int32) int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(clock, &ts) // fails for unknown clocks and bad pointers only
	return ts.Nano()
}

// suspended is by how much the clock of jitdumps (CLOCK_MONOTONIC) is behind the boot clock: it
// stops in suspend. In ns, by the fastest of some readings: whoever waits for the CPU between
// two clocks has not slept.
func suspended(read func(clock int32) int64) uint64 {
	const tries = 5
	behind, fastest := int64(0), int64(math.MaxInt64)
	for range tries {
		before := read(unix.CLOCK_MONOTONIC)
		boot := read(unix.CLOCK_BOOTTIME)
		after := read(unix.CLOCK_MONOTONIC)
		if after-before < fastest {
			fastest, behind = after-before, boot-after
		}
	}
	return uint64(max(behind, 0))
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
