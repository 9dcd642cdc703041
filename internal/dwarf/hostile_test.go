// SPDX-License-Identifier: Apache-2.0

package dwarf

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/elffile"
)

// TestDamaged: real debug information with each of some thousand bytes changed ends in an
// answer or an error, soon.
func TestDamaged(t *testing.T) {
	whole := compile(t, "gcc", "-g")
	d := openBytes(t, whole)
	for _, s := range []*Section{d.Info, d.Abbrev, d.Line, d.Rnglists} {
		for i := uint64(0); i < s.Size; i++ {
			for _, v := range []byte{0, 0x7f, 0x80, 0xff} {
				b := bytes.Clone(whole)
				b[s.Off+i] = v
				start := time.Now()
				check(t, openBytes(t, b))
				if took := time.Since(start); took > 2*time.Second {
					t.Fatalf("%v for byte %#x of the file as %#x", took, s.Off+i, v)
				}
			}
		}
	}
}

// made is debug information made by hand: abbreviations with one entry each.
type made struct{ info, abbrev []byte }

func (m *made) spec(b ...byte) { m.abbrev = append(m.abbrev, b...) }

// unit wraps entries into a unit of DWARF 4.
func (m *made) unit(entries []byte) {
	m.info = binary.LittleEndian.AppendUint32(nil, uint32(7+len(entries)))
	m.info = append(m.info, 4, 0, 0, 0, 0, 0, 8)
	m.info = append(m.info, entries...)
}

func (m *made) data() *Data {
	return &Data{Info: asSection(m.info), Abbrev: asSection(m.abbrev), Code: []Range{{0x1000, 0x100000}}}
}

// TestCyclicOrigin: abstract origins that refer to each other.
func TestCyclicOrigin(t *testing.T) {
	var m made
	m.spec(1, tagCompileUnit, 1, 0, 0)
	m.spec(2, tagSubprogram, 0, atAbstractOrigin, formRef4, atLowPC, formAddr, atHighPC, formData4, 0, 0, 0)
	function := func(to uint32) []byte {
		b := binary.LittleEndian.AppendUint32([]byte{2}, to)
		b = binary.LittleEndian.AppendUint64(b, 0x2000)
		return binary.LittleEndian.AppendUint32(b, 16)
	}
	const first = 12
	m.unit(append(append(append([]byte{1}, function(first+17)...), function(first)...), 0))
	d := m.data()
	if n, err := d.ReadUnits(); n != 1 || err != nil {
		t.Fatalf("%d units, %v", n, err)
	}
	c, err := codeOf(d.NewReader(&counted{}), 0)
	if err != nil || len(c.Nodes) != 2 || c.Nodes[0].Function != 0 {
		t.Errorf("%+v, %v", c, err)
	}
}

// TestDeepEntries: entries within entries without end.
func TestDeepEntries(t *testing.T) {
	var m made
	m.spec(1, tagCompileUnit, 1, 0, 0)
	m.spec(2, 0x0b, 1, 0, 0, 0)
	m.unit(append([]byte{1}, bytes.Repeat([]byte{2}, 1<<20)...))
	d := m.data()
	if _, err := d.ReadUnits(); err != nil {
		t.Fatal(err)
	}
	if _, err := codeOf(d.NewReader(&counted{}), 0); !elffile.ReasonIs(err, elffile.TooLarge) {
		t.Errorf("%v, want too_large", err)
	}
}

// TestLongName: a name of a million letters is cut.
func TestLongName(t *testing.T) {
	var m made
	m.spec(1, tagCompileUnit, 1, 0, 0)
	m.spec(2, tagSubprogram, 0, atName, formString, atLowPC, formAddr, atHighPC, formData4, 0, 0, 0)
	entry := append([]byte{1, 2}, bytes.Repeat([]byte{'P'}, 1<<20)...)
	entry = append(entry, 0)
	entry = binary.LittleEndian.AppendUint64(entry, 0x2000)
	entry = binary.LittleEndian.AppendUint32(entry, 16)
	m.unit(append(entry, 0))
	d := m.data()
	if _, err := d.ReadUnits(); err != nil {
		t.Fatal(err)
	}
	names := &counted{}
	if _, err := codeOf(d.NewReader(names), 0); err != nil || len(names.functions) != 1 || len(names.functions[0]) != maxString {
		t.Errorf("%d names, %v", len(names.functions), err)
	}
}

