// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"encoding/binary"
	"slices"
)

// Go's pclntab: its header is followed, at the offsets that it holds, by the names of
// functions, the files of compilation units (cutab), the names of files, the pc-value
// tables and the table of functions (ftab: entry, offset of its record; both 32 bits,
// entries from the start of text). The layout has been this since Go 1.18
// (src/runtime/symtab.go, pcHeader).
const (
	goMagic118 = 0xfffffff0 // Go 1.18 and 1.19
	goMagic120 = 0xfffffff1 // since Go 1.20: start lines, shorter inline entries

	goHeaderWords   = 8       // after the 8 bytes of magic, padding, quantum, pointer size
	goFtabEntry     = 8       // bytes
	goFtabBlock     = 512     // entries of ftab for which one index entry is kept
	maxGoFunctions  = 1 << 23 // per file
	maxGoDataScan   = 256 << 20
	moduleWords     = 42 // of moduledata, as far as we read
	moduleNames     = 1  // word: funcnametab's address
	moduleText      = 22
	moduleEtext     = 23
	moduleGofunc118 = 38
	moduleGofunc120 = 40 // two words more: covctrs, ecovctrs
)

// goTable finds functions, lines and inlined calls by a pclntab. It keeps one word for
// each 512 functions; the rest is read by pages as it is needed.
type goTable struct {
	image   *image
	pager   pager
	is120   bool
	ptrSize uint64
	quantum uint64
	nfunc   uint64
	text    uint64 // ELF virtual address of the first function
	textEnd uint64 // offset from text of the end of the last
	end     uint64 // file offset where pclntab ends

	// File offsets.
	funcnames, cutab, filetab, pctab, ftab uint64

	gofunc uint64   // where inline trees are based; 0: unknown, calls are not expanded
	index  []uint32 // entry of the first function of each block

	// What was asked for: by pc, and by offset.
	lines        map[uint32][]Line
	names, files map[uint32]string
	held         int64 // bytes of the three
}

// loadGoTable finds the pclntab of a Go binary. Reason no_symbols: it is not one.
func loadGoTable(m *image, secs []section) (*goTable, error) {
	at, err := findPclntab(m, secs)
	if err != nil {
		return nil, err
	}
	g, err := parseGoHeader(m, at)
	if err != nil {
		return nil, err
	}
	headerText := g.text
	g.text = 0
	if module := g.findModule(secs, at); module != nil {
		g.text = module[moduleText]
		gofunc := moduleGofunc118
		if g.is120 {
			gofunc = moduleGofunc120
		}
		if e, ok := m.fileOffset(module[gofunc]); ok {
			g.gofunc = e.off
		}
	} else if _, ok := m.executable(headerText); ok && headerText != 0 {
		g.text = headerText // until Go 1.25, if it needed no relocation
	}
	if _, ok := m.executable(g.text); !ok || g.text == 0 {
		return nil, errorf(ReasonMalformed, "pclntab: no start of text")
	}
	if err := g.buildIndex(); err != nil {
		return nil, err
	}
	if g.gofunc != 0 && !g.inlineTreesMakeSense() {
		g.gofunc = 0
	}
	return g, nil
}

// goHeader is a place where a pclntab is.
type goHeader struct {
	extent
	addr uint64 // its ELF virtual address
}

func findPclntab(m *image, secs []section) (goHeader, error) {
	for _, s := range m.sectionsNamed(secs, ".gopclntab", ".data.rel.ro.gopclntab") {
		if s.typ != shtNobits && s.flags&shfCompressed == 0 && isGoHeader(m, s.extent) {
			return goHeader{s.extent, s.addr}, nil
		}
	}
	// Sections are renamed by some linkers and dropped by some tools.
	if len(secs) > 0 && len(m.sectionsNamed(secs, ".go.buildinfo", ".note.go.buildid", ".go.module")) == 0 {
		return goHeader{}, errorf(ReasonNoSymbols, "not a Go binary")
	}
	budget := uint64(maxGoDataScan)
	for _, s := range m.loads {
		if s.Executable {
			continue
		}
		at, ok := scanGoHeader(m, extent{s.Offset, min(s.Filesz, budget)})
		if ok {
			size := s.Filesz - (at - s.Offset)
			return goHeader{extent{at, size}, s.Vaddr + (at - s.Offset)}, nil
		}
		budget -= min(s.Filesz, budget)
	}
	return goHeader{}, errorf(ReasonNoSymbols, "no pclntab")
}

