// SPDX-License-Identifier: Apache-2.0

// Package pclntab reads Go's table of functions out of a binary, stripped or not. The file
// may be hostile.
package pclntab

import (
	"bytes"
	"encoding/binary"
	"slices"

	"github.com/hostflame/hostflame/internal/elffile"
)

// A pclntab's header is followed, at the offsets that it holds, by the names of
// functions, the files of compilation units (cutab), the names of files, the pc-value
// tables and the table of functions (ftab: entry, offset of its record; both 32 bits,
// entries from the start of text). The layout has been this since Go 1.18
// (src/runtime/symtab.go, pcHeader).
const (
	Magic118 = 0xfffffff0 // Go 1.18 and 1.19
	Magic120 = 0xfffffff1 // since Go 1.20: start lines, shorter inline entries

	headerWords     = 8       // after the 8 bytes of magic, padding, quantum, pointer size
	ftabEntry       = 8       // bytes
	ftabBlock       = 64      // entries of ftab for which one index entry is kept
	maxFunctions    = 1 << 23 // per file
	maxDataScan     = 256 << 20
	ModuleWords     = 42 // of moduledata, as far as we read
	ModuleNames     = 1  // word: funcnametab's address
	ModuleText      = 22
	ModuleEtext     = 23
	ModuleGofunc118 = 38
	ModuleGofunc120 = 40 // two words more: covctrs, ecovctrs
)

// Table is a pclntab. It keeps one word for each 64 functions; the rest is read by pages
// as it is needed. It is for one goroutine.
type Table struct {
	Image   *elffile.Image
	Pager   elffile.Pager
	Text    uint64 // ELF virtual address of the first function
	TextEnd uint64 // offset from Text of the end of the last
	Quantum uint64 // bytes that addresses of instructions are a multiple of
	Len     uint64 // functions

	// File offsets of the names, the files of units, the names of files, the pc-value
	// tables and the table of functions, in this order; End is where pclntab ends.
	Names, Units, Files, Values, Functions, End uint64

	is120   bool
	ptrSize uint64
	gofunc  uint64   // where inline trees are based; 0: unknown, calls are not expanded
	index   []uint32 // entry of the first function of each block
}

// Open finds the pclntab of a Go binary. Reason no_symbols: it is not one.
func Open(m *elffile.Image, secs []elffile.Section) (*Table, error) {
	at, err := findPclntab(m, secs)
	if err != nil {
		return nil, err
	}
	g, err := parseHeader(m, at)
	if err != nil {
		return nil, err
	}
	headerText := g.Text
	g.Text = 0
	if module := g.findModule(secs, at); module != nil {
		g.Text = module[ModuleText]
		gofunc := ModuleGofunc118
		if g.is120 {
			gofunc = ModuleGofunc120
		}
		if e, ok := m.FileOffset(module[gofunc]); ok {
			g.gofunc = e.Off
		}
	} else if _, ok := m.ExecutableAt(headerText); ok && headerText != 0 {
		g.Text = headerText // until Go 1.25, if it needed no relocation
	}
	if _, ok := m.ExecutableAt(g.Text); !ok || g.Text == 0 {
		return nil, elffile.Errorf(elffile.Malformed, "pclntab: no start of text")
	}
	if err := g.buildIndex(); err != nil {
		return nil, err
	}
	if g.gofunc != 0 && !g.inlineTreesMakeSense() {
		g.gofunc = 0
	}
	return g, nil
}

// header is a place where a pclntab is.
type header struct {
	elffile.Extent
	addr uint64 // its ELF virtual address
}

