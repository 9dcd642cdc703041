// SPDX-License-Identifier: Apache-2.0

package elffile

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"
)

// ELF constants (System V ABI, "Object Files"; the GNU extensions from elf.h).
const (
	Class32 = 1
	Class64 = 2
	DataLSB = 1

	typeNone = 0
	TypeRel  = 1
	TypeExec = 2
	TypeDyn  = 3

	MachineARM   = 40
	MachineAMD64 = 62
	MachineARM64 = 183

	PTLoad       = 1
	PTDynamic    = 2
	PTNote       = 4
	PTGNUEHFrame = 0x6474e550
	PFExec       = 1
	PFWrite      = 2

	SHTSymtab      = 2
	SHTRela        = 4
	SHTNote        = 7
	SHTNobits      = 8
	SHTDynsym      = 11
	SHFAlloc       = 2
	SHFExecInstr   = 4
	SHFCompressed  = 0x800
	SHNUndef       = 0
	SHNLoReserve   = 0xff00
	SHNXIndex      = 0xffff
	maxSegments    = 1170    // what Linux executes: 64 KiB of program headers
	maxSections    = 1 << 16 // of a linked file; a file with more has lost its way
	maxNameSection = 1 << 20 // bytes of .shstrtab
)

// Extent is a range of a file.
type Extent struct{ Off, Size uint64 }

// Image is the parsed headers of an ELF file, and access to its bytes.
type Image struct {
	Content
	Is64    bool
	Machine uint16
	Loads   []Segment // PT_LOAD, in the order of the file
	Dynamic Extent    // PT_DYNAMIC
	Notes   []Extent  // PT_NOTE
	EHFrame Segment   // PT_GNU_EH_FRAME; Filesz is 0 where there is none

	// Relocatable: the file was not linked. Sections lays its code out.
	Relocatable bool

	// BuildID is the GNU build id in hex, else Go's build id, else empty.
	BuildID string

	shoff    uint64
	shnum    uint64
	shstrndx uint64
}

// Segment is one PT_LOAD of an ELF file.
type Segment struct {
	Vaddr, Memsz, Offset, Filesz uint64
	Executable, Writable         bool
}

// Parse reads the ELF header, the program headers and the notes.
func Parse(c Content) (*Image, error) { return parse(c, TypeExec, TypeDyn) }

// ParseObject is Parse for a file that was not linked (.dwo, .ko), or is no program (.dwp).
func ParseObject(c Content) (*Image, error) { return parse(c, typeNone, TypeRel, TypeExec, TypeDyn) }

func parse(c Content, types ...uint16) (*Image, error) {
	var h [64]byte
	if c.Size() < 52 {
		return nil, Errorf(Malformed, "%d bytes are too few for ELF", c.Size())
	}
	if err := ReadAt(c, h[:min(64, c.Size())], 0); err != nil {
		return nil, err
	}
	if string(h[:4]) != "\x7fELF" {
		return nil, Errorf(Malformed, "not an ELF file")
	}
	if h[5] != DataLSB {
		return nil, Errorf(Unsupported, "byte order %d", h[5])
	}
	m := &Image{Content: c}
	switch h[4] {
	case Class32:
	case Class64:
		m.Is64 = true
	default:
		return nil, Errorf(Malformed, "class %d", h[4])
	}
	typ := binary.LittleEndian.Uint16(h[16:])
	if !slices.Contains(types, typ) {
		return nil, Errorf(Unsupported, "file type %d", typ)
	}
	m.Relocatable = typ == TypeRel
	m.Machine = binary.LittleEndian.Uint16(h[18:])

	d := Decoder{B: h[24:], Is64: m.Is64}
	d.Word() // entry
	phoff := d.Word()
	m.shoff = d.Word()
	d.U32() // flags
	d.U16() // ehsize
	phentsize, phnum := d.U16(), d.U16()
	shentsize := d.U16()
	m.shnum, m.shstrndx = uint64(d.U16()), uint64(d.U16())
	if m.shoff == 0 || uint64(shentsize) != m.ShdrSize() {
		m.shoff, m.shnum = 0, 0
	}
	if phnum > 0 && uint64(phentsize) != m.PhdrSize() {
		return nil, Errorf(Malformed, "program headers of %d bytes", phentsize)
	}
	if phnum > maxSegments {
		return nil, Errorf(Malformed, "%d program headers", phnum)
	}
	if err := m.parseSegments(phoff, int(phnum)); err != nil {
		return nil, err
	}
	m.BuildID = m.findBuildID()
	return m, nil
}

