// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/elffile"
)

// cieBytes is a CIE of amd64 with more instructions, and its augmentation.
func cieBytes(augmentation string, data []byte, instructions ...byte) []byte {
	b := []byte{0, 0, 0, 0, 1}
	b = append(append(b, augmentation...), 0, 1, 0x78, 16)
	if augmentation != "" && augmentation[0] == 'z' {
		b = append(b, byte(len(data)))
	}
	b = append(append(b, data...), 0x0c, 7, 8, 0x90, 1)
	return recordBytes(append(b, instructions...))
}

func recordBytes(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...)
}

// fdeBytes is an FDE with absolute addresses at an offset in the section, whose CIE is at 0.
func fdeBytes(at int, start, size uint64, instructions ...byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(at+4))
	b = binary.LittleEndian.AppendUint64(b, start)
	b = binary.LittleEndian.AppendUint64(b, size)
	return recordBytes(append(b, instructions...))
}

// TestHostile gives the reader what would make a careless one loop, allocate or crash.
func TestHostile(t *testing.T) {
	cie, strange, indirect := cieBytes("", nil), cieBytes("zX", []byte{0}), cieBytes("zR", []byte{0x9b})
	one := func(instructions ...byte) []byte {
		return slices.Concat(cie, fdeBytes(len(cie), 0x1000, 0x100, instructions...))
	}
	repeat := func(n int, b ...byte) []byte { return bytes.Repeat(b, n) }
	many := slices.Clone(cie)
	for i := range 30000 {
		many = append(many, fdeBytes(len(many), 0x1000+uint64(i%0x1000), 1<<40, 0x41)...)
	}
	for _, tt := range []struct {
		name   string
		frames []byte
		skip   Skip
		good   bool // 0x1000 has its rule nevertheless
	}{
		{"nothing wrong", one(0x41, 0x0e, 16), "", true},
		{"length beyond the end", append(one(0x41), 0xff, 0xff, 0, 0, 1, 2, 3, 4), SkipMalformed, true},
		{"64-bit length", append(one(0x41), slices.Concat(repeat(12, 0xff), repeat(12, 0))...), SkipMalformed, true},
		{"CIE before the section", recordBytes([]byte{0xf0, 0xff, 0xff, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0}), SkipMalformed, false},
		{"CIE is an FDE", fdeBytes(0, 0x1000, 0x100, 0x41), SkipMalformed, false},
		{"remember bomb", one(append(repeat(100, 0x0a), 0x41, 0x0e, 16)...), SkipLimit, false},
		{"restore without remember", one(0x41, 0x0b), SkipMalformed, true},
		{"unknown instruction", one(0x41, 0x3f), SkipInstruction, true},
		{"unknown augmentation", slices.Concat(strange, fdeBytes(len(strange), 0x1000, 0x100)), SkipAugmentation, false},
		{"indirect pointers", slices.Concat(indirect, fdeBytes(len(indirect), 0x1000, 0x100)), SkipEncoding, false},
		{"LEB without end", one(append([]byte{0x41, 0x0e}, repeat(40, 0xff)...)...), SkipMalformed, true},
		{"expression beyond the end", one(0x41, 0x0f, 0x7f, 0x77), SkipMalformed, true},
		{"expression of a thousand values", one(append([]byte{0x41, 0x0f, 0xe8, 0x07}, repeat(1000, 0x30)...)...), SkipExpression, true},
		{"CFA that wraps round", one(0x41, 0x0c, 7, 0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1), "", true},
		{"range that wraps round", slices.Concat(cie, fdeBytes(len(cie), 0x1000, ^uint64(0), 0x41)), SkipMalformed, false},
		{"ranges of everything", many, "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			began := time.Now()
			b := smallELF(elffile.MachineAMD64, ".eh_frame", tt.frames, nil)
			f, err := Open(bytes.NewReader(b), int64(len(b)), nil)
			if err != nil {
				t.Fatal(err)
			}
			ts := build(t, f)
			if got := ts.rule(0x1000) == narrow(KindSP, 1, 0, 0); got != tt.good {
				t.Errorf("0x1000 has %v", ts.rule(0x1000))
			}
			if tt.skip != "" && ts.skipped[tt.skip] == 0 {
				t.Errorf("skipped %v, want %s", ts.skipped, tt.skip)
			}
			if d := time.Since(began); d > 10*time.Second {
				t.Errorf("it took %v", d)
			}
		})
	}
}

