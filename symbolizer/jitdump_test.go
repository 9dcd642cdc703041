// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// jitFile makes a jitdump.
type jitFile []byte

func newJITFile() jitFile {
	b := binary.LittleEndian.AppendUint32(nil, jitMagic)
	for _, v := range []uint32{1, jitHeader, 62, 0, 1} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return append(b, make([]byte, jitHeader-len(b))...)
}

func (f *jitFile) record(id uint32, body []byte) { f.recordAt(1, id, body) }

func (f *jitFile) recordAt(time uint64, id uint32, body []byte) {
	*f = binary.LittleEndian.AppendUint32(*f, id)
	*f = binary.LittleEndian.AppendUint32(*f, uint32(jitRecord+len(body)))
	*f = binary.LittleEndian.AppendUint64(*f, time)
	*f = append(*f, body...)
}

func jitWords(values ...uint64) []byte {
	b := make([]byte, 8) // pid, tid
	for _, v := range values {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

func (f *jitFile) load(addr, size uint64, name string) { f.loadAt(1, addr, size, name) }

func (f *jitFile) loadAt(time, addr, size uint64, name string) {
	f.recordAt(time, jitLoad, append(append(jitWords(addr, addr, size, 1), name+"\x00"...), make([]byte, size)...))
}

func (f *jitFile) move(from, to, size uint64) { f.record(jitMove, jitWords(to, from, to, size, 1)) }

func TestJITDump(t *testing.T) {
	path := filepath.Join(t.TempDir(), fmt.Sprintf("jit-%d.dump", os.Getpid()))
	f := newJITFile()
	f.load(0x7f0000001000, 0x100, "add")
	f.record(2, jitWords(1, 2)) // lines, which are not read
	f.load(0x7f0000002000, 0x40, "_ZN3jit4glueEv")
	if err := os.WriteFile(path, f, 0o644); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	marker, err := unix.Mmap(int(file.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(marker)

	pm := newSymbolizer(t, Config{}).PerfMap(uint32(os.Getpid()))
	check := func(addr uint64, want string) {
		t.Helper()
		if got := nameAt(t, pm, addr); got != want {
			t.Errorf("%#x: %s, want %s", addr, got, want)
		}
	}
	check(0x7f0000001000, "add")
	check(0x7f00000010ff, "add")
	check(0x7f0000001100, "(not_found)")
	check(0x7f0000002010, "jit::glue")

	// More, of which the last is not written to its end; code that moves, and is replaced.
	var more jitFile
	more.move(0x7f0000002000, 0x7f0000003000, 0x40)
	more.load(0x7f0000001080, 0x80, "replaced")
	var last jitFile
	last.load(0x7f0000004000, 0x10, "last")
	appendFile(t, path, string(more)+string(last[:20]))
	check(0x7f0000003010, "jit::glue")
	check(0x7f0000001080, "replaced")
	check(0x7f000000107f, "add")
	check(0x7f0000004000, "(not_found)")
	appendFile(t, path, string(last[20:]))
	check(0x7f0000004000, "last")
}

// lines notes the lines of the code that comes next: pairs of bytes from its start and a line.
func (f *jitFile) lines(addr uint64, file string, pairs ...uint64) {
	b := binary.LittleEndian.AppendUint64(nil, addr)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(pairs)/2))
	for i := 0; i < len(pairs); i += 2 {
		b = binary.LittleEndian.AppendUint64(b, addr+pairs[i])
		b = binary.LittleEndian.AppendUint32(b, uint32(pairs[i+1]))
		b = binary.LittleEndian.AppendUint32(b, 0)
		b = append(append(b, file...), 0)
		file = "\xff"
	}
	f.record(jitLines, b)
}

// readDump is the table of a jitdump of at most limit bytes.
func readDump(t testing.TB, f jitFile, limit int64) *perfTable {
	t.Helper()
	p := newPerfTable(limit)
	p.dump = true
	if err := p.readJIT(bytes.NewReader(f), int64(len(f))); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestJITDumpTimes: what was where when, and on which line.
func TestJITDumpTimes(t *testing.T) {
	f := newJITFile()
	f.lines(0x1000, "/app/add.js", 0, 3, 0x10, 4, 0x10, 5, 0x40, 9)
	f.loadAt(100, 0x1000, 0x100, "add")
	f.loadAt(100, 0x5000, 0x100, "other")
	f.loadAt(200, 0x1000, 0x80, "sub")
	f.lines(0x2000, "/app/mul.js", 0x20, 7)
	f.loadAt(300, 0x1040, 0x100, "no lines of its own")
	f.recordAt(400, jitMove, jitWords(0x6000, 0x1000, 0x6000, 0x40, 1))
	f.lines(0x7000, "/app/moved.js", 8, 21)
	f.loadAt(450, 0x7000, 0x20, "moves")
	f.recordAt(500, jitMove, jitWords(0x8000, 0x7000, 0x8000, 0x20, 1))
	p := readDump(t, f, 1<<20)
	say := func(p *perfTable, addr, at uint64) string {
		r := p.lookupJIT(addr, at)
		checkResult(t, r)
		if len(r.Lines) == 0 {
			return string(r.Reason)
		}
		return fmt.Sprintf("%s %s:%d<%d", r.Lines[0].Function, r.Lines[0].File, r.Lines[0].Line, r.Lines[0].StartLine)
	}
	for _, tt := range []struct {
		addr, at uint64
		want     string
	}{
		{0x1000, 100, "add /app/add.js:3<3"}, {0x1000, 199, "add /app/add.js:3<3"}, {0x1010, 150, "add /app/add.js:5<3"}, {0x10ff, 150, "add /app/add.js:9<3"},
		{0x1000, 200, "sub :0<0"}, {0x1000, 0, "sub :0<0"}, {0x1040, 250, "sub :0<0"}, {0x1090, 250, "add /app/add.js:9<3"},
		{0x1040, 300, "no lines of its own :0<0"}, {0x1040, 0, "no lines of its own :0<0"},
		{0x1000, 50, "add /app/add.js:3<3"}, // noted when it was ready
		{0x6000, 0, "sub :0<0"}, {0x5000, 1, "other :0<0"}, {0x9000, 0, "not_found"},
		{0x8008, 0, "moves /app/moved.js:21<21"}, {0x8007, 0, "moves :0<0"},
	} {
		if got := say(p, tt.addr, tt.at); got != tt.want {
			t.Errorf("%#x at %d: %s, want %s", tt.addr, tt.at, got, tt.want)
		}
	}
	// A counter of the CPU's own is no time.
	f[jitFlags] = jitOwnClock
	if got := say(readDump(t, f, 1<<20), 0x1000, 150); got != "sub :0<0" {
		t.Errorf("%s, want what came last", got)
	}
}

// TestJITDumpForever: a compiler that makes code anew and anew fills nothing, and what came
// last has its name and line.
func TestJITDumpForever(t *testing.T) {
	f := newJITFile()
	const second = uint64(time.Second)
	for i := range uint64(20_000) {
		f.lines(0x1000+i%7*64, fmt.Sprintf("/app/%d.js", i), 0, i+1)
		f.loadAt(i*second, 0x1000+i%7*64, 64, fmt.Sprintf("function_%d", i))
	}
	p := readDump(t, f, 64<<10)
	if p.full || p.bytes() > 64<<10 {
		t.Errorf("full %v, %d bytes", p.full, p.bytes())
	}
	for i := uint64(20_000 - 7); i < 20_000; i++ {
		r := p.lookupJIT(0x1000+i%7*64, 0)
		if want := (Line{fmt.Sprintf("function_%d", i), fmt.Sprintf("function_%d", i), fmt.Sprintf("/app/%d.js", i), int64(i + 1), int64(i + 1)}); len(r.Lines) != 1 || r.Lines[0] != want {
			t.Errorf("%+v, want %+v", r, want)
		}
	}
	if r := p.lookupJIT(0x1000, 19_990*second); len(r.Lines) != 1 || r.Lines[0].Function != "function_19985" {
		t.Errorf("%+v, want what was there ten seconds ago", r)
	}
}

func FuzzJITDump(f *testing.F) {
	seed := newJITFile()
	seed.load(0x1000, 16, "a")
	seed.lines(0x3000, "a.js", 0, 1, 4, 2)
	seed.loadAt(7, 0x3000, 16, "b")
	seed.move(0x1000, 0x2000, 16)
	f.Add([]byte(seed), uint16(50))
	f.Fuzz(func(t *testing.T, b []byte, split uint16) {
		p := newPerfTable(64 << 10)
		p.dump = true
		r := bytes.NewReader(b)
		for _, size := range []int64{min(int64(split), int64(len(b))), int64(len(b)), int64(len(b))} {
			_ = p.readJIT(r, size)
			for _, rows := range [][]perfRow{p.older, p.newer} {
				for i, row := range rows {
					if i > 0 && row.start < rows[i-1].start+uint64(rows[i-1].size) {
						t.Fatalf("rows overlap: %+v", rows)
					}
					for _, at := range []uint64{0, 1, 1 << 40} {
						checkResult(t, p.lookupJIT(row.start, at))
					}
				}
			}
		}
	})
}

// TestJITDumpSharedLines: code that moves on and on keeps one copy of its lines.
func TestJITDumpSharedLines(t *testing.T) {
	f := newJITFile()
	var pairs []uint64
	for i := range uint64(200) {
		pairs = append(pairs, i, i+1)
	}
	f.lines(0x1000, "/app/a.js", pairs...)
	f.load(0x1000, 0x100, "a")
	at, to := uint64(0x1000), uint64(0x2000)
	for i := range uint64(30_000) {
		f.recordAt(i*uint64(time.Second), jitMove, jitWords(to, at, to, 0x100, 1))
		at, to = to, at
	}
	const limit = 1 << 20
	p := readDump(t, f, limit)
	if len(p.jitLines) != 200 || p.full || p.bytes() > limit {
		t.Errorf("%d lines, %d bytes, full: %v", len(p.jitLines), p.bytes(), p.full)
	}
	r := p.lookupJIT(at+77, 0)
	if want := (Line{"a", "a", "/app/a.js", 78, 1}); len(r.Lines) != 1 || r.Lines[0] != want {
		t.Errorf("%+v, want %+v", r, want)
	}
}

// TestJITDumpNextLines: room that is made between lines and their code leaves them.
func TestJITDumpNextLines(t *testing.T) {
	f := newJITFile()
	f.load(0x5000, 0x100, "before")
	f.lines(0x1000, "/app/a.js", 0, 1, 4, 2)
	p, half := readDump(t, f, 1<<20), int64(len(f))
	p.relieve()
	f.load(0x1000, 0x100, "a")
	if err := p.readJIT(bytes.NewReader(f), int64(len(f))); err != nil || p.off <= half {
		t.Fatal(p.off, err)
	}
	r := p.lookupJIT(0x1004, 0)
	if want := (Line{"a", "a", "/app/a.js", 2, 1}); len(r.Lines) != 1 || r.Lines[0] != want {
		t.Errorf("%+v, want %+v", r, want)
	}
}

// v8Lines notes lines as V8 does: the name with each one, and the addresses behind an ELF header.
func (f *jitFile) v8Lines(addr uint64, file string, pairs ...uint64) {
	b := binary.LittleEndian.AppendUint64(nil, addr)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(pairs)/2))
	for i := 0; i < len(pairs); i += 2 {
		b = binary.LittleEndian.AppendUint64(b, addr+pairs[i]+0x40)
		b = binary.LittleEndian.AppendUint32(b, uint32(pairs[i+1]))
		b = binary.LittleEndian.AppendUint32(b, 0)
		b = append(append(b, file...), 0)
	}
	f.record(jitLines, append(b, make([]byte, -len(b)&7)...))
}

// TestJITDumpV8: its addresses, and names of files that are none. A name is held once.
func TestJITDumpV8(t *testing.T) {
	f := newJITFile()
	binary.LittleEndian.PutUint32(f[jitPad:], jitV8)
	var pairs []uint64
	for i := range uint64(100) {
		pairs = append(pairs, i, i+1)
	}
	f.v8Lines(0x1000, "/app/a.js", pairs...)
	f.load(0x1000, 0x100, "JS:*a /app/a.js:1:10")
	f.v8Lines(0x2000, "\x9c\xb7\x02\x00\x00\x00\x9a\x7f!", 0, 5, 0x13, 6, 0x15, 7)
	f.load(0x2000, 0x100, "JS:^get b /app/b c.js:5:1")
	f.v8Lines(0x3000, "\x00\x00\x02\x00\x00\x00\x9a\x7f!", pairs...)
	f.load(0x3000, 0x100, "Builtin:none")
	for i, name := range []string{"get b file:///app/b.mjs:5:1", "b node:b:5:1"} {
		f.v8Lines(0x4000+uint64(i)*0x1000, "\x00\x00\x02\x00\x00\x00\x9a\x7f!", pairs...)
		f.load(0x4000+uint64(i)*0x1000, 0x100, "JS:*"+name)
	}
	p := readDump(t, f, 1<<20)
	if n := bytes.Count(p.names, []byte{0}); n != 6 {
		t.Errorf("%d names, want 6: %q", n, p.names)
	}
	for _, tt := range []struct {
		addr uint64
		want string
	}{
		{0x1000, "/app/a.js:1<1"}, {0x1042, "/app/a.js:67<1"}, {0x10ff, "/app/a.js:100<1"},
		{0x2012, "/app/b c.js:5<5"}, {0x2013, "/app/b c.js:6<5"}, {0x20ff, "/app/b c.js:7<5"}, {0x3063, ":100<1"},
		{0x4000, "file:///app/b.mjs:1<1"}, {0x5000, "node:b:1<1"},
	} {
		r := p.lookupJIT(tt.addr, 0)
		checkResult(t, r)
		if got := fmt.Sprintf("%s:%d<%d", r.Lines[0].File, r.Lines[0].Line, r.Lines[0].StartLine); got != tt.want {
			t.Errorf("%#x: %s, want %s", tt.addr, got, tt.want)
		}
	}
}

// repeated is a jitdump of one record again and again.
type repeated struct {
	header, record []byte
	read           int64
}

func (r *repeated) ReadAt(b []byte, off int64) (int, error) {
	r.read += int64(len(b))
	for n := 0; n < len(b); {
		at := off + int64(n) - int64(len(r.header))
		if at < 0 {
			n += copy(b[n:], r.header[off+int64(n):])
		} else {
			n += copy(b[n:], r.record[at%int64(len(r.record)):])
		}
	}
	return len(b), nil
}

// TestJITDumpAtOnce: a call reads so much and no more, and tells that it is behind.
func TestJITDumpAtOnce(t *testing.T) {
	var f jitFile
	f.load(0x1000, 0x100, "a")
	f.record(jitLines, append(jitWords(0x2000)[8:], make([]byte, maxJITLines+8)...))
	r := &repeated{header: newJITFile(), record: f}
	size := int64(len(r.header)) + 300*int64(len(f))
	p := newPerfTable(1 << 30)
	p.dump = true
	calls := 0
	for ; p.off < size && calls < 10; calls++ {
		r.read = 0
		if err := p.readJIT(r, size); err != nil || r.read > jitAtOnce+2*maxJITLines {
			t.Fatalf("%d bytes read, %v", r.read, err)
		}
		want := ReasonTooLarge
		if p.off == size {
			want = ""
		}
		if got := p.lookupJIT(0x1000, 2).Reason; got != want {
			t.Errorf("%d of %d read: %q, want %q", p.off, size, got, want)
		}
		if got := p.lookupJIT(0x1000, 1); len(got.Lines) != 1 {
			t.Errorf("%+v of what is read", got)
		}
	}
	if calls < 2 || p.off != size {
		t.Errorf("%d of %d read in %d calls", p.off, size, calls)
	}
}

// TestJITDumpMoves: to move code takes about what to make it takes.
func TestJITDumpMoves(t *testing.T) {
	made, moves := newJITFile(), newJITFile()
	for i := range uint64(5000) {
		made.load(0x10000+i*16, 1, "a")
		moves.load(0x10000+i*16, 1, "a")
		moves.move(0x10000+i*16, 0x1000000-i*16, 1)
	}
	allocated := func(f jitFile) uint64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		p := readDump(t, f, 1<<30)
		runtime.ReadMemStats(&after)
		if p.lookupJIT(0x10000+4999*16, 0).Lines == nil {
			t.Error("not found")
		}
		return after.TotalAlloc - before.TotalAlloc
	}
	if a, b := allocated(made), allocated(moves); b > 5*a {
		t.Errorf("%d bytes allocated with moves, %d without", b, a)
	}
}

