// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bufio"
	"cmp"
	"debug/elf"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/ianlancetaylor/demangle"

	"github.com/hostflame/hostflame/test/workload"
)

// Names gives addresses of one process their functions' names: by the symbol tables of
// its files, and the map that a JIT compiler wrote. It has nothing in
// common with the agent's symbolizer.
type Names struct {
	maps []Mapping
	jit  symbols
}

// NewNames takes the mappings of a process, and the path of a perf map, or "".
func NewNames(maps []Mapping, perfMap string) (*Names, error) {
	n := &Names{maps: maps}
	if perfMap != "" {
		var err error
		if n.jit, err = readPerfMap(perfMap); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// Stack names the frames of a stack as the walkers give it, leaf first, and returns them
// root first. What has no name is "".
func (n *Names) Stack(frames []uint64) []string {
	names := make([]string, 0, len(frames))
	for i, addr := range slices.Backward(frames) {
		exact := addr&Exact != 0 || i == 0
		addr &^= Exact
		if !exact {
			addr--
		}
		names = append(names, n.name(addr))
	}
	return names
}

func (n *Names) name(addr uint64) string {
	for _, m := range n.maps {
		if addr < m.Start || addr >= m.End || !strings.HasPrefix(m.Path, "/") {
			continue
		}
		if f := openFile(m.Path); f != nil {
			return f.name(addr - m.Start + m.Offset)
		}
	}
	return n.jit.name(addr)
}

type symbol struct {
	addr, size uint64
	name       string
}

// symbols are sorted by address.
type symbols []symbol

func (s symbols) name(addr uint64) string {
	i, found := slices.BinarySearchFunc(s, addr, func(s symbol, addr uint64) int { return cmp.Compare(s.addr, addr) })
	if !found {
		i--
	} else {
		for i+1 < len(s) && s[i+1].addr == addr {
			i++
		}
	}
	if i < 0 || s[i].size > 0 && addr-s[i].addr >= s[i].size {
		return ""
	}
	return s[i].name
}

// file is what is read of an ELF file.
type file struct {
	loads   []elf.ProgHeader
	symbols symbols
}

func (f *file) name(offset uint64) string {
	for _, p := range f.loads {
		if offset >= p.Off && offset < p.Off+p.Filesz {
			return f.symbols.name(offset - p.Off + p.Vaddr)
		}
	}
	return ""
}

var files = map[string]*file{}

// openFile reads a file's symbols, once. It is nil for what is no ELF file.
func openFile(path string) *file {
	if f, ok := files[path]; ok {
		return f
	}
	files[path] = nil
	named := path + workload.Unstripped
	if _, err := os.Stat(named); err != nil {
		named = path
	}
	e, err := elf.Open(named)
	if err != nil {
		return nil
	}
	defer e.Close()
	f := &file{}
	files[path] = f
	for _, p := range e.Progs {
		if p.Type == elf.PT_LOAD {
			f.loads = append(f.loads, p.ProgHeader)
		}
	}
	static, _ := e.Symbols()
	dynamic, _ := e.DynamicSymbols()
	for _, s := range slices.Concat(dynamic, static) {
		if elf.ST_TYPE(s.Info) == elf.STT_FUNC || elf.ST_TYPE(s.Info) == elf.STT_NOTYPE && s.Section != elf.SHN_UNDEF {
			// The part of a function that compilers put elsewhere is the function.
			name := demangle.Filter(strings.TrimSuffix(s.Name, ".cold"), demangle.NoParams)
			f.symbols = append(f.symbols, symbol{s.Value, s.Size, name})
		}
	}
	slices.SortStableFunc(f.symbols, func(x, y symbol) int {
		return cmp.Or(cmp.Compare(x.addr, y.addr), cmp.Compare(x.size, y.size))
	})
	return f
}

// readPerfMap reads lines of "address size name". A later line replaces what it covers.
func readPerfMap(path string) (symbols, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read names of JIT code: %w", err)
	}
	defer f.Close()
	var all symbols
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.SplitN(lines.Text(), " ", 3)
		if len(fields) != 3 {
			continue
		}
		addr, err1 := strconv.ParseUint(strings.TrimPrefix(fields[0], "0x"), 16, 64)
		size, err2 := strconv.ParseUint(strings.TrimPrefix(fields[1], "0x"), 16, 64)
		if err1 == nil && err2 == nil {
			all = append(all, symbol{addr, size, jitName(fields[2])})
		}
	}
	slices.SortStableFunc(all, func(x, y symbol) int { return cmp.Compare(x.addr, y.addr) })
	return all, lines.Err()
}

// jitName takes the function's name out of what the compilers write: "JS:*walk
// file.js:41:14" with the tier in front, "int Chain.walk(int, int)".
func jitName(text string) string {
	if js, ok := strings.CutPrefix(text, "JS:"); ok {
		name, _, _ := strings.Cut(strings.TrimLeft(js, "~^*+"), " ")
		return name
	}
	if name, _, ok := strings.Cut(text, "("); ok {
		return name[strings.LastIndexByte(name, ' ')+1:]
	}
	return text
}
