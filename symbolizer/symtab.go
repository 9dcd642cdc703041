// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"cmp"
	"slices"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/overlap"
)

// ELF symbol types and bindings (gABI, "Symbol Table"; 10 to 12 are GNU's).
const (
	sttNoType   = 0
	sttFunc     = 2
	sttGNUIFunc = 10

	stbLocal     = 0
	stbGlobal    = 1
	stbWeak      = 2
	stbGNUUnique = 10
)

// symTable is a symbol table as lookups need it: for each executable segment the ranges
// that symbols cover, sorted and without overlap, in 12 bytes each. Names stay in the
// file and are read when a function is seen for the first time. What covers an address:
//
//   - a symbol with a size covers that and no more, so that gaps are not found;
//   - where such symbols overlap, the one that starts last; of those that start together a
//     function before an untyped label, global before weak before local, then the longer;
//   - a symbol without a size, where no other covers its start, reaches to the next symbol
//     or the end of its section; in .dynsym, which lacks the next symbols, one byte;
//   - of equal symbols (aliases) the first by compareAliases.
//
// Mapping symbols ($x, $d) and local labels (.L) are no symbols.
type symTable struct {
	image  *elffile.Image
	strtab elffile.Extent
	parts  []symPart
	rows   int
	lines  map[rowID][]Line // of the functions seen
	names  int64            // bytes of lines
	buf    []byte

	demangle demangler
}

// maxSymbols bounds the functions of a table, so that what it takes while it is read stays
// within twice MaxTableBytes.
func (s *Symbolizer) maxSymbols() int { return int(s.cfg.MaxTableBytes / (symRowsEach * symRowSize)) }

type symPart struct {
	base uint64
	rows []symRow
}

// symRow is one range. Rows with the same start are aliases of each other.
type symRow struct {
	start, size uint32 // start is from the part's base
	name        uint32 // offset in the string table
}

type rowID struct{ part, row uint32 }

const (
	symRowSize  = 12
	symRowsEach = 2       // rows that a symbol may have on the average, and as big as its span
	maxAliases  = 16      // rows with one start
	aliasBit    = 1 << 31 // in Span.Name while building: equal to the span before, names apart
	maxStrtab   = aliasBit
	lineBytes   = 64             // of a Line, without the strings
	lineSize    = lineBytes + 64 // of one that is kept, with its map entry
)

// symBuilder collects the symbols of a table.
type symBuilder struct {
	image    *elffile.Image
	sections []elffile.Section
	parts    []Segment
	dynamic  bool // .dynsym
	strtab   elffile.Extent
	names    elffile.Pager // of the whole file; for untyped symbols
	limit    int
	spans    []overlap.Span
	labels   map[uint32]bool // untyped symbols, by name offset: to be kept
}

// loadSymTable reads the symbols of tab, whose names are in strtab. limit is the largest
// number of symbols.
func loadSymTable(m *elffile.Image, secs []elffile.Section, tab, strtab elffile.Extent, dynamic bool, limit int) (*symTable, error) {
	if strtab.Size > maxStrtab {
		return nil, errorf(ReasonTooLarge, "string table of %d bytes", strtab.Size)
	}
	size := uint64(m.Size())
	if tab.Off > size || tab.Size > size-tab.Off || strtab.Off > size || strtab.Size > size-strtab.Off {
		return nil, errorf(ReasonMalformed, "symbol table lies beyond the end of the file")
	}
	b := &symBuilder{
		image: m, sections: secs, parts: m.ExecutableParts(), dynamic: dynamic, strtab: strtab,
		names: elffile.Pager{Content: m}, limit: limit, labels: map[uint32]bool{},
	}
	if err := b.read(tab); err != nil {
		return nil, err
	}
	t := &symTable{image: m, strtab: strtab, lines: map[rowID][]Line{}}
	var err error
	if t.parts, err = b.build(); err != nil {
		return nil, err
	}
	for _, p := range t.parts {
		t.rows += len(p.rows)
	}
	return t, nil
}

func (b *symBuilder) read(tab elffile.Extent) error {
	const enough = 1 << 17 // half of a kernel's are functions
	n := tab.Size / b.image.SymSize()
	if n > enough {
		// Counted first, as spans that grow would take twice what they take.
		n = 0
		if err := b.each(tab, func(symbol) error { n++; return nil }); err != nil {
			return err
		}
	}
	b.spans = make([]overlap.Span, 0, min(n, uint64(b.limit)))
	return b.each(tab, b.add)
}

type symbol struct {
	name        uint32
	info        uint8
	shndx       uint16
	value, size uint64
}

