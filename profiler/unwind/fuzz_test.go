// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/pclntab"
)

// exercise makes all tables of a file that may say anything, and checks what comes out.
func exercise(t *testing.T, b []byte) {
	f, err := Open(bytes.NewReader(b), int64(len(b)), func(string, string, uint32) (io.ReaderAt, int64, error) {
		return bytes.NewReader(b), int64(len(b)), nil
	})
	if err != nil {
		return
	}
	regions := f.Regions()
	for _, n := range regions[:min(len(regions), 8)] {
		r, err := f.Region(n)
		if err != nil {
			continue
		}
		checkRegion(t, &r)
		again, err := f.Region(n)
		if err != nil || !sameTable(r, again) {
			t.Fatalf("region %d is another one the second time, error %v", n, err)
		}
		for off := uint64(0); off < RegionSize; off += 61 {
			_ = r.Rule(off).String()
		}
		walkRegion(t, &r)
	}
}

// walkRegion walks a stack of small numbers and addresses of itself by whatever rules a
// table has.
func walkRegion(t *testing.T, r *Region) {
	const start, code = 0x7ffe00000000, 0x400000
	stack := make([]byte, 2048)
	for i := range len(stack) / 8 {
		v := uint64(code + i*997)
		if i%3 == 0 {
			v = start + uint64(i*11%len(stack))&^7
		}
		binary.LittleEndian.PutUint64(stack[8*i:], v)
	}
	for _, a := range []*arch{&amd64, &arm64} {
		w := &Walker{arch: a, Lookup: func(addr uint64) (*Region, uint64, bool) { return r, addr - code, addr-code < RegionSize }}
		for off := uint64(0); off < RegionSize; off += RegionSize / 16 {
			addrs, outcome := w.Walk(nil, bpf.Frame{IP: code + off, SP: start, FP: start + 64, Exact: true, Leaf: true}, 0, stack, start)
			if outcome == 0 || len(addrs) == 0 || len(addrs) > bpf.MaxUserFrames {
				t.Fatalf("%d frames, outcome %v", len(addrs), outcome)
			}
		}
	}
}

// smallELF is a file with code at 0x1000, .eh_frame_hdr, and a section of the given name and
// contents at 0x3000.
func smallELF(machine uint16, name string, frames []byte, hdr []byte) []byte {
	const codeAt, hdrAt, framesAt, names = 0x1000, 0x2000, 0x3000, "\x00.eh_frame\x00.debug_frame\x00.gopclntab\x00.shstrtab\x00"
	b := make([]byte, framesAt, framesAt+len(frames)+1024)
	copy(b[hdrAt:framesAt], hdr)
	b = append(b, frames...)
	namesAt := len(b)
	b = append(b, names...)
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	shoff := len(b)
	le := binary.LittleEndian
	section := func(name, typ uint32, addr, off, size uint64) {
		s := make([]byte, 64)
		le.PutUint32(s, name)
		le.PutUint32(s[4:], typ)
		le.PutUint64(s[16:], addr)
		le.PutUint64(s[24:], off)
		le.PutUint64(s[32:], size)
		b = append(b, s...)
	}
	section(0, 0, 0, 0, 0)
	section(uint32(strings.Index(names, name)), 1, framesAt, framesAt, uint64(len(frames)))
	section(uint32(strings.Index(names, ".shstrtab")), 3, 0, uint64(namesAt), uint64(len(names)))
	copy(b, "\x7fELF\x02\x01\x01")
	for i, v := range []uint16{3, machine, 1, 0} {
		le.PutUint16(b[16+2*i:], v)
	}
	le.PutUint64(b[32:], 64)
	le.PutUint64(b[40:], uint64(shoff))
	for i, v := range []uint16{64, 56, 3, 64, 3, 2} {
		le.PutUint16(b[52+2*i:], v)
	}
	segment := func(i int, typ, flags uint32, off, size uint64) {
		p := b[64+56*i:]
		le.PutUint32(p, typ)
		le.PutUint32(p[4:], flags)
		for j, v := range []uint64{off, off, off, size, size, 0x1000} {
			le.PutUint64(p[8+8*j:], v)
		}
	}
	segment(0, elffile.PTLoad, elffile.PFExec, codeAt, hdrAt-codeAt)
	segment(1, elffile.PTLoad, 4, hdrAt, uint64(namesAt-hdrAt))
	if hdr != nil {
		segment(2, elffile.PTGNUEHFrame, 4, hdrAt, uint64(len(hdr)))
	}
	return b
}

