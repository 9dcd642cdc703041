// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"encoding/binary"
	"reflect"
	"testing"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/pclntab"
)

// goSpec describes a Go binary to be made, of any release.
type goSpec struct {
	magic     uint32
	ptrSize   int
	quantum   uint32 // 1 if 0
	relocated bool   // addresses in moduledata are left to relocations
	noModule  bool   // text is only in the header
	sections  bool   // pclntab has a section
}

// pcRange is a value that holds until a pc, which is from the function's entry.
type pcRange struct {
	value int32
	end   uint32
}

// pcTable encodes a pc-value table.
func pcTable(quantum uint32, ranges ...pcRange) []byte {
	var b []byte
	value, pc := int32(-1), uint32(0)
	for _, r := range ranges {
		delta := r.value - value
		b = binary.AppendUvarint(b, uint64(uint32(delta<<1^delta>>31)))
		b = binary.AppendUvarint(b, uint64((r.end-pc)/quantum))
		value, pc = r.value, r.end
	}
	return append(b, 0)
}

const (
	goTextAddr = 0x401000
	goRodata   = 0x500000
	goDataAddr = 0x600000
)

// bytes makes a binary with main.outer at text+0x100, into which main.middle[...] and, in
// that, main.inner are inlined from 0x10 to 0x20, and main.second at text+0x180.
func (g goSpec) bytes() []byte {
	is120, quantum := g.magic == pclntab.Magic120, max(g.quantum, 1)
	names := []byte("main.outer\x00main.middle[go.shape.int]\x00main.inner\x00main.second\x00")
	const nameMiddle, nameInner, nameSecond = 11, 11 + 26, 11 + 26 + 11
	files := []byte("outer.go\x00inner.go\x00")
	cutab := words{}
	for _, off := range []uint32{9, 0, pclntab.None} {
		cutab.u32(off)
	}
	pctab := []byte{0}
	table := func(ranges ...pcRange) uint32 {
		at := uint32(len(pctab))
		pctab = append(pctab, pcTable(quantum, ranges...)...)
		return at
	}
	pcfile := table(pcRange{1, 0x10}, pcRange{0, 0x20}, pcRange{1, 0x80})
	pcln := table(pcRange{10, 0x10}, pcRange{55, 0x20}, pcRange{12, 0x30}, pcRange{31, 0x34}, pcRange{11, 0x80})
	pcinl := table(pcRange{-1, 0x10}, pcRange{1, 0x20}, pcRange{-1, 0x30}, pcRange{0, 0x34}, pcRange{-1, 0x80})
	one := table(pcRange{1, 0x40})
	bad := table(pcRange{2, 0x40})

	gofunc := words{}
	gofunc.Write(make([]byte, 16)) // some other function's data
	for _, c := range []struct {
		name          uint32
		parent, start uint32
	}{{nameMiddle, 0x24, 30}, {nameInner, 0x30, 50}} {
		if is120 {
			gofunc.u32(0)
			gofunc.u32(c.name)
			gofunc.u32(c.parent)
			gofunc.u32(c.start)
		} else {
			gofunc.u16(0xffff)
			gofunc.u16(0)
			gofunc.u32(0)
			gofunc.u32(1)
			gofunc.u32(c.name)
			gofunc.u32(c.parent)
		}
	}

	ftab, records := words{}, words{}
	const nfunc = 2
	base := uint32(nfunc*8 + 4)
	function := func(entry, name, file, line, inl, tree, start uint32) {
		ftab.u32(entry)
		ftab.u32(base + uint32(records.Len()))
		for _, v := range []uint32{entry, name, 0, 0, 0, file, line, 3, 0} {
			records.u32(v)
		}
		if is120 {
			records.u32(start)
		}
		records.u32(4 << 24) // funcID, flag, padding, nfuncdata
		for _, v := range []uint32{0, 0, inl, pclntab.None, pclntab.None, pclntab.None, tree} {
			records.u32(v)
		}
	}
	function(0x100, 0, pcfile, pcln, pcinl, 16, 9)
	function(0x180, nameSecond, bad, one, 0, pclntab.None, 70)
	ftab.u32(0x1c0)

	is32 := g.ptrSize == 4
	h := words{is32: is32}
	h.u32(g.magic)
	h.u16(0)
	h.u8(uint8(quantum))
	h.u8(uint8(g.ptrSize))
	h.word(nfunc)
	h.word(2)
	if g.noModule {
		h.word(goTextAddr)
	} else {
		h.word(0)
	}
	at := uint64(8 + 8*g.ptrSize)
	tables := [][]byte{names, cutab.Bytes(), files, pctab, append(ftab.Bytes(), records.Bytes()...)}
	body := words{}
	for _, tab := range tables {
		for (at+uint64(body.Len()))%8 != 0 {
			body.u8(0)
		}
		h.word(at + uint64(body.Len()))
		body.Write(tab)
	}
	rodata := words{}
	rodata.Write(make([]byte, 64))
	rodata.Write(gofunc.Bytes())
	for rodata.Len()%32 != 0 {
		rodata.u8(0)
	}
	tabAt := goRodata + uint64(rodata.Len())
	rodata.Write(h.Bytes())
	rodata.Write(body.Bytes())

	module := make([]uint64, pclntab.ModuleWords)
	module[0], module[pclntab.ModuleNames] = tabAt, tabAt+at
	module[pclntab.ModuleText], module[pclntab.ModuleEtext] = goTextAddr, goTextAddr+0x1c0
	if is120 {
		module[pclntab.ModuleGofunc120] = goRodata + 64
	} else {
		module[pclntab.ModuleGofunc118] = goRodata + 64
	}
	data, rela := words{is32: is32}, words{}
	data.Write(make([]byte, 40))
	for i, v := range module {
		if g.relocated || g.noModule {
			if g.relocated && v != 0 {
				rela.word(goDataAddr + 40 + uint64(i)*8)
				rela.word(8) // R_X86_64_RELATIVE
				rela.word(v)
			}
			v = 0
		}
		data.word(v)
	}
	e := &elfSpec{
		is32: is32,
		segments: []specSegment{
			{typ: elffile.PTLoad, flags: elffile.PFExec, vaddr: 0x400000, memsz: 0x2000, filesize: 0x2000},
			{typ: elffile.PTLoad, flags: 4, section: ".rodata"},
			{typ: elffile.PTLoad, flags: 4 | elffile.PFWrite, section: ".noptrdata"},
		},
		sections: []specSection{
			{name: ".rodata", typ: 1, flags: elffile.SHFAlloc, addr: goRodata, data: rodata.Bytes()},
			{name: ".noptrdata", typ: 1, flags: elffile.SHFAlloc, addr: goDataAddr, data: data.Bytes()},
			{name: ".rela", typ: elffile.SHTRela, flags: elffile.SHFAlloc, data: rela.Bytes(), entsize: 24},
			{name: ".go.buildinfo", typ: 1},
		},
	}
	if g.sections {
		// One section of the whole of .rodata would not start with the header.
		e.sections[0].name = ".elsewhere"
		e.sections[0].data = rodata.Bytes()[:tabAt-goRodata]
		e.sections = append(e.sections, specSection{
			name: ".gopclntab", typ: 1, flags: elffile.SHFAlloc, addr: tabAt, data: rodata.Bytes()[tabAt-goRodata:],
		})
		e.segments[1] = specSegment{typ: elffile.PTLoad, flags: 4, section: ".elsewhere"}
		e.segments = append(e.segments, specSegment{typ: elffile.PTLoad, flags: 4, section: ".gopclntab"})
	}
	return e.bytes()
}

