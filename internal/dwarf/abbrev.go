// SPDX-License-Identifier: Apache-2.0

package dwarf

import "github.com/hostflame/hostflame/internal/elffile"

// abbrev says how an entry is read: ops for what we want of it and for the bytes between.
type abbrev struct {
	tag      uint16
	kind     uint8
	children bool
	first, n uint32 // of table.ops
}

// Kinds of entries.
const (
	kindNone       = iota // not in the table
	kindOther             // nothing of it is of interest, but there can be code in it
	kindType              // a type: in C there is no code in it
	kindSubprogram        // a function, or what is known of one
	kindInlined           // an inlined call
	kindUnit
)

// op is a step in reading an entry.
type op struct {
	field uint8
	form  uint16
	n     uint64 // bytes to skip; or the value of an implicit constant
}

// Fields of entries.
const (
	fieldSkip  = iota // n bytes
	fieldOther        // whatever the form takes
	fieldSibling
	fieldName
	fieldLinkageName
	fieldLow
	fieldHigh
	fieldRanges
	fieldOrigin
	fieldSpecification
	fieldDeclLine
	fieldCallFile
	fieldCallLine
	fieldStmtList
	fieldCompDir
	fieldLanguage
	fieldStrOffsetsBase
	fieldAddrBase
	fieldRnglistsBase
	fieldDwoName
	fieldDwoID
	fieldRangesBase
)

// codeField is what we want of functions and inlined calls.
func codeField(attr uint64) uint8 {
	switch attr {
	case atSibling:
		return fieldSibling
	case atName:
		return fieldName
	case atLinkageName, atMIPSLinkageName:
		return fieldLinkageName
	case atLowPC:
		return fieldLow
	case atHighPC:
		return fieldHigh
	case atRanges:
		return fieldRanges
	case atAbstractOrigin:
		return fieldOrigin
	case atSpecification:
		return fieldSpecification
	case atDeclLine:
		return fieldDeclLine
	case atCallFile:
		return fieldCallFile
	case atCallLine:
		return fieldCallLine
	}
	return fieldOther
}

// unitField is what we want of units.
func unitField(attr uint64) uint8 {
	switch attr {
	case atLowPC:
		return fieldLow
	case atHighPC:
		return fieldHigh
	case atRanges:
		return fieldRanges
	case atStmtList:
		return fieldStmtList
	case atCompDir:
		return fieldCompDir
	case atLanguage:
		return fieldLanguage
	case atStrOffsetsBase:
		return fieldStrOffsetsBase
	case atAddrBase, atGNUAddrBase:
		return fieldAddrBase
	case atRnglistsBase:
		return fieldRnglistsBase
	case atDwoName, atGNUDwoName:
		return fieldDwoName
	case atGNUDwoID:
		return fieldDwoID
	case atGNURangesBase:
		return fieldRangesBase
	}
	return fieldOther
}

// table is the abbreviations of a unit, compiled for the sizes of its addresses and
// offsets.
type table struct {
	key    tableKey
	dense  []abbrev // by code - 1; producers number from 1
	sparse map[uint64]abbrev
	ops    []op
	specs  int // attributes and abbreviations that were read, whatever came of them
}

// tableKey is all that a table depends on. Units share tables: what a compiler makes of a
// whole program has one for all.
type tableKey struct {
	data     *Data
	off      uint64
	is64     bool
	version2 bool
	addrSize uint8
}

func (u *unitContext) tableKey() tableKey {
	return tableKey{u.data, u.abbrev, u.is64, u.version == 2, u.addrSize}
}

// size is what a table takes, in attributes: an abbreviation counts as one and more.
func (t *table) size() int { return len(t.ops) + len(t.dense) + 4*len(t.sparse) }

func (t *table) get(code uint64) abbrev {
	if code-1 < uint64(len(t.dense)) {
		return t.dense[code-1]
	}
	return t.sparse[code]
}

func kindOf(tag uint64) uint8 {
	switch tag {
	case tagSubprogram:
		return kindSubprogram
	case tagInlinedSubroutine:
		return kindInlined
	case tagCompileUnit, tagPartialUnit, tagSkeletonUnit:
		return kindUnit
	case tagArrayType, tagClassType, tagEnumerationType, tagStructureType, tagSubroutineType,
		tagUnionType, tagInterfaceType, tagCallSite, tagGNUCallSite:
		return kindType
	}
	return kindOther
}

// open reads the table of a unit, if it is not that already.
func (t *table) open(c *cursor, u *unitContext) error {
	k := u.tableKey()
	if t.key == k {
		return nil
	}
	t.key = tableKey{}
	if err := t.read(c, u.data.Abbrev, &u.unit); err != nil {
		return err
	}
	t.key = k
	return nil
}

