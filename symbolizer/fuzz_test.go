// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/hostflame/hostflame/internal/elffile"
)

func FuzzELF(f *testing.F) {
	for _, seeds := range []map[string][]byte{hostileSeeds(f), compiledSeeds(f)} {
		for _, b := range seeds {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) { exercise(t, b) })
}

func FuzzPclntab(f *testing.F) {
	for _, spec := range goSpecs {
		f.Add(spec.bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := elffile.Parse(elffile.FromBytes(b))
		if err != nil {
			return
		}
		secs, err := m.Sections()
		if err != nil {
			return
		}
		g, err := loadGoTable(m, secs)
		if err != nil {
			return
		}
		for range 2 {
			for off := uint64(0); off < min(g.TextEnd+2, 0x400); off++ {
				lines, err := g.lookup(g.Text + off)
				if len(lines) > maxInlineDepth+1 || err != nil && lines != nil {
					t.Fatalf("%d lines, error %v", len(lines), err)
				}
				if len(lines) > 0 {
					checkResult(t, Result{Lines: lines})
				}
			}
		}
	})
}

func FuzzPerfMap(f *testing.F) {
	f.Add([]byte("1000 10 a\n1008 10 b\n1000 4 c\n"), uint16(12))
	f.Add([]byte("0x7f0000001000 0x40 LazyCompile:~f x.js:1\n7f0000001020 40 _Z1fv\r\n"), uint16(3))
	f.Add([]byte("zz\n1000 10 \xff\x01\n\n1000"), uint16(0))
	f.Fuzz(func(t *testing.T, b []byte, split uint16) {
		p := newPerfTable(64 << 10)
		for _, size := range []int64{min(int64(split), int64(len(b))), int64(len(b)), int64(len(b))} {
			if !p.continues(bytes.NewReader(b), size) {
				t.Fatal("the same file does not continue itself")
			}
			if err := p.readOn(bytes.NewReader(b), size); err != nil {
				t.Fatal(err)
			}
		}
		for _, rows := range [][]perfRow{p.newer, p.older} {
			for i, r := range rows {
				if r.size == 0 || i > 0 && rows[i-1].start+uint64(rows[i-1].size) > r.start {
					t.Fatalf("row %d overlaps: %+v", i, rows)
				}
				for _, addr := range []uint64{r.start - 1, r.start, r.start + uint64(r.size) - 1} {
					checkResult(t, p.lookup(addr))
				}
			}
		}
		// In one piece it says the same.
		whole := newPerfTable(64 << 10)
		if err := whole.readOn(bytes.NewReader(b), int64(len(b))); err != nil {
			t.Fatal(err)
		}
		if p.full || whole.full || len(b) > maxName {
			return
		}
		for _, r := range slices.Concat(p.older, p.newer) {
			got, want := p.lookup(r.start), whole.lookup(r.start)
			if len(got.Lines) != len(want.Lines) || len(got.Lines) > 0 && got.Lines[0] != want.Lines[0] {
				t.Fatalf("%#x: %+v, in one piece %+v", r.start, got, want)
			}
		}
	})
}

func FuzzKallsyms(f *testing.F) {
	f.Add(kallsymsText)
	f.Add("0000000000000000 T hidden\n")
	f.Add("ffffffffffffffff T last\nffffffff00000000 t a\t[\nffff800000000000 W b\t[]\n")
	f.Fuzz(func(t *testing.T, text string) {
		table, err := parseKallsyms(strings.NewReader(text), 0)
		if err != nil {
			if ReasonOf(err) == "" || table != nil {
				t.Fatalf("table %v, error %v", table, err)
			}
			return
		}
		k := kernel{table: table, lines: map[int][]Line{}}
		addrs := []uint64{0, kernelHalf, ^uint64(0)}
		for line := range strings.Lines(text) {
			addr, _ := parseHex([]byte(line))
			addrs = append(addrs, addr-1, addr, addr+1)
		}
		results := make([]Result, len(addrs))
		k.answer(addrs, results)
		for _, r := range results {
			checkResult(t, r)
		}
	})
}

func FuzzBuildIDs(f *testing.F) {
	f.Add([]byte("\x04\x00\x00\x00\x08\x00\x00\x00\x03\x00\x00\x00GNU\x00abcdefgh"))
	f.Add([]byte("\x04\x00\x00\x00\x05\x00\x00\x00\x04\x00\x00\x00Go\x00\x00a/b/c"))
	f.Add([]byte("\x01\x00\x00\x00\xff\xff\xff\xff\x03\x00\x00\x00A\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		gnu, goID := elffile.ParseBuildIDs(b)
		if len(gnu) > 2*elffile.MaxBuildID || strings.Trim(gnu, "0123456789abcdef") != "" {
			t.Errorf("GNU build id %q", gnu)
		}
		if cleanName(goID) != goID {
			t.Errorf("Go build id %q", goID)
		}
	})
}

func FuzzDemangled(f *testing.F) {
	for _, s := range []string{
		"_ZNSt6vectorIiSaIiEE9push_backERKi", "_ZZ4mainENKUliE_clEi", "_RNvCs1234_7mycrate3foo", "_Z1fPPPi",
		"_ZN4core3fmt5write17h0123456789abcdefE", "memcpy@@GLIBC_2.14", "_GLOBAL__sub_I_main", "_ZTSN1AIS_IS_EEE",
		"_Z1fI" + strings.Repeat("ZcvT_I", 25),
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		name := cleanName(s)
		if name == "" {
			return
		}
		checkResult(t, Result{Lines: []Line{{Function: demangled(name[:min(len(name), maxName)]), SystemName: "x"}}})
	})
}

func FuzzDebugdata(f *testing.F) {
	xz := exec.Command("xz", "-c", "--format=xz")
	xz.Stdin = strings.NewReader(strings.Repeat("hostflame ", 100))
	b, err := xz.Output()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 1 << 20
		if n, err := unpackXZ(io.Discard, b, limit); err == nil && n > limit {
			t.Fatalf("%d bytes of at most %d", n, limit)
		}
	})
}