func findPclntab(m *elffile.Image, secs []elffile.Section) (header, error) {
	for _, s := range m.SectionsNamed(secs, ".gopclntab", ".data.rel.ro.gopclntab") {
		if s.Type != elffile.SHTNobits && s.Flags&elffile.SHFCompressed == 0 && isHeader(m, s.Extent) {
			return header{s.Extent, s.Addr}, nil
		}
	}
	// Sections are renamed by some linkers and dropped by some tools.
	if len(secs) > 0 && len(m.SectionsNamed(secs, ".go.buildinfo", ".note.go.buildid", ".go.module")) == 0 {
		return header{}, elffile.Errorf(elffile.Missing, "not a Go binary")
	}
	budget := uint64(maxDataScan)
	for _, s := range m.Loads {
		if s.Executable {
			continue
		}
		at, ok := scanHeader(m, elffile.Extent{Off: s.Offset, Size: min(s.Filesz, budget)})
		if ok {
			size := s.Filesz - (at - s.Offset)
			return header{elffile.Extent{Off: at, Size: size}, s.Vaddr + (at - s.Offset)}, nil
		}
		budget -= min(s.Filesz, budget)
	}
	return header{}, elffile.Errorf(elffile.Missing, "no pclntab")
}

// scanHeader looks for the magic at aligned offsets of a range.
func scanHeader(m *elffile.Image, r elffile.Extent) (uint64, bool) {
	buf := make([]byte, 256<<10)
	magic := []byte{0xff, 0xff, 0xff, 0, 0} // after its low byte
	for off := r.Off; off+8 <= r.Off+r.Size; {
		b := buf[:min(uint64(len(buf)), r.Off+r.Size-off)]
		if off > uint64(m.Size()) {
			return 0, false
		}
		b = b[:min(uint64(len(b)), uint64(m.Size())-off)]
		if len(b) < 8 || elffile.ReadAt(m, b, off) != nil {
			return 0, false
		}
		for i := 0; ; {
			j := bytes.Index(b[i:], magic)
			if j < 0 {
				break
			}
			if at := i + j - 1; at >= 0 && (off+uint64(at))%8 == 0 {
				if found := off + uint64(at); isHeader(m, elffile.Extent{Off: found, Size: r.Off + r.Size - found}) {
					return found, true
				}
			}
			i += j + 1
		}
		if uint64(len(b)) < uint64(len(buf)) {
			break
		}
		off += uint64(len(b)) - 8
	}
	return 0, false
}

func isHeader(m *elffile.Image, at elffile.Extent) bool {
	_, err := parseHeader(m, header{Extent: at})
	return err == nil
}

// parseHeader reads and checks a header. The text of the result is what the header
// says, not verified.
func parseHeader(m *elffile.Image, at header) (*Table, error) {
	var h [8 + headerWords*8]byte
	if at.Off > uint64(m.Size()) {
		return nil, elffile.Errorf(elffile.Malformed, "pclntab: beyond the end")
	}
	size := min(at.Size, uint64(m.Size())-at.Off)
	b := h[:min(uint64(len(h)), size)]
	if err := elffile.ReadAt(m, b, at.Off); err != nil {
		return nil, err
	}
	g := &Table{
		Image: m, Pager: elffile.Pager{Content: m}, End: at.Off + size,
	}
	d := elffile.Decoder{B: b}
	switch magic := d.U32(); magic {
	case Magic120:
		g.is120 = true
	case Magic118:
	default:
		return nil, elffile.Errorf(elffile.Unsupported, "pclntab: magic %#x", magic)
	}
	pad := d.U16()
	g.Quantum, g.ptrSize = uint64(d.U8()), uint64(d.U8())
	d.Is64 = g.ptrSize == 8
	if pad != 0 || g.Quantum != 1 && g.Quantum != 2 && g.Quantum != 4 || g.ptrSize != 4 && g.ptrSize != 8 {
		return nil, elffile.Errorf(elffile.Malformed, "pclntab: quantum %d, pointers of %d bytes", g.Quantum, g.ptrSize)
	}
	g.Len = d.Word()
	d.Word() // nfiles
	g.Text = d.Word()
	last := uint64(0)
	for _, p := range []*uint64{&g.Names, &g.Units, &g.Files, &g.Values, &g.Functions} {
		off := d.Word()
		if off < last || off >= size {
			return nil, elffile.Errorf(elffile.Malformed, "pclntab: table at %#x of %#x", off, size)
		}
		*p, last = at.Off+off, off
	}
	if g.Names == at.Off || g.Len == 0 || g.Len > maxFunctions || g.Len > (g.End-g.Functions)/ftabEntry {
		return nil, elffile.Errorf(elffile.Malformed, "pclntab: %d functions", g.Len)
	}
	return g, nil
}