// TestJITDumpSteps: history is looked through so far and no further.
func TestJITDumpSteps(t *testing.T) {
	for between, want := range map[uint64]string{maxJITSteps - 1: "old", maxJITSteps: "new"} {
		f := newJITFile()
		f.loadAt(1, 0x1000, 16, "old")
		for i := range between {
			f.loadAt(2, 0x10000+i%16*16, 16, "other")
		}
		f.loadAt(3, 0x1000, 16, "new")
		if r := readDump(t, f, 1<<30).lookupJIT(0x1000, 2); len(r.Lines) != 1 || r.Lines[0].Function != want {
			t.Errorf("%d between: %+v, want %s", between, r, want)
		}
	}
}

// TestJITDumpPressure: lines go first, then history, and then nothing new is taken and what
// may be new has no name.
func TestJITDumpPressure(t *testing.T) {
	const limit = 1 << 20
	f := newJITFile()
	f.loadAt(1, 0x8000, 64, "old")
	f.loadAt(2, 0x8000, 64, "new")
	var pairs []uint64
	for i := range uint64(32) {
		pairs = append(pairs, i, i+1)
	}
	for i := range uint64(4000) {
		f.lines(0x10000+i*64, fmt.Sprintf("/app/%d.js", i), pairs...)
		f.loadAt(i+1, 0x10000+i*64, 64, fmt.Sprintf("f%d", i))
	}
	name := func(p *perfTable, addr, at uint64) string {
		if r := p.lookupJIT(addr, at); len(r.Lines) == 1 {
			return r.Lines[0].Function
		} else {
			return string(r.Reason)
		}
	}
	p := readDump(t, f, limit)
	if first, last := name(p, 0x10000, 0), name(p, 0x10000+3999*64, 0); p.full || first != "f0" || last != "f3999" || len(p.jitLines) == 0 || p.bytes() > limit {
		t.Errorf("lines: %s, %s, full: %v, %d lines, %d bytes", first, last, p.full, len(p.jitLines), p.bytes())
	}
	if got := name(p, 0x8000, 1); got != "old" {
		t.Errorf("history goes before lines: %s", got)
	}

	f = newJITFile()
	for i := range uint64(50_000) {
		f.loadAt(i+1, 0x10000+i%100*64, 64, fmt.Sprintf("f%d", i))
	}
	p = readDump(t, f, limit)
	if got := name(p, 0x10000, 0); p.full || got != "f49900" {
		t.Errorf("history: %s, full: %v", got, p.full)
	}

	f = newJITFile()
	for i := range uint64(50_000) {
		f.loadAt(i+1, 0x10000+i*64, 64, fmt.Sprintf("f%d", i))
	}
	p = readDump(t, f, limit)
	if !p.full || p.bytes() > limit {
		t.Fatalf("full: %v, %d bytes", p.full, p.bytes())
	}
	for at, want := range map[uint64]string{1: "f0", p.last: "f0", p.last + 1: string(ReasonTooLarge), 0: string(ReasonTooLarge)} {
		if got := name(p, 0x10000, at); got != want {
			t.Errorf("at %d of %d: %s, want %s", at, p.last, got, want)
		}
	}
}

// TestSuspended: a wait for the CPU between two clocks is no sleep.
func TestSuspended(t *testing.T) {
	for _, slept := range []int64{0, int64(time.Hour)} {
		now, calls := int64(1e12), 0
		read := func(clock int32) int64 {
			calls++
			if now += 50; calls%3 == 2 && calls < 9 {
				now += int64(10 * time.Millisecond)
			}
			if clock == unix.CLOCK_BOOTTIME {
				return now + slept
			}
			return now
		}
		if got := int64(suspended(read)); got < slept-100 || got > slept {
			t.Errorf("%d ns, want %d", got, slept)
		}
	}
}
