// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"cmp"
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

// kallsymsParser collects symbols. Lines that are none are skipped.
type kallsymsParser struct {
	symbols []kernelSymbol
	names   []byte
	lastAt  int // where in names the last one starts
	modules []string
	byName  map[string]uint16
	hidden  int    // symbols with address zero
	text    uint64 // of _stext
}

type kernelSymbol struct {
	addr   uint64
	name   uint32
	module uint16
	rank   uint8
}

// parseKallsyms reads kallsyms. expect is the number of rows to make room for. The error is ReasonNoPermission where the kernel hides its addresses.
func parseKallsyms(r io.Reader, expect int) (*kernelTable, error) {
	p := &kallsymsParser{
		symbols: make([]kernelSymbol, 0, expect),
		names:   make([]byte, 0, expect*expectName),
		modules: []string{kernelFile},
		byName:  map[string]uint16{},
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
		if len(p.symbols) >= maxKernelSymbols || len(p.names) >= maxKernelNames {
			return nil, errorf(ReasonTooLarge, "more than %d kernel symbols", len(p.symbols))
		}
	}
	if len(p.symbols) == 0 {
		if p.hidden > 0 {
			return nil, errorf(ReasonNoPermission, "kernel addresses are hidden: CAP_SYSLOG is missing, or kernel.kptr_restrict is 2")
		}
		return nil, errorf(ReasonNoSymbols, "kallsyms has no text symbols")
	}
	return p.table(), nil
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
	switch typ {
	case 'T':
		s.rank = rankGlobal
	case 'W', 'w':
		s.rank = rankWeak
	case 't':
	default:
		p.symbols = append(p.symbols, s) // the end of text
		return
	}
	if notASymbol(name) {
		return
	}
	if len(module) > 0 {
		var ok bool
		if s.module, ok = p.module(module); !ok {
			return
		}
	}
	if string(name) == "_stext" && len(module) == 0 {
		p.text = addr
	}
	s.name = p.name(name)
	s.rank += rankFunc
	p.symbols = append(p.symbols, s)
}

// name adds a name to the arena.
func (p *kallsymsParser) name(b []byte) uint32 {
	if !isClean(b) {
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

func (p *kallsymsParser) table() *kernelTable {
	// Of what is written no more, so that it need not be copied.
	t := &kernelTable{names: unsafe.String(unsafe.SliceData(p.names), len(p.names)), modules: p.modules, text: p.text}
	t.sort(p.symbols)
	// Keep the best of those that share an address, and of ends of text those after text.
	kept := p.symbols[:0]
	for _, s := range p.symbols {
		n := len(kept)
		if n > 0 && kept[n-1].addr == s.addr {
			continue
		}
		if s.name == noName && (n == 0 || kept[n-1].name == noName) {
			continue
		}
		kept = append(kept, s)
	}
	t.rows = make([]kernelRow, 0, len(kept))
	for i, s := range kept {
		if n := len(t.parts); n == 0 || s.addr-t.parts[n-1].base > 1<<32-1 {
			t.parts = append(t.parts, kernelPart{base: s.addr, row: i})
		}
		if s.name != noName {
			t.symbols++
			if n := len(t.runs); n == 0 || t.runs[n-1].module != s.module {
				t.runs = append(t.runs, kernelRun{row: i, module: s.module})
			}
		}
		t.rows = append(t.rows, kernelRow{start: uint32(s.addr - t.parts[len(t.parts)-1].base), name: s.name})
	}
	return t
}

// sort sorts symbols by address, and those of one address by which of them is to stay. The
// kernel prints them almost in order: its own by address, then each module's.
func (t *kernelTable) sort(symbols []kernelSymbol) {
	byAddr := func(a, b kernelSymbol) int { return cmp.Compare(a.addr, b.addr) }
	if !slices.IsSortedFunc(symbols, byAddr) {
		slices.SortFunc(symbols, byAddr)
	}
	for i := 0; i < len(symbols); {
		end := i + 1
		for end < len(symbols) && symbols[end].addr == symbols[i].addr {
			end++
		}
		if end > i+1 {
			slices.SortFunc(symbols[i:end], func(a, b kernelSymbol) int {
				if c := cmp.Compare(b.rank, a.rank); c != 0 {
					return c
				}
				return compareAliases(t.name(a.name), t.name(b.name))
			})
		}
		i = end
	}
}

// name is the name at an offset of names.
func (t *kernelTable) name(off uint32) string {
	if off == noName {
		return ""
	}
	s := t.names[off:]
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