// findModule finds runtime.firstmoduledata, which knows where text and inline trees are,
// by its first words: the addresses of pclntab and of the function names in it. Where a
// linker left addresses to relocations, those are read. nil if it is not found.
func (g *Table) findModule(secs []elffile.Section, at header) []uint64 {
	pclntab, names := at.addr, at.addr+(g.Names-at.Off)
	var want [16]byte
	g.putWord(want[:], pclntab)
	g.putWord(want[g.ptrSize:], names)
	size := ModuleWords * g.ptrSize
	budget := uint64(maxDataScan)
	for _, s := range g.Image.Loads {
		if !s.Writable {
			continue
		}
		if at, ok := scanBytes(g.Image, elffile.Extent{Off: s.Offset, Size: min(s.Filesz, budget)}, want[:2*g.ptrSize]); ok {
			b := make([]byte, size)
			if elffile.ReadAt(g.Image, b, at) != nil {
				continue
			}
			if module := g.words(b); g.moduleMakesSense(module) {
				return module
			}
		}
		budget -= min(s.Filesz, budget)
	}
	module := g.relocatedModule(secs, pclntab)
	if module != nil && module[ModuleNames] == names && g.moduleMakesSense(module) {
		return module
	}
	return nil
}

func (g *Table) moduleMakesSense(module []uint64) bool {
	text, etext := module[ModuleText], module[ModuleEtext]
	_, ok := g.Image.ExecutableAt(text)
	return ok && etext > text
}

func (g *Table) putWord(b []byte, v uint64) {
	if g.ptrSize == 8 {
		binary.LittleEndian.PutUint64(b, v)
	} else {
		binary.LittleEndian.PutUint32(b, uint32(v))
	}
}

func (g *Table) words(b []byte) []uint64 {
	d := elffile.Decoder{B: b, Is64: g.ptrSize == 8}
	w := make([]uint64, ModuleWords)
	for i := range w {
		w[i] = d.Word()
	}
	return w
}

// scanBytes looks for want at 4-byte aligned offsets of a range.
func scanBytes(m *elffile.Image, r elffile.Extent, want []byte) (uint64, bool) {
	buf := make([]byte, 256<<10)
	for off := r.Off; off < r.Off+r.Size && off < uint64(m.Size()); {
		b := buf[:min(uint64(len(buf)), r.Off+r.Size-off, uint64(m.Size())-off)]
		if elffile.ReadAt(m, b, off) != nil {
			return 0, false
		}
		for i := 0; ; {
			j := bytes.Index(b[i:], want)
			if j < 0 {
				break
			}
			if at := off + uint64(i+j); at%4 == 0 {
				return at, true
			}
			i += j + 1
		}
		if len(b) < len(buf) {
			break
		}
		off += uint64(len(b) - len(want))
	}
	return 0, false
}

// relocatedModule puts moduledata together from the relative relocations (RELA, whose
// addends are the values) of a position-independent file.
func (g *Table) relocatedModule(secs []elffile.Section, pclntab uint64) []uint64 {
	if g.ptrSize != 8 {
		return nil // 32-bit files have REL, whose addends are in place
	}
	const entry = 24
	var module []uint64
	var base uint64
	buf := make([]byte, 2048*entry)
	for _, s := range secs {
		if s.Type != elffile.SHTRela || s.EntSize != entry {
			continue
		}
		// Sorted by address in practice; so one pass sees the words after the first.
		for off, left := s.Off, s.Size/entry*entry; left > 0; {
			b := buf[:min(uint64(len(buf)), left)]
			if elffile.ReadAt(g.Image, b, off) != nil {
				return module
			}
			off, left = off+uint64(len(b)), left-uint64(len(b))
			for ; len(b) > 0; b = b[entry:] {
				at, addend := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[16:])
				if symbol := binary.LittleEndian.Uint32(b[12:]); symbol != 0 {
					continue
				}
				if module == nil || module[ModuleNames] == 0 && addend == pclntab {
					if addend != pclntab {
						continue
					}
					module, base = make([]uint64, ModuleWords), at
				}
				if i := (at - base) / 8; at >= base && i < ModuleWords {
					module[i] = addend
				}
			}
		}
	}
	return module
}

