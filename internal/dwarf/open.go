// SPDX-License-Identifier: Apache-2.0

package dwarf

import (
	"cmp"
	"slices"

	"github.com/hostflame/hostflame/internal/elffile"
)

// sections are where the parts of a Data are in a file, without what is put before the
// name where it is compressed in the old way, or after it in a split file.
var sections = []struct {
	name string
	of   func(d *Data) **Section
}{
	{"info", func(d *Data) **Section { return &d.Info }},
	{"abbrev", func(d *Data) **Section { return &d.Abbrev }},
	{"str", func(d *Data) **Section { return &d.Str }},
	{"line_str", func(d *Data) **Section { return &d.LineStr }},
	{"line", func(d *Data) **Section { return &d.Line }},
	{"ranges", func(d *Data) **Section { return &d.Ranges }},
	{"rnglists", func(d *Data) **Section { return &d.Rnglists }},
	{"addr", func(d *Data) **Section { return &d.Addr }},
	{"str_offsets", func(d *Data) **Section { return &d.StrOffsets }},
}

// Has is whether a file has debug information, by its section headers.
func Has(m *elffile.Image, secs []elffile.Section) bool {
	for _, s := range m.SectionsNamed(secs, ".debug_info", ".zdebug_info") {
		if s.Type != elffile.SHTNobits && s.Size > 0 {
			return true
		}
	}
	return false
}

// Open finds the debug sections of a file. Compressed ones are decompressed by z. Reason
// no_symbols: there are none.
func Open(m *elffile.Image, secs []elffile.Section, z *elffile.Inflater) (*Data, error) {
	return open(m, secs, z, "")
}

func open(m *elffile.Image, secs []elffile.Section, z *elffile.Inflater, suffix string) (*Data, error) {
	d := &Data{Code: CodeOf(m, secs)}
	for _, part := range sections {
		for _, name := range []string{".debug_" + part.name + suffix, ".zdebug_" + part.name + suffix} {
			for _, s := range m.SectionsNamed(secs, name) {
				if s.Type == elffile.SHTNobits || s.Size == 0 || *part.of(d) != nil {
					continue
				}
				c, off, size, err := z.Section(m, s, name)
				if err != nil {
					return nil, err
				}
				*part.of(d) = &Section{Content: c, Off: off, Size: size}
				if m.Relocatable {
					if err := relocate(m, secs, z, name, *part.of(d)); err != nil {
						return nil, err
					}
				}
			}
		}
	}
	if d.Info == nil || d.Abbrev == nil {
		return nil, elffile.Errorf(elffile.Missing, "no debug information")
	}
	return d, nil
}

// Sections are the section headers of a file's debug sections that Open reads, one of each
// name, in its order.
func Sections(m *elffile.Image, secs []elffile.Section) []elffile.Section {
	var found []elffile.Section
	for _, part := range sections {
		for _, s := range m.SectionsNamed(secs, ".debug_"+part.name, ".zdebug_"+part.name) {
			if s.Type != elffile.SHTNobits && s.Size > 0 {
				found = append(found, s)
				break
			}
		}
	}
	return found
}

// Bytes is the size of all sections, decompressed.
func (d *Data) Bytes() int64 {
	var n int64
	for _, part := range sections {
		if s := *part.of(d); s != nil {
			n += int64(s.Size)
		}
	}
	return n
}

// CodeOf is where a file's sections have instructions.
func CodeOf(m *elffile.Image, secs []elffile.Section) []Range {
	var code []Range
	for _, s := range secs {
		if s.Executable() && s.Size > 0 && s.Addr+s.Size > s.Addr {
			code = append(code, Range{s.Addr, s.Addr + s.Size})
		}
	}
	slices.SortFunc(code, func(a, b Range) int { return cmp.Compare(a.Low, b.Low) })
	out := code[:0]
	for _, r := range code {
		if n := len(out); n > 0 && r.Low <= out[n-1].High {
			out[n-1].High = max(out[n-1].High, r.High)
			continue
		}
		out = append(out, r)
	}
	return out
}
