// SPDX-License-Identifier: Apache-2.0

package elffile

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"
)

const (
	compressZlib = 1
	compressZstd = 2
	zdebugMagic  = "ZLIB" // before a size in 64 bits, big-endian, and zlib's data

	maxRatio      = 1040     // of deflate, which can do no better
	honestRatio   = 64       // of debug sections, which come to a tenth
	honestSize    = 64 << 20 // bytes that may come of fewer
	maxZstdWindow = 8 << 20  // bytes of memory for decoding: what level 19 takes
)

// Inflater decompresses sections within a budget. What is big goes into files without a
// name, so that it takes no memory of the process.
type Inflater struct {
	Dir    string // where the files are; empty: nothing goes there
	Memory int64  // bytes that may be decompressed into memory
	Disk   int64  // bytes that may be decompressed into files
	files  []*os.File
}

// Close gives the files back: what was decompressed into them is not to be used any more.
func (z *Inflater) Close() error {
	var first error
	for _, f := range z.files {
		if err := f.Close(); err != nil && first == nil {
			first = err
		}
	}
	z.files = nil
	return first
}

// Section is a section's bytes, decompressed if they are compressed: where they are, from
// which offset on, and how many.
func (z *Inflater) Section(m *Image, s Section, name string) (c Content, off, size uint64, err error) {
	total := uint64(m.Size())
	if s.Off > total || s.Size > total-s.Off {
		return nil, 0, 0, Errorf(Malformed, "section at %#x of %#x bytes is beyond the end", s.Off, s.Size)
	}
	old := len(name) > 7 && name[:7] == ".zdebug"
	if s.Flags&SHFCompressed == 0 && !old {
		return m, s.Off, s.Size, nil
	}
	h, typ, size, err := m.compressionHeader(s, old)
	if err != nil {
		return nil, 0, 0, err
	}
	packed := s.Size - h
	if typ == compressZlib && size/maxRatio > packed {
		return nil, 0, 0, Errorf(Malformed, "%d bytes can not decompress to %d", packed, size)
	}
	if size > honestSize && size/honestRatio > packed {
		return nil, 0, 0, Errorf(TooLarge, "%d bytes that decompress to %d", packed, size)
	}
	r, err := decompressor(typ, io.NewSectionReader(m, int64(s.Off+h), int64(packed)))
	if err != nil {
		return nil, 0, 0, err
	}
	defer r.Close()
	c, err = z.inflate(r, int64(size))
	return c, 0, size, err
}

// compressionHeader reads the header of a compressed section (gABI, "Section
// Compression"): its own size, the kind, and the size decompressed.
func (m *Image) compressionHeader(s Section, old bool) (header uint64, typ uint32, size uint64, err error) {
	var b [24]byte
	header = 24
	switch {
	case old, !m.Is64:
		header = 12
	}
	if s.Size < header {
		return 0, 0, 0, Errorf(Malformed, "compressed section of %d bytes", s.Size)
	}
	if err := ReadAt(m, b[:header], s.Off); err != nil {
		return 0, 0, 0, err
	}
	switch {
	case old && string(b[:4]) == zdebugMagic:
		return header, compressZlib, binary.BigEndian.Uint64(b[4:]), nil
	case old:
		return 0, 0, 0, Errorf(Malformed, "compressed section without a header")
	case m.Is64:
		return header, binary.LittleEndian.Uint32(b[:]), binary.LittleEndian.Uint64(b[8:]), nil
	}
	return header, binary.LittleEndian.Uint32(b[:]), uint64(binary.LittleEndian.Uint32(b[4:])), nil
}

func decompressor(typ uint32, r io.Reader) (io.ReadCloser, error) {
	switch typ {
	case compressZlib:
		z, err := zlib.NewReader(r)
		if err != nil {
			return nil, Errorf(Malformed, "decompress: %w", err)
		}
		return z, nil
	case compressZstd:
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return nil, Errorf(Malformed, "decompress: %w", err)
		}
		return z.IOReadCloser(), nil
	}
	return nil, Errorf(Unsupported, "compression %d", typ)
}

// inflate reads size bytes, into memory while the budget lasts, else into a file.
func (z *Inflater) inflate(r io.Reader, size int64) (Content, error) {
	if size <= z.Memory {
		z.Memory -= size
		// What the header says is believed only as a bound: memory grows with what is there.
		b, err := io.ReadAll(io.LimitReader(r, size))
		if err != nil || int64(len(b)) < size {
			return nil, Errorf(Malformed, "decompress: %d bytes of %d: %w", len(b), size, err)
		}
		return FromBytes(b), nil
	}
	f, err := z.Create(size)
	if err != nil {
		return nil, err
	}
	w := &writer{f: f}
	n, err := io.CopyBuffer(w, io.LimitReader(r, size), make([]byte, 256<<10))
	if w.err != nil {
		return nil, fmt.Errorf("decompress: %w", w.err)
	}
	if err != nil || n < size {
		return nil, Errorf(Malformed, "decompress: %d bytes of %d: %w", n, size, err)
	}
	return sizedFile{f, size}, nil
}

// writer keeps the error of its file, for which what is decompressed is not to blame.
type writer struct {
	f   *os.File
	err error
}

func (w *writer) Write(p []byte) (n int, err error) {
	n, w.err = w.f.Write(p)
	return n, w.err
}

// Create makes a file for size bytes of the budget, which Close closes.
func (z *Inflater) Create(size int64) (*os.File, error) {
	if size > z.Disk || z.Dir == "" {
		return nil, Errorf(TooLarge, "%d bytes decompressed", size)
	}
	z.Disk -= size
	f, err := TempFile(z.Dir)
	if err != nil {
		return nil, err
	}
	z.files = append(z.files, f)
	return f, nil
}

// TempFile makes a file without a name in a directory.
func TempFile(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, ".hostflame-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("remove: %w", err)
	}
	return f, nil
}

type sizedFile struct {
	*os.File
	size int64
}

func (f sizedFile) Size() int64 { return f.size }
