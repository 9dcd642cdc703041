// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/hostflame/hostflame/internal/dwarf"
	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/kerneltest"
)

// budget is what making an index may add to a process, in bytes (docs/internals.md).
const budget = 64 << 20

// generated is debug information made by hand, in files, as it is bigger than what is
// measured.
type generated struct {
	t                   testing.TB
	info, abbrev, lines *os.File
	w, l                *bufio.Writer
	unit, at            uint64 // of .debug_info
	linesAt             uint64
}

// The abbreviations of generated units. Names and numbers are not those that constants of
// the reader have: the tests are not to agree with it by using them.
var abbreviations = []byte{
	unitEntry, 0x11, 1, 0x10, 0x17, 0, 0, // DW_TAG_compile_unit with DW_AT_stmt_list
	leafEntry, 0x2e, 0, 0x03, 0x08, 0, 0, // DW_TAG_subprogram with a name
	functionEntry, 0x2e, 1, 0x03, 0x08, 0x11, 0x01, 0x12, 0x0b, 0x3a, 0x0b, 0, 0, // and low, high, decl_file
	inlinedEntry, 0x1d, 0, 0x31, 0x13, 0x11, 0x01, 0x12, 0x0b, 0x58, 0x0b, 0x59, 0x0f, 0, 0, // origin, low, high, call
	0,
}

const (
	unitEntry = iota + 1
	leafEntry
	functionEntry
	inlinedEntry

	leafName = "leaf"
	unitHead = 11 // bytes of a unit's header in DWARF 4
	leafAt   = unitHead + 5
)

func newGenerated(t testing.TB) *generated {
	g := &generated{t: t, info: tempFile(t), abbrev: tempFile(t), lines: tempFile(t)}
	g.w, g.l = bufio.NewWriter(g.info), bufio.NewWriter(g.lines)
	if _, err := g.abbrev.Write(abbreviations); err != nil {
		t.Fatal(err)
	}
	return g
}

func (g *generated) put(b ...byte) {
	g.w.Write(b)
	g.at += uint64(len(b))
}

func (g *generated) put32(v int)    { g.put(binary.LittleEndian.AppendUint32(nil, uint32(v))...) }
func (g *generated) put64(v uint64) { g.put(binary.LittleEndian.AppendUint64(nil, v)...) }

// begin begins a unit with the line table that comes next.
func (g *generated) begin() {
	g.unit = g.at
	g.put32(0)
	g.put(4, 0, 0, 0, 0, 0, 8, unitEntry)
	g.put32(int(g.linesAt))
	g.put(leafEntry)
	g.put([]byte(leafName + "\x00")...)
}

func (g *generated) end() {
	g.put(0)
	if err := g.w.Flush(); err != nil {
		g.t.Fatal(err)
	}
	b := binary.LittleEndian.AppendUint32(nil, uint32(g.at-g.unit-4))
	if _, err := g.info.WriteAt(b, int64(g.unit)); err != nil {
		g.t.Fatal(err)
	}
}

// function adds one with a call of leaf from 8 to 16 bytes after low.
func (g *generated) function(name string, low uint64, size byte, inlined int) {
	g.put(functionEntry)
	g.put([]byte(name + "\x00")...)
	g.put64(low)
	g.put(size, 1)
	for range inlined {
		g.put(inlinedEntry)
		g.put32(leafAt)
		g.put64(low + 8)
		g.put(8, 1)
		g.put(binary.AppendUvarint(nil, low)...)
	}
	g.put(0)
}

// table adds a line table of one sequence, which begins at low with line 1. The program goes
// on from there: its special opcode 13 + line + 2 * bytes has line, 0 or 1, and bytes.
func (g *generated) table(low uint64, program func(w *bufio.Writer) int) {
	head := []byte{4, 0, 25, 0, 0, 0, 1, 1, 1, 0, 2, 13, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 'f', 0, 0, 0, 0, 0}
	head = append(binary.LittleEndian.AppendUint64(append(head, 0, 9, 2), low), 1)
	length := g.linesAt
	g.l.Write(make([]byte, 4))
	g.l.Write(head)
	n := len(head) + program(g.l)
	g.l.Write([]byte{0, 1, 1})
	g.linesAt += uint64(4 + n + 3)
	if err := g.l.Flush(); err != nil {
		g.t.Fatal(err)
	}
	if _, err := g.lines.WriteAt(binary.LittleEndian.AppendUint32(nil, uint32(n+3)), int64(length)); err != nil {
		g.t.Fatal(err)
	}
}

type content struct {
	*os.File
	size int64
}

func (c content) Size() int64 { return c.size }

func (g *generated) data(code dwarf.Range) *dwarf.Data {
	section := func(f *os.File) *dwarf.Section {
		fi, err := f.Stat()
		if err != nil {
			g.t.Fatal(err)
		}
		return &dwarf.Section{Content: content{f, fi.Size()}, Size: uint64(fi.Size())}
	}
	return &dwarf.Data{Info: section(g.info), Abbrev: section(g.abbrev), Line: section(g.lines), Code: []dwarf.Range{code}}
}

func within(t testing.TB, what string, peak int64) {
	t.Helper()
	t.Logf("%s: %d MB", what, peak>>20)
	if peak > budget && !kerneltest.Race {
		t.Errorf("%s took %d MB, want %d", what, peak>>20, int64(budget)>>20)
	}
}