// frameSeeds are .eh_frame sections of a compiled program and of rare instructions.
func frameSeeds(f *testing.F) (seeds [][]byte) {
	dir := f.TempDir()
	src := filepath.Join(dir, "rare.s")
	if err := os.WriteFile(src, []byte(rareSource), 0o644); err != nil {
		f.Fatal(err)
	}
	paths := []string{buildC(f, cWalkSource, "-O2", "-nostartfiles", "-shared", "-fPIC")}
	if machine == 62 {
		out := filepath.Join(dir, "rare.so")
		run(f, "gcc", "-shared", "-nostdlib", "-o", out, src)
		paths = append(paths, out)
	}
	for _, p := range paths {
		file := openFile(f, p, nil)
		b := make([]byte, file.frames.size)
		if err := elffile.ReadAt(file.image, b, file.frames.off); err != nil {
			f.Fatal(err)
		}
		// Moved, so that the code is where smallELF has it.
		delta := uint32(file.frames.addr - 0x3000)
		for off := uint64(0); off < uint64(len(b)); {
			r, ok := file.frames.record(off)
			if !ok || r.size == 0 {
				break
			}
			if !r.isCIE {
				at := b[r.off:]
				binary.LittleEndian.PutUint32(at, binary.LittleEndian.Uint32(at)+delta)
			}
			off = r.next
		}
		seeds = append(seeds, b)
	}
	return seeds
}

// FuzzFrames reads any bytes as .eh_frame and .debug_frame of both machines.
func FuzzFrames(f *testing.F) {
	for _, b := range frameSeeds(f) {
		f.Add(b, false, false)
		f.Add(b, true, true)
	}
	f.Fuzz(func(t *testing.T, b []byte, debug, arm bool) {
		m := uint16(elffile.MachineAMD64)
		if arm {
			m = elffile.MachineARM64
		}
		name := ".eh_frame"
		if debug {
			name = ".debug_frame"
		}
		exercise(t, smallELF(m, name, b, nil))
	})
}

// FuzzIndex has any bytes as .eh_frame_hdr. Whatever it says, an address has the rule that
// its FDE has, or none: the table only leads to FDEs.
func FuzzIndex(f *testing.F) {
	seeds := frameSeeds(f)
	for _, b := range seeds {
		f.Add(b, []byte("\x01\x1b\x03\x3b\xfc\x0f\x00\x00\x01\x00\x00\x00\x00\xf0\xff\xff\x18\x10\x00\x00"))
		f.Add(b, []byte("\x01\xff\xff\xff"))
	}
	f.Fuzz(func(t *testing.T, frames, hdr []byte) {
		exercise(t, smallELF(elffile.MachineAMD64, ".eh_frame", frames, hdr[:min(len(hdr), 0x1000)]))
	})
}

