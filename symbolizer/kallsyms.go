// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"io"
	"slices"
	"strings"
	"unsafe"
)

// kernelTable is one reading of /proc/kallsyms: text symbols in 8 bytes each, their names
// in one string in which a name that ends the one before it ("__pfx_vfs_read",
// "vfs_read") takes nothing. It does not change; what it hands out does not hold on to it.
//
// A symbol reaches to the next one of any type, since kallsyms has no sizes; one of a
// module or a BPF program, after which there can be a hole, no further than maxModuleSymbol.
type kernelTable struct {
	parts   []kernelPart
	rows    []kernelRow
	names   string
	modules []string // as Result.Module has them; the first is the kernel itself
	runs    []kernelRun
	symbols int    // rows with a name
	text    uint64 // where the kernel's text starts (_stext); 0: not known
}

// kernelPart is a part of the address space that offsets of 32 bits reach through.
type kernelPart struct {
	base uint64
	row  int // the first of the part
}

type kernelRow struct {
	start uint32 // from the part's base
	name  uint32 // where the name starts in names; it ends with a NUL
}

// kernelRun says that from a row on, until the next run, symbols are a module's.
type kernelRun struct {
	row    int
	module uint16
}

const (
	kernelFile       = "[kernel.kallsyms]"
	noName           = ^uint32(0)      // a row where text ends
	maxModuleSymbol  = 2 << 20         // bytes
	kernelHalf       = uint64(1) << 63 // addresses of the kernel
	maxKernelSymbols = 4 << 20         // more is not a kernel
	maxKernelNames   = 256 << 20       // bytes
	maxKallsymsLine  = 4 << 10         // the kernel's limit of a name is 512
	maxKernelModules = 1<<16 - 1
	expectSymbols    = 1 << 17 // of a kernel that was not read yet
	expectName       = 16      // bytes a symbol
)

// kallsymsParser collects symbols. Lines that are none are skipped. The kernel prints its own
// symbols by address, which makes rows at once; then those of each module and of BPF
// programs, which come by address too for the most part.
type kallsymsParser struct {
	*kernelTable
	last   kernelSymbol   // the best of the newest address, not yet a row; address 0: none
	rest   []kernelSymbol // what came behind its turn
	names  []byte
	lastAt int // where in names the last one starts
	byName map[string]uint16
	hidden int // symbols with address zero
}

type kernelSymbol struct {
	addr   uint64
	name   uint32
	module uint16
	rank   uint8
}

// parseKallsyms reads kallsyms. expect is the number of rows to make room for. The error is
// ReasonNoPermission where the kernel hides its addresses.
func parseKallsyms(r io.Reader, expect int) (*kernelTable, error) {
	p := &kallsymsParser{
		kernelTable: &kernelTable{rows: make([]kernelRow, 0, expect), modules: []string{kernelFile}},
		names:       make([]byte, 0, expect*expectName),
		byName:      map[string]uint16{},
	}
	buf := make([]byte, 64<<10)
	kept := 0 // bytes of an unfinished line at the start of buf
	for {
		n, err := r.Read(buf[kept:])
		b := buf[:kept+n]
		for {
			i := bytes.IndexByte(b, '\n')
			if i < 0 {
				break
			}
			p.line(b[:i])
			b = b[i+1:]
		}
		if err == io.EOF {
			p.line(b)
			break
		}
		if err != nil {
			return nil, err
		}
		if len(b) > maxKallsymsLine {
			b = b[:0]
		}
		kept = copy(buf, b)
		if len(p.rows)+len(p.rest) >= maxKernelSymbols || len(p.names) >= maxKernelNames {
			return nil, errorf(ReasonTooLarge, "more than %d kernel symbols", len(p.rows)+len(p.rest))
		}
	}
	t := p.table()
	if t.symbols == 0 {
		if p.hidden > 0 {
			return nil, errorf(ReasonNoPermission, "kernel addresses are hidden: CAP_SYSLOG is missing, or kernel.kptr_restrict is 2")
		}
		return nil, errorf(ReasonNoSymbols, "kallsyms has no text symbols")
	}
	return t, nil
}

