// SPDX-License-Identifier: Apache-2.0

package index

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Index is an index file in memory. It does not change and may be used from any goroutine.
type Index struct {
	h         header
	data      []byte
	addrs     []byte
	blocks    []byte
	functions []byte
	files     []byte
	strings   []byte
}

// Frame is a function at an address. The numbers are those of the index, 0 is unknown.
type Frame struct {
	Function uint32
	File     uint32
	Line     uint32 // of the address, or of the call of the frame before
}

// Open reads the index in a file and maps it into memory until nobody uses the result any
// more; f can be closed. The error is ErrDamaged or ErrForeign where the file is not what
// was written for this identity.
func Open(f *os.File, id Identity) (*Index, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open index: %w", err)
	}
	if !fi.Mode().IsRegular() || fi.Size() < headerSize || fi.Size() > maxFile {
		return nil, fmt.Errorf("open index: %w: %d bytes", ErrDamaged, fi.Size())
	}
	crc, err := checksum(f, fi.Size())
	if err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map index: %w", err)
	}
	// At random: reading ahead would only fill the memory.
	_ = unix.Madvise(data, unix.MADV_RANDOM)
	x, err := parse(data, id)
	if err == nil && x.h.crc != crc {
		err = fmt.Errorf("open index: %w: checksum", ErrDamaged)
	}
	if err != nil {
		unix.Munmap(data)
		return nil, err
	}
	runtime.AddCleanup(x, func(data []byte) { unix.Munmap(data) }, data)
	return x, nil
}

// checksum is that of what a file of this size should have.
func checksum(f io.ReaderAt, size int64) (uint32, error) {
	h := crc32.New(castagnoli)
	_, err := io.CopyBuffer(struct{ io.Writer }{h}, io.NewSectionReader(f, crcStart, size-crcStart), make([]byte, 256<<10))
	return h.Sum32(), err
}

// parse finds the parts of an index. Whoever has the bytes from elsewhere than Open has no
// promise that they are right, only that look-ups stay within them.
func parse(data []byte, id Identity) (_ *Index, err error) {
	defer catchFault(&err)()
	x := &Index{data: data}
	h := &x.h
	if err := h.decode(data); err != nil {
		return nil, fmt.Errorf("open index: %w", err)
	}
	size := uint64(len(data))
	if h.identity != id {
		return nil, fmt.Errorf("open index: %w", ErrForeign)
	}
	part := func(off, count, width uint64) []byte {
		if off > size || count > (size-off)/width {
			err = fmt.Errorf("open index: %w: %d entries at %#x of %#x", ErrDamaged, count, off, size)
			return nil
		}
		return data[off : off+count*width]
	}
	x.addrs = part(h.directory, h.pieces, 4)
	x.blocks = part(h.directory+4*h.pieces, h.pieces, 4)
	x.functions = part(h.functionTable, h.functions, 8)
	x.files = part(h.functionTable+8*h.functions, h.files, 4)
	x.strings = part(h.strings, size-min(size, h.strings), 1)
	if err == nil && h.size != size {
		err = fmt.Errorf("open index: %w: %d bytes of %d", ErrDamaged, size, h.size)
	}
	if err != nil {
		return nil, err
	}
	return x, nil
}

// catchFault makes an error of what reading a mapped file can end in: it was truncated, or
// the device failed. The returned function restores what was set before.
func catchFault(err *error) func() {
	old := debug.SetPanicOnFault(true)
	return func() {
		debug.SetPanicOnFault(old)
		if r := recover(); r != nil {
			fault, ok := r.(interface{ Addr() uintptr })
			if !ok {
				panic(r)
			}
			*err = fmt.Errorf("read index at %#x: %w", fault.Addr(), ErrDamaged)
		}
	}
}

// Size is the number of bytes of the index.
func (x *Index) Size() int { return len(x.data) }

// Batch calls f, which may look up addresses, and returns an error if the file turned out
// to be unreadable meanwhile.
func (x *Index) Batch(f func()) (err error) {
	defer catchFault(&err)()
	f()
	runtime.KeepAlive(x)
	return nil
}