func (m *Image) PhdrSize() uint64 {
	if m.Is64 {
		return 56
	}
	return 32
}

func (m *Image) ShdrSize() uint64 {
	if m.Is64 {
		return 64
	}
	return 40
}

func (m *Image) SymSize() uint64 {
	if m.Is64 {
		return 24
	}
	return 16
}

func (m *Image) parseSegments(phoff uint64, n int) error {
	size := int(m.PhdrSize())
	b := make([]byte, n*size)
	if err := ReadAt(m, b, phoff); err != nil {
		return err
	}
	for ; len(b) > 0; b = b[size:] {
		var typ, flags uint32
		var off, vaddr, filesz, memsz uint64
		d := Decoder{B: b[:size], Is64: m.Is64}
		typ = d.U32()
		if m.Is64 {
			flags = d.U32()
		}
		off, vaddr = d.Word(), d.Word()
		d.Word() // paddr
		filesz, memsz = d.Word(), d.Word()
		if !m.Is64 {
			flags = d.U32()
		}
		if off+filesz < off || vaddr+memsz < vaddr {
			continue
		}
		switch typ {
		case PTLoad:
			m.Loads = append(m.Loads, Segment{
				Vaddr: vaddr, Memsz: memsz, Offset: off, Filesz: filesz,
				Executable: flags&PFExec != 0, Writable: flags&PFWrite != 0,
			})
		case PTDynamic:
			m.Dynamic = Extent{off, filesz}
		case PTGNUEHFrame:
			m.EHFrame = Segment{Vaddr: vaddr, Memsz: memsz, Offset: off, Filesz: filesz}
		case PTNote:
			m.Notes = append(m.Notes, Extent{off, filesz})
		}
	}
	return nil
}

// FileOffset is where the byte at an ELF virtual address is in the file, and how many
// follow it there.
func (m *Image) FileOffset(vaddr uint64) (Extent, bool) {
	for _, s := range m.Loads {
		if vaddr >= s.Vaddr && vaddr-s.Vaddr < s.Filesz {
			return Extent{s.Offset + (vaddr - s.Vaddr), s.Filesz - (vaddr - s.Vaddr)}, true
		}
	}
	return Extent{}, false
}

// ExecutableAt is the executable segment that holds an ELF virtual address.
func (m *Image) ExecutableAt(vaddr uint64) (Segment, bool) {
	for _, s := range m.Loads {
		if s.Executable && vaddr >= s.Vaddr && vaddr-s.Vaddr < s.Memsz {
			return s, true
		}
	}
	return Segment{}, false
}

