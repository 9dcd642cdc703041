// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"encoding/binary"

	"github.com/hostflame/hostflame/internal/elffile"
)

// elfSpec describes an ELF file to be made: what compilers do not make on request.
type elfSpec struct {
	is32     bool
	machine  uint16
	segments []specSegment
	sections []specSection // without the first, null, and the last, .shstrtab
}

// specSegment is a program header. Its contents are the section named, if any.
type specSegment struct {
	typ, flags                  uint32
	vaddr, memsz, off, filesize uint64
	section                     string
}

type specSection struct {
	name    string
	typ     uint32
	flags   uint64
	addr    uint64
	size    uint64 // of a section without data
	data    []byte
	link    uint32
	entsize uint64
}

type specSymbol struct {
	name        string
	value, size uint64
	info        uint8
	section     uint16
}

const (
	globalFunc = stbGlobal<<4 | sttFunc
	weakFunc   = stbWeak<<4 | sttFunc
	localFunc  = stbLocal<<4 | sttFunc
)

// words writes little-endian fields.
type words struct {
	bytes.Buffer
	is32 bool
}

func (w *words) u8(v uint8)   { w.WriteByte(v) }
func (w *words) u16(v uint16) { w.Write(binary.LittleEndian.AppendUint16(nil, v)) }
func (w *words) u32(v uint32) { w.Write(binary.LittleEndian.AppendUint32(nil, v)) }
func (w *words) word(v uint64) {
	if w.is32 {
		w.u32(uint32(v))
	} else {
		w.Write(binary.LittleEndian.AppendUint64(nil, v))
	}
}

// symbols makes the contents of a symbol table and its strings.
func symbols(is32 bool, syms ...specSymbol) (tab, strtab []byte) {
	w := words{is32: is32}
	strs := []byte{0}
	for _, s := range append([]specSymbol{{}}, syms...) {
		name := uint32(0)
		if s.name != "" {
			name = uint32(len(strs))
			strs = append(append(strs, s.name...), 0)
		}
		w.u32(name)
		if is32 {
			w.word(s.value)
			w.word(s.size)
		}
		w.u8(s.info)
		w.u8(0)
		w.u16(s.section)
		if !is32 {
			w.word(s.value)
			w.word(s.size)
		}
	}
	return w.Bytes(), strs
}

// bytes lays the file out: headers, sections' data, section headers.
func (e *elfSpec) bytes() []byte {
	m := elffile.Image{Is64: !e.is32}
	headers := uint64(64)
	if e.is32 {
		headers = 52
	}
	off := headers + uint64(len(e.segments))*m.PhdrSize()
	names := []byte{0}
	sections := append([]specSection{{}}, e.sections...)
	sections = append(sections, specSection{name: ".shstrtab", typ: 3})
	nameAt, offAt := make([]uint32, len(sections)), make([]uint64, len(sections))
	for i, s := range sections[1:] {
		nameAt[i+1] = uint32(len(names))
		names = append(append(names, s.name...), 0)
	}
	sections[len(sections)-1].data = names
	body := words{is32: e.is32}
	for i, s := range sections {
		for (off+uint64(body.Len()))%32 != 0 {
			body.u8(0)
		}
		offAt[i] = off + uint64(body.Len())
		body.Write(s.data)
	}
	shoff := off + uint64(body.Len())

	w := words{is32: e.is32}
	class := byte(elffile.Class64)
	if e.is32 {
		class = elffile.Class32
	}
	w.Write(append([]byte("\x7fELF"), class, elffile.DataLSB, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0))
	w.u16(elffile.TypeDyn)
	w.u16(e.machine)
	w.u32(1)
	w.word(0)
	w.word(headers)
	w.word(shoff)
	w.u32(0)
	w.u16(uint16(headers))
	w.u16(uint16(m.PhdrSize()))
	w.u16(uint16(len(e.segments)))
	w.u16(uint16(m.ShdrSize()))
	w.u16(uint16(len(sections)))
	w.u16(uint16(len(sections) - 1))
	for _, s := range e.segments {
		for i, sec := range sections {
			if s.section != "" && sec.name == s.section {
				s.off, s.filesize = offAt[i], uint64(len(sec.data))
				s.memsz, s.vaddr = s.filesize, sec.addr
			}
		}
		w.u32(s.typ)
		if !e.is32 {
			w.u32(s.flags)
		}
		w.word(s.off)
		w.word(s.vaddr)
		w.word(s.vaddr)
		w.word(s.filesize)
		w.word(s.memsz)
		if e.is32 {
			w.u32(s.flags)
		}
		w.word(0x1000)
	}
	w.Write(body.Bytes())
	for i, s := range sections {
		w.u32(nameAt[i])
		w.u32(s.typ)
		w.word(s.flags)
		w.word(s.addr)
		w.word(offAt[i])
		w.word(max(s.size, uint64(len(s.data))))
		w.u32(s.link)
		w.u32(0)
		w.word(1)
		w.word(s.entsize)
	}
	return w.Bytes()
}

// memoryObject is an object whose file is b.
func memoryObject(s *Symbolizer, b []byte) (*Object, error) {
	img, err := elffile.Parse(elffile.FromBytes(b))
	if err != nil {
		return nil, err
	}
	return &Object{sym: s, image: img}, nil
}

// symbolSpec is a file with a symbol table: .text is section 1, .elsewhere 2, .data 3, .far 4.
func symbolSpec(is32 bool, typ uint32, syms ...specSymbol) *elfSpec {
	tab, strs := symbols(is32, syms...)
	entsize := uint64(24)
	if is32 {
		entsize = 16
	}
	const code = elffile.SHFAlloc | elffile.SHFExecInstr
	e := &elfSpec{
		is32: is32,
		segments: []specSegment{
			{typ: elffile.PTLoad, flags: 4, vaddr: 0, memsz: 0x1000, filesize: 0x1000},
			{typ: elffile.PTLoad, flags: elffile.PFExec | 4, vaddr: 0x1000, memsz: 0x3000, off: 0x1000, filesize: 0x3000},
			{typ: elffile.PTLoad, flags: elffile.PFWrite | 4, vaddr: 0x5000, memsz: 0x1000, off: 0x4000, filesize: 0x1000},
		},
		sections: []specSection{
			{name: ".text", typ: 1, flags: code, addr: 0x1000, size: 0x1000},
			{name: ".elsewhere", typ: 1, flags: code, addr: 0x3000, size: 0x100},
			{name: ".data", typ: 1, flags: elffile.SHFAlloc, addr: 0x5000, size: 0x1000},
			{name: ".far", typ: 1, flags: code, addr: 0x7f0000000000, size: 0x1000},
			{name: ".symtab", typ: typ, data: tab, link: 6, entsize: entsize},
			{name: ".strtab", typ: 3, data: strs},
		},
	}
	if is32 {
		e.machine = elffile.MachineARM
		e.sections[3].addr = 0x7f000000
	} else {
		e.segments = append(e.segments, specSegment{typ: elffile.PTLoad, flags: elffile.PFExec | 4, vaddr: 0x7f0000000000, memsz: 0x1000, off: 0x1_8000_0000, filesize: 0x1000})
	}
	return e
}
