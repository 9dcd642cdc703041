// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/kerneltest"
)

// exercise does with an image all that can be done with one, and checks what must hold of
// any answer. It returns how many addresses had lines.
func exercise(t testing.TB, b []byte) int {
	t.Helper()
	// A limit that hostile counts run into soon.
	s := New(Config{MaxTableBytes: 1 << 20})
	defer s.Close()
	o, err := memoryObject(s, b)
	if err != nil {
		if ReasonOf(err) == "" {
			t.Errorf("no reason in %v", err)
		}
		return 0
	}
	if id := o.BuildID(); !isClean(id) || len(id) > elffile.MaxGoBuildID {
		t.Errorf("build id %q", id)
	}
	addrs := []uint64{0, ^uint64(0), 1 << 63}
	for _, seg := range o.Segments() {
		o.Address(seg.Offset)
		o.Address(seg.Offset + seg.Filesz - 1)
		o.Address(seg.Offset + seg.Filesz)
		if seg.Executable && len(addrs) < 200 {
			for i := range uint64(32) {
				addrs = append(addrs, seg.Vaddr+i*max(seg.Memsz/32, 1))
			}
		}
	}
	found := 0
	for range 2 {
		results := o.Symbolize(addrs)
		if len(results) != len(addrs) {
			t.Fatalf("%d results for %d addresses", len(results), len(addrs))
		}
		found = 0
		for _, r := range results {
			checkResult(t, r)
			found += min(len(r.Lines), 1)
		}
	}
	return found
}

func checkResult(t testing.TB, r Result) {
	t.Helper()
	if (len(r.Lines) == 0) == (r.Reason == "") {
		t.Errorf("%+v: neither lines nor a reason, or both", r)
	}
	for _, l := range r.Lines {
		for _, s := range []string{l.Function, l.SystemName, l.File} {
			if !utf8.ValidString(s) || strings.ContainsAny(s, "\n\x00\t") || len(s) > 4*maxName {
				t.Errorf("name %.100q", s)
			}
		}
		if l.Function == "" || l.SystemName == "" || l.Line < 0 || l.StartLine < 0 {
			t.Errorf("line %+v", l)
		}
	}
}

// within fails if f takes longer than any honest or hostile file of this size should.
func within(t testing.TB, d time.Duration, what string, f func()) {
	t.Helper()
	start := time.Now()
	f()
	if took := time.Since(start); took > d {
		t.Errorf("%s: took %v", what, took)
	}
}

func hostileSeeds(t testing.TB) map[string][]byte {
	t.Helper()
	seeds := map[string][]byte{
		"symbols": symbolSpec(false, elffile.SHTSymtab,
			specSymbol{"f", 0x1100, 0x100, globalFunc, 1}, specSymbol{"g", 0x1180, 0x100, weakFunc, 1},
			specSymbol{"l", 0x1400, 0, globalFunc, 1}, specSymbol{"_Z1hv", 0x1100, 0x100, globalFunc, 1}).bytes(),
		"32 bits": symbolSpec(true, elffile.SHTDynsym, specSymbol{"f", 0x1101, 0x100, globalFunc, 1}).bytes(),
	}
	for name, spec := range goSpecs {
		seeds["go "+name] = spec.bytes()
	}
	return seeds
}

// compiledSeeds are files from real tools, small ones.
func compiledSeeds(t testing.TB) map[string][]byte {
	t.Helper()
	seeds := map[string][]byte{}
	for name, path := range map[string]string{
		"bare":     buildC(t, bareSource, "-O1", "-nostdlib", "-static", "-Wl,-z,noseparate-code"),
		"shared":   buildC(t, bareSource, "-O1", "-nostdlib", "-shared", "-fPIC", "-Wl,-z,noseparate-code"),
		"stripped": stripped(t, buildC(t, bareSource, "-O1", "-nostdlib", "-shared", "-fPIC", "-Wl,-z,noseparate-code")),
	} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		seeds[name] = b
		if name == "shared" {
			headless := append([]byte{}, b...)
			clear(headless[0x28:0x30])
			clear(headless[0x3c:0x40])
			seeds["without sections"] = headless
		}
	}
	return seeds
}