// scanGoHeader looks for the magic at aligned offsets of a range.
func scanGoHeader(m *image, r extent) (uint64, bool) {
	buf := make([]byte, 256<<10)
	magic := []byte{0xff, 0xff, 0xff, 0, 0} // after its low byte
	for off := r.off; off+8 <= r.off+r.size; {
		b := buf[:min(uint64(len(buf)), r.off+r.size-off)]
		if off > uint64(m.Size()) {
			return 0, false
		}
		b = b[:min(uint64(len(b)), uint64(m.Size())-off)]
		if len(b) < 8 || readAt(m, b, off) != nil {
			return 0, false
		}
		for i := 0; ; {
			j := bytes.Index(b[i:], magic)
			if j < 0 {
				break
			}
			if at := i + j - 1; at >= 0 && (off+uint64(at))%8 == 0 {
				if found := off + uint64(at); isGoHeader(m, extent{found, r.off + r.size - found}) {
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

func isGoHeader(m *image, at extent) bool {
	_, err := parseGoHeader(m, goHeader{extent: at})
	return err == nil
}

// parseGoHeader reads and checks a header. The text of the result is what the header
// says, not verified.
func parseGoHeader(m *image, at goHeader) (*goTable, error) {
	var h [8 + goHeaderWords*8]byte
	if at.off > uint64(m.Size()) {
		return nil, errorf(ReasonMalformed, "pclntab: beyond the end")
	}
	size := min(at.size, uint64(m.Size())-at.off)
	b := h[:min(uint64(len(h)), size)]
	if err := readAt(m, b, at.off); err != nil {
		return nil, err
	}
	g := &goTable{
		image: m, pager: pager{content: m}, end: at.off + size,
		lines: map[uint32][]Line{}, names: map[uint32]string{}, files: map[uint32]string{},
	}
	d := decoder{b: b}
	switch magic := d.u32(); magic {
	case goMagic120:
		g.is120 = true
	case goMagic118:
	default:
		return nil, errorf(ReasonUnsupported, "pclntab: magic %#x", magic)
	}
	pad := d.u16()
	g.quantum, g.ptrSize = uint64(d.u8()), uint64(d.u8())
	d.is64 = g.ptrSize == 8
	if pad != 0 || g.quantum != 1 && g.quantum != 2 && g.quantum != 4 || g.ptrSize != 4 && g.ptrSize != 8 {
		return nil, errorf(ReasonMalformed, "pclntab: quantum %d, pointers of %d bytes", g.quantum, g.ptrSize)
	}
	g.nfunc = d.word()
	d.word() // nfiles
	g.text = d.word()
	last := uint64(0)
	for _, p := range []*uint64{&g.funcnames, &g.cutab, &g.filetab, &g.pctab, &g.ftab} {
		off := d.word()
		if off < last || off >= size {
			return nil, errorf(ReasonMalformed, "pclntab: table at %#x of %#x", off, size)
		}
		*p, last = at.off+off, off
	}
	if g.funcnames == at.off || g.nfunc == 0 || g.nfunc > maxGoFunctions || g.nfunc > (g.end-g.ftab)/goFtabEntry {
		return nil, errorf(ReasonMalformed, "pclntab: %d functions", g.nfunc)
	}
	return g, nil
}

// findModule finds runtime.firstmoduledata, which knows where text and inline trees are,
// by its first words: the addresses of pclntab and of the function names in it. Where a
// linker left addresses to relocations, those are read. nil if it is not found.
func (g *goTable) findModule(secs []section, at goHeader) []uint64 {
	pclntab, names := at.addr, at.addr+(g.funcnames-at.off)
	var want [16]byte
	g.putWord(want[:], pclntab)
	g.putWord(want[g.ptrSize:], names)
	size := moduleWords * g.ptrSize
	budget := uint64(maxGoDataScan)
	for i, s := range g.image.loads {
		if !g.image.write[i] {
			continue
		}
		if at, ok := scanBytes(g.image, extent{s.Offset, min(s.Filesz, budget)}, want[:2*g.ptrSize]); ok {
			b := make([]byte, size)
			if readAt(g.image, b, at) != nil {
				continue
			}
			if module := g.words(b); g.moduleMakesSense(module) {
				return module
			}
		}
		budget -= min(s.Filesz, budget)
	}
	module := g.relocatedModule(secs, pclntab)
	if module != nil && module[moduleNames] == names && g.moduleMakesSense(module) {
		return module
	}
	return nil
}

func (g *goTable) moduleMakesSense(module []uint64) bool {
	text, etext := module[moduleText], module[moduleEtext]
	_, ok := g.image.executable(text)
	return ok && etext > text
}

func (g *goTable) putWord(b []byte, v uint64) {
	if g.ptrSize == 8 {
		binary.LittleEndian.PutUint64(b, v)
	} else {
		binary.LittleEndian.PutUint32(b, uint32(v))
	}
}

func (g *goTable) words(b []byte) []uint64 {
	d := decoder{b: b, is64: g.ptrSize == 8}
	w := make([]uint64, moduleWords)
	for i := range w {
		w[i] = d.word()
	}
	return w
}

// scanBytes looks for want at 4-byte aligned offsets of a range.
func scanBytes(m *image, r extent, want []byte) (uint64, bool) {
	buf := make([]byte, 256<<10)
	for off := r.off; off < r.off+r.size && off < uint64(m.Size()); {
		b := buf[:min(uint64(len(buf)), r.off+r.size-off, uint64(m.Size())-off)]
		if readAt(m, b, off) != nil {
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
func (g *goTable) relocatedModule(secs []section, pclntab uint64) []uint64 {
	if g.ptrSize != 8 {
		return nil // 32-bit files have REL, whose addends are in place
	}
	const entry = 24
	var module []uint64
	var base uint64
	buf := make([]byte, 2048*entry)
	for _, s := range secs {
		if s.typ != shtRela || s.entsize != entry {
			continue
		}
		// Sorted by address in practice; so one pass sees the words after the first.
		for off, left := s.off, s.size/entry*entry; left > 0; {
			b := buf[:min(uint64(len(buf)), left)]
			if readAt(g.image, b, off) != nil {
				return module
			}
			off, left = off+uint64(len(b)), left-uint64(len(b))
			for ; len(b) > 0; b = b[entry:] {
				at, addend := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[16:])
				if symbol := binary.LittleEndian.Uint32(b[12:]); symbol != 0 {
					continue
				}
				if module == nil || module[moduleNames] == 0 && addend == pclntab {
					if addend != pclntab {
						continue
					}
					module, base = make([]uint64, moduleWords), at
				}
				if i := (at - base) / 8; at >= base && i < moduleWords {
					module[i] = addend
				}
			}
		}
	}
	return module
}

// buildIndex reads ftab once and checks that it is sorted.
func (g *goTable) buildIndex() error {
	g.index = make([]uint32, 0, (g.nfunc+goFtabBlock-1)/goFtabBlock)
	buf := make([]byte, goFtabBlock*goFtabEntry)
	last := uint32(0)
	for i := uint64(0); i < g.nfunc; i += goFtabBlock {
		b := buf[:min(goFtabBlock, g.nfunc-i)*goFtabEntry]
		if err := readAt(g.image, b, g.ftab+i*goFtabEntry); err != nil {
			return err
		}
		g.index = append(g.index, binary.LittleEndian.Uint32(b))
		for ; len(b) > 0; b = b[goFtabEntry:] {
			entry := binary.LittleEndian.Uint32(b)
			if entry < last {
				return errorf(ReasonMalformed, "pclntab: functions are not sorted")
			}
			last = entry
		}
	}
	// One entry without a record ends the table.
	end, err := g.pager.u32(g.ftab + g.nfunc*goFtabEntry)
	if err != nil {
		return err
	}
	if end < last {
		return errorf(ReasonMalformed, "pclntab: functions are not sorted")
	}
	g.textEnd = uint64(end)
	return nil
}

// find returns the function at an offset from text: its entry, and the offset of its record.
func (g *goTable) find(off uint32) (entry, record uint32, err error) {
	block, found := slices.BinarySearch(g.index, off)
	if !found {
		block--
	}
	if block < 0 {
		return 0, 0, errorf(ReasonNotFound, "before the first function")
	}
	// Of several functions with one entry (empty ones) the last counts, as in the runtime.
	for block+1 < len(g.index) && g.index[block+1] == off {
		block++
	}
	lo, hi := uint64(block)*goFtabBlock, min(uint64(block+1)*goFtabBlock, g.nfunc)
	for lo < hi {
		mid := (lo + hi) / 2
		e, err := g.pager.u32(g.ftab + mid*goFtabEntry)
		if err != nil {
			return 0, 0, err
		}
		if e <= off {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == uint64(block)*goFtabBlock {
		return 0, 0, errorf(ReasonChanged, "pclntab: functions have changed")
	}
	b, err := g.pager.slice(g.ftab+(lo-1)*goFtabEntry, goFtabEntry)
	if err != nil {
		return 0, 0, err
	}
	return binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]), nil
}