// TestTypeUnits: they say nothing of code, and are not broken for that.
func TestTypeUnits(t *testing.T) {
	header := filepath.Join(t.TempDir(), "types.h")
	if err := os.WriteFile(header, []byte("struct s { int a; struct { int b; } c; } global;"), 0o644); err != nil {
		t.Fatal(err)
	}
	d := openBytes(t, compile(t, "gcc", "-gdwarf-5", "-fdebug-types-section", "-include", header))
	n, err := d.ReadUnits()
	if n < 2 || err != nil {
		t.Fatalf("%d units, %v", n, err)
	}
	r, compiled := d.NewReader(&counted{}), 0
	for i := range n {
		c, err := codeOf(r, i)
		if err != nil {
			t.Errorf("unit %d: %v", i, err)
		}
		if c != nil {
			compiled++
		}
	}
	if compiled != 1 {
		t.Errorf("%d of %d units with code, want 1", compiled, n)
	}
}

// referring is a unit that refers to all the others, whose tables are at an offset of
// .debug_abbrev: there is what add adds. Each has a function of its own.
func referring(t *testing.T, units int, add func(m *made)) *Data {
	t.Helper()
	const size = 20 // bytes of each of the others
	var m made
	m.spec(1, tagCompileUnit, 1, 0, 0)
	m.spec(2, tagSubprogram, 0, atName, formString, 0, 0)
	m.spec(3, tagSubprogram, 0, atAbstractOrigin, formRefAddr, atLowPC, formAddr, atHighPC, formData4, 0, 0, 0)
	table := len(m.abbrev)
	add(&m)
	entries := []byte{1}
	first := 11 + 1 + 17*units + 1
	for i := range units {
		entries = binary.LittleEndian.AppendUint32(append(entries, 3), uint32(first+size*i+12))
		entries = binary.LittleEndian.AppendUint64(entries, uint64(0x1000+16*i))
		entries = binary.LittleEndian.AppendUint32(entries, 16)
	}
	m.unit(append(entries, 0))
	info := m.info
	for i := range units {
		m.unit(fmt.Appendf([]byte{1, 2}, "f%04d\x00\x00", i))
		m.info[6] = byte(table)
		info = append(info, m.info...)
	}
	m.info = info
	d := m.data()
	if n, err := d.ReadUnits(); n != units+1 || err != nil {
		t.Fatalf("%d units, %v", n, err)
	}
	return d
}

// TestSharedAbbreviations: what refers to thousands of units that share one big table, as a
// compiler makes of a whole program, is complete.
func TestSharedAbbreviations(t *testing.T) {
	const units = 3000
	d := referring(t, units, func(m *made) {
		m.spec(1, tagCompileUnit, 1, 0, 0)
		m.spec(2, tagSubprogram, 0, atName, formString, 0, 0)
		for range 1000 {
			m.spec(4, 0x34, 0)
			m.spec(bytes.Repeat([]byte{atName, formString}, 10)...)
			m.spec(0, 0)
		}
	})
	names := &counted{}
	c, err := codeOf(d.NewReader(names), 0)
	if err != nil || len(c.Nodes) != units || len(names.functions) != units || names.functions[units-1] != "f2999" {
		t.Errorf("%d names, %v", len(names.functions), err)
	}
}

// TestBrokenAbbreviations: the work for tables that end beyond a limit is counted too.
func TestBrokenAbbreviations(t *testing.T) {
	d := referring(t, 3000, func(m *made) {
		m.spec(1, tagCompileUnit, 1)
		m.spec(bytes.Repeat([]byte{atName, formData1}, maxAbbrevSpecs+1)...)
	})
	if _, err := codeOf(d.NewReader(&counted{}), 0); !elffile.ReasonIs(err, elffile.TooLarge) {
		t.Errorf("%v, want too_large", err)
	}
}

