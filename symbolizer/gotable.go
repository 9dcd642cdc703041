// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"cmp"
	"slices"
	"strings"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/pclntab"
)

const maxInlineDepth = 64

// goTable finds functions, lines and inlined calls by a pclntab. What it has answered it
// finds again without reading.
type goTable struct {
	*pclntab.Table

	known        [][]goAnswer // by block of the table, sorted
	names, files map[uint32]string
	held         int64 // bytes of the three
}

// goAnswer is the answer for a piece of a function.
type goAnswer struct {
	goRange
	lines []Line
}

// goRange is a range of offsets from the start of text.
type goRange struct{ from, to uint64 }

const goAnswerSize = 40 // bytes

// loadGoTable finds the pclntab of a Go binary. Reason no_symbols: it is not one.
func loadGoTable(m *elffile.Image, secs []elffile.Section) (*goTable, error) {
	t, err := pclntab.Open(m, secs)
	if err != nil {
		return nil, err
	}
	g := &goTable{Table: t}
	g.forget()
	return g, nil
}

func (g *goTable) forget() {
	g.known = make([][]goAnswer, g.Blocks())
	g.names, g.files = map[uint32]string{}, map[uint32]string{}
	g.held = int64(len(g.known)) * 24
}

// lookup returns the functions at addr: the calls that the compiler inlined there,
// innermost first, then the function itself. Where the calls can not be told, the line,
// which is that of the innermost, is left out.
func (g *goTable) lookup(addr uint64) ([]Line, error) {
	if addr < g.Text || addr-g.Text >= g.TextEnd {
		return nil, nil
	}
	pc := uint32(addr - g.Text)
	block := g.Block(pc)
	if block < 0 {
		return nil, errorf(ReasonNotFound, "before the first function")
	}
	i, _ := slices.BinarySearchFunc(g.known[block], uint64(pc), func(a goAnswer, pc uint64) int { return cmp.Compare(a.to, pc+1) })
	if i < len(g.known[block]) && uint64(pc) >= g.known[block][i].from {
		return g.known[block][i].lines, nil
	}
	a, err := g.read(pc)
	if err != nil {
		return nil, err
	}
	if g.held > maxHeldNames {
		g.forget()
		i = 0
	}
	g.known[block] = slices.Insert(g.known[block], i, a)
	g.held += goAnswerSize + int64(cap(a.lines))*lineBytes
	return a.lines, nil
}

// read reads the functions at pc, and how far around it the answer is the same.
func (g *goTable) read(pc uint32) (a goAnswer, err error) {
	entry, end, record, err := g.Find(pc)
	if err != nil {
		return a, err
	}
	a.goRange = goRange{uint64(entry), uint64(end)}
	f, err := g.Func(entry, record)
	if err != nil {
		return a, err
	}
	if err := g.ReadInline(&f); err != nil {
		return a, err
	}
	a.lines = make([]Line, 0, 1)
	inlined, same := int32(-1), &a.goRange
	for f.InlineIndex != 0 {
		inlined, err = g.value(f.InlineIndex, &f, pc, same)
		if err != nil {
			return a, err
		}
		if inlined < 0 || len(a.lines) == maxInlineDepth {
			break
		}
		call, err := g.InlinedCall(&f, inlined)
		if err != nil {
			break // the function itself is still right
		}
		line, err := g.line(&f, call.Name, pc, same)
		if err != nil {
			return a, err
		}
		line.StartLine = int64(max(call.StartLine, 0))
		a.lines = append(a.lines, line)
		// The callers are the same wherever the innermost is.
		pc, same = f.Entry+call.ParentPC, new(goRange)
	}
	line, err := g.line(&f, f.Name, pc, same)
	if err != nil {
		return a, err
	}
	if inlined >= 0 {
		line.File, line.Line = "", 0
	}
	line.StartLine = int64(max(f.StartLine, 0))
	a.lines = append(a.lines, line)
	return a, nil
}

// value is the value of one of f's tables at pc; same is cut to where it is that.
func (g *goTable) value(table uint32, f *pclntab.Func, pc uint32, same *goRange) (int32, error) {
	v, from, to, err := g.Value(table, f.Entry, pc)
	same.from, same.to = max(same.from, from), min(same.to, to)
	return v, err
}

// line describes a function of which the instruction at pc is part, by name offset.
func (g *goTable) line(f *pclntab.Func, name, pc uint32, same *goRange) (Line, error) {
	n, err := g.funcName(name)
	if err != nil {
		return Line{}, err
	}
	l := Line{Function: goDisplayName(n), SystemName: n}
	line, err := g.value(f.Line, f, pc, same)
	if err != nil {
		return Line{}, err
	}
	file, err := g.value(f.File, f, pc, same)
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