// TestGiantUnit: a unit of 400,000 functions and inlined calls and a million lines is indexed
// in parts, and says what it would say as a whole.
func TestGiantUnit(t *testing.T) {
	const functions, size, base = 200_000, 32, 0x10_0000
	g := newGenerated(t)
	g.begin()
	rnd := rand.New(rand.NewPCG(1, 2))
	at := rnd.Perm(functions) // so that each part has functions from everywhere
	low := func(i int) uint64 { return base + uint64(at[i])*size }
	for i := range functions {
		if i%100 == 0 {
			// The same code, of which the function that comes next says more.
			g.function("hidden", low(i), size, 1)
		}
		if i%1000 == 1 {
			continue // of this code only the lines are known
		}
		g.function(fmt.Sprint("f", i), low(i), size, 1)
	}
	g.table(base, func(w *bufio.Writer) int {
		n := functions * size / 8
		for i := range n {
			w.WriteByte(13 + byte(min(i, 1)) + 2*8*byte(min(i, 1)))
		}
		w.Write([]byte{2, 8})
		return n + 2
	})
	g.end()
	d := g.data(dwarf.Range{Low: base, High: base + functions*size})
	file := tempFile(t)
	var st Stats
	var err error
	peak := kerneltest.PeakMemory(t, func() {
		st, err = Build(context.Background(), d, Options{File: file, Dir: t.TempDir(), Workers: 1})
	})
	if err != nil || st.BrokenUnits > 0 || st.Units != 1 {
		t.Fatalf("%+v, %v", st, err)
	}
	t.Logf("%+v", st)
	within(t, "a giant unit", peak)
	x, err := Open(file, Identity{})
	if err != nil {
		t.Fatal(err)
	}
	say := func(addr uint64) (s string) {
		for _, f := range x.Lookup(addr, nil) {
			name, _ := x.Function(f.Function)
			s += fmt.Sprintf("%s %s:%d ", name, x.File(f.File), f.Line)
		}
		return s
	}
	wrong := 0
	err = x.Batch(func() {
		for i := range functions {
			for off := uint64(4); off < size; off += 8 {
				addr := low(i) + off
				line := 1 + (addr-base)/8
				want := fmt.Sprintf("f%d f:%d ", i, line)
				switch {
				case i%1000 == 1:
					want = fmt.Sprintf(" f:%d ", line)
				case off == 12:
					want = fmt.Sprintf("leaf f:%d f%d f:%d ", line, i, low(i))
				}
				if got := say(addr); got != want {
					if wrong++; wrong < 5 {
						t.Errorf("%#x: %q, want %q", addr, got, want)
					}
				}
			}
		}
	})
	if err != nil || wrong > 0 {
		t.Errorf("%d wrong, %v", wrong, err)
	}
}

// TestHostileMemory: a file that is at all limits at once stays within the budget, whether
// it is refused or not.
func TestHostileMemory(t *testing.T) {
	const base = 0x10_0000
	for name, make := range map[string]func(g *generated){
		// Each function takes a block, as it neither ends nor begins where another does.
		"blocks": func(g *generated) {
			for unit := range 4 {
				g.begin()
				for i := range 400_000 {
					g.function("f", base+uint64(4*i+unit)*64, 20, 0)
				}
				g.end()
			}
		},
		"names, a big part and a big line table": func(g *generated) {
			g.begin()
			for i := range 900_000 {
				g.function(fmt.Sprint("f", i), base+uint64(i)*64, 20, 0)
			}
			for i := range 30 {
				g.function(fmt.Sprint("g", i), base+uint64(i)*64, 20, 60_000)
			}
			g.end()
			g.table(base, func(w *bufio.Writer) int {
				n := 40_000_000 // bytes
				for range n / 10 {
					w.Write([]byte{3, 0xff, 0xff, 0xff, 0x3f, 4, 0xff, 0xff, 0x7f, 13 + 2})
				}
				return n / 10 * 10
			})
		},
		"a function without end": func(g *generated) {
			for i := range 8 {
				g.begin()
				g.function(fmt.Sprint("f", i), base, 20, 300_000)
				g.end()
			}
		},
		"sequences": func(g *generated) {
			g.begin()
			g.function("f", base, 20, 0)
			g.end()
			g.table(base, func(w *bufio.Writer) int {
				n := 0
				for i := range 2_000_000 {
					b := append(binary.LittleEndian.AppendUint64([]byte{1, 2, 1, 0, 1, 1, 0, 9, 2}, base+uint64(i*7919%1_000_000)*16), 1)
					w.Write(b)
					n += len(b)
				}
				return n
			})
		},
		"units": func(g *generated) {
			for range 200_000 {
				g.begin()
				g.end()
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGenerated(t)
			make(g)
			if g.linesAt == 0 {
				g.table(base, func(*bufio.Writer) int { return 0 })
			}
			d := g.data(dwarf.Range{Low: base, High: base + 1<<32})
			file, dir := tempFile(t), t.TempDir()
			peak := kerneltest.PeakMemory(t, func() {
				st, err := Build(context.Background(), d, Options{File: file, Dir: dir, Workers: 1})
				if err != nil && !elffile.ReasonIs(err, elffile.TooLarge) {
					t.Error(err)
				}
				t.Logf("%+v, %v", st, err)
			})
			within(t, name, peak)
		})
	}
}
