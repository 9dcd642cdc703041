// SPDX-License-Identifier: Apache-2.0

// Package dwarf reads what DWARF 2 to 5 says of code: functions, inlined calls and lines.
// It reads units in sequence through windows of fixed size and never holds one in memory,
// so that what it takes does not grow with the file. The file may be hostile: all reads go
// through one cursor that knows its bounds, and everything that is counted has a limit.
package dwarf

import (
	"slices"
	"sort"

	"github.com/hostflame/hostflame/internal/elffile"
)

// Limits of a file. What is beyond one is too large for us.
const (
	MaxUnits       = 1 << 19  // each takes 8 bytes of memory
	MaxParts       = 1 << 10  // of a unit
	partSpans      = 1 << 16  // ranges after which the next function of a unit begins a part
	maxSpans       = 2 << 16  // ranges of a part; each takes 24 bytes, and as much for its node
	maxLineBytes   = 12 << 20 // of a unit's line table, packed: 3 or 4 a row
	maxUnsorted    = 1 << 15  // rows of a sequence that is not in order
	maxLineFiles   = 1 << 15  // of a line table, and so many directories
	maxAbbrevs     = 1 << 15  // of a table
	maxAbbrevSpecs = 1 << 17  // of a table, all abbreviations together; each takes 16 bytes
	maxDepth       = 256      // of entries within entries, and of inlined calls
	maxHops        = 16       // from an abstract origin or a specification to the next
	maxRanges      = 1 << 16  // of one entry
	maxWork        = 1 << 27  // of a unit: ranges, and attributes of other units' abbreviations
	maxString      = 8 << 10  // bytes of a name; what is longer is cut
	maxPath        = 4 << 10
)

// Data is the debug information of one file.
type Data struct {
	Info, Abbrev, Str, LineStr, Line, Ranges, Rnglists, Addr, StrOffsets *Section // nil where there is none

	// Alt is the file that .gnu_debugaltlink or .debug_sup names (dwz), or nil.
	Alt *Data
	// Code is where instructions are. What lies elsewhere was removed by the linker.
	Code []Range
	// Split returns the split unit of a skeleton: by its id, and the path in the unit's
	// attributes joined to its directory. It may be nil, and what it returns too.
	Split func(id uint64, path string) *SplitUnit

	units []uint64 // where their headers are
	dwo   bool     // of a .dwo or .dwp: lists have no base attribute
}

// Range is a half-open range of ELF virtual addresses.
type Range struct{ Low, High uint64 }

// unit is a unit's header.
type unit struct {
	off, dies, end uint64 // of .debug_info: the header, the first entry, the end
	abbrev         uint64
	id             uint64 // of a skeleton or split unit
	version        uint16
	kind           uint8
	is64           bool
	addrSize       uint8
}

func (u *unit) offsetSize() int {
	if u.is64 {
		return 8
	}
	return 4
}

// ReadUnits reads the headers of all units and returns their number. It is to be called
// before anything else, of Alt too.
func (d *Data) ReadUnits() (int, error) {
	if d.Info == nil || d.Abbrev == nil {
		return 0, elffile.Errorf(elffile.Missing, "dwarf: no .debug_info")
	}
	c := cursor{buf: make([]byte, 64)}
	d.units = d.units[:0]
	headers := 0
	for off := uint64(0); off+4 < d.Info.Size; headers++ {
		u, err := readHeader(&c, d.Info, off)
		if err != nil {
			return 0, err
		}
		off = u.end
		if len(d.units) >= MaxUnits || headers >= 4*MaxUnits {
			return 0, elffile.Errorf(elffile.TooLarge, "dwarf: more than %d units", MaxUnits)
		}
		if u.version == 0 {
			continue // padding, or of a kind that we do not know
		}
		d.units = append(d.units, u.off)
	}
	return len(d.units), nil
}

// readHeader reads a unit's header (DWARF 5, section 7.5.1).
func readHeader(c *cursor, info *Section, off uint64) (unit, error) {
	c.start(info, off, info.Size)
	u := unit{off: off, kind: unitCompile}
	length := uint64(c.u32())
	if length == 0xffffffff {
		u.is64 = true
		length = c.u64()
	}
	if c.err != nil {
		return u, c.err
	}
	if length > c.left() {
		return u, elffile.Errorf(elffile.Malformed, "dwarf: unit of %#x bytes at %#x", length, off)
	}
	u.end = c.pos() + length
	c.end = u.end
	if length == 0 {
		return u, nil
	}
	u.version = c.u16()
	switch {
	case u.version >= 2 && u.version <= 4:
		u.abbrev = c.offset(u.is64)
		u.addrSize = c.u8()
	case u.version == 5:
		u.kind = c.u8()
		u.addrSize = c.u8()
		u.abbrev = c.offset(u.is64)
		switch u.kind {
		case unitSkeleton, unitSplitCompile:
			u.id = c.u64()
		case unitType, unitSplitType:
			c.u64()
			c.offset(u.is64)
		}
	default:
		u.version = 0
		return u, nil
	}
	u.dies = c.pos()
	if u.addrSize != 4 && u.addrSize != 8 {
		u.version = 0
	}
	return u, c.err
}

// unitAt finds the unit that holds an offset, if one does.
func (d *Data) unitAt(off uint64) (int, bool) {
	i := sort.Search(len(d.units), func(i int) bool { return d.units[i] > off }) - 1
	return i, i >= 0
}

// inCode is whether there can be instructions at an address, and where they end.
func (d *Data) inCode(addr uint64) (end uint64, ok bool) {
	i, found := slices.BinarySearchFunc(d.Code, addr, func(r Range, a uint64) int {
		switch {
		case r.High <= a:
			return -1
		case r.Low > a:
			return 1
		}
		return 0
	})
	if !found {
		return 0, false
	}
	return d.Code[i].High, true
}