// line takes "ffffffff81000000 T _stext" or "... t nf_hook\t[nf_tables]".
func (p *kallsymsParser) line(b []byte) {
	addr, n := parseHex(b)
	if n == 0 || len(b) < n+4 || b[n] != ' ' || b[n+2] != ' ' {
		return
	}
	typ, name := b[n+1], b[n+3:]
	if addr == 0 {
		p.hidden++
		return
	}
	if addr < kernelHalf {
		return // absolute, or an offset of per-CPU data
	}
	var module []byte
	if i := bytes.IndexByte(name, '\t'); i >= 0 {
		name, module = name[:i], name[i+1:]
	}
	s := kernelSymbol{addr: addr, name: noName}
	if len(module) > 0 {
		var ok bool
		if s.module, ok = p.module(module); !ok {
			return
		}
	}
	switch typ {
	case 'T':
		s.rank = rankGlobal
	case 'W', 'w':
		s.rank = rankWeak
	case 't':
	default:
		p.add(s) // the end of text
		return
	}
	if notASymbol(name) {
		return
	}
	if string(name) == "_stext" && s.module == 0 {
		p.text = addr
	}
	s.name = p.addName(name)
	s.rank += rankFunc
	p.add(s)
}

// addName adds a name to the arena.
func (p *kallsymsParser) addName(b []byte) uint32 {
	if !isCleanBytes(b) {
		b = []byte(cleanName(string(b)))
	}
	if n := len(p.names); n > 0 && bytes.HasSuffix(p.names[p.lastAt:n-1], b) {
		return uint32(n - 1 - len(b))
	}
	p.lastAt = len(p.names)
	p.names = append(append(p.names, b...), 0)
	return uint32(p.lastAt)
}

// module finds the number of "[name]".
func (p *kallsymsParser) module(b []byte) (uint16, bool) {
	if n := len(b); n >= 2 && b[0] == '[' && b[n-1] == ']' {
		b = b[1 : n-1]
	}
	if m, ok := p.byName[string(b)]; ok {
		return m, true
	}
	if len(p.modules) > maxKernelModules {
		return 0, false
	}
	m := uint16(len(p.modules))
	p.modules = append(p.modules, "["+cleanName(string(b))+"]")
	p.byName[string(b)] = m
	return m, true
}

// add takes a symbol, of those that share an address the best.
func (p *kallsymsParser) add(s kernelSymbol) {
	switch {
	case s.addr > p.last.addr:
		p.row(p.last)
		p.last = s
	case s.addr < p.last.addr:
		p.rest = append(p.rest, s)
	case p.compare(s, p.last) < 0:
		p.last = s
	}
}

// compare orders symbols by address, and those of one address by which of them is to stay.
func (p *kallsymsParser) compare(a, b kernelSymbol) int {
	if c := cmp.Or(cmp.Compare(a.addr, b.addr), cmp.Compare(b.rank, a.rank)); c != 0 || a.name == b.name {
		return c
	}
	names := unsafe.String(unsafe.SliceData(p.names), len(p.names))
	return compareAliases(nameIn(names, a.name), nameIn(names, b.name))
}

// table ends the parsing.
func (p *kallsymsParser) table() *kernelTable {
	p.row(p.last)
	t := p.kernelTable
	if len(p.rest) > 0 {
		t = p.merged()
	}
	// Of what is written no more, so that it need not be copied.
	t.names = unsafe.String(unsafe.SliceData(p.names), len(p.names))
	return t
}

// merged puts the rest in between what came in order.
func (p *kallsymsParser) merged() *kernelTable {
	slices.SortFunc(p.rest, p.compare)
	from := p.kernelTable
	t := &kernelTable{rows: make([]kernelRow, 0, len(from.rows)+len(p.rest)), modules: from.modules, text: from.text}
	rest, part, run := p.rest, 0, 0
	for i, r := range from.rows {
		for part+1 < len(from.parts) && from.parts[part+1].row <= i {
			part++
		}
		for run+1 < len(from.runs) && from.runs[run+1].row <= i {
			run++
		}
		s := kernelSymbol{addr: from.parts[part].base + uint64(r.start), name: r.name}
		if s.name != noName {
			s.module = from.runs[run].module
		}
		for len(rest) > 0 && rest[0].addr < s.addr {
			t.row(rest[0])
			rest = rest[1:]
		}
		t.row(s)
	}
	for _, s := range rest {
		t.row(s)
	}
	return t
}

