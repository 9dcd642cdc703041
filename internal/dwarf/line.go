// SPDX-License-Identifier: Apache-2.0

package dwarf

import (
	"bytes"

	"github.com/hostflame/hostflame/internal/elffile"
)

// lineTable is the header of a line program (DWARF 5, section 6.2.4).
type lineTable struct {
	version           uint16
	is64              bool
	addrSize          uint8
	minLength, maxOps uint8
	lineBase          int8
	lineRange         uint8
	opcodeBase        uint8
	opcodeLengths     [256]uint8
	program, end      uint64
	dirs              []text
	files             []lineFile
	interned          []uint32 // of files: what the Interner said, 0 before
	compDir           []byte
}

type lineFile struct {
	name text
	dir  uint64
}

// lines reads the line program at an offset of .debug_line into r.rows.
func (r *Reader) lines(u *unitContext, off uint64) error {
	t := &r.table
	if err := r.lineHeader(t, u, off); err != nil {
		return err
	}
	r.rows.reset()
	err := r.lineProgram(t)
	r.rows.sortSequences()
	return err
}

func (r *Reader) lineHeader(t *lineTable, u *unitContext, off uint64) error {
	sec := u.data.Line
	*t = lineTable{dirs: t.dirs[:0], files: t.files[:0], interned: t.interned[:0], compDir: t.compDir[:0], addrSize: u.addrSize}
	if sec == nil {
		return elffile.Errorf(elffile.Missing, "dwarf: no .debug_line")
	}
	c := &r.line
	c.start(sec, off, sec.Size)
	length := uint64(c.u32())
	if length == 0xffffffff {
		t.is64, length = true, c.u64()
	}
	if length > c.left() {
		return elffile.Errorf(elffile.Malformed, "dwarf: line table of %#x bytes at %#x", length, off)
	}
	c.end = c.pos() + length
	t.end = c.end
	t.version = c.u16()
	if t.version < 2 || t.version > 5 {
		return elffile.Errorf(elffile.Unsupported, "dwarf: line table of version %d", t.version)
	}
	if t.version >= 5 {
		t.addrSize = c.u8()
		c.u8() // segment selector's size
	}
	headerLength := c.offset(t.is64)
	if headerLength > c.left() {
		return elffile.Errorf(elffile.Malformed, "dwarf: header of a line table of %#x bytes", headerLength)
	}
	t.program = c.pos() + headerLength
	t.minLength, t.maxOps = c.u8(), 1
	if t.version >= 4 {
		t.maxOps = c.u8()
	}
	c.u8() // default of is_stmt
	t.lineBase, t.lineRange, t.opcodeBase = int8(c.u8()), c.u8(), c.u8()
	for i := 1; i < int(t.opcodeBase); i++ {
		t.opcodeLengths[i] = c.u8()
	}
	if t.lineRange == 0 || t.opcodeBase == 0 {
		return elffile.Errorf(elffile.Malformed, "dwarf: line table with a range of %d lines", t.lineRange)
	}
	if t.version >= 5 {
		r.entryFormats(t, u, c, func(name text, _ uint64) bool {
			t.dirs = append(t.dirs, name)
			return len(t.dirs) < maxLineFiles
		})
		r.entryFormats(t, u, c, func(name text, dir uint64) bool {
			t.files = append(t.files, lineFile{name, dir})
			return len(t.files) < maxLineFiles
		})
		return c.err
	}
	t.dirs = append(t.dirs, text{}) // the compilation directory
	for c.left() > 0 && len(t.dirs) < maxLineFiles {
		at := c.pos()
		if c.u8() == 0 {
			break
		}
		c.skipString()
		t.dirs = append(t.dirs, text{sec, at})
	}
	if len(t.dirs) >= maxLineFiles { // what comes next is no file
		c.fail("line table of more than %d directories", maxLineFiles)
	}
	t.files = append(t.files, lineFile{}) // numbers start at 1
	for c.left() > 0 && len(t.files) < maxLineFiles {
		at := c.pos()
		if c.u8() == 0 {
			break
		}
		c.skipString()
		dir := c.uleb()
		c.uleb() // time of modification
		c.uleb() // size
		t.files = append(t.files, lineFile{text{sec, at}, dir})
	}
	return c.err
}

// entryFormats reads a list of directories or files of version 5.
func (r *Reader) entryFormats(t *lineTable, u *unitContext, c *cursor, add func(name text, dir uint64) bool) {
	type format struct{ content, form uint64 }
	var formats [256]format
	n := int(c.u8())
	for i := range n {
		formats[i] = format{c.uleb(), c.uleb()}
	}
	// The forms are those of the line table's own encoding.
	enc := *u
	enc.is64, enc.addrSize, enc.version = t.is64, t.addrSize, t.version
	for count := c.uleb(); count > 0 && c.err == nil && c.left() > 0 && n > 0; count-- {
		var name text
		var dir uint64
		for _, f := range formats[:n] {
			form := uint16(min(f.form, 0xffff))
			switch f.content {
			case lnctPath:
				if form == formString {
					name = text{u.data.Line, c.pos()}
					c.skipString()
				} else {
					name = enc.text(c, form)
				}
			case lnctDirectoryIndex:
				dir = enc.number(c, form, 0)
			default:
				skipForm(c, form, &enc.unit)
			}
		}
		if c.err == nil && !add(name, dir) {
			c.fail("line table of more than %d files", maxLineFiles)
		}
	}
}