// TestDamagedFiles cuts files at every length near a header and at others, and damages
// single fields, one and several at a time.
func TestDamagedFiles(t *testing.T) {
	seeds := hostileSeeds(t)
	for name, b := range compiledSeeds(t) {
		seeds[name] = b
	}
	values := []uint64{0, 1, 0x7f, 0xff, 0xffff, 1 << 31, 1<<32 - 1, 1 << 63, 1<<64 - 1}
	for name, b := range seeds {
		t.Run(name, func(t *testing.T) {
			if exercise(t, b) == 0 {
				t.Fatal("the undamaged file has no symbols")
			}
			within(t, 40*time.Second, name, func() {
				for n := 0; n < len(b); n += 1 + n/40 {
					exercise(t, b[:n])
				}
				shoff := int(binary.LittleEndian.Uint64(b[0x28:]))
				if b[4] == elffile.Class32 {
					shoff = int(binary.LittleEndian.Uint32(b[0x20:]))
				}
				rnd := rand.New(rand.NewPCG(1, uint64(len(b))))
				for i := range 1500 {
					d := append([]byte{}, b...)
					for range 1 + rnd.IntN(3) {
						at := rnd.IntN(min(len(d)-8, 0x200))
						switch {
						case i%3 == 1 && shoff > 0 && shoff < len(d)-8:
							at = shoff + rnd.IntN(len(d)-8-shoff)
						case i%3 == 2:
							at = rnd.IntN(len(d) - 8)
						}
						v := values[rnd.IntN(len(values))]
						switch rnd.IntN(4) {
						case 0:
							d[at] ^= 1 << rnd.IntN(8)
						case 1:
							binary.LittleEndian.PutUint16(d[at:], uint16(v))
						case 2:
							binary.LittleEndian.PutUint32(d[at:], uint32(v))
						case 3:
							binary.LittleEndian.PutUint64(d[at:], v)
						}
					}
					exercise(t, d)
				}
			})
		})
	}
}

func TestReadsStayInside(t *testing.T) {
	c := elffile.FromBytes(make([]byte, 100))
	for _, tt := range []struct {
		off  uint64
		n    int
		want Reason
	}{
		{0, 100, ""}, {99, 1, ""}, {100, 0, ""}, {100, 1, ReasonMalformed}, {99, 2, ReasonMalformed},
		{1 << 63, 1, ReasonMalformed}, {^uint64(0), 8, ReasonMalformed},
	} {
		if got := ReasonOf(elffile.ReadAt(c, make([]byte, tt.n), tt.off)); got != tt.want {
			t.Errorf("%d bytes at %#x: %q, want %q", tt.n, tt.off, got, tt.want)
		}
	}
	e := symbolSpec(false, elffile.SHTSymtab)
	e.segments[0] = specSegment{typ: elffile.PTLoad, flags: elffile.PFExec, vaddr: ^uint64(0) - 5, memsz: 100, filesize: 100}
	e.segments[2] = specSegment{typ: elffile.PTLoad, flags: elffile.PFExec, off: ^uint64(0) - 5, memsz: 100, filesize: 100}
	o, err := memoryObject(newSymbolizer(t, Config{}), e.bytes())
	if err != nil {
		t.Fatal(err)
	}
	if n := len(o.Segments()); n != len(e.segments)-2 {
		t.Errorf("%d segments, want those that do not wrap", n)
	}
}