// row adds a symbol behind all others: of those at one address the first, and of ends of text
// those after text, or of a module, as the text of another can come to lie before them.
func (t *kernelTable) row(s kernelSymbol) {
	n := len(t.rows)
	if s.addr == 0 || s.name == noName && s.module == 0 && (n == 0 || t.rows[n-1].name == noName) {
		return
	}
	if parts := len(t.parts); parts > 0 && n > 0 && t.parts[parts-1].base+uint64(t.rows[n-1].start) == s.addr {
		return
	}
	if parts := len(t.parts); parts == 0 || s.addr-t.parts[parts-1].base > 1<<32-1 {
		t.parts = append(t.parts, kernelPart{base: s.addr, row: n})
	}
	if s.name != noName {
		t.symbols++
		if runs := len(t.runs); runs == 0 || t.runs[runs-1].module != s.module {
			t.runs = append(t.runs, kernelRun{row: n, module: s.module})
		}
	}
	t.rows = append(t.rows, kernelRow{start: uint32(s.addr - t.parts[len(t.parts)-1].base), name: s.name})
}

// name is the name at an offset of names.
func (t *kernelTable) name(off uint32) string { return nameIn(t.names, off) }

func nameIn(names string, off uint32) string {
	if off == noName {
		return ""
	}
	s := names[off:]
	return s[:strings.IndexByte(s, 0)]
}

// find returns the row of the symbol at addr and the module that it belongs to.
func (t *kernelTable) find(addr uint64) (row int, module uint16, ok bool) {
	p := len(t.parts) - 1
	for p >= 0 && t.parts[p].base > addr {
		p--
	}
	if p < 0 || addr-t.parts[p].base > 1<<32-1 {
		return 0, 0, false
	}
	lo, hi := t.parts[p].row, len(t.rows)
	if p+1 < len(t.parts) {
		hi = t.parts[p+1].row
	}
	off := uint32(addr - t.parts[p].base)
	for lo < hi {
		if mid := int(uint(lo+hi) >> 1); t.rows[mid].start <= off {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	row = lo - 1
	if t.rows[row].name == noName {
		return 0, 0, false
	}
	r, found := slices.BinarySearchFunc(t.runs, row, func(r kernelRun, row int) int { return r.row - row })
	if !found {
		r--
	}
	module = t.runs[r].module
	if module != 0 && off-t.rows[row].start >= maxModuleSymbol {
		return 0, 0, false
	}
	return row, module, true
}

// bytes is the memory of the table.
func (t *kernelTable) bytes() int64 {
	return int64(cap(t.rows))*8 + int64(len(t.names)) + int64(cap(t.runs))*16 + int64(len(t.modules))*64
}

// parseHex reads hex digits from the start of b, and how many there were, at most 16.
func parseHex(b []byte) (v uint64, n int) {
	if len(b) >= 16 {
		high, ok1 := hex8(binary.LittleEndian.Uint64(b))
		low, ok2 := hex8(binary.LittleEndian.Uint64(b[8:]))
		if ok1 && ok2 {
			return high<<32 | low, 16
		}
	}
	for n < len(b) && n < 16 {
		c := b[n]
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return v, n
		}
		v = v<<4 | uint64(c)
		n++
	}
	return v, n
}

// hex8 reads eight hex digits in lower case at once, the first from the lowest byte.
func hex8(x uint64) (uint64, bool) {
	const each = 0x0101010101010101
	letters := x >> 6 & each
	d := x - each*'0' - letters*('a'-'0') // 0 to 9, of letters 0 to 5
	if (d|(d+0x76*each+letters*4))&(0x80*each) != 0 {
		return 0, false
	}
	d += letters * 10
	d = (d<<4 | d>>8) & 0x00ff00ff00ff00ff
	d = (d<<8 | d>>16) & 0x0000ffff0000ffff
	return (d<<16 | d>>32) & 0xffffffff, true
}