// read reads the table at an offset of .debug_abbrev, whose abbreviations end with code 0
// (DWARF 5, section 7.5.3).
func (t *table) read(c *cursor, sec *Section, u *unit) error {
	c.start(sec, u.abbrev, sec.Size)
	t.dense, t.ops = t.dense[:0], t.ops[:0]
	clear(t.sparse)
	t.specs = 0
	for count := 0; c.left() > 0; count++ {
		code := c.uleb()
		if code == 0 || c.err != nil {
			break
		}
		t.specs++ // the abbreviation itself
		tag := c.uleb()
		a := abbrev{tag: uint16(min(tag, 0xffff)), kind: kindOf(tag), children: c.u8() != 0, first: uint32(len(t.ops))}
		for {
			attr, form := c.uleb(), c.uleb()
			implicit := uint64(0)
			if form == formImplicitConst {
				implicit = uint64(c.sleb())
			}
			if attr == 0 && form == 0 || c.err != nil {
				break
			}
			if t.specs++; t.specs-count > maxAbbrevSpecs+1 {
				return elffile.Errorf(elffile.TooLarge, "dwarf: more than %d attributes in a table of abbreviations", maxAbbrevSpecs)
			}
			t.add(a, u, attr, form, implicit)
		}
		a.n = uint32(len(t.ops)) - a.first
		switch {
		case count >= maxAbbrevs:
			return elffile.Errorf(elffile.TooLarge, "dwarf: more than %d abbreviations in a table", maxAbbrevs)
		case code == uint64(len(t.dense))+1:
			t.dense = append(t.dense, a)
		default:
			if t.sparse == nil {
				t.sparse = map[uint64]abbrev{}
			}
			if _, twice := t.sparse[code]; !twice {
				t.sparse[code] = a
			}
		}
	}
	return c.err
}

// add compiles one attribute of a.
func (t *table) add(a abbrev, u *unit, attr, form, implicit uint64) {
	field := uint8(fieldOther)
	switch a.kind {
	case kindSubprogram, kindInlined:
		field = codeField(attr)
	case kindUnit:
		field = unitField(attr)
	default:
		if attr == atSibling && a.children {
			field = fieldSibling
		}
	}
	if form > 0xffff {
		form = 0 // no form, and so an error where it is read
	}
	if field == fieldOther {
		if n, ok := fixedSize(form, u); ok {
			if last := len(t.ops) - 1; last >= int(a.first) && t.ops[last].field == fieldSkip {
				t.ops[last].n += n
			} else if n > 0 {
				t.ops = append(t.ops, op{field: fieldSkip, n: n})
			}
			return
		}
	}
	t.ops = append(t.ops, op{field: field, form: uint16(form), n: implicit})
}

// fixedSize is the number of bytes of a form, where that does not depend on what it holds.
func fixedSize(form uint64, u *unit) (uint64, bool) {
	switch form {
	case formFlagPresent, formImplicitConst:
		return 0, true
	case formData1, formRef1, formFlag, formStrx1, formAddrx1:
		return 1, true
	case formData2, formRef2, formStrx2, formAddrx2:
		return 2, true
	case formStrx3, formAddrx3:
		return 3, true
	case formData4, formRef4, formRefSup4, formStrx4, formAddrx4:
		return 4, true
	case formData8, formRef8, formRefSig8, formRefSup8:
		return 8, true
	case formData16:
		return 16, true
	case formAddr:
		return uint64(u.addrSize), true
	case formRefAddr:
		if u.version == 2 {
			return uint64(u.addrSize), true
		}
		return uint64(u.offsetSize()), true
	case formStrp, formLineStrp, formSecOffset, formStrpSup, formGNURefAlt, formGNUStrpAlt:
		return uint64(u.offsetSize()), true
	}
	return 0, false
}

// skipForm skips a value.
func skipForm(c *cursor, form uint16, u *unit) {
	for range maxHops {
		if n, ok := fixedSize(uint64(form), u); ok {
			c.skip(n)
			return
		}
		switch form {
		case formBlock1:
			c.skip(uint64(c.u8()))
		case formBlock2:
			c.skip(uint64(c.u16()))
		case formBlock4:
			c.skip(uint64(c.u32()))
		case formBlock, formExprloc:
			c.skip(c.uleb())
		case formString:
			c.skipString()
		case formSdata, formUdata, formRefUdata, formStrx, formAddrx, formLoclistx, formRnglistx,
			formGNUAddrIndex, formGNUStrIndex:
			c.uleb()
		case formIndirect:
			form = uint16(min(c.uleb(), 0xffff))
			continue
		default:
			c.fail("form %#x", form)
		}
		return
	}
	c.fail("indirect forms without end")
}
