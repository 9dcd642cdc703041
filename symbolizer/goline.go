// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"encoding/binary"
	"strings"
)

const (
	goPCDataInlTreeIndex = 2 // _PCDATA_InlTreeIndex
	goFuncDataInlTree    = 3 // _FUNCDATA_InlTree

	maxInlineDepth = 64
	maxPCSteps     = 1 << 20 // of one pc-value table
	goNone         = ^uint32(0)
)

// goFunc is what we use of a function's record (src/runtime/runtime2.go, _func).
type goFunc struct {
	entry        uint32 // offset from text
	name         uint32
	pcfile, pcln uint32 // pc-value tables, offsets in pctab
	cu           uint32 // index in cutab
	startLine    int32
	inlineIndex  uint32 // pc-value table: index into the inline tree; 0: nothing is inlined
	inlineTree   uint32 // offset from gofunc
}

// function reads the record at an offset from ftab.
func (g *goTable) function(entry, record uint32) (goFunc, error) {
	size := 40
	if g.is120 {
		size = 44
	}
	at := g.ftab + uint64(record)
	if at+uint64(size) > g.end {
		return goFunc{}, errorf(ReasonMalformed, "pclntab: function record at %#x", record)
	}
	b, err := g.pager.slice(at, size)
	if err != nil {
		return goFunc{}, err
	}
	d := decoder{b: b}
	f := goFunc{entry: d.u32(), name: d.u32()}
	if f.entry != entry {
		return goFunc{}, errorf(ReasonMalformed, "pclntab: record of %#x is of %#x", entry, f.entry)
	}
	d.u32() // args
	d.u32() // deferreturn
	d.u32() // pcsp
	f.pcfile, f.pcln = d.u32(), d.u32()
	npcdata := d.u32()
	f.cu = d.u32()
	if g.is120 {
		f.startLine = int32(d.u32())
	}
	d.u8() // funcID
	d.u8() // flag
	d.u8() // padding
	nfuncdata := d.u8()
	if npcdata <= goPCDataInlTreeIndex || nfuncdata <= goFuncDataInlTree || npcdata > 1<<16 {
		return f, nil
	}
	at += uint64(size)
	f.inlineIndex, err = g.pager.u32(at + 4*goPCDataInlTreeIndex)
	if err != nil {
		return f, err
	}
	f.inlineTree, err = g.pager.u32(at + 4*uint64(npcdata) + 4*goFuncDataInlTree)
	if err != nil || f.inlineTree == goNone {
		f.inlineIndex = 0
	}
	return f, err
}

// lookup returns the functions at addr: the calls that the compiler inlined there,
// innermost first, then the function itself. Where the calls can not be told, the line,
// which is that of the innermost, is left out.
func (g *goTable) lookup(addr uint64) ([]Line, error) {
	if addr < g.text || addr-g.text >= g.textEnd {
		return nil, nil
	}
	pc := uint32(addr - g.text)
	if lines := g.lines[pc]; lines != nil {
		return lines, nil
	}
	lines, err := g.linesAt(pc)
	if err != nil {
		return nil, err
	}
	if g.held > maxHeldNames {
		g.forget()
	}
	g.lines[pc] = lines
	g.held += 64 + int64(cap(lines))*lineBytes
	return lines, nil
}

func (g *goTable) forget() {
	clear(g.lines)
	clear(g.names)
	clear(g.files)
	g.held = 0
}