// Address is the ELF virtual address of a file offset that is mapped executable.
//
// A mapping covers whole pages, so it can begin before its segment does and end after it;
// what is there belongs to a neighbour and counts only if no segment claims it.
func (m *Image) Address(off uint64) (uint64, bool) {
	const page = 1 << 12
	var padded *Segment
	for i := range m.Loads {
		s := &m.Loads[i]
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

// Section is what we use of a section header.
type Section struct {
	Name  uint32
	Type  uint32
	Flags uint64
	Addr  uint64
	Extent
	Link    uint32
	EntSize uint64
}

func (s *Section) Executable() bool { return s.Flags&SHFExecInstr != 0 && s.Flags&SHFAlloc != 0 }

// Sections reads the section headers; none is not an error. Code of a file that was not
// linked has no addresses: it gets some, section after section.
func (m *Image) Sections() ([]Section, error) {
	if m.shoff == 0 {
		return nil, nil
	}
	size := m.ShdrSize()
	n := m.shnum
	if n == 0 || m.shstrndx == SHNXIndex {
		// Counts that do not fit are in the first section header.
		var b [64]byte
		if err := ReadAt(m, b[:size], m.shoff); err != nil {
			return nil, err
		}
		first := m.decodeSection(b[:size])
		if n == 0 {
			n = first.Size
		}
		if m.shstrndx == SHNXIndex {
			m.shstrndx = uint64(first.Link)
		}
	}
	if n > maxSections || n > uint64(m.Size())/size {
		return nil, Errorf(Malformed, "%d Section headers", n)
	}
	b := make([]byte, n*size)
	if err := ReadAt(m, b, m.shoff); err != nil {
		return nil, err
	}
	secs := make([]Section, n)
	next := uint64(1 << 20)
	for i := range secs {
		s := &secs[i]
		*s = m.decodeSection(b[uint64(i)*size:][:size])
		if m.Relocatable && s.Executable() && s.Size < 1<<32 {
			s.Addr = next
			next += (s.Size | (1<<16 - 1)) + 1 // with a hole, so that an end is no start
		}
	}
	return secs, nil
}

func (m *Image) decodeSection(b []byte) Section {
	d := Decoder{B: b, Is64: m.Is64}
	var s Section
	s.Name, s.Type = d.U32(), d.U32()
	s.Flags, s.Addr = d.Word(), d.Word()
	s.Off, s.Size = d.Word(), d.Word()
	s.Link = d.U32()
	d.U32()  // info
	d.Word() // alignment
	s.EntSize = d.Word()
	return s
}

// SectionsNamed finds sections by name, in the order of the names given.
func (m *Image) SectionsNamed(secs []Section, names ...string) []Section {
	if m.shstrndx >= uint64(len(secs)) {
		return nil
	}
	tab := secs[m.shstrndx].Extent
	if tab.Size > maxNameSection {
		return nil
	}
	b := make([]byte, min(tab.Size, uint64(m.Size())))
	if err := ReadAt(m, b, tab.Off); err != nil {
		return nil
	}
	var found []Section
	for _, name := range names {
		for _, s := range secs {
			if uint64(s.Name) < uint64(len(b)) {
				rest := b[s.Name:]
				if len(rest) > len(name) && rest[len(name)] == 0 && string(rest[:len(name)]) == name {
					found = append(found, s)
				}
			}
		}
	}
	return found
}

// ExecutableParts returns the executable segments, sorted and cut so that none overlaps
// the one before it.
func (m *Image) ExecutableParts() []Segment {
	var parts []Segment
	for _, s := range m.Loads {
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

// Decoder reads little-endian fields one after the other. Past the end it reads zeros.
type Decoder struct {
	B    []byte
	Is64 bool
}

func (d *Decoder) take(n int) (v uint64) {
	if len(d.B) < n {
		d.B = nil
		return 0
	}
	for i := n - 1; i >= 0; i-- {
		v = v<<8 | uint64(d.B[i])
	}
	d.B = d.B[n:]
	return v
}

func (d *Decoder) U8() uint8   { return uint8(d.take(1)) }
func (d *Decoder) U16() uint16 { return uint16(d.take(2)) }
func (d *Decoder) U32() uint32 { return uint32(d.take(4)) }

// Word reads a field whose size is that of an address.
func (d *Decoder) Word() uint64 {
	if !d.Is64 {
		return d.take(4)
	}
	if len(d.B) < 8 {
		d.B = nil
		return 0
	}
	v := binary.LittleEndian.Uint64(d.B)
	d.B = d.B[8:]
	return v
}

// CString is the bytes before the first NUL, and whether there is one.
func CString(b []byte) ([]byte, bool) {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i], true
	}
	return b, false
}
