// SPDX-License-Identifier: Apache-2.0

package dwarf

import "github.com/hostflame/hostflame/internal/elffile"

// entry is what we want of a debugging information entry.
type entry struct {
	has uint32 // bit by field

	low, high uint64
	highIsLen bool // high is an offset from low
	ranges    uint64
	rangesX   bool // ranges is an index
	sibling   uint64

	name, linkageName     text
	origin, specification ref
	declLine, callFile    uint64
	callLine              uint64

	// Of units.
	stmtList, language, id                            uint64
	strOffsetsBase, addrBase, rnglistsBase, rangeBase uint64
	compDir, dwoName                                  text
}

func (e *entry) is(field int) bool { return e.has&(1<<field) != 0 }

// ref is an entry by its offset in .debug_info, of the alternate file if alt is set. The
// zero value is none.
type ref struct {
	off uint64
	alt bool
}

// text is a string by where it is.
type text struct {
	sec *Section // nil: none
	off uint64
}

// unitContext is a unit and what its entries need to be read.
type unitContext struct {
	unit
	data    *Data
	index   int
	abbrevs *table

	low                                    uint64
	strOffsetsBase, addrBase, rnglistsBase uint64
	rangesBase                             uint64
	addr, ranges                           *Section // for a split unit those of its skeleton
}

// read reads an entry of abbreviation a into e.
func (u *unitContext) read(c *cursor, a abbrev, e *entry) {
	e.has = 0
	ops := u.abbrevs.ops[a.first : a.first+a.n]
	for i := range ops {
		o := &ops[i]
		switch o.field {
		case fieldSkip:
			if n := int(o.n); n <= len(c.b)-c.i {
				c.i += n
			} else {
				c.skip(o.n)
			}
			continue
		case fieldOther:
			skipForm(c, o.form, &u.unit)
			continue
		}
		form := o.form
		for hops := 0; form == formIndirect; hops++ {
			form = uint16(min(c.uleb(), 0xffff))
			if hops > maxHops {
				c.fail("indirect forms without end")
				return
			}
		}
		u.field(c, o, form, e)
	}
}

func (u *unitContext) field(c *cursor, o *op, form uint16, e *entry) {
	e.has |= 1 << o.field
	switch o.field {
	case fieldSibling:
		e.sibling = u.reference(c, form).off
	case fieldName:
		e.name = u.text(c, form)
	case fieldLinkageName:
		e.linkageName = u.text(c, form)
	case fieldLow:
		var ok bool
		if e.low, ok = u.address(c, form); !ok {
			e.has &^= 1 << fieldLow
		}
	case fieldHigh:
		switch form {
		case formAddr, formAddrx, formAddrx1, formAddrx2, formAddrx3, formAddrx4, formGNUAddrIndex:
			var ok bool
			e.highIsLen = false
			if e.high, ok = u.address(c, form); !ok {
				e.has &^= 1 << fieldHigh
			}
		default:
			e.highIsLen = true
			e.high = u.number(c, form, o.n)
		}
	case fieldRanges:
		e.rangesX = form == formRnglistx
		e.ranges = u.number(c, form, o.n)
	case fieldOrigin:
		e.origin = u.reference(c, form)
	case fieldSpecification:
		e.specification = u.reference(c, form)
	case fieldDeclLine:
		e.declLine = u.number(c, form, o.n)
	case fieldCallFile:
		e.callFile = u.number(c, form, o.n)
	case fieldCallLine:
		e.callLine = u.number(c, form, o.n)
	case fieldStmtList:
		e.stmtList = u.number(c, form, o.n)
	case fieldCompDir:
		e.compDir = u.text(c, form)
	case fieldLanguage:
		e.language = u.number(c, form, o.n)
	case fieldStrOffsetsBase:
		e.strOffsetsBase = u.number(c, form, o.n)
	case fieldAddrBase:
		e.addrBase = u.number(c, form, o.n)
	case fieldRnglistsBase:
		e.rnglistsBase = u.number(c, form, o.n)
	case fieldDwoName:
		e.dwoName = u.text(c, form)
	case fieldDwoID:
		e.id = u.number(c, form, o.n)
	case fieldRangesBase:
		e.rangeBase = u.number(c, form, o.n)
	}
}

// number reads a constant or an offset of a section.
func (u *unitContext) number(c *cursor, form uint16, implicit uint64) uint64 {
	switch form {
	case formData1, formFlag:
		return uint64(c.u8())
	case formData2:
		return uint64(c.u16())
	case formData4:
		return uint64(c.u32())
	case formData8:
		return c.u64()
	case formUdata, formRnglistx, formLoclistx:
		return c.uleb()
	case formSdata:
		return uint64(c.sleb())
	case formImplicitConst:
		return implicit
	case formSecOffset:
		return c.offset(u.is64)
	}
	skipForm(c, form, &u.unit)
	return 0
}

// reference reads a reference to an entry.
func (u *unitContext) reference(c *cursor, form uint16) ref {
	var off uint64
	switch form {
	case formRef1:
		off = uint64(c.u8())
	case formRef2:
		off = uint64(c.u16())
	case formRef4:
		off = uint64(c.u32())
	case formRef8:
		off = c.u64()
	case formRefUdata:
		off = c.uleb()
	case formRefAddr:
		if u.version == 2 {
			return ref{off: c.uint(int(u.addrSize))}
		}
		return ref{off: c.offset(u.is64)}
	case formGNURefAlt:
		return ref{off: c.offset(u.is64), alt: true}
	case formRefSup4:
		return ref{off: uint64(c.u32()), alt: true}
	case formRefSup8:
		return ref{off: c.u64(), alt: true}
	default:
		skipForm(c, form, &u.unit)
		return ref{}
	}
	if off >= u.end-u.off {
		return ref{}
	}
	return ref{off: u.off + off}
}