// TestHostileCounts: what a file claims does not make us reserve memory or work for long.
func TestHostileCounts(t *testing.T) {
	huge := func(change func(e *elfSpec)) []byte {
		e := symbolSpec(false, elffile.SHTSymtab, specSymbol{"f", 0x1100, 0x100, globalFunc, 1})
		change(e)
		return e.bytes()
	}
	// Nothing but overlapping symbols, and nothing but aliases.
	var nested, aliases []specSymbol
	for i := range uint64(20000) {
		nested = append(nested, specSymbol{fmt.Sprint("n", i), 0x1000 + i/16, 0x1000 - i/16*2, globalFunc, 1})
		aliases = append(aliases, specSymbol{fmt.Sprint("a", i), 0x1100, 0x10, globalFunc, 1})
	}
	bomb := strings.Repeat("N1xI", 400)
	for name, b := range map[string][]byte{
		"symbol table without end": huge(func(e *elfSpec) { e.sections[4].size = 1 << 62 }),
		"strings without end":      huge(func(e *elfSpec) { e.sections[5].size = 1 << 40 }),
		"notes without end": huge(func(e *elfSpec) {
			e.segments = append(e.segments, specSegment{typ: elffile.PTNote, filesize: 1 << 50, memsz: 1 << 50})
		}),
		"segments that wrap": huge(func(e *elfSpec) {
			e.segments[1] = specSegment{typ: elffile.PTLoad, flags: elffile.PFExec, vaddr: ^uint64(0) - 5, memsz: 100, off: ^uint64(0), filesize: 100}
		}),
		"a segment of everything": huge(func(e *elfSpec) {
			e.segments[1] = specSegment{typ: elffile.PTLoad, flags: elffile.PFExec, vaddr: 0, memsz: ^uint64(0), filesize: ^uint64(0)}
		}),
		"nested symbols":   symbolSpec(false, elffile.SHTSymtab, nested...).bytes(),
		"aliases":          symbolSpec(false, elffile.SHTSymtab, aliases...).bytes(),
		"demangler's bomb": symbolSpec(false, elffile.SHTSymtab, specSymbol{"_Z1f" + bomb, 0x1100, 0x100, globalFunc, 1}).bytes(),
		"demangler's depth": symbolSpec(false, elffile.SHTSymtab,
			specSymbol{"_Z1f" + strings.Repeat("P", 1<<20), 0x1000, 0x800, globalFunc, 1},
			specSymbol{"_Z1f" + strings.Repeat("P", maxName-20) + "i", 0x1800, 0x800, globalFunc, 1}).bytes(),
	} {
		within(t, 5*time.Second, name, func() {
			heap := heapOf(func() { exercise(t, b) })
			if heap > 8<<20 {
				t.Errorf("%s: the heap grew by %d bytes", name, heap)
			}
		})
	}
}

// TestHostileDebugInformation: what debug information holds costs no more than its lines. The
// symbol table answers, the reason is kept, and neither memory nor disk is filled.
func TestHostileDebugInformation(t *testing.T) {
	compressed := func(typ uint32, size uint64, packed []byte) []byte {
		w := words{}
		w.u32(typ)
		w.u32(0)
		w.word(size)
		w.word(1)
		return append(w.Bytes(), packed...)
	}
	const size = 80 << 20
	zeros := make([]byte, size)
	var deflated bytes.Buffer
	w := zlib.NewWriter(&deflated)
	encoder, err := zstd.NewWriter(nil)
	if _, err2 := w.Write(zeros); err != nil || err2 != nil || w.Close() != nil {
		t.Fatal(err, err2)
	}
	zstandard := encoder.EncodeAll(zeros, nil)
	for name, debug := range map[string]specSection{
		"zlib bomb":            {data: compressed(1, size, deflated.Bytes()), flags: elffile.SHFCompressed},
		"zstd bomb":            {data: compressed(2, size, zstandard), flags: elffile.SHFCompressed},
		"bomb with a lie":      {data: compressed(2, 1<<20, zstandard), flags: elffile.SHFCompressed},
		"more than there is":   {data: compressed(1, 1<<62, deflated.Bytes()), flags: elffile.SHFCompressed},
		"a section of nothing": {size: 1 << 60},
		"units of nothing":     {data: make([]byte, 8<<20)},
		"all ones":             {data: bytes.Repeat([]byte{0xff}, 8<<20)},
	} {
		t.Run(name, func(t *testing.T) {
			e := symbolSpec(false, elffile.SHTSymtab, specSymbol{"f", 0x1100, 0x100, globalFunc, 1})
			debug.name, debug.typ = ".debug_info", 1
			e.sections = append(e.sections, debug, specSection{name: ".debug_abbrev", typ: 1, data: []byte{1, 0x11, 0, 0, 0, 0}})
			path := filepath.Join(t.TempDir(), "out")
			writeFile(t, path, string(e.bytes()))
			temp := filepath.Join(t.TempDir(), "cache")
			within(t, 20*time.Second, name, func() {
				s := newSymbolizer(t, Config{Cache: openTestCache(t, temp, 64<<20), WaitForIndex: true})
				heap := heapOf(func() {
					if r := openObject(t, s, path).Symbolize([]uint64{0x1110})[0]; len(r.Lines) != 1 || r.Lines[0].Function != "f" {
						t.Errorf("%+v, want f", r)
					}
				})
				if st := s.Stats().Index; heap > 8<<20 || st.Failed != 1 && st.Bytes > 1<<20 {
					t.Errorf("the heap grew by %d bytes; %+v", heap, st)
				} else {
					t.Logf("%+v", st)
				}
			})
		})
	}
}

