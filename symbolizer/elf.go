// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"
)

// ELF constants (System V ABI, "Object Files"; the GNU extensions from elf.h).
const (
	elfClass32 = 1
	elfClass64 = 2
	elfDataLSB = 1

	elfTypeRel  = 1
	elfTypeExec = 2
	elfTypeDyn  = 3

	elfMachineARM = 40

	ptLoad    = 1
	ptDynamic = 2
	ptNote    = 4
	pfExec    = 1
	pfWrite   = 2

	shtSymtab      = 2
	shtRela        = 4
	shtNote        = 7
	shtNobits      = 8
	shtDynsym      = 11
	shfAlloc       = 2
	shfExecInstr   = 4
	shfCompressed  = 0x800
	shnUndef       = 0
	shnLoReserve   = 0xff00
	shnXIndex      = 0xffff
	maxSegments    = 1170    // what Linux executes: 64 KiB of program headers
	maxSections    = 1 << 16 // of a linked file; a file with more has lost its way
	maxNameSection = 1 << 20 // bytes of .shstrtab
)

// extent is a range of a file.
type extent struct{ off, size uint64 }

// image is the parsed headers of an ELF file, and access to its bytes.
type image struct {
	content
	is64    bool
	machine uint16
	loads   []Segment // in the order of the file
	write   []bool    // of loads: writable
	dynamic extent
	notes   []extent

	shoff    uint64
	shnum    uint64
	shstrndx uint64

	buildID string
}

// parseImage reads the ELF header, the program headers and the notes.
func parseImage(c content) (*image, error) {
	var h [64]byte
	if c.Size() < 52 {
		return nil, errorf(ReasonMalformed, "%d bytes are too few for ELF", c.Size())
	}
	if err := readAt(c, h[:min(64, c.Size())], 0); err != nil {
		return nil, err
	}
	if string(h[:4]) != "\x7fELF" {
		return nil, errorf(ReasonMalformed, "not an ELF file")
	}
	if h[5] != elfDataLSB {
		return nil, errorf(ReasonUnsupported, "byte order %d", h[5])
	}
	m := &image{content: c}
	switch h[4] {
	case elfClass32:
	case elfClass64:
		m.is64 = true
	default:
		return nil, errorf(ReasonMalformed, "class %d", h[4])
	}
	switch typ := binary.LittleEndian.Uint16(h[16:]); typ {
	case elfTypeExec, elfTypeDyn:
	default:
		return nil, errorf(ReasonUnsupported, "file type %d", typ)
	}
	m.machine = binary.LittleEndian.Uint16(h[18:])

	d := decoder{b: h[24:], is64: m.is64}
	d.word() // entry
	phoff := d.word()
	m.shoff = d.word()
	d.u32() // flags
	d.u16() // ehsize
	phentsize, phnum := d.u16(), d.u16()
	shentsize := d.u16()
	m.shnum, m.shstrndx = uint64(d.u16()), uint64(d.u16())
	if m.shoff == 0 || uint64(shentsize) != m.shdrSize() {
		m.shoff, m.shnum = 0, 0
	}
	if phnum > 0 && uint64(phentsize) != m.phdrSize() {
		return nil, errorf(ReasonMalformed, "program headers of %d bytes", phentsize)
	}
	if phnum > maxSegments {
		return nil, errorf(ReasonMalformed, "%d program headers", phnum)
	}
	if err := m.parseSegments(phoff, int(phnum)); err != nil {
		return nil, err
	}
	m.buildID = m.findBuildID()
	return m, nil
}

func (m *image) phdrSize() uint64 {
	if m.is64 {
		return 56
	}
	return 32
}

func (m *image) shdrSize() uint64 {
	if m.is64 {
		return 64
	}
	return 40
}

func (m *image) symSize() uint64 {
	if m.is64 {
		return 24
	}
	return 16
}

func (m *image) parseSegments(phoff uint64, n int) error {
	size := int(m.phdrSize())
	b := make([]byte, n*size)
	if err := readAt(m, b, phoff); err != nil {
		return err
	}
	for ; len(b) > 0; b = b[size:] {
		var typ, flags uint32
		var off, vaddr, filesz, memsz uint64
		d := decoder{b: b[:size], is64: m.is64}
		typ = d.u32()
		if m.is64 {
			flags = d.u32()
		}
		off, vaddr = d.word(), d.word()
		d.word() // paddr
		filesz, memsz = d.word(), d.word()
		if !m.is64 {
			flags = d.u32()
		}
		if off+filesz < off || vaddr+memsz < vaddr {
			continue
		}
		switch typ {
		case ptLoad:
			m.loads = append(m.loads, Segment{
				Vaddr: vaddr, Memsz: memsz, Offset: off, Filesz: filesz, Executable: flags&pfExec != 0,
			})
			m.write = append(m.write, flags&pfWrite != 0)
		case ptDynamic:
			m.dynamic = extent{off, filesz}
		case ptNote:
			m.notes = append(m.notes, extent{off, filesz})
		}
	}
	return nil
}

// fileOffset is where the byte at an ELF virtual address is in the file, and how many
// follow it there.
func (m *image) fileOffset(vaddr uint64) (extent, bool) {
	for _, s := range m.loads {
		if vaddr >= s.Vaddr && vaddr-s.Vaddr < s.Filesz {
			return extent{s.Offset + (vaddr - s.Vaddr), s.Filesz - (vaddr - s.Vaddr)}, true
		}
	}
	return extent{}, false
}

