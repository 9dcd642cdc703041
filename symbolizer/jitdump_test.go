// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"

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

func (f *jitFile) record(id uint32, body []byte) {
	*f = binary.LittleEndian.AppendUint32(*f, id)
	*f = binary.LittleEndian.AppendUint32(*f, uint32(jitRecord+len(body)))
	*f = binary.LittleEndian.AppendUint64(*f, 1)
	*f = append(*f, body...)
}

func jitWords(values ...uint64) []byte {
	b := make([]byte, 8) // pid, tid
	for _, v := range values {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

func (f *jitFile) load(addr, size uint64, name string) {
	f.record(jitLoad, append(append(jitWords(addr, addr, size, 1), name+"\x00"...), make([]byte, size)...))
}

func (f *jitFile) move(from, to, size uint64) { f.record(jitMove, jitWords(to, from, to, size, 1)) }

func TestJITDump(t *testing.T) {
	path := filepath.Join(t.TempDir(), fmt.Sprintf("jit-%d.dump", os.Getpid()))
	f := newJITFile()
	f.load(0x7f0000001000, 0x100, "add")
	f.record(2, jitWords(1, 2)) // lines, which are not read
	f.load(0x7f0000002000, 0x40, "_ZN3jit4stubEv")
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
	check(0x7f0000002010, "jit::stub")

	// More, of which the last is not written to its end; code that moves, and is replaced.
	var more jitFile
	more.move(0x7f0000002000, 0x7f0000003000, 0x40)
	more.load(0x7f0000001080, 0x80, "replaced")
	var last jitFile
	last.load(0x7f0000004000, 0x10, "last")
	appendFile(t, path, string(more)+string(last[:20]))
	check(0x7f0000003010, "jit::stub")
	check(0x7f0000001080, "replaced")
	check(0x7f000000107f, "add")
	check(0x7f0000004000, "(not_found)")
	appendFile(t, path, string(last[20:]))
	check(0x7f0000004000, "last")
}

func FuzzJITDump(f *testing.F) {
	seed := newJITFile()
	seed.load(0x1000, 16, "a")
	seed.move(0x1000, 0x2000, 16)
	f.Add([]byte(seed), uint16(50))
	f.Fuzz(func(t *testing.T, b []byte, split uint16) {
		p := newPerfTable(64 << 10)
		r := bytes.NewReader(b)
		for _, size := range []int64{min(int64(split), int64(len(b))), int64(len(b)), int64(len(b))} {
			_ = p.readJIT(r, size)
			for _, rows := range [][]perfRow{p.older, p.newer} {
				for i, row := range rows {
					if i > 0 && row.start < rows[i-1].start+uint64(rows[i-1].size) {
						t.Fatalf("rows overlap: %+v", rows)
					}
					checkResult(t, p.lookup(row.start))
				}
			}
		}
	})
}