// TestHostileMemory: reading what is at the limits, or beyond, takes no more than the budget of
// a file, 64 MB, at any time.
func TestHostileMemory(t *testing.T) {
	const budget, base = 64 << 20, 1 << 32
	// fill writes a symbol table of n symbols, of which f says what is to be there.
	fill := func(e *elfSpec, n int, f func(i uint64) (name uint32, value, size uint64)) {
		tab := make([]byte, 24*(n+1))
		for i := range n {
			name, value, size := f(uint64(i))
			b := tab[24*(i+1):]
			binary.LittleEndian.PutUint32(b, name)
			b[4], b[6], b[7] = globalFunc, 0xff, 0xff
			binary.LittleEndian.PutUint64(b[8:], value)
			binary.LittleEndian.PutUint64(b[16:], size)
		}
		e.segments[1] = specSegment{typ: elffile.PTLoad, flags: elffile.PFExec | 4, vaddr: base, memsz: 1 << 31, off: 0x1000, filesize: 0x1000}
		e.sections[4].data = tab
	}
	packed := func(e *elfSpec, name string, flags uint64, b []byte) {
		e.sections = append(e.sections, specSection{name: name, typ: 1, flags: flags, data: b},
			specSection{name: ".debug_abbrev", typ: 1, data: []byte{1, 0x11, 0, 0, 0, 0}})
	}
	most := New(Config{}).maxSymbols()
	for name, tt := range map[string]struct {
		change func(e *elfSpec)
		want   Reason // "" : the answer is f
	}{
		"symbols": {func(e *elfSpec) {
			fill(e, most, func(i uint64) (uint32, uint64, uint64) { return 1, base + i*64, 1 + i%1000 })
		}, ""},
		"too many symbols": {func(e *elfSpec) {
			fill(e, 2*most, func(i uint64) (uint32, uint64, uint64) { return 1, base + i*64, 1 + i%1000 })
		}, ReasonTooLarge},
		"symbols within symbols of many names": {func(e *elfSpec) {
			fill(e, most/2, func(i uint64) (uint32, uint64, uint64) {
				if i < maxAliases {
					return 1 + uint32(i%2), base, 1 << 31
				}
				return 1, base + i*64, 1
			})
		}, ReasonTooLarge},
		"zstd with a window of 64 MB": {func(e *elfSpec) {
			w := words{}
			w.u32(2)
			w.u32(0)
			w.word(100 << 20)
			w.word(1)
			var out bytes.Buffer
			z, err := zstd.NewWriter(&out, zstd.WithWindowSize(64<<20), zstd.WithEncoderConcurrency(1))
			if err != nil {
				t.Fatal(err)
			}
			noise := make([]byte, 2<<20)
			rand.NewChaCha8([32]byte{}).Read(noise)
			for range 50 {
				z.Write(noise)
			}
			if err := z.Close(); err != nil {
				t.Fatal(err)
			}
			packed(e, ".debug_info", elffile.SHFCompressed, append(w.Bytes(), out.Bytes()...))
		}, ""},
		"xz with a dictionary of 16 MB": {func(e *elfSpec) {
			cmd := exec.Command("xz", "-c", "--format=xz", "--lzma2=preset=0,dict=16MiB")
			cmd.Stdin = bytes.NewReader(make([]byte, maxUnpackedData))
			b, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			e.sections[4].typ = 1
			packed(e, ".gnu_debugdata", 0, b)
		}, ReasonMalformed},
		"stubs of one long name": {func(e *elfSpec) {
			fill(e, 0, nil)
			e.machine, e.sections[4].typ = elffile.MachineAMD64, elffile.SHTDynsym
			e.sections[4].data, e.sections[5].data = symbols(false, specSymbol{"f", 0, 0, globalFunc, 0}, specSymbol{strings.Repeat("g", maxName), 0, 0, globalFunc, 0})
			var plt, relocs []byte
			for i := range uint64(maxPLTRelocs) {
				plt = binary.LittleEndian.AppendUint32(append(plt, 0xff, 0x25), 1<<24)
				plt = append(plt, make([]byte, 10)...) // and so the words are 16 bytes apart too
				symbol := uint64(2)
				if i == 0x10 {
					symbol = 1
				}
				relocs = binary.LittleEndian.AppendUint64(relocs, base+16*i+6+1<<24)
				relocs = binary.LittleEndian.AppendUint64(relocs, symbol<<32|relocJumpSlotAMD64)
				relocs = binary.LittleEndian.AppendUint64(relocs, 0)
			}
			e.sections = append(e.sections, specSection{name: ".plt", typ: 1, flags: elffile.SHFAlloc | elffile.SHFExecInstr, addr: base, data: plt},
				specSection{name: ".rela.plt", typ: elffile.SHTRela, flags: elffile.SHFAlloc, entsize: 24, link: 5, data: relocs})
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			e := symbolSpec(false, elffile.SHTSymtab, specSymbol{"f", 0x1100, 0x100, globalFunc, 1})
			tt.change(e)
			path := filepath.Join(t.TempDir(), "out")
			writeFile(t, path, string(e.bytes()))
			addr := e.segments[1].vaddr + 0x100
			e = nil
			s := newSymbolizer(t, Config{WaitForIndex: true})
			var r Result
			peak := kerneltest.PeakMemory(t, func() { r = openObject(t, s, path).Symbolize([]uint64{addr})[0] })
			t.Logf("%d MB: %+v", peak>>20, r)
			if peak > budget && !kerneltest.Race {
				t.Errorf("took %d MB, want %d", peak>>20, budget>>20)
			}
			if r.Reason != tt.want || r.Reason == "" && strings.TrimSuffix(r.Lines[0].Function, "@plt") != "f" {
				t.Errorf("%+v, want reason %q", r, tt.want)
			}
		})
	}
}