func (g *goTable) linesAt(pc uint32) ([]Line, error) {
	entry, record, err := g.find(pc)
	if err != nil {
		return nil, err
	}
	f, err := g.function(entry, record)
	if err != nil {
		return nil, err
	}
	lines := make([]Line, 0, 1)
	inlined := int32(-1)
	for f.inlineIndex != 0 {
		inlined, err = g.pcValue(f.inlineIndex, f.entry, pc)
		if err != nil {
			return nil, err
		}
		if inlined < 0 || len(lines) == maxInlineDepth {
			break
		}
		call, err := g.inlinedCall(&f, inlined)
		if err != nil {
			break // the function itself is still right
		}
		line, err := g.line(&f, call.name, pc)
		if err != nil {
			return nil, err
		}
		line.StartLine = int64(max(call.startLine, 0))
		lines = append(lines, line)
		pc = f.entry + call.parentPC
	}
	line, err := g.line(&f, f.name, pc)
	if err != nil {
		return nil, err
	}
	if inlined >= 0 {
		line.File, line.Line = "", 0
	}
	line.StartLine = int64(max(f.startLine, 0))
	return append(lines, line), nil
}

// line describes a function of which the instruction at pc is part, by name offset.
func (g *goTable) line(f *goFunc, name, pc uint32) (Line, error) {
	n, err := g.funcName(name)
	if err != nil {
		return Line{}, err
	}
	l := Line{Function: goDisplayName(n), SystemName: n}
	line, err := g.pcValue(f.pcln, f.entry, pc)
	if err != nil {
		return Line{}, err
	}
	file, err := g.pcValue(f.pcfile, f.entry, pc)
	if err != nil {
		return Line{}, err
	}
	if file < 0 || line < 0 {
		return l, nil
	}
	at := g.cutab + (uint64(f.cu)+uint64(file))*4
	if at+4 > g.filetab {
		return l, nil
	}
	off, err := g.pager.u32(at)
	if err != nil {
		return Line{}, err
	}
	if off != goNone {
		if l.File, err = g.cached(g.files, g.filetab, g.pctab, off); err != nil {
			return Line{}, err
		}
		l.Line = int64(line)
	}
	return l, nil
}

func (g *goTable) funcName(off uint32) (string, error) {
	name, err := g.cached(g.names, g.funcnames, g.cutab, off)
	if err == nil && name == "" {
		err = errorf(ReasonMalformed, "pclntab: function without a name")
	}
	return name, err
}

// cached returns the string at an offset from base.
func (g *goTable) cached(cache map[uint32]string, base, end uint64, off uint32) (string, error) {
	if s, ok := cache[off]; ok {
		return s, nil
	}
	s, err := g.pager.cstring(base+uint64(off), end)
	if err != nil {
		return "", err
	}
	s = cleanName(s)
	cache[off] = s
	g.held += int64(len(s)) + 48
	return s, nil
}

// goDisplayName is the name as the runtime prints it: type arguments are elided.
func goDisplayName(name string) string {
	if i := strings.IndexByte(name, '['); i >= 0 {
		if j := strings.LastIndexByte(name, ']'); j > i && name[i:j+1] != "[...]" {
			return name[:i] + "[...]" + name[j+1:]
		}
	}
	return name
}

type goInlinedCall struct {
	name      uint32
	parentPC  uint32 // offset from the function's entry of an instruction at the call's position
	startLine int32  // 0 before Go 1.20
}

// inlinedCall reads an entry of an inline tree (src/runtime/symtabinl.go, inlinedCall).
func (g *goTable) inlinedCall(f *goFunc, i int32) (goInlinedCall, error) {
	if g.gofunc == 0 {
		return goInlinedCall{}, errorf(ReasonNoSymbols, "pclntab: no inline trees")
	}
	size := uint64(20) // parent (16 bits), funcID, padding, file, line, name, parent's pc
	if g.is120 {
		size = 16 // funcID, padding, name, parent's pc, start line
	}
	b, err := g.pager.slice(g.gofunc+uint64(f.inlineTree)+uint64(i)*size, int(size))
	if err != nil {
		return goInlinedCall{}, err
	}
	d := decoder{b: b}
	d.u8()
	padding := uint32(d.u8())<<16 | uint32(d.u16())
	var c goInlinedCall
	if g.is120 {
		c.name, c.parentPC, c.startLine = d.u32(), d.u32(), int32(d.u32())
	} else {
		padding = uint32(b[3])
		d.u32() // file
		d.u32() // line
		c.name, c.parentPC = d.u32(), d.u32()
	}
	if padding != 0 || uint64(c.name) >= g.cutab-g.funcnames || c.parentPC > 1<<30 {
		return c, errorf(ReasonMalformed, "pclntab: inlined call")
	}
	if _, seen := g.names[c.name]; !seen && c.name > 0 {
		// A name starts after another's end.
		if b, err = g.pager.slice(g.funcnames+uint64(c.name)-1, 1); err != nil || b[0] != 0 {
			return c, errorf(ReasonMalformed, "pclntab: inlined call's name")
		}
	}
	return c, nil
}

