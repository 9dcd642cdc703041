// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"os"
	"path/filepath"
	"sync"

	"github.com/hostflame/hostflame/internal/dwarf"
	"github.com/hostflame/hostflame/internal/elffile"
)

// splitFinder finds the split units (.dwo) of a binary: in the package (.dwp) beside the
// file, else in the files that the compiler wrote, at their path.
type splitFinder struct {
	object *Object
	z      *elffile.Inflater

	mu     sync.Mutex
	looked bool // for the package
	pack   *dwarf.Package
	file   *os.File // of the package
}

func (s *splitFinder) close() {
	if s.file != nil {
		s.file.Close()
	}
}

// find implements dwarf.Data.Split.
func (s *splitFinder) find(id uint64, path string) *dwarf.SplitUnit {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.looked {
		s.looked = true
		s.openPackage()
	}
	if s.pack != nil {
		if u := s.pack.Unit(id); u != nil {
			return u
		}
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join(filepath.Dir(s.object.file.Path), path)
	}
	for _, root := range s.object.file.Roots {
		f, err := elffile.OpenBelow(root, path, nil)
		if err != nil {
			continue
		}
		if u := s.open(f, id); u != nil {
			return u
		}
		f.Close()
	}
	return nil
}

// open reads a .dwo file. It is closed when the unit is done.
func (s *splitFinder) open(f *os.File, id uint64) *dwarf.SplitUnit {
	m, secs, err := parseSplit(f)
	if err != nil {
		return nil
	}
	d, err := dwarf.OpenSplit(m, secs, s.z)
	if err != nil {
		return nil
	}
	if _, err := d.ReadUnits(); err != nil {
		return nil
	}
	i, ok := d.Find(id)
	if !ok {
		return nil
	}
	return &dwarf.SplitUnit{Data: d, Index: i, Done: func() { f.Close() }}
}

func (s *splitFinder) openPackage() {
	for _, root := range s.object.file.Roots {
		f, err := elffile.OpenBelow(root, s.object.file.Path+".dwp", nil)
		if err != nil {
			continue
		}
		if m, secs, err := parseSplit(f); err == nil {
			if s.pack, err = dwarf.OpenPackage(m, secs, s.z); err == nil {
				s.file = f
				return
			}
		}
		f.Close()
	}
}

func parseSplit(f *os.File) (*elffile.Image, []elffile.Section, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	m, err := elffile.ParseObject(wholeFile{f, fi.Size()})
	if err != nil {
		return nil, nil, err
	}
	secs, err := m.Sections()
	return m, secs, err
}