var goSpecs = map[string]goSpec{
	"1.18":                    {magic: pclntab.Magic118, ptrSize: 8, sections: true},
	"1.20":                    {magic: pclntab.Magic120, ptrSize: 8, sections: true},
	"1.18 32 bits":            {magic: pclntab.Magic118, ptrSize: 4, sections: true},
	"1.20 32 bits":            {magic: pclntab.Magic120, ptrSize: 4},
	"1.18 without a section":  {magic: pclntab.Magic118, ptrSize: 8},
	"1.20 arm64":              {magic: pclntab.Magic120, ptrSize: 8, quantum: 4},
	"1.20 relocated":          {magic: pclntab.Magic120, ptrSize: 8, relocated: true},
	"1.20 without moduledata": {magic: pclntab.Magic120, ptrSize: 8, noModule: true, sections: true},
}

func TestGoFormats(t *testing.T) {
	for name, spec := range goSpecs {
		t.Run(name, func(t *testing.T) {
			o, err := memoryObject(newSymbolizer(t, Config{}), spec.bytes())
			if err != nil {
				t.Fatal(err)
			}
			start := func(line int64) int64 {
				if spec.magic == pclntab.Magic118 {
					return 0
				}
				return line
			}
			outer := func(line int64) Line { return Line{"main.outer", "main.outer", "outer.go", line, start(9)} }
			middle := Line{"main.middle[...]", "main.middle[go.shape.int]", "outer.go", 31, start(30)}
			inner := Line{"main.inner", "main.inner", "inner.go", 55, start(50)}
			tests := map[uint64][]Line{
				0x0ff: nil,
				0x100: {outer(10)},
				0x10f: {outer(10)},
				0x110: {inner, middle, outer(12)},
				0x11f: {inner, middle, outer(12)},
				0x120: {outer(12)},
				0x130: {middle, outer(12)},
				0x134: {outer(11)},
				0x180: {{"main.second", "main.second", "", 0, start(70)}},
				0x1bf: {{"main.second", "main.second", "", 0, start(70)}},
				0x1c0: nil,
			}
			for off, want := range tests {
				if spec.noModule && len(want) > 1 {
					// Without moduledata nobody knows where the inline trees are.
					want = []Line{{"main.outer", "main.outer", "", 0, start(9)}}
				}
				r := o.Symbolize([]uint64{goTextAddr + off})[0]
				if !reflect.DeepEqual(r.Lines, want) {
					t.Errorf("text+%#x: %+v, want %+v", off, r, want)
				}
			}
		})
	}
}