// executable is the executable segment that holds an ELF virtual address.
func (m *image) executable(vaddr uint64) (Segment, bool) {
	for _, s := range m.loads {
		if s.Executable && vaddr >= s.Vaddr && vaddr-s.Vaddr < s.Memsz {
			return s, true
		}
	}
	return Segment{}, false
}

// address is the ELF virtual address of a file offset that is mapped executable.
//
// A mapping covers whole pages, so it can begin before its segment does and end after it;
// what is there belongs to a neighbour and counts only if no segment claims it.
func (m *image) address(off uint64) (uint64, bool) {
	const page = 1 << 12
	var padded *Segment
	for i := range m.loads {
		s := &m.loads[i]
		if !s.Executable || s.Filesz == 0 {
			continue
		}
		if off >= s.Offset && off-s.Offset < s.Filesz {
			return off - s.Offset + s.Vaddr, true
		}
		first, last := s.Offset&^(page-1), s.Offset+s.Filesz-1|(page-1)
		if padded == nil && off >= first && off <= last {
			padded = s
		}
	}
	if padded != nil {
		return off - padded.Offset + padded.Vaddr, true
	}
	return 0, false
}

// section is what we use of a section header.
type section struct {
	name  uint32
	typ   uint32
	flags uint64
	addr  uint64
	extent
	link    uint32
	entsize uint64
}

func (s *section) executable() bool { return s.flags&shfExecInstr != 0 && s.flags&shfAlloc != 0 }

// sections reads the section headers; none is not an error.
func (m *image) sections() ([]section, error) {
	if m.shoff == 0 {
		return nil, nil
	}
	size := m.shdrSize()
	n := m.shnum
	if n == 0 || m.shstrndx == shnXIndex {
		// Counts that do not fit are in the first section header.
		var b [64]byte
		if err := readAt(m, b[:size], m.shoff); err != nil {
			return nil, err
		}
		first := m.decodeSection(b[:size])
		if n == 0 {
			n = first.size
		}
		if m.shstrndx == shnXIndex {
			m.shstrndx = uint64(first.link)
		}
	}
	if n > maxSections || n > uint64(m.Size())/size {
		return nil, errorf(ReasonMalformed, "%d section headers", n)
	}
	b := make([]byte, n*size)
	if err := readAt(m, b, m.shoff); err != nil {
		return nil, err
	}
	secs := make([]section, n)
	for i := range secs {
		secs[i] = m.decodeSection(b[uint64(i)*size:][:size])
	}
	return secs, nil
}

func (m *image) decodeSection(b []byte) section {
	d := decoder{b: b, is64: m.is64}
	var s section
	s.name, s.typ = d.u32(), d.u32()
	s.flags, s.addr = d.word(), d.word()
	s.off, s.size = d.word(), d.word()
	s.link = d.u32()
	d.u32()  // info
	d.word() // alignment
	s.entsize = d.word()
	return s
}

// sectionsNamed finds sections by name, in the order of the names given.
func (m *image) sectionsNamed(secs []section, names ...string) []section {
	if m.shstrndx >= uint64(len(secs)) {
		return nil
	}
	tab := secs[m.shstrndx].extent
	if tab.size > maxNameSection {
		return nil
	}
	b := make([]byte, min(tab.size, uint64(m.Size())))
	if err := readAt(m, b, tab.off); err != nil {
		return nil
	}
	var found []section
	for _, name := range names {
		for _, s := range secs {
			if uint64(s.name) < uint64(len(b)) {
				rest := b[s.name:]
				if len(rest) > len(name) && rest[len(name)] == 0 && string(rest[:len(name)]) == name {
					found = append(found, s)
				}
			}
		}
	}
	return found
}

// executableParts returns the executable segments, sorted and cut so that none overlaps
// the one before it.
func (m *image) executableParts() []Segment {
	var parts []Segment
	for _, s := range m.loads {
		if s.Executable && s.Memsz > 0 {
			parts = append(parts, s)
		}
	}
	slices.SortStableFunc(parts, func(a, b Segment) int { return cmp.Compare(a.Vaddr, b.Vaddr) })
	out := parts[:0]
	for _, s := range parts {
		if n := len(out); n > 0 {
			if end := out[n-1].Vaddr + out[n-1].Memsz; end > s.Vaddr {
				if end-s.Vaddr >= s.Memsz {
					continue
				}
				s.Memsz -= end - s.Vaddr
				s.Vaddr = end
			}
		}
		out = append(out, s)
	}
	return out
}

// decoder reads little-endian fields one after the other. Past the end it reads zeros.
type decoder struct {
	b    []byte
	is64 bool
}

func (d *decoder) take(n int) (v uint64) {
	if len(d.b) < n {
		d.b = nil
		return 0
	}
	for i := n - 1; i >= 0; i-- {
		v = v<<8 | uint64(d.b[i])
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) u8() uint8   { return uint8(d.take(1)) }
func (d *decoder) u16() uint16 { return uint16(d.take(2)) }
func (d *decoder) u32() uint32 { return uint32(d.take(4)) }

// word reads a field whose size is that of an address.
func (d *decoder) word() uint64 {
	if d.is64 {
		return d.take(8)
	}
	return d.take(4)
}

// cstring is the bytes before the first NUL, and whether there is one.
func cstring(b []byte) ([]byte, bool) {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i], true
	}
	return b, false
}
