// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"cmp"
	"errors"
	"fmt"
	"io"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/pclntab"
)

// File is an ELF file of which tables are made. It is for one goroutine at a time, and
// does not close what it reads from.
type File struct {
	image *elffile.Image
	arch  *arch
	open  DebugFunc

	frames  *section // .eh_frame, or nil
	index   index    // of frames; nil: not read yet, or none
	sorted  bool     // index is .eh_frame_hdr's
	lied    bool     // .eh_frame_hdr's is not to be believed
	gotab   *pclntab.Table
	goNames map[uint32]Rule // what functions of Go that switch stacks do, by name's offset

	own      *section // .debug_frame, or nil
	ownIndex index
	separate bool // the separate debug file was looked for
	once     map[Skip]int
	readers  []*reader

	builder builder
}

// Open reads the headers of an ELF file, or of an image of one in memory (the vDSO).
// debug may be nil.
func Open(r io.ReaderAt, size int64, debug DebugFunc) (*File, error) {
	file := &reader{r: r, size: size}
	m, err := elffile.Parse(file)
	if err != nil {
		var e *elffile.Error
		switch {
		case errors.As(err, &e) && e.Reason == elffile.Unsupported:
			return nil, fmt.Errorf("%w: %w", ErrUnsupported, err)
		case errors.As(err, &e) && e.Reason == elffile.Malformed:
			return nil, fmt.Errorf("%w: %w", ErrNotELF, err)
		}
		return nil, err
	}
	f := &File{image: m, arch: archOf(m.Machine), open: debug, once: map[Skip]int{}, readers: []*reader{file}}
	if f.arch == nil || !m.Is64 {
		return nil, fmt.Errorf("%w: machine %d", ErrUnsupported, m.Machine)
	}
	secs, err := m.Sections()
	if err != nil {
		secs = nil // the loader needs none, and neither do we
	}
	f.openFrames(secs)
	f.own = f.debugSection(m, secs)
	if g, err := pclntab.Open(m, secs); err == nil {
		f.gotab = g
		f.goNames = map[uint32]Rule{}
	}
	return f, nil
}

// reader is a file of a size that is believed, and the last error of reading it.
type reader struct {
	r    io.ReaderAt
	size int64
	err  error
}

func (r *reader) Size() int64 { return r.size }

func (r *reader) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.r.ReadAt(p, off)
	if n < len(p) {
		if r.err = err; err == nil || errors.Is(err, io.EOF) {
			r.err = io.ErrUnexpectedEOF // it has shrunk: who reads looks at the size before
		}
	}
	return n, err
}

// failed is the error of reading since it was last asked. What was read meanwhile is
// forgotten: it may be half of what there is.
func (f *File) failed() error {
	var first error
	for _, r := range f.readers {
		first = cmp.Or(first, r.err)
		r.err = nil
	}
	if first != nil {
		if !f.sorted {
			f.index = nil
		}
		f.ownIndex = nil
		for _, s := range []*section{f.frames, f.own} {
			if s != nil {
				s.cies, s.lastCIE, s.window = nil, nil, s.window[:0]
			}
		}
	}
	return first
}

// BuildID is the GNU build id in hex, else Go's build id, else empty.
func (f *File) BuildID() string { return f.image.BuildID }

func (f *File) openFrames(secs []elffile.Section) {
	frame, hdr := openHdr(f.image)
	s := &section{arch: f.arch, content: f.image}
	for _, sec := range f.image.SectionsNamed(secs, ".eh_frame") {
		if sec.Type != elffile.SHTNobits && sec.Flags&elffile.SHFCompressed == 0 && s.size == 0 {
			s.off, s.addr, s.size = sec.Off, sec.Addr, sec.Size
		}
	}
	if frame != 0 && (s.size == 0 || s.addr != frame) {
		// Without section headers its end is not told: it is that of its segment.
		if e, ok := f.image.FileOffset(frame); ok {
			s.off, s.addr, s.size = e.Off, frame, e.Size
		}
	}
	size := uint64(f.image.Size())
	if s.off >= size || s.size == 0 {
		return
	}
	s.size = min(s.size, size-s.off)
	f.frames = s
	if hdr != nil {
		hdr.section = s
		f.index, f.sorted = hdr, true
	}
}