// TestLyingIndex has tables in .eh_frame_hdr that lead elsewhere: .eh_frame itself is read
// then.
func TestLyingIndex(t *testing.T) {
	cie := cieBytes("", nil)
	frames := slices.Concat(cie, fdeBytes(len(cie), 0x1000, 0x100, 0x41))
	good := hdrBytes(1, 0x1000, 0x3000+len(cie))
	for name, tt := range map[string]struct {
		hdr     []byte
		skipped int
	}{
		"right":             {good, 0},
		"another start":     {hdrBytes(1, 0x1010, 0x3000+len(cie)), 1},
		"leads to the CIE":  {hdrBytes(1, 0x1000, 0x3000), 1},
		"leads into an FDE": {hdrBytes(1, 0x1000, 0x3000+len(cie)+3), 1},
		"leads away":        {hdrBytes(1, 0x1000, 0x7000), 1},
		"not sorted":        {append(hdrBytes(2, 0x1000, 0x3000+len(cie)), hdrBytes(1, 0x800, 0x3000)[12:20]...), 1},
		"too many":          {hdrBytes(1<<30, 0x1000, 0x3000+len(cie)), 0},
		"no table":          {good[:8], 0},
		"another version":   {append([]byte{2}, good[1:]...), 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := smallELF(elffile.MachineAMD64, ".eh_frame", frames, tt.hdr)
			f, err := Open(bytes.NewReader(b), int64(len(b)), nil)
			if err != nil {
				t.Fatal(err)
			}
			ts := build(t, f)
			if got := ts.rule(0x1080); got != narrow(KindSP, 1, 0, 0) {
				t.Errorf("0x1080 has %v", got)
			}
			if ts.skipped[SkipIndex] != tt.skipped {
				t.Errorf("skipped %v", ts.skipped)
			}
		})
	}
}

// hdrBytes is an .eh_frame_hdr at 0x2000 with one entry.
func hdrBytes(n uint32, start, frame int) []byte {
	b := []byte{1, 0x1b, 0x03, 0x3b}
	for _, v := range []int{0x3000 - 0x2004, int(n), start - 0x2000, frame - 0x2000} {
		b = binary.LittleEndian.AppendUint32(b, uint32(int32(v)))
	}
	return b
}

// failing fails from an offset on, as a file does that has shrunk.
type failing struct {
	io.ReaderAt
	from int64
	err  error
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	if f.err != nil && off+int64(len(p)) > f.from {
		return 0, f.err
	}
	return f.ReaderAt.ReadAt(p, off)
}

// TestReadErrors says so where a file can not be read, instead of making a table of half of
// it, and makes it when it can be read again.
func TestReadErrors(t *testing.T) {
	path := buildC(t, cWalkSource, "-O2")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, hdr := range []bool{true, false} {
		want := openFile(t, path, nil)
		r := &failing{ReaderAt: bytes.NewReader(b)}
		f, err := Open(r, int64(len(b)), nil)
		if err != nil {
			t.Fatal(err)
		}
		if !hdr {
			want.index, want.sorted, f.index, f.sorted = nil, false, nil, false
		}
		n := f.Regions()[0]
		for _, failure := range []error{io.EOF, os.ErrPermission} {
			r.err, r.from = failure, int64(f.frames.off)
			if _, err := f.Region(n); err == nil || failure != io.EOF && !errors.Is(err, failure) {
				t.Fatalf("error %v", err)
			}
		}
		r.err = nil
		got, err1 := f.Region(n)
		expected, err2 := want.Region(n)
		if err1 != nil || err2 != nil || !sameTable(got, expected) || got.Rows < 10 {
			t.Errorf("%d rows, want %d; errors %v, %v", got.Rows, expected.Rows, err1, err2)
		}
	}
}

// TestOverlap has FDEs that overlap: each ends where the next one begins, as unwinders see
// it that look for the last start. And it restores what a CIE has set.
func TestOverlap(t *testing.T) {
	frames := cieBytes("", nil, 0x86, 2) // rbp at CFA - 16
	frames = append(frames, fdeBytes(len(frames), 0x1000, 0x100, 0x41, 0x0e, 16, 0x86, 3, 0x41, 0xc6)...)
	frames = append(frames, fdeBytes(len(frames), 0x1040, 0x20, 0x06, 6, 0x41, 0x0e, 24)...)
	frames = append(frames, fdeBytes(len(frames), 0x1040, 0x40, 0x41, 0x0e, 32)...) // the first one counts
	b := smallELF(elffile.MachineAMD64, ".eh_frame", frames, nil)
	f, err := Open(bytes.NewReader(b), int64(len(b)), nil)
	if err != nil {
		t.Fatal(err)
	}
	ts := build(t, f)
	for addr, want := range map[uint64]Rule{
		0xfff: 0, 0x1000: narrow(KindSP, 1, 2, 0), 0x1001: narrow(KindSP, 2, 3, 0), 0x1002: narrow(KindSP, 2, 2, 0),
		0x103f: narrow(KindSP, 2, 2, 0), 0x1040: narrow(KindSP, 1, 2, 0), 0x1041: narrow(KindSP, 3, 2, 0),
		0x105f: narrow(KindSP, 3, 2, 0), 0x1060: 0, 0x10ff: 0,
	} {
		if got := ts.rule(addr); got != want {
			t.Errorf("%#x: %v, want %v", addr, got, want)
		}
	}
}
