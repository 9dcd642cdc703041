// SPDX-License-Identifier: Apache-2.0

package dwarf

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/hostflame/hostflame/internal/elffile"
)

const source = `
static inline __attribute__((always_inline)) int leaf(int x) { return x * 3 + 1; }
static inline __attribute__((always_inline)) int middle(int x) { return leaf(x) + leaf(x ^ 5); }
__attribute__((noinline)) int outer(int x) { if (__builtin_expect(x == 77, 0)) __builtin_abort(); return middle(x) * 2; }
int main(int c, char **v) { return outer(c); }
`

// compile returns a binary made of source.
func compile(t testing.TB, compiler string, flags ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	src, out := filepath.Join(dir, "main.c"), filepath.Join(dir, "out")
	if err := os.WriteFile(src, []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(compiler, append([]string{"-O2", "-o", out, src, "-nostartfiles", "-Wl,-e,main"}, flags...)...)
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, b)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func openBytes(t testing.TB, b []byte) *Data {
	t.Helper()
	m, err := elffile.Parse(elffile.FromBytes(b))
	if err != nil {
		t.Fatal(err)
	}
	secs, err := m.Sections()
	if err != nil {
		t.Fatal(err)
	}
	d, err := Open(m, secs, &elffile.Inflater{Memory: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// counted is an Interner that keeps the names.
type counted struct {
	functions, files []string
}

func (c *counted) Function(name []byte, _ uint32) uint32 {
	c.functions = append(c.functions, string(name))
	return uint32(len(c.functions))
}

func (c *counted) File(path []byte) uint32 {
	c.files = append(c.files, string(path))
	return uint32(len(c.files))
}

func bytesOf(t testing.TB, s *Section) []byte {
	if s == nil {
		return nil
	}
	b := make([]byte, s.Size)
	if err := s.read(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func asSection(b []byte) *Section {
	if len(b) == 0 {
		return nil
	}
	return &Section{Content: elffile.FromBytes(b), Size: uint64(len(b))}
}

// check reads all units of d and holds what comes out against what is promised.
func check(t *testing.T, d *Data) {
	n, err := d.ReadUnits()
	if err != nil {
		return
	}
	names := &counted{}
	r := d.NewReader(names)
	for i := range min(n, 64) {
		c, err := codeOf(r, i)
		if err != nil || c == nil {
			continue
		}
		for i, node := range c.Nodes {
			if node.Parent > uint32(i) || node.Function > uint32(len(names.functions)) || node.CallFile > uint32(len(names.files)) {
				t.Fatalf("node %d: %+v", i, node)
			}
		}
		for _, s := range c.Spans {
			if _, ok := d.inCode(s.Start); !ok || s.Start >= s.End || s.Name == 0 || s.Name > uint32(len(c.Nodes)) {
				t.Fatalf("span %+v", s)
			}
		}
		checkLines(t, d, c.Lines, names)
	}
}

func checkLines(t *testing.T, d *Data, lines *Lines, names *counted) {
	end := uint64(1)
	for l, ok := lines.Next(); ok; l, ok = lines.Next() {
		if _, in := d.inCode(l.Low); !in || l.Low < end || l.Low >= l.High || l.File > uint32(len(names.files)) {
			t.Fatalf("line %+v after %#x", l, end)
		}
		end = l.High
	}
}

// codeOf reads a unit that comes as a whole; nil if there is no code.
func codeOf(r *Reader, i int) (whole *Code, err error) {
	err = r.Code(i, func(c *Code) error {
		if c.Part != 0 {
			return elffile.Errorf(elffile.TooLarge, "a unit in parts")
		}
		copied := *c
		whole = &copied
		return nil
	})
	return whole, err
}

// seeds adds the sections of real binaries.
func seeds(f *testing.F, add func(d *Data)) {
	for _, flags := range [][]string{{"gcc", "-g"}, {"gcc", "-gdwarf-4"}, {"gcc", "-gdwarf-3"}, {"clang-19", "-g"}, {"clang-19", "-gdwarf-2"}, {"clang-19", "-g", "-gdwarf64"}} {
		add(openBytes(f, compile(f, flags[0], flags[1:]...)))
	}
}

const fuzzCode = 1 << 20 // bytes

func FuzzInfo(f *testing.F) {
	seeds(f, func(d *Data) {
		f.Add(bytesOf(f, d.Info), bytesOf(f, d.Abbrev), bytesOf(f, d.Line), bytesOf(f, d.Str), bytesOf(f, d.LineStr), bytesOf(f, d.Ranges), bytesOf(f, d.Rnglists), bytesOf(f, d.Addr), bytesOf(f, d.StrOffsets))
	})
	f.Fuzz(func(t *testing.T, info, abbrev, line, str, lineStr, ranges, rnglists, addr, offsets []byte) {
		check(t, &Data{
			Info: asSection(info), Abbrev: asSection(abbrev), Line: asSection(line), Str: asSection(str), LineStr: asSection(lineStr),
			Ranges: asSection(ranges), Rnglists: asSection(rnglists), Addr: asSection(addr), StrOffsets: asSection(offsets),
			Code: []Range{{1, fuzzCode}},
		})
	})
}

func FuzzAbbrev(f *testing.F) {
	seeds(f, func(d *Data) { f.Add(bytesOf(f, d.Abbrev), uint16(5), true) })
	f.Fuzz(func(t *testing.T, b []byte, version uint16, is64 bool) {
		if len(b) == 0 {
			return
		}
		c := cursor{buf: make([]byte, 64)}
		var tab table
		u := unit{version: version, is64: is64, addrSize: 8}
		if tab.read(&c, asSection(b), &u) != nil {
			return
		}
		for code := range uint64(64) {
			if a := tab.get(code); a.kind != kindNone && int(a.first+a.n) > len(tab.ops) {
				t.Fatalf("abbreviation %d: ops %d and %d of %d", code, a.first, a.n, len(tab.ops))
			}
		}
	})
}

func FuzzLine(f *testing.F) {
	seeds(f, func(d *Data) { f.Add(bytesOf(f, d.Line), bytesOf(f, d.LineStr)) })
	f.Fuzz(func(t *testing.T, line, lineStr []byte) {
		if len(line) == 0 {
			return
		}
		d := &Data{Line: asSection(line), LineStr: asSection(lineStr), Code: []Range{{1, fuzzCode}}}
		names := &counted{}
		r := d.NewReader(names)
		u := &unitContext{data: d, unit: unit{version: 5, addrSize: 8}}
		if r.lines(u, 0) != nil {
			return
		}
		for i := range uint64(len(r.table.files)) {
			if id := r.file(&r.table, i); id > uint32(len(names.files)) {
				t.Fatalf("file %d of %d", id, len(names.files))
			}
		}
		checkLines(t, d, &Lines{reader: r}, names)
	})
}

func FuzzRanges(f *testing.F) {
	seeds(f, func(d *Data) {
		f.Add(bytesOf(f, d.Rnglists), bytesOf(f, d.Ranges), bytesOf(f, d.Addr), uint64(12), true)
	})
	f.Fuzz(func(t *testing.T, rnglists, ranges, addr []byte, off uint64, indexed bool) {
		d := &Data{Rnglists: asSection(rnglists), Ranges: asSection(ranges), Code: []Range{{1, fuzzCode}}}
		r := d.NewReader(&counted{})
		for _, version := range []uint16{4, 5} {
			u := &unitContext{data: d, addr: asSection(addr), ranges: d.Ranges, rnglistsBase: 12, unit: unit{version: version, addrSize: 8}}
			n := 0
			r.ranges(u, &entry{has: 1 << fieldRanges, ranges: off, rangesX: indexed}, func(low, high uint64) {
				if n++; low >= high || high > fuzzCode || n > maxRanges {
					t.Fatalf("range %#x-%#x", low, high)
				}
			})
		}
	})
}

func FuzzPackageIndex(f *testing.F) {
	var b []byte
	for _, v := range []uint32{5, 2, 1, 2, 0, 0, 0x1234, 0, 0, 1, 1, 3, 0, 0, 16, 16} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	f.Add(b, make([]byte, 32))
	f.Fuzz(func(t *testing.T, index, info []byte) {
		if len(index) == 0 || len(info) == 0 {
			return
		}
		p, err := newPackage(&Data{Info: asSection(info), Abbrev: asSection(info), Code: []Range{{1, fuzzCode}}, dwo: true}, asSection(index))
		if err != nil {
			return
		}
		for at := uint64(packageHeader); at < min(p.headers(), packageHeader+8*64); at += 8 {
			if u := p.Unit(uint64(p.word(at)) | uint64(p.word(at+4))<<32); u != nil {
				check(t, u.Data)
			}
		}
	})
}

// FuzzRelocate reads files that were not linked.
func FuzzRelocate(f *testing.F) {
	for _, flags := range [][]string{{"-g"}, {"-gdwarf-4"}, {"-g", "-gz=zlib"}} {
		f.Add(compile(f, "gcc", append(flags, "-c")...))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := elffile.ParseObject(elffile.FromBytes(b))
		if err != nil || !m.Relocatable {
			return
		}
		secs, err := m.Sections()
		if err != nil {
			return
		}
		z := &elffile.Inflater{Dir: dir, Memory: 1 << 20, Disk: 1 << 20}
		defer z.Close()
		d, err := Open(m, secs, z)
		if err != nil {
			return
		}
		if d.Bytes() > 2<<20 {
			t.Fatalf("%d bytes of sections", d.Bytes())
		}
		check(t, d)
	})
}