// file is what the Interner calls a file of the table: 0 if there is none.
func (r *Reader) file(t *lineTable, i uint64) uint32 {
	if i >= uint64(len(t.files)) || t.files[i].name.sec == nil {
		return 0
	}
	for len(t.interned) < len(t.files) {
		t.interned = append(t.interned, 0)
	}
	if t.interned[i] == 0 {
		t.interned[i] = r.names.File(r.path(t, t.files[i]))
	}
	return t.interned[i]
}

// path puts a file's path together: the compilation directory, the file's directory, its
// name, from the last of them that is absolute on.
func (r *Reader) path(t *lineTable, f lineFile) []byte {
	p := &r.pathBuf
	*p = (*p)[:0]
	name := r.string(f.name)
	if bytes.HasPrefix(name, slash) {
		*p = append(*p, name...)
		return *p
	}
	r.nameBuf = append(r.nameBuf[:0], name...)
	// Directory 0 is the compilation directory; version 5 spells it out.
	var dir []byte
	if f.dir < uint64(len(t.dirs)) && t.dirs[f.dir].sec != nil {
		dir = r.string(t.dirs[f.dir])
	}
	if !bytes.HasPrefix(dir, slash) && (t.version < 5 || f.dir != 0) {
		*p = appendPath(*p, t.compDir)
	}
	*p = appendPath(*p, dir)
	*p = appendPath(*p, r.nameBuf)
	return *p
}

var slash = []byte("/")

func appendPath(p, elem []byte) []byte {
	if len(p) > 0 && len(elem) > 0 && p[len(p)-1] != '/' {
		p = append(p, '/')
	}
	return append(p, elem[:min(len(elem), max(0, maxPath-len(p)))]...)
}

// lineProgram runs the program (DWARF 5, section 6.2.5).
func (r *Reader) lineProgram(t *lineTable) error {
	c := &r.line
	c.seek(t.program)
	var advance [256]struct {
		addr uint64
		line int32
	}
	for op := int(t.opcodeBase); op < 256; op++ {
		adjusted := op - int(t.opcodeBase)
		advance[op].addr = uint64(adjusted/int(t.lineRange)) * uint64(t.minLength)
		advance[op].line = int32(t.lineBase) + int32(adjusted%int(t.lineRange))
	}
	constAdd := uint64((255-int(t.opcodeBase))/int(t.lineRange)) * uint64(t.minLength)
	addr, file, line := uint64(0), uint32(1), uint32(1)
	rows := &r.rows
	for c.i < len(c.b) && c.base+uint64(c.i) < c.end || c.left() > 0 {
		if rows.bytes() > maxLineBytes {
			return elffile.Errorf(elffile.TooLarge, "dwarf: line table that takes more than %d bytes", maxLineBytes)
		}
		op := c.u8()
		if op >= t.opcodeBase {
			addr += advance[op].addr
			line += uint32(advance[op].line)
			rows.add(addr, file, line)
			continue
		}
		switch op {
		case 0:
			n := c.uleb()
			if n == 0 {
				continue
			}
			if n > c.left() {
				c.fail("extended opcode of %#x bytes", n)
				continue
			}
			next := c.pos() + n
			switch c.u8() {
			case lneEndSequence:
				rows.endSequence(r.data, addr)
				addr, file, line = 0, 1, 1
			case lneSetAddress:
				if size := n - 1; size == 4 || size == 8 {
					addr = c.uint(int(size))
				}
			case lneDefineFile:
				at := c.pos()
				c.skipString()
				if dir := c.uleb(); len(t.files) < maxLineFiles {
					t.files = append(t.files, lineFile{text{c.sec, at}, dir})
				}
			}
			if c.err == nil {
				c.seek(next)
			}
		case lnsCopy:
			rows.add(addr, file, line)
		case lnsAdvancePC:
			addr += c.uleb() * uint64(t.minLength)
		case lnsAdvanceLine:
			line += uint32(c.sleb())
		case lnsSetFile:
			file = uint32(min(c.uleb(), 1<<32-1))
		case lnsSetColumn, lnsSetISA:
			c.uleb()
		case lnsNegateStmt, lnsSetBasicBlock, lnsSetPrologueEnd, lnsSetEpilogueBegin:
		case lnsConstAddPC:
			addr += constAdd
		case lnsFixedAdvancePC:
			addr += uint64(c.u16())
		default:
			for range t.opcodeLengths[op] {
				c.uleb()
			}
		}
	}
	return c.err
}