// TestManyDebugSections: of a name that thousands of sections have, the first is read.
func TestManyDebugSections(t *testing.T) {
	e := symbolSpec(false, elffile.SHTSymtab, specSymbol{"f", 0x1100, 0x100, globalFunc, 1})
	// They share 16 MB of the file, all of them zeros.
	const at, size, copies = 2 << 20, 16 << 20, 20_000
	for range copies {
		e.sections = append(e.sections, specSection{name: ".debug_info", typ: 1, size: size})
	}
	e.sections = append(e.sections, specSection{name: ".debug_abbrev", typ: 1, data: []byte{1, 0x11, 0, 0, 0, 0}})
	path := filepath.Join(t.TempDir(), "out")
	writeFile(t, path, string(e.bytes()))
	if err := os.Truncate(path, at+size); err != nil {
		t.Fatal(err)
	}
	s := newSymbolizer(t, Config{Cache: openTestCache(t, filepath.Join(t.TempDir(), "cache"), 64<<20), WaitForIndex: true, IndexTimeout: 40 * time.Second})
	within(t, 30*time.Second, "sections", func() {
		if r := openObject(t, s, path).Symbolize([]uint64{0x1110})[0]; len(r.Lines) != 1 || r.Lines[0].Function != "f" {
			t.Errorf("%+v, want f", r)
		}
	})
	t.Logf("%+v", s.Stats().Index)
}