// text reads where a string is.
func (u *unitContext) text(c *cursor, form uint16) text {
	switch form {
	case formString:
		t := text{u.data.Info, c.pos()}
		c.skipString()
		return t
	case formStrp:
		return text{u.data.Str, c.offset(u.is64)}
	case formLineStrp:
		return text{u.data.LineStr, c.offset(u.is64)}
	case formStrpSup, formGNUStrpAlt:
		off := c.offset(u.is64)
		if u.data.Alt == nil {
			return text{}
		}
		return text{u.data.Alt.Str, off}
	case formStrx, formGNUStrIndex:
		return u.indexedText(c.uleb())
	case formStrx1:
		return u.indexedText(uint64(c.u8()))
	case formStrx2:
		return u.indexedText(uint64(c.u16()))
	case formStrx3:
		return u.indexedText(c.uint(3))
	case formStrx4:
		return u.indexedText(uint64(c.u32()))
	}
	skipForm(c, form, &u.unit)
	return text{}
}

// indexedText is a string by its number in .debug_str_offsets.
func (u *unitContext) indexedText(i uint64) text {
	var b [8]byte
	if i > 1<<32 || !u.indexed(u.data.StrOffsets, u.strOffsetsBase, i, u.offsetSize(), &b) {
		return text{}
	}
	return text{u.data.Str, little(b[:], u.offsetSize())}
}

// indexed reads the i-th word of a section after base.
func (u *unitContext) indexed(s *Section, base, i uint64, size int, b *[8]byte) bool {
	return s != nil && s.read(b[:size], base+i*uint64(size)) == nil
}

func little(b []byte, size int) (v uint64) {
	for i := size - 1; i >= 0; i-- {
		v = v<<8 | uint64(b[i])
	}
	return v
}

// address reads an address, or one's number in .debug_addr.
func (u *unitContext) address(c *cursor, form uint16) (uint64, bool) {
	switch form {
	case formAddr:
		return c.uint(int(u.addrSize)), true
	case formAddrx, formGNUAddrIndex:
		return u.indexedAddress(c.uleb())
	case formAddrx1:
		return u.indexedAddress(uint64(c.u8()))
	case formAddrx2:
		return u.indexedAddress(uint64(c.u16()))
	case formAddrx3:
		return u.indexedAddress(c.uint(3))
	case formAddrx4:
		return u.indexedAddress(uint64(c.u32()))
	}
	skipForm(c, form, &u.unit)
	return 0, false
}

func (u *unitContext) indexedAddress(i uint64) (uint64, bool) {
	var b [8]byte
	if i > 1<<32 || !u.indexed(u.addr, u.addrBase, i, int(u.addrSize), &b) {
		return 0, false
	}
	return little(b[:], int(u.addrSize)), true
}

// open prepares u for the i-th unit of d: abbreviations, which tableOf finds, and the bases
// that are in the attributes of the unit's own entry, which it returns.
func (u *unitContext) open(c *cursor, d *Data, i int, root *entry, tableOf func(u *unitContext) (*table, error)) error {
	var err error
	if u.unit, err = readHeader(c, d.Info, d.units[i]); err != nil {
		return err
	}
	if u.version == 0 { // ReadUnits saw another one
		return elffile.Errorf(elffile.Changed, "dwarf: unit at %#x is another one now", u.off)
	}
	u.data, u.index = d, i
	u.addr, u.ranges = d.Addr, d.Ranges
	u.strOffsetsBase, u.addrBase, u.rnglistsBase, u.rangesBase, u.low = 0, 0, 0, 0, 0
	if d.dwo && u.version >= 5 {
		// There is one contribution, whose base is after its header.
		u.strOffsetsBase, u.rnglistsBase = 8, 12
		if u.is64 {
			u.strOffsetsBase, u.rnglistsBase = 16, 20
		}
	}
	if u.abbrevs, err = tableOf(u); err != nil {
		return err
	}
	// Twice: an index can come before the base that it counts from.
	for range 2 {
		c.start(d.Info, u.dies, u.end)
		a := u.abbrevs.get(c.uleb())
		if a.kind != kindUnit {
			if c.err == nil {
				return elffile.Errorf(elffile.Malformed, "dwarf: unit at %#x starts with tag %#x", u.off, a.tag)
			}
			return c.err
		}
		u.read(c, a, root)
		if root.is(fieldStrOffsetsBase) {
			u.strOffsetsBase = root.strOffsetsBase
		}
		if root.is(fieldAddrBase) {
			u.addrBase = root.addrBase
		}
		if root.is(fieldRnglistsBase) {
			u.rnglistsBase = root.rnglistsBase
		}
		if root.is(fieldRangesBase) {
			u.rangesBase = root.rangeBase
		}
		if root.is(fieldLow) {
			u.low = root.low
		}
		if c.err != nil {
			break
		}
	}
	if root.is(fieldDwoID) && u.id == 0 {
		u.id = root.id
	}
	return c.err
}
