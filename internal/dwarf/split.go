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
	for i, u := range d.units {
		switch {
		case u.kind == unitSplitCompile && u.id == id:
			return i, true
		case u.kind == unitCompile && u.version < 5:
			found = i
			compile++
		}
	}
	return found, compile == 1
}

// Package is a .dwp file: the .dwo files of a program in one.
type Package struct {
	whole Data
	units map[uint64][packageColumns]extent
}

type extent struct{ off, size uint32 }

// The sections that units have a part of (DWARF 5, section 7.3.5.3; version 2 is GNU's).
const (
	columnInfo = iota
	columnAbbrev
	columnStrOffsets
	columnRnglists
	packageColumns

	maxPackageUnits   = 1 << 20
	maxPackageSlots   = 4 * maxPackageUnits
	maxPackageSection = 32
)

// OpenPackage reads the index of a .dwp file.
func OpenPackage(m *elffile.Image, secs []elffile.Section, z *elffile.Inflater) (*Package, error) {
	d, err := open(m, secs, z, ".dwo")
	if err != nil {
		return nil, err
	}
	d.dwo = true
	p := &Package{whole: *d, units: map[uint64][packageColumns]extent{}}
	index := m.SectionsNamed(secs, ".debug_cu_index")
	if len(index) == 0 {
		return nil, elffile.Errorf(elffile.Missing, "no .debug_cu_index")
	}
	c, off, size, err := z.Section(m, index[0], ".debug_cu_index")
	if err != nil {
		return nil, err
	}
	return p, p.readIndex(&Section{Content: c, Off: off, Size: size})
}

func (p *Package) readIndex(sec *Section) error {
	c := cursor{buf: make([]byte, otherWindow)}
	c.start(sec, 0, sec.Size)
	version := c.u32() & 0xffff // version 5 has 16 bits and 16 of padding
	columns, units, slots := uint64(c.u32()), uint64(c.u32()), uint64(c.u32())
	if version != 2 && version != 5 {
		return elffile.Errorf(elffile.Unsupported, "dwarf: package index of version %d", version)
	}
	if columns > maxPackageSection || units > maxPackageUnits || slots > maxPackageSlots || 12*slots+8*columns*units > c.left() {
		return elffile.Errorf(elffile.Malformed, "dwarf: package index of %d units", units)
	}
	ids, rows := c.pos(), c.pos()+8*slots
	headers := rows + 4*slots
	c.seek(headers)
	var column [maxPackageSection]int
	for i := range columns {
		column[i] = -1
		switch id := c.u32(); {
		case id == 1:
			column[i] = columnInfo
		case id == 3:
			column[i] = columnAbbrev
		case id == 6:
			column[i] = columnStrOffsets
		case id == 8 && version == 5:
			column[i] = columnRnglists
		}
	}
	offsets, sizes := headers+4*columns, headers+4*columns+4*columns*units
	word := func(at uint64) uint32 {
		var b [4]byte
		if sec.read(b[:], at) != nil {
			return 0
		}
		return binary.LittleEndian.Uint32(b[:])
	}
	for slot := range slots {
		c.seek(ids + 8*slot)
		id := c.u64()
		row := uint64(word(rows + 4*slot))
		if row == 0 || row > units {
			continue
		}
		var parts [packageColumns]extent
		for i := range columns {
			if column[i] >= 0 {
				at := 4 * ((row-1)*columns + i)
				parts[column[i]] = extent{word(offsets + at), word(sizes + at)}
			}
		}
		p.units[id] = parts
	}
	return c.err
}

// Unit returns the unit with an id, nil if there is none.
func (p *Package) Unit(id uint64) *SplitUnit {
	parts, ok := p.units[id]
	if !ok {
		return nil
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