// each calls f for the symbols that may name code.
func (b *symBuilder) each(tab elffile.Extent, f func(symbol) error) error {
	size := b.image.SymSize()
	const atOnce = 64 << 10
	buf := make([]byte, min(tab.Size/size*size, atOnce/size*size))
	for n := tab.Size / size; n > 0; {
		buf = buf[:min(uint64(len(buf)), n*size)]
		if err := elffile.ReadAt(b.image, buf, tab.Off); err != nil {
			return err
		}
		for at := 0; at < len(buf); at += int(size) {
			if s := b.decode(buf[at : at+int(size)]); b.mayName(s) {
				if err := f(s); err != nil {
					return err
				}
			}
		}
		tab.Off += uint64(len(buf))
		n -= uint64(len(buf)) / size
	}
	return nil
}

func (b *symBuilder) decode(sym []byte) (s symbol) {
	d := elffile.Decoder{B: sym, Is64: b.image.Is64}
	s.name = d.U32()
	if b.image.Is64 {
		s.info, _, s.shndx = d.U8(), d.U8(), d.U16()
		s.value, s.size = d.Word(), d.Word()
	} else {
		s.value, s.size = d.Word(), d.Word()
		s.info, _, s.shndx = d.U8(), d.U8(), d.U16()
	}
	return s
}

func (b *symBuilder) mayName(s symbol) bool {
	switch s.info & 0xf {
	case sttFunc, sttGNUIFunc, sttNoType:
	default:
		return false
	}
	return s.name != 0 && uint64(s.name) < b.strtab.Size && s.shndx != elffile.SHNUndef &&
		(s.shndx < elffile.SHNLoReserve || s.shndx == elffile.SHNXIndex)
}

// add takes one symbol if it names code.
func (b *symBuilder) add(s symbol) error {
	name, info, shndx, value, size, typ := s.name, s.info, s.shndx, s.value, s.size, s.info&0xf
	if b.image.Machine == elffile.MachineARM {
		value &^= 1 // Thumb
	}
	end, ok := b.limitOf(value, shndx, typ != sttNoType)
	if !ok {
		return nil
	}
	if typ == sttNoType {
		keep, err := b.keepLabel(name)
		if err != nil || !keep {
			return err
		}
	}
	if len(b.spans) >= b.limit {
		return errorf(ReasonTooLarge, "more than %d function symbols", b.limit)
	}
	if size > 0 && size < end-value {
		end = value + size
	}
	b.spans = append(b.spans, overlap.Span{Start: value, End: end, Name: name, Prio: rank(info, size > 0)})
	return nil
}

// The rank of a symbol, while it is built kept as its span's priority.
const (
	rankWeak   = 1
	rankGlobal = 2
	rankFunc   = 4
	rankSized  = 8
)

func rank(info uint8, sized bool) uint32 {
	var r uint32
	switch info >> 4 {
	case stbGlobal, stbGNUUnique:
		r = rankGlobal
	case stbWeak:
		r = rankWeak
	}
	if info&0xf != sttNoType {
		r += rankFunc
	}
	if sized {
		r += rankSized
	}
	return r
}

// limitOf is where a symbol at addr must end: at the end of its section, and of what is
// mapped executable. It is false for what is not code. A function whose section is
// unknown is trusted, a label is not.
func (b *symBuilder) limitOf(addr uint64, shndx uint16, function bool) (uint64, bool) {
	i, found := slices.BinarySearchFunc(b.parts, addr, func(s Segment, a uint64) int { return cmp.Compare(s.Vaddr, a) })
	if !found {
		i--
	}
	if i < 0 || addr-b.parts[i].Vaddr >= b.parts[i].Memsz {
		return 0, false
	}
	end := b.parts[i].Vaddr + b.parts[i].Memsz
	if int(shndx) >= len(b.sections) || shndx == elffile.SHNXIndex {
		return end, function
	}
	s := &b.sections[shndx]
	if !s.Executable() {
		return 0, false
	}
	if addr < s.Addr || addr-s.Addr >= s.Size {
		return end, function
	}
	return min(end, s.Addr+s.Size), true
}

// keepLabel is whether an untyped symbol names code, by its name.
func (b *symBuilder) keepLabel(name uint32) (bool, error) {
	if keep, ok := b.labels[name]; ok {
		return keep, nil
	}
	const enough = 4
	off := b.strtab.Off + uint64(name)
	s, err := b.names.CString(off, min(off+enough, b.strtab.Off+b.strtab.Size), enough)
	if err != nil {
		return false, err
	}
	keep := !notASymbol(s)
	if len(b.labels) < 1<<12 {
		b.labels[name] = keep
	}
	return keep, nil
}

// notASymbol is true for ARM and RISC-V mapping symbols and for local labels.
func notASymbol[T string | []byte](name T) bool {
	if len(name) < 2 {
		return len(name) == 0
	}
	switch name[0] {
	case '.':
		return name[1] == 'L'
	case '$':
		switch name[1] {
		case 'x':
			return true // RISC-V adds the instruction set
		case 'a', 'd', 't':
			return len(name) == 2 || name[2] == '.'
		}
	}
	return false
}

