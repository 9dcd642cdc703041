// SPDX-License-Identifier: Apache-2.0

package pclntab

import (
	"encoding/binary"
	"math"

	"github.com/hostflame/hostflame/internal/elffile"
)

const (
	pcDataInlTreeIndex = 2       // _PCDATA_InlTreeIndex
	funcDataInlTree    = 3       // _FUNCDATA_InlTree
	maxSteps           = 1 << 20 // of one pc-value table

	// None stands for no offset.
	None = ^uint32(0)
)

// Bits of Func.Flags (src/internal/abi/symtab.go).
const (
	FlagTopFrame = 1 << iota // the outermost frame of a stack
	FlagSPWrite              // writes the stack pointer, so that SP says nothing of the frame
	FlagAsm                  // written in assembly
)

// Func is what we use of a function's record (src/runtime/runtime2.go, _func).
type Func struct {
	Entry        uint32 // offset from Text
	Name         uint32 // offset from Names
	SP           uint32 // pc-value table, offset in Values: bytes that the function has pushed
	File, Line   uint32 // pc-value tables
	Unit         uint32 // first word of the function's unit in Units
	StartLine    int32
	Flags        uint8
	InlineIndex  uint32 // pc-value table: index into the inline tree; 0: nothing is inlined
	inlineTree   uint32 // offset from gofunc
	inlineTables uint64 // file offset of what follows the record; 0: no inlining
	npcdata      uint32
}

// Entry returns the i-th function: its entry, and the offset of its record.
func (g *Table) Entry(i uint64) (entry, record uint32, err error) {
	b, err := g.Pager.Slice(g.Functions+i*ftabEntry, ftabEntry)
	if err != nil {
		return 0, 0, err
	}
	return binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]), nil
}

// Func reads the record at an offset from Functions.
func (g *Table) Func(entry, record uint32) (Func, error) {
	size := 40
	if g.is120 {
		size = 44
	}
	at := g.Functions + uint64(record)
	if at+uint64(size) > g.End {
		return Func{}, elffile.Errorf(elffile.Malformed, "pclntab: function record at %#x", record)
	}
	b, err := g.Pager.Slice(at, size)
	if err != nil {
		return Func{}, err
	}
	d := elffile.Decoder{B: b}
	f := Func{Entry: d.U32(), Name: d.U32()}
	if f.Entry != entry {
		return Func{}, elffile.Errorf(elffile.Malformed, "pclntab: record of %#x is of %#x", entry, f.Entry)
	}
	d.U32() // args
	d.U32() // deferreturn
	f.SP, f.File, f.Line = d.U32(), d.U32(), d.U32()
	f.npcdata = d.U32()
	f.Unit = d.U32()
	if g.is120 {
		f.StartLine = int32(d.U32())
	}
	d.U8() // funcID
	f.Flags = d.U8()
	d.U8() // padding
	if nfuncdata := d.U8(); f.npcdata > pcDataInlTreeIndex && nfuncdata > funcDataInlTree && f.npcdata <= 1<<16 {
		f.inlineTables = at + uint64(size)
	}
	return f, nil
}

// ReadInline fills in InlineIndex.
func (g *Table) ReadInline(f *Func) (err error) {
	if f.inlineTables == 0 {
		return nil
	}
	if f.InlineIndex, err = g.Pager.U32(f.inlineTables + 4*pcDataInlTreeIndex); err != nil {
		return err
	}
	f.inlineTree, err = g.Pager.U32(f.inlineTables + 4*uint64(f.npcdata) + 4*funcDataInlTree)
	if err != nil || f.inlineTree == None {
		f.InlineIndex = 0
	}
	return err
}

// InlinedCall is a call that the compiler inlined.
type InlinedCall struct {
	Name      uint32 // offset from Names
	ParentPC  uint32 // offset from the function's entry of an instruction at the call's position
	StartLine int32  // 0 before Go 1.20
}