// Lookup appends the frames at an address to frames, the innermost inlined call first, and
// returns them: nothing where the index knows nothing. It does not allocate if there is
// room. It must be called within Batch.
func (x *Index) Lookup(addr uint64, frames []Frame) []Frame {
	if addr < x.h.base || addr-x.h.base > 1<<32-1 {
		return frames
	}
	off := uint32(addr - x.h.base)
	lo, hi := 0, len(x.addrs)/4
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if binary.LittleEndian.Uint32(x.addrs[4*mid:]) <= off {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 {
		return frames
	}
	block := binary.LittleEndian.Uint32(x.blocks[4*(lo-1):])
	if block == 0 || uint64(block) >= uint64(len(x.data)) {
		return frames
	}
	return x.row(uint64(block), off, frames)
}

// reader reads varints of the data. Past the end it reads zeros.
type reader struct {
	b  []byte
	at uint64
}

func (r *reader) uvarint() uint64 {
	if r.at < uint64(len(r.b)) {
		if v := r.b[r.at]; v < 0x80 {
			r.at++
			return uint64(v)
		}
	}
	return r.long()
}

func (r *reader) long() uint64 {
	if r.at >= uint64(len(r.b)) {
		return 0
	}
	v, n := binary.Uvarint(r.b[r.at:])
	if n <= 0 {
		r.at = uint64(len(r.b))
		return 0
	}
	r.at += uint64(n)
	return v
}

// row finds the row of a block that covers an offset.
func (x *Index) row(block uint64, off uint32, frames []Frame) []Frame {
	r := reader{b: x.data, at: block}
	nodes := block - r.uvarint()
	at := r.uvarint()
	count := r.uvarint()
	var node, file, line uint64
	var found struct{ node, file, line uint64 }
	for i := uint64(0); i < count && i < blockRows; i++ {
		head := r.uvarint()
		at += head >> 2
		if at > uint64(off) {
			return x.chain(nodes, found.node, found.file, found.line, frames)
		}
		if head&1 != 0 {
			node += uint64(unzigzag(r.uvarint()))
		}
		if head&2 != 0 {
			file = r.uvarint()
		}
		line += uint64(unzigzag(r.uvarint()))
		found.node, found.file, found.line = node, file, line
	}
	if uint64(off) >= at+r.uvarint() {
		return frames
	}
	return x.chain(nodes, found.node, found.file, found.line, frames)
}

// chain appends a row's node and those that it was inlined into.
func (x *Index) chain(nodes, node, file, line uint64, frames []Frame) []Frame {
	if node == 0 {
		if file != 0 {
			frames = append(frames, Frame{File: uint32(file), Line: uint32(line)})
		}
		return frames
	}
	r := reader{b: x.data, at: nodes + node - 1}
	for range maxChain {
		start := r.at
		function, parent := r.uvarint(), r.uvarint()
		frames = append(frames, Frame{uint32(function), uint32(file), uint32(line)})
		if parent == 0 || parent > start {
			break
		}
		file, line = r.uvarint(), r.uvarint()
		r.at = start - parent
	}
	return frames
}

// Function returns a function's name and the line where it starts, 0 if that is not known.
// The name is a copy. It must be called within Batch.
func (x *Index) Function(number uint32) (name string, startLine uint32) {
	i := uint64(number-1) * 8
	if number == 0 || i+8 > uint64(len(x.functions)) {
		return "", 0
	}
	b := x.functions[i:]
	return x.text(binary.LittleEndian.Uint32(b)), binary.LittleEndian.Uint32(b[4:])
}

// File returns the path of a file. It must be called within Batch.
func (x *Index) File(number uint32) string {
	i := uint64(number-1) * 4
	if number == 0 || i+4 > uint64(len(x.files)) {
		return ""
	}
	return x.text(binary.LittleEndian.Uint32(x.files[i:]))
}

func (x *Index) text(off uint32) string {
	r := reader{b: x.strings, at: uint64(off)}
	n := r.uvarint()
	if r.at > uint64(len(r.b)) || n > uint64(len(r.b))-r.at {
		return ""
	}
	return string(r.b[r.at : r.at+n])
}
