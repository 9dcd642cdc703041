// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"strings"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/pclntab"
)

const maxInlineDepth = 64

// goTable finds functions, lines and inlined calls by a pclntab.
type goTable struct {
	*pclntab.Table

	// What was asked for: by pc, and by offset.
	lines        map[uint32][]Line
	names, files map[uint32]string
	held         int64 // bytes of the three
}

// loadGoTable finds the pclntab of a Go binary. Reason no_symbols: it is not one.
func loadGoTable(m *elffile.Image, secs []elffile.Section) (*goTable, error) {
	t, err := pclntab.Open(m, secs)
	if err != nil {
		return nil, err
	}
	return &goTable{Table: t, lines: map[uint32][]Line{}, names: map[uint32]string{}, files: map[uint32]string{}}, nil
}

// lookup returns the functions at addr: the calls that the compiler inlined there,
// innermost first, then the function itself. Where the calls can not be told, the line,
// which is that of the innermost, is left out.
func (g *goTable) lookup(addr uint64) ([]Line, error) {
	if addr < g.Text || addr-g.Text >= g.TextEnd {
		return nil, nil
	}
	pc := uint32(addr - g.Text)
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
	entry, record, err := g.Find(pc)
	if err != nil {
		return nil, err
	}
	f, err := g.Func(entry, record)
	if err != nil {
		return nil, err
	}
	if err := g.ReadInline(&f); err != nil {
		return nil, err
	}
	lines := make([]Line, 0, 1)
	inlined := int32(-1)
	for f.InlineIndex != 0 {
		inlined, err = g.Value(f.InlineIndex, f.Entry, pc)
		if err != nil {
			return nil, err
		}
		if inlined < 0 || len(lines) == maxInlineDepth {
			break
		}
		call, err := g.InlinedCall(&f, inlined)
		if err != nil {
			break // the function itself is still right
		}
		line, err := g.line(&f, call.Name, pc)
		if err != nil {
			return nil, err
		}
		line.StartLine = int64(max(call.StartLine, 0))
		lines = append(lines, line)
		pc = f.Entry + call.ParentPC
	}
	line, err := g.line(&f, f.Name, pc)
	if err != nil {
		return nil, err
	}
	if inlined >= 0 {
		line.File, line.Line = "", 0
	}
	line.StartLine = int64(max(f.StartLine, 0))
	return append(lines, line), nil
}

// line describes a function of which the instruction at pc is part, by name offset.
func (g *goTable) line(f *pclntab.Func, name, pc uint32) (Line, error) {
	n, err := g.funcName(name)
	if err != nil {
		return Line{}, err
	}
	l := Line{Function: goDisplayName(n), SystemName: n}
	line, err := g.Value(f.Line, f.Entry, pc)
	if err != nil {
		return Line{}, err
	}
	file, err := g.Value(f.File, f.Entry, pc)
	if err != nil {
		return Line{}, err
	}
	if file < 0 || line < 0 {
		return l, nil
	}
	at := g.Units + (uint64(f.Unit)+uint64(file))*4
	if at+4 > g.Files {
		return l, nil
	}
	off, err := g.Pager.U32(at)
	if err != nil {
		return Line{}, err
	}
	if off != pclntab.None {
		if l.File, err = g.cached(g.files, g.Files, g.Values, off); err != nil {
			return Line{}, err
		}
		l.Line = int64(line)
	}
	return l, nil
}

func (g *goTable) funcName(off uint32) (string, error) {
	name, err := g.cached(g.names, g.Names, g.Units, off)
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
	s, err := g.Pager.CString(base+uint64(off), end, maxName)
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

func (g *goTable) bytes() int64 {
	return g.Bytes() + g.held + 512
}