// inlineTreesMakeSense tries some of the trees, so that a layout of moduledata that we do
// not know yet costs us the inlined calls and nothing else.
func (g *goTable) inlineTreesMakeSense() bool {
	const functions, trees = 4096, 64
	tried := 0
	for i := uint64(0); i < min(g.nfunc, functions) && tried < trees; i++ {
		b, err := g.pager.slice(g.ftab+i*goFtabEntry, goFtabEntry)
		if err != nil {
			return false
		}
		f, err := g.function(binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]))
		if err != nil {
			return false
		}
		if f.inlineIndex == 0 {
			continue
		}
		tried++
		if _, err := g.inlinedCall(&f, 0); err != nil {
			return false
		}
	}
	return true
}

// pcValue is the value of a pc-value table at pc: pairs of a zigzag value delta and a pc
// delta in quanta, both varints, the value from -1 and the pc from the entry on, until a
// value delta of 0 (src/runtime/symtab.go, step). It is -1 where the table has no value.
func (g *goTable) pcValue(table, entry, pc uint32) (int32, error) {
	if table == 0 || g.pctab+uint64(table) >= g.ftab {
		return -1, nil
	}
	r := byteReader{pager: &g.pager, off: g.pctab + uint64(table), end: g.ftab}
	value, at := int32(-1), uint64(entry)
	for step := range maxPCSteps {
		delta := r.uvarint()
		if r.err != nil || delta == 0 && step > 0 {
			return -1, r.err
		}
		if delta&1 != 0 {
			value += int32(^(delta >> 1))
		} else {
			value += int32(delta >> 1)
		}
		at += uint64(r.uvarint()) * g.quantum
		if r.err != nil {
			return -1, r.err
		}
		if uint64(pc) < at {
			return value, nil
		}
	}
	return -1, errorf(ReasonTooLarge, "pclntab: pc-value table of more than %d steps", maxPCSteps)
}

// byteReader reads bytes in sequence. Its error is sticky.
type byteReader struct {
	pager    *pager
	off, end uint64
	chunk    []byte
	err      error
}

func (r *byteReader) byte() byte {
	if len(r.chunk) == 0 {
		if r.err != nil {
			return 0
		}
		if r.off >= r.end {
			r.err = errorf(ReasonMalformed, "pclntab: table goes on beyond its end")
			return 0
		}
		b, err := r.pager.chunk(r.off)
		if err != nil {
			r.err = err
			return 0
		}
		r.chunk = b[:min(uint64(len(b)), r.end-r.off)]
		r.off += uint64(len(r.chunk))
	}
	b := r.chunk[0]
	r.chunk = r.chunk[1:]
	return b
}

// uvarint reads a varint of at most 32 bits.
func (r *byteReader) uvarint() uint32 {
	var v uint32
	for shift := 0; shift < 35; shift += 7 {
		b := r.byte()
		v |= uint32(b&0x7f) << shift
		if b&0x80 == 0 {
			return v
		}
	}
	r.err = errorf(ReasonMalformed, "pclntab: varint of more than 5 bytes")
	return 0
}

func (g *goTable) bytes() int64 {
	return int64(len(g.index))*4 + g.pager.bytes() + g.held + 512
}