// buildIndex reads ftab once and checks that it is sorted.
func (g *Table) buildIndex() error {
	g.index = make([]uint32, 0, (g.Len+ftabBlock-1)/ftabBlock)
	buf := make([]byte, ftabBlock*ftabEntry)
	last := uint32(0)
	for i := uint64(0); i < g.Len; i += ftabBlock {
		b := buf[:min(ftabBlock, g.Len-i)*ftabEntry]
		if err := elffile.ReadAt(g.Image, b, g.Functions+i*ftabEntry); err != nil {
			return err
		}
		g.index = append(g.index, binary.LittleEndian.Uint32(b))
		for ; len(b) > 0; b = b[ftabEntry:] {
			entry := binary.LittleEndian.Uint32(b)
			if entry < last {
				return elffile.Errorf(elffile.Malformed, "pclntab: functions are not sorted")
			}
			last = entry
		}
	}
	// One entry without a record ends the table.
	end, err := g.Pager.U32(g.Functions + g.Len*ftabEntry)
	if err != nil {
		return err
	}
	if end < last {
		return elffile.Errorf(elffile.Malformed, "pclntab: functions are not sorted")
	}
	g.TextEnd = uint64(end)
	return nil
}

// Block is the number of the block of functions that the one at an offset from text is in,
// of Blocks, or negative before the first.
func (g *Table) Block(off uint32) int {
	block, found := slices.BinarySearch(g.index, off)
	if !found {
		return block - 1
	}
	// Of several functions with one entry (empty ones) the last counts, as in the runtime.
	for block+1 < len(g.index) && g.index[block+1] == off {
		block++
	}
	return block
}

// Blocks is the number of blocks.
func (g *Table) Blocks() int { return len(g.index) }

// Find returns the function at an offset from text: its entry, the next function's, and the
// offset of its record.
func (g *Table) Find(off uint32) (entry, end, record uint32, err error) {
	block := g.Block(off)
	if block < 0 {
		return 0, 0, 0, elffile.Errorf(elffile.NotFound, "before the first function")
	}
	lo, hi := uint64(block)*ftabBlock, min(uint64(block+1)*ftabBlock, g.Len)
	for lo < hi {
		mid := (lo + hi) / 2
		e, err := g.Pager.U32(g.Functions + mid*ftabEntry)
		if err != nil {
			return 0, 0, 0, err
		}
		if e <= off {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == uint64(block)*ftabBlock {
		return 0, 0, 0, elffile.Errorf(elffile.Changed, "pclntab: functions have changed")
	}
	// What ends the table has an entry too.
	b, err := g.Pager.Slice(g.Functions+(lo-1)*ftabEntry, ftabEntry+4)
	if err != nil {
		return 0, 0, 0, err
	}
	d := elffile.Decoder{B: b}
	entry, record, end = d.U32(), d.U32(), d.U32()
	if entry > off || end <= off {
		return 0, 0, 0, elffile.Errorf(elffile.Changed, "pclntab: functions have changed")
	}
	return entry, end, record, nil
}

// Bytes is the memory that the table holds.
func (g *Table) Bytes() int64 { return int64(len(g.index))*4 + g.Pager.Bytes() + 256 }

// IndexOf is the number of the function at an offset from Text.
func (g *Table) IndexOf(off uint32) (uint64, error) {
	lo, hi := uint64(0), g.Len
	for lo < hi {
		mid := (lo + hi) / 2
		e, _, err := g.Entry(mid)
		if err != nil {
			return 0, err
		}
		if e <= off {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return max(lo, 1) - 1, nil
}
