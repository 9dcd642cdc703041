// SPDX-License-Identifier: Apache-2.0

package dwarf

import (
	"encoding/binary"

	"github.com/hostflame/hostflame/internal/elffile"
)

// SplitUnit is the unit that a skeleton stands for.
type SplitUnit struct {
	Data  *Data
	Index int
	Done  func() // called when it is not used any more
}

// OpenSplit finds the debug sections of a .dwo file.
func OpenSplit(m *elffile.Image, secs []elffile.Section, z *elffile.Inflater) (*Data, error) {
	d, err := open(m, secs, z, ".dwo")
	if err == nil {
		d.dwo = true
	}
	return d, err
}

// Find returns the compilation unit with an id; any, if there is one only, whose header has
// no id before DWARF 5.
func (d *Data) Find(id uint64) (int, bool) {
	found, compile := 0, 0
	c := cursor{buf: make([]byte, 64)}
	for i, off := range d.units {
		u, err := readHeader(&c, d.Info, off)
		switch {
		case err != nil:
			return 0, false
		case u.kind == unitSplitCompile && u.id == id:
			return i, true
		case u.kind == unitCompile && u.version < 5:
			found = i
			compile++
		}
	}
	return found, compile == 1
}

// Package is a .dwp file: the .dwo files of a program in one. Its index is a hash table
// that stays in the file.
type Package struct {
	whole                 Data
	index                 *Section
	slots, units, columns uint64
	column                [maxPackageSection]int // what is in each
}

type extent struct{ off, size uint32 }

// The sections that units have a part of (DWARF 5, section 7.3.5.3; version 2 is GNU's).
const (
	columnInfo = iota
	columnAbbrev
	columnStrOffsets
	columnRnglists
	packageColumns

	packageHeader     = 16 // bytes
	maxPackageUnits   = 1 << 20
	maxPackageSection = 32
	maxProbes         = 1 << 10 // slots that are looked at for a unit
)

// OpenPackage reads the header of the index of a .dwp file.
func OpenPackage(m *elffile.Image, secs []elffile.Section, z *elffile.Inflater) (*Package, error) {
	d, err := open(m, secs, z, ".dwo")
	if err != nil {
		return nil, err
	}
	d.dwo = true
	index := m.SectionsNamed(secs, ".debug_cu_index")
	if len(index) == 0 {
		return nil, elffile.Errorf(elffile.Missing, "no .debug_cu_index")
	}
	c, off, size, err := z.Section(m, index[0], ".debug_cu_index")
	if err != nil {
		return nil, err
	}
	return newPackage(d, &Section{Content: c, Off: off, Size: size})
}

func newPackage(whole *Data, index *Section) (*Package, error) {
	p := &Package{whole: *whole, index: index}
	c := cursor{buf: make([]byte, packageHeader)}
	c.start(index, 0, index.Size)
	version := c.u32() & 0xffff // version 5 has 16 bits and 16 of padding
	p.columns, p.units, p.slots = uint64(c.u32()), uint64(c.u32()), uint64(c.u32())
	if version != 2 && version != 5 {
		return nil, elffile.Errorf(elffile.Unsupported, "dwarf: package index of version %d", version)
	}
	if p.columns > maxPackageSection || p.units > maxPackageUnits || p.slots&(p.slots-1) != 0 || 12*p.slots+8*p.columns*p.units > c.left() {
		return nil, elffile.Errorf(elffile.Malformed, "dwarf: package index of %d units in %d slots", p.units, p.slots)
	}
	c.seek(p.headers())
	for i := range p.columns {
		p.column[i] = -1
		switch id := c.u32(); {
		case id == 1:
			p.column[i] = columnInfo
		case id == 3:
			p.column[i] = columnAbbrev
		case id == 6:
			p.column[i] = columnStrOffsets
		case id == 8 && version == 5:
			p.column[i] = columnRnglists
		}
	}
	return p, c.err
}

// headers is where the index says what is in the columns, after the ids of the slots and
// their rows.
func (p *Package) headers() uint64 { return packageHeader + 12*p.slots }

// word is a word of the index, 0 beyond its end.
func (p *Package) word(at uint64) uint32 {
	var b [4]byte
	if p.index.read(b[:], at) != nil {
		return 0
	}
	return binary.LittleEndian.Uint32(b[:])
}

// row finds the row of a unit, counted from 1, as section 7.3.5.3 has it; 0 if there is none.
func (p *Package) row(id uint64) uint64 {
	mask := p.slots - 1
	slot, step := id&mask, id>>32&mask|1
	for range min(p.slots, maxProbes) {
		row := uint64(p.word(packageHeader + 8*p.slots + 4*slot))
		if row == 0 || row > p.units {
			return 0
		}
		if at := packageHeader + 8*slot; uint64(p.word(at))|uint64(p.word(at+4))<<32 == id {
			return row
		}
		slot = (slot + step) & mask
	}
	return 0
}

// Unit returns the unit with an id, nil if there is none.
func (p *Package) Unit(id uint64) *SplitUnit {
	row := p.row(id)
	if row == 0 {
		return nil
	}
	var parts [packageColumns]extent
	offsets := p.headers() + 4*p.columns
	for i, column := range p.column[:p.columns] {
		if column >= 0 {
			at := offsets + 4*((row-1)*p.columns+uint64(i))
			parts[column] = extent{p.word(at), p.word(at + 4*p.columns*p.units)}
		}
	}
	d := p.whole
	for i, s := range []**Section{columnInfo: &d.Info, columnAbbrev: &d.Abbrev, columnStrOffsets: &d.StrOffsets, columnRnglists: &d.Rnglists} {
		if *s == nil {
			continue
		}
		off, size := uint64(parts[i].off), uint64(parts[i].size)
		if off > (*s).Size || size > (*s).Size-off {
			return nil
		}
		*s = &Section{Content: (*s).Content, Off: (*s).Off + off, Size: size}
	}
	d.units = nil
	if _, err := d.ReadUnits(); err != nil {
		return nil
	}
	i, ok := d.Find(id)
	if !ok {
		return nil
	}
	return &SplitUnit{Data: &d, Index: i, Done: func() {}}
}