// build sorts the symbols into rows.
func (b *symBuilder) build() ([]symPart, error) {
	spans := b.spans
	overlap.Sort(spans, func(x, y *overlap.Span) int {
		return cmp.Or(cmp.Compare(x.Prio, y.Prio), cmp.Compare(x.End, y.End), cmp.Compare(x.Name, y.Name))
	})
	n := uint32(len(spans))
	for i := len(spans) - 1; i >= 0; i-- {
		s := &spans[i]
		alias := i > 0 && spans[i-1].Start == s.Start && spans[i-1].End == s.End && spans[i-1].Prio == s.Prio
		if s.Prio >= rankSized {
			s.Prio = n + uint32(i)
		} else {
			s.Prio = uint32(i) // below all that have a size, and below the labels after it
			if b.dynamic {
				s.End = s.Start + 1
			}
		}
		if alias {
			s.Name |= aliasBit
		}
	}
	parts := make([]symPart, len(b.parts))
	for i := range parts {
		parts[i].base = b.parts[i].Vaddr
	}
	// Two passes, so that rows are reserved to size.
	for fill := range 2 {
		p, rows, total := 0, 0, 0
		overlap.Flatten(spans, func(s *overlap.Span, start, end uint64) {
			if s.Prio < n && start != s.Start {
				return // a label goes no further than what comes after it, or covers it
			}
			for p+1 < len(parts) && start >= parts[p+1].base {
				if fill == 0 && total+rows <= symRowsEach*b.limit {
					parts[p].rows = make([]symRow, 0, rows)
				}
				p, rows, total = p+1, 0, total+rows
			}
			if start-parts[p].base > 1<<32-1 {
				return
			}
			for i, count := s.Prio%n, 0; count < maxAliases; i, count = i-1, count+1 {
				if rows++; fill == 1 {
					parts[p].rows = append(parts[p].rows, symRow{
						start: uint32(start - parts[p].base),
						size:  uint32(min(end-start, 1<<32-1)),
						name:  spans[i].Name &^ aliasBit,
					})
				}
				if spans[i].Name&aliasBit == 0 {
					break
				}
			}
		})
		// Symbols that lie within others, of which there are many names, make many rows.
		if total += rows; total > symRowsEach*b.limit {
			return nil, errorf(ReasonTooLarge, "%d ranges of function symbols", total)
		}
		if fill == 0 && len(parts) > 0 {
			parts[p].rows = make([]symRow, 0, rows)
		}
	}
	return parts, nil
}

// lookup returns the function at addr.
func (t *symTable) lookup(addr uint64) ([]Line, error) {
	id, ok := t.find(addr)
	if !ok {
		return nil, nil
	}
	if lines := t.lines[id]; lines != nil {
		return lines, nil
	}
	names, err := t.namesOf(id)
	if len(names) == 0 || err != nil {
		return nil, err
	}
	best := names[0]
	lines := []Line{{Function: t.demangle.name(best), SystemName: best}}
	if t.names > maxHeldNames {
		clear(t.lines)
		t.names = 0
	}
	t.lines[id] = lines
	t.names += lineSize + int64(len(best)+len(lines[0].Function))
	return lines, nil
}

// namesOf are the names of the function of which id is the last row, by compareAliases.
func (t *symTable) namesOf(id rowID) (names []string, err error) {
	rows := t.parts[id.part].rows
	for i := int(id.row); i >= 0 && rows[i].start == rows[id.row].start; i-- {
		name, err := t.name(rows[i].name)
		if err != nil {
			return nil, err
		}
		if name != "" {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, compareAliases)
	return names, nil
}

// find returns the last row that covers addr.
func (t *symTable) find(addr uint64) (rowID, bool) {
	p := len(t.parts) - 1
	for p >= 0 && t.parts[p].base > addr {
		p--
	}
	if p < 0 || addr-t.parts[p].base > 1<<32-1 {
		return rowID{}, false
	}
	off, rows := uint32(addr-t.parts[p].base), t.parts[p].rows
	lo, hi := 0, len(rows) // the first row that starts above off
	for lo < hi {
		if mid := int(uint(lo+hi) >> 1); rows[mid].start <= off {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 || off-rows[lo-1].start >= rows[lo-1].size {
		return rowID{}, false
	}
	return rowID{uint32(p), uint32(lo - 1)}, true
}

// name reads a name from the string table.
func (t *symTable) name(off uint32) (string, error) {
	for n := uint64(256); ; n = maxName {
		n = min(n, t.strtab.Size-uint64(off))
		if uint64(cap(t.buf)) < n {
			t.buf = make([]byte, n)
		}
		b := t.buf[:n]
		if err := elffile.ReadAt(t.image, b, t.strtab.Off+uint64(off)); err != nil {
			return "", err
		}
		if i := bytes.IndexByte(b, 0); i >= 0 {
			return cleanName(string(b[:i])), nil
		}
		if n == maxName || n == t.strtab.Size-uint64(off) {
			return cleanName(string(b)), nil
		}
	}
}

func (t *symTable) bytes() int64 {
	return int64(t.rows)*symRowSize + t.names + int64(cap(t.buf)) + 256
}