// FuzzELF has any bytes as a file.
func FuzzELF(f *testing.F) {
	for _, b := range frameSeeds(f) {
		f.Add(smallELF(elffile.MachineAMD64, ".eh_frame", b, nil))
		f.Add(smallELF(elffile.MachineARM64, ".debug_frame", b, []byte("\x01\x1b\x03\x3b")))
	}
	for _, flags := range [][]string{{"-O2"}, {"-O2", "-Wl,-z,noseparate-code"}} {
		path := buildC(f, "void _start(void) { for (;;); }", append(flags, "-nostdlib", "-static", "-Wl,--build-id")...)
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(exercise)
}

// goPclntab is a table of some functions of the runtime, 64 bytes each, whose frames have
// 24 bytes from byte 16 to byte 48.
func goPclntab(quantum byte) []byte {
	functions := []struct {
		name  string
		flags byte
	}{
		{"main.main", 0}, {"runtime.systemstack", 2}, {"runtime.mcall", 2}, {"runtime.goexit", 1}, {"runtime.asmcgocall", 2},
		{"runtime.sigreturn__sigaction", 4}, {"crosscall2", 4}, {"runtime.sigtramp", 5}, {"runtime.nanotime1", 2},
	}
	var names, table, records []byte
	values := []byte{0, 2, 16 / quantum, 48, 32 / quantum, 47, 16 / quantum, 0}
	le := binary.LittleEndian
	fixed := 8*len(functions) + 4
	for i, fn := range functions {
		table = le.AppendUint32(table, uint32(i*64))
		table = le.AppendUint32(table, uint32(fixed+len(records)))
		for _, v := range []uint32{uint32(i * 64), uint32(len(names)), 0, 0, 1, 0, 0, 0, 0, 0} {
			records = le.AppendUint32(records, v)
		}
		records = append(records, 0, fn.flags, 0, 0)
		names = append(append(names, fn.name...), 0)
	}
	table = le.AppendUint32(table, uint32(len(functions)*64))
	h := le.AppendUint32(nil, pclntab.Magic120)
	h = append(h, 0, 0, quantum, 8)
	at := uint64(8 + 8*8)
	for _, v := range []uint64{uint64(len(functions)), 0, 0x1000, at, at + uint64(len(names)), at + uint64(len(names)), at + uint64(len(names)), at + uint64(len(names)+len(values))} {
		h = le.AppendUint64(h, v)
	}
	return slices.Concat(h, names, values, table, records)
}

// TestGoSwitches checks the rules of functions that switch stacks, in the middle of each.
func TestGoSwitches(t *testing.T) {
	for _, tt := range []struct {
		machine uint16
		quantum byte
		want    []string
	}{
		{elffile.MachineAMD64, 1, []string{
			"sp+32 fp=c-16", "go 16 fp=c-16", "end", "end", "go 16 fp=c-16", "signal", "sp+32 fp=c-16", "sp+32 fp=c-16", "go 16 fp=c-16",
		}},
		{elffile.MachineARM64, 4, []string{
			"sp+24 fp=c-32 second=c-24", "go 32 fp=c-32 second=c-24", "end", "end", "go 24 second=c-24", "signal", "sp+24 fp=c-16 second=c-8",
			"sp+24 fp=c-32 second=c-24", "go 32 fp=c-32 second=c-24",
		}},
	} {
		b := smallELF(tt.machine, ".gopclntab", goPclntab(tt.quantum), nil)
		f, err := Open(bytes.NewReader(b), int64(len(b)), nil)
		if err != nil {
			t.Fatal(err)
		}
		ts := build(t, f)
		for i, want := range tt.want {
			if got := ts.rule(0x1000 + uint64(i)*64 + 32).String(); got != want {
				t.Errorf("machine %d, function %d: %s, want %s", tt.machine, i, got, want)
			}
		}
		// A handler returns to the trampoline's first byte.
		if got := ts.rule(0x1000 + 5*64 - 1); got.Kind() != KindSignal {
			t.Errorf("before the trampoline: %v", got)
		}
	}
}

// FuzzGo has any bytes as a pclntab.
func FuzzGo(f *testing.F) {
	f.Add(goPclntab(1), false)
	f.Add(goPclntab(4), true)
	f.Fuzz(func(t *testing.T, b []byte, arm bool) {
		m := uint16(elffile.MachineAMD64)
		if arm {
			m = elffile.MachineARM64
		}
		exercise(t, smallELF(m, ".gopclntab", b, nil))
	})
}

func FuzzDebugLink(f *testing.F) {
	f.Add([]byte("libc.so.debug\x00\x00\x00\x78\x56\x34\x12"))
	f.Add([]byte("../x\x00\x00\x00\x00\x01\x02\x03\x04"))
	f.Add([]byte("a\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		name, _ := elffile.ParseDebugLink(b)
		if strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
			t.Errorf("%q", name)
		}
	})
}

// FuzzCachedTable has any bytes as a file of the cache.
func FuzzCachedTable(f *testing.F) {
	header := (&CacheKey{"id", 1, 2}).header(3)
	for _, n := range []int{0, 1, 100} {
		r := testTable(n)
		f.Add(encodeTable(&r, header)[len(header):])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := decodeTable(append(bytes.Clone(header), b...), header); err == nil {
			for off := uint64(0); off < RegionSize; off += 61 {
				r.Rule(off)
			}
		}
		// As if the checksum were right.
		d := cursor{b: b}
		r := Region{FirstBucket: d.u16(), Rows: int(d.u16())}
		for range min(d.left()/2, maxWords) {
			r.Words = append(r.Words, d.u16())
		}
		if r.valid() {
			for off := uint64(0); off < RegionSize; off += 61 {
				r.Rule(off)
			}
		}
	})
}
