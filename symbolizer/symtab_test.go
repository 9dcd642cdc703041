// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/overlap"
)

// TestSymbolRules has one case for each rule in symTable's comment.
func TestSymbolRules(t *testing.T) {
	label := func(name string, addr uint64) specSymbol {
		return specSymbol{name, addr, 0, stbGlobal<<4 | sttNoType, 1}
	}
	spec := symbolSpec(false, elffile.SHTSymtab,
		specSymbol{"outer", 0x1000, 0x100, localFunc, 1},
		specSymbol{"nested", 0x1040, 0x20, localFunc, 1},
		label("inside", 0x1010), label("inside_at_the_end", 0x10f0),

		specSymbol{"local", 0x1200, 0x10, localFunc, 1},
		specSymbol{"weak", 0x1200, 0x10, weakFunc, 1},
		specSymbol{"a_global_one", 0x1200, 0x10, globalFunc, 1},

		specSymbol{"__read", 0x1300, 0x10, globalFunc, 1},
		specSymbol{"read64", 0x1300, 0x10, globalFunc, 1},
		specSymbol{"read", 0x1300, 0x10, globalFunc, 1},
		specSymbol{"_r", 0x1300, 0x10, globalFunc, 1},

		specSymbol{"untyped", 0x1400, 0x10, stbGlobal<<4 | sttNoType, 1},
		specSymbol{"typed", 0x1400, 0x10, localFunc, 1},
		specSymbol{"sized_untyped", 0x1420, 0x10, stbGlobal<<4 | sttNoType, 1},
		specSymbol{"ifunc", 0x1440, 0x10, stbGlobal<<4 | sttGNUIFunc, 1},
		specSymbol{"unique", 0x1460, 0x10, stbGNUUnique<<4 | sttFunc, 1},

		specSymbol{"short", 0x1500, 0x10, globalFunc, 1},
		specSymbol{"the_longer_range", 0x1500, 0x40, globalFunc, 1},
		specSymbol{"global_start", 0x1580, 0x10, globalFunc, 1},
		specSymbol{"local_all", 0x1580, 0x40, localFunc, 1},

		label("lab", 0x1600),
		label("$x", 0x1620), label("$d.12", 0x1624), label(".Lloop", 0x1630),
		label("$money", 0x1670),
		specSymbol{"sizeless", 0x1680, 0, globalFunc, 1},

		specSymbol{"first", 0x1700, 0x100, globalFunc, 1},
		specSymbol{"second", 0x1780, 0x100, localFunc, 1},

		label("to_the_end", 0x1f00),
		specSymbol{"absolute", 0x1f80, 0x10, globalFunc, 0xfff1},
		specSymbol{"undefined", 0x1f80, 0x10, globalFunc, 0},
		specSymbol{"object", 0x1f80, 0x10, stbGlobal<<4 | 1, 1},
		specSymbol{"", 0x1f80, 0x10, globalFunc, 1},
		specSymbol{"in_data", 0x5000, 0x10, globalFunc, 3},
		specSymbol{"huge", 0x3000, 1 << 40, globalFunc, 2},
		specSymbol{"past", 0x3100, 0x10, globalFunc, 2},
		specSymbol{"far", 0x7f0000000010, 0x10, globalFunc, 4},
		specSymbol{"_ZN2ns4coldEv.cold", 0x7f0000000100, 0x10, globalFunc, 4},
		specSymbol{"bad\xffutf8\n", 0x7f0000000200, 0x10, globalFunc, 4},
		specSymbol{strings.Repeat("n", 3*maxName), 0x7f0000000300, 0x10, globalFunc, 4},
	)
	s := newSymbolizer(t, Config{})
	o, err := memoryObject(s, spec.bytes())
	if err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[uint64]string{
		0x0fff: "", 0x1000: "outer", 0x1010: "outer", 0x103f: "outer", 0x1040: "nested", 0x105f: "nested",
		0x1060: "outer", 0x10f8: "outer", 0x10ff: "outer", 0x1100: "", 0x11ff: "",
		0x1200: "a_global_one", 0x120f: "a_global_one", 0x1210: "",
		0x1305: "read", 0x1405: "typed", 0x1425: "sized_untyped", 0x1445: "ifunc", 0x1465: "unique",
		0x1505: "the_longer_range", 0x153f: "the_longer_range",
		0x1585: "global_start", 0x15a0: "local_all", 0x15bf: "local_all", 0x15c0: "",
		0x1600: "lab", 0x1625: "lab", 0x1650: "lab", 0x1675: "$money", 0x1680: "sizeless", 0x16ff: "sizeless",
		0x177f: "first", 0x1780: "second", 0x187f: "second", 0x1880: "",
		0x1f00: "to_the_end", 0x1f85: "to_the_end", 0x1fff: "to_the_end", 0x2000: "",
		0x3000: "huge", 0x30ff: "huge", 0x3100: "past", 0x5005: "",
		0x7f0000000010: "far", 0x7f000000001f: "far", 0x7f0000000020: "",
		0x7f0000000105: "_ZN2ns4coldEv.cold", 0x7f0000000205: "bad\ufffdutf8?",
		0x7f0000000305: strings.Repeat("n", maxName), ^uint64(0): "",
	} {
		r := o.Symbolize([]uint64{addr})[0]
		switch {
		case want == "" && (len(r.Lines) != 0 || r.Reason != ReasonNotFound):
			t.Errorf("%#x: %.80v, want not_found", addr, r)
		case want != "" && (len(r.Lines) != 1 || r.Lines[0].SystemName != want):
			t.Errorf("%#x: %.80v, want %.40s", addr, r, want)
		}
	}
	if got := o.Symbolize([]uint64{0x7f0000000105})[0].Lines[0].Function; got != "ns::cold" {
		t.Errorf("demangled: %s", got)
	}
	if got, ok := o.Address(0x1_8000_0010); !ok || got != 0x7f0000000010 {
		t.Errorf("offset above 4 GiB: %#x %v", got, ok)
	}
}