// maxDecompressed is how many bytes of a compressed .debug_frame go into memory.
const maxDecompressed = 32 << 20

// debugSection is the .debug_frame of an image, or nil.
func (f *File) debugSection(m *elffile.Image, secs []elffile.Section) *section {
	for _, sec := range m.SectionsNamed(secs, ".debug_frame") {
		if sec.Type == elffile.SHTNobits || sec.Size == 0 {
			continue
		}
		z := elffile.Inflater{Memory: maxDecompressed}
		content, off, size, err := z.Section(m, sec, ".debug_frame")
		if err != nil {
			f.once[SkipDebugFile]++
			return nil
		}
		s := &section{arch: f.arch, content: content, off: off, size: size, debug: true}
		if size := uint64(s.content.Size()); s.off >= size {
			return nil
		} else {
			s.size = min(s.size, size-s.off)
		}
		return s
	}
	return nil
}

// openSeparate looks for the separate debug file, once.
func (f *File) openSeparate() {
	if f.separate || f.open == nil {
		return
	}
	f.separate = true
	secs, err := f.image.Sections()
	if err != nil {
		return
	}
	link, crc := f.image.DebugLink(secs)
	if link == "" && f.image.BuildID == "" {
		return
	}
	r, size, err := f.open(f.image.BuildID, link, crc)
	if err != nil {
		return
	}
	file := &reader{r: r, size: size}
	m, err := elffile.Parse(file)
	if err != nil || m.Machine != f.arch.machine || !m.Is64 || m.BuildID != f.image.BuildID {
		f.once[SkipDebugFile]++
		return
	}
	if secs, err = m.Sections(); err != nil {
		f.once[SkipDebugFile]++
		return
	}
	f.readers = append(f.readers, file)
	f.own, f.ownIndex = f.debugSection(m, secs), nil
}

// code is the lowest and the highest address that can be executed.
func (f *File) code() (lo, hi uint64) {
	lo = ^uint64(0)
	for _, s := range f.image.Loads {
		if s.Executable && s.Filesz > 0 {
			lo, hi = min(lo, s.Vaddr), max(hi, s.Vaddr+s.Filesz)
		}
	}
	return lo, hi
}

func (f *File) skipOnce(s Skip) { f.once[s]++ }

// frameIndex is the index of .eh_frame, made now if there is none, or nil.
func (f *File) frameIndex() index {
	if f.index == nil && f.frames != nil {
		lo, hi := f.code()
		f.index = scan(f.frames, lo, hi, f.skipOnce)
	}
	return f.index
}

// distrust replaces a sorted table that is wrong.
func (f *File) distrust() {
	f.index, f.sorted, f.lied = nil, false, true
	f.once[SkipIndex]++
}

// debugIndex is the index of .debug_frame, or nil.
func (f *File) debugIndex() index {
	if f.ownIndex == nil && f.own != nil {
		lo, hi := f.code()
		f.ownIndex = scan(f.own, lo, hi, f.skipOnce)
	}
	return f.ownIndex
}

// Regions returns the regions that hold executable code, in order.
func (f *File) Regions() []uint32 {
	const most = 1 << 16 // 16 GiB of code
	var regions []uint32
	seen := map[uint32]bool{}
	size := uint64(f.image.Size())
	for _, s := range f.image.Loads {
		if !s.Executable || s.Filesz == 0 || s.Offset >= size {
			continue
		}
		last := min(s.Offset+s.Filesz, size) - 1
		for n := s.Offset >> RegionShift; n <= last>>RegionShift && len(regions) < most; n++ {
			if r := uint32(n); uint64(r) == n && !seen[r] {
				seen[r] = true
				regions = append(regions, r)
			}
		}
	}
	return sortedRegions(regions)
}