// InlinedCall reads an entry of a function's inline tree (src/runtime/symtabinl.go,
// inlinedCall).
func (g *Table) InlinedCall(f *Func, i int32) (InlinedCall, error) {
	if g.gofunc == 0 {
		return InlinedCall{}, elffile.Errorf(elffile.Missing, "pclntab: no inline trees")
	}
	size := uint64(20) // parent (16 bits), funcID, padding, file, line, name, parent's pc
	if g.is120 {
		size = 16 // funcID, padding, name, parent's pc, start line
	}
	b, err := g.Pager.Slice(g.gofunc+uint64(f.inlineTree)+uint64(i)*size, int(size))
	if err != nil {
		return InlinedCall{}, err
	}
	d := elffile.Decoder{B: b}
	d.U8()
	padding := uint32(d.U8())<<16 | uint32(d.U16())
	var c InlinedCall
	if g.is120 {
		c.Name, c.ParentPC, c.StartLine = d.U32(), d.U32(), int32(d.U32())
	} else {
		padding = uint32(b[3])
		d.U32() // file
		d.U32() // line
		c.Name, c.ParentPC = d.U32(), d.U32()
	}
	if padding != 0 || uint64(c.Name) >= g.Units-g.Names || c.ParentPC > 1<<30 {
		return c, elffile.Errorf(elffile.Malformed, "pclntab: inlined call")
	}
	if c.Name > 0 {
		// A name starts after another's end.
		if b, err = g.Pager.Slice(g.Names+uint64(c.Name)-1, 1); err != nil || b[0] != 0 {
			return c, elffile.Errorf(elffile.Malformed, "pclntab: inlined call's name")
		}
	}
	return c, nil
}

// inlineTreesMakeSense tries some of the trees, so that a layout of moduledata that we do
// not know yet costs us the inlined calls and nothing else.
func (g *Table) inlineTreesMakeSense() bool {
	const functions, trees = 4096, 64
	tried := 0
	for i := uint64(0); i < min(g.Len, functions) && tried < trees; i++ {
		entry, record, err := g.Entry(i)
		if err != nil {
			return false
		}
		f, err := g.Func(entry, record)
		if err != nil || g.ReadInline(&f) != nil {
			return false
		}
		if f.InlineIndex == 0 {
			continue
		}
		tried++
		if _, err := g.InlinedCall(&f, 0); err != nil {
			return false
		}
	}
	return true
}

// Value is the value of a pc-value table at pc, and the offsets from and to which it holds.
// It is -1 where the table has none.
func (g *Table) Value(table, entry, pc uint32) (value int32, from, to uint64, err error) {
	value, from, to = -1, uint64(entry), math.MaxUint64
	err = g.EachValue(table, entry, func(start, end uint64, v int32) bool {
		if uint64(pc) >= end {
			from = end
			return true
		}
		value, from, to = v, start, end
		return false
	})
	return value, from, to, err
}

// EachValue calls f for the values of a pc-value table, in order of pc, until f returns
// false: pairs of a zigzag value delta and a pc delta in quanta, both varints, the value
// from -1 and the pc from the entry on, until a value delta of 0 (src/runtime/symtab.go,
// step). f must not use the table.
func (g *Table) EachValue(table, entry uint32, f func(start, end uint64, value int32) bool) error {
	if table == 0 || g.Values+uint64(table) >= g.Functions {
		return nil
	}
	r := byteReader{pager: &g.Pager, off: g.Values + uint64(table), end: g.Functions}
	value, at := int32(-1), uint64(entry)
	for step := range maxSteps {
		delta := r.uvarint()
		if r.err != nil || delta == 0 && step > 0 {
			return r.err
		}
		if delta&1 != 0 {
			value += int32(^(delta >> 1))
		} else {
			value += int32(delta >> 1)
		}
		start := at
		at += uint64(r.uvarint()) * g.Quantum
		if r.err != nil {
			return r.err
		}
		if !f(start, at, value) {
			return nil
		}
	}
	return elffile.Errorf(elffile.TooLarge, "pclntab: pc-value table of more than %d steps", maxSteps)
}

// byteReader reads bytes in sequence. Its error is sticky.
type byteReader struct {
	pager    *elffile.Pager
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
			r.err = elffile.Errorf(elffile.Malformed, "pclntab: table goes on beyond its end")
			return 0
		}
		b, err := r.pager.Chunk(r.off)
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
	r.err = elffile.Errorf(elffile.Malformed, "pclntab: varint of more than 5 bytes")
	return 0
}