func TestSymbolsOf32Bits(t *testing.T) {
	s := newSymbolizer(t, Config{})
	o, err := memoryObject(s, symbolSpec(true, elffile.SHTSymtab,
		specSymbol{"thumb", 0x1101, 0x10, globalFunc, 1},
		specSymbol{"$t", 0x1104, 0, sttNoType, 1},
		specSymbol{"arm", 0x1200, 0x10, globalFunc, 1},
	).bytes())
	if err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[uint64]string{0x1100: "thumb", 0x110f: "thumb", 0x1208: "arm"} {
		if r := o.Symbolize([]uint64{addr})[0]; len(r.Lines) != 1 || r.Lines[0].Function != want {
			t.Errorf("%#x: %+v, want %s", addr, r, want)
		}
	}
}

func TestDynsymLabels(t *testing.T) {
	s := newSymbolizer(t, Config{})
	o, err := memoryObject(s, symbolSpec(false, elffile.SHTDynsym,
		specSymbol{"entry", 0x1100, 0, globalFunc, 1},
		specSymbol{"sized", 0x1200, 0x10, globalFunc, 1},
	).bytes())
	if err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[uint64]int{0x1100: 1, 0x1101: 0, 0x120f: 1, 0x1210: 0} {
		if r := o.Symbolize([]uint64{addr})[0]; len(r.Lines) != want {
			t.Errorf("%#x: %+v, want %d lines", addr, r, want)
		}
	}
}

func TestSymtabBeforeDynsym(t *testing.T) {
	spec := symbolSpec(false, elffile.SHTSymtab, specSymbol{"from_symtab", 0x1100, 0x10, localFunc, 1})
	tab, strs := symbols(false,
		specSymbol{"exported", 0x1100, 0x10, globalFunc, 1}, specSymbol{"only_dynamic", 0x1200, 0x10, globalFunc, 1})
	spec.sections = append(spec.sections,
		specSection{name: ".dynsym", typ: elffile.SHTDynsym, data: tab, link: 8, entsize: 24},
		specSection{name: ".dynstr", typ: 3, data: strs})
	s := newSymbolizer(t, Config{})
	o, err := memoryObject(s, spec.bytes())
	if err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[uint64]string{0x1100: "from_symtab", 0x1200: "only_dynamic"} {
		if r := o.Symbolize([]uint64{addr})[0]; len(r.Lines) != 1 || r.Lines[0].Function != want {
			t.Errorf("%#x: %+v, want %s", addr, r, want)
		}
	}
}

// TestDynamicSectionAlone: what lost its section headers still has the symbols that the
// dynamic linker uses.
func TestDynamicSectionAlone(t *testing.T) {
	for _, hash := range []string{"sysv", "gnu"} {
		path := stripped(t, buildCXX(t, cxxSource, "-O1", "-shared", "-fPIC", "-Wl,--hash-style="+hash))
		want := openObject(t, newSymbolizer(t, Config{}), path)
		got := openObject(t, newSymbolizer(t, Config{}), withoutSections(t, path))
		found := 0
		for _, sym := range nmText(t, path, "-D", "--without-symbol-versions") {
			w, g := want.Symbolize([]uint64{sym.addr})[0], got.Symbolize([]uint64{sym.addr})[0]
			if fmt.Sprint(w) != fmt.Sprint(g) {
				t.Errorf("%s %s: %v, with sections %v", hash, sym.name, g, w)
			}
			found += len(g.Lines)
		}
		if found < 10 {
			t.Errorf("%s: found %d symbols", hash, found)
		}
	}
}

func TestTooManySymbols(t *testing.T) {
	var syms []specSymbol
	for i := range 100 {
		syms = append(syms, specSymbol{fmt.Sprintf("f%d", i), 0x1000 + uint64(i)*16, 16, globalFunc, 1})
	}
	s := newSymbolizer(t, Config{MaxTableBytes: 50 * symRowSize})
	o, err := memoryObject(s, symbolSpec(false, elffile.SHTSymtab, syms...).bytes())
	if err != nil {
		t.Fatal(err)
	}
	if r := o.Symbolize([]uint64{0x1000})[0]; r.Reason != ReasonTooLarge {
		t.Errorf("%+v, want too_large", r)
	}
}

// TestFlatten compares with painting every address.
func TestFlatten(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	for range 500 {
		var spans []overlap.Span
		paint := make([]int, 64)
		for i := range paint {
			paint[i] = -1
		}
		n := rnd.IntN(12)
		for i := range n {
			start := rnd.Uint64N(60)
			spans = append(spans, overlap.Span{Start: start, End: min(start+rnd.Uint64N(20), 64), Prio: uint32(i)})
			for a := start; a < spans[i].End; a++ {
				paint[a] = i
			}
		}
		slices.SortStableFunc(spans, func(a, b overlap.Span) int { return int(a.Start) - int(b.Start) })
		got := make([]int, 64)
		for i := range got {
			got[i] = -1
		}
		last, lastPrio := uint64(0), ^uint32(0)
		overlap.Flatten(spans, func(s *overlap.Span, start, end uint64) {
			if start < last || end <= start || start == last && s.Prio == lastPrio {
				t.Fatalf("%v: piece %d-%d of %d after %d", spans, start, end, s.Prio, last)
			}
			for a := start; a < end; a++ {
				got[a] = int(s.Prio)
			}
			last, lastPrio = end, s.Prio
		})
		if !slices.Equal(got, paint) {
			t.Fatalf("%v:\n%v, want\n%v", spans, got, paint)
		}
	}
}