// TestOverwritten: a unit whose header is another one when it is read again.
func TestOverwritten(t *testing.T) {
	for at, v := range map[int]byte{4: 9, 10: 255} { // version, size of addresses
		var m made
		m.spec(1, tagCompileUnit, 1, 0, 0)
		m.spec(2, tagSubprogram, 0, atRanges, formSecOffset, 0, 0, 0)
		m.unit([]byte{1, 2, 0, 0, 0, 0, 0})
		d := m.data()
		d.Ranges = asSection(make([]byte, 1<<10))
		if n, err := d.ReadUnits(); n != 1 || err != nil {
			t.Fatalf("%d units, %v", n, err)
		}
		m.info[at] = v
		if _, err := codeOf(d.NewReader(&counted{}), 0); !elffile.ReasonIs(err, elffile.Changed) {
			t.Errorf("byte %d: %v, want file_changed", at, err)
		}
	}
}

// TestCutRanges: a list of ranges that does not fit as a whole is an error, also as the last
// of a unit.
func TestCutRanges(t *testing.T) {
	var m made
	m.spec(1, tagCompileUnit, 1, 0, 0)
	m.spec(2, tagSubprogram, 1, atLowPC, formAddr, atHighPC, formData1, 0, 0)
	m.spec(3, tagInlinedSubroutine, 0, atRanges, formSecOffset, 0, 0, 0)
	var ranges []byte
	for i := range uint64(maxRanges) {
		ranges = binary.LittleEndian.AppendUint64(ranges, 0x1000+2*i)
		ranges = binary.LittleEndian.AppendUint64(ranges, 0x1001+2*i)
	}
	list := []byte{3, 0, 0, 0, 0}
	for more := range 2 {
		entries := append(binary.LittleEndian.AppendUint64([]byte{1, 2}, 0x1000), 0xff)
		entries = append(entries, bytes.Repeat(list, 1+more)...)
		m.unit(append(entries, 0, 0))
		d := m.data()
		d.Ranges = asSection(ranges)
		if _, err := d.ReadUnits(); err != nil {
			t.Fatal(err)
		}
		_, err := codeOf(d.NewReader(&counted{}), 0)
		if cut := elffile.ReasonIs(err, elffile.TooLarge); cut != (more > 0) {
			t.Errorf("%d lists: %v", 1+more, err)
		}
	}
}

// TestGiantUnit: a unit with more functions, or more lines, than fit its budget of memory is
// refused, and holds no more than the budget until it is.
func TestGiantUnit(t *testing.T) {
	const budget = 32 // MB, what is thrown away while slices grow included
	var functions made
	functions.spec(1, tagCompileUnit, 1, 0, 0)
	functions.spec(2, tagSubprogram, 0, atLowPC, formAddr, atHighPC, formData1, 0, 0, 0)
	entries := []byte{1}
	for i := range uint64(maxSpans + 10) {
		entries = append(binary.LittleEndian.AppendUint64(append(entries, 2), 0x1000+i%0xf000), 1)
	}
	functions.unit(entries)

	// Each of the special opcodes at the end moves on by a byte and a line.
	program := []byte{4, 0, 25, 0, 0, 0, 1, 1, 1, 0, 2, 13, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 'f', 0, 0, 0, 0, 0}
	program = append(program, 0, 9, lneSetAddress, 0, 0x10, 0, 0, 0, 0, 0, 0)
	program = append(program, bytes.Repeat([]byte{13 + 2 + 1}, 64<<20)...)
	lines := &Data{Line: asSection(append(binary.LittleEndian.AppendUint32(nil, uint32(len(program))), program...)), Code: []Range{{0x1000, 1 << 40}}}
	unit := &unitContext{data: lines, unit: unit{version: 4, addrSize: 8}}

	for name, read := range map[string]func() error{
		"functions": func() error {
			d := functions.data()
			if _, err := d.ReadUnits(); err != nil {
				return err
			}
			_, err := codeOf(d.NewReader(&counted{}), 0)
			return err
		},
		"lines": func() error { return lines.NewReader(&counted{}).lines(unit, 0) },
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := read()
		runtime.ReadMemStats(&after)
		allocated := (after.TotalAlloc - before.TotalAlloc) >> 20
		t.Logf("%s: %v, %d MB allocated", name, err, allocated)
		if !elffile.ReasonIs(err, elffile.TooLarge) || allocated > budget {
			t.Errorf("%s: %v, want too_large, and %d MB allocated", name, err, allocated)
		}
	}
}
