// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/ulikunitz/xz/lzma"

	"github.com/hostflame/hostflame/internal/elffile"
)

// Limits of .gnu_debugdata.
const (
	maxPackedData   = 16 << 20
	maxUnpackedData = 64 << 20
	maxDictionary   = 16 << 20 // of xz -6, which is what is used, 8 MiB
	maxXZBlocks     = 1 << 10
)

// miniTable is the .symtab in .gnu_debugdata: a small ELF file, packed with xz, with the
// symbols that distributions leave in stripped binaries. It is unpacked into a file without a
// name, which is closed when the table is collected.
type miniTable struct{ *symTable }

func (o *Object) readMini(secs []elffile.Section) (table, error) {
	for _, s := range o.image.SectionsNamed(secs, ".gnu_debugdata") {
		if s.Type == elffile.SHTNobits {
			continue
		}
		if s.Size > maxPackedData {
			return nil, errorf(ReasonTooLarge, ".gnu_debugdata of %d bytes", s.Size)
		}
		packed := make([]byte, s.Size)
		if err := elffile.ReadAt(o.image, packed, s.Off); err != nil {
			return nil, err
		}
		f, err := elffile.TempFile(o.sym.index.temp)
		if err != nil {
			return nil, fmt.Errorf("unpack .gnu_debugdata: %w", err)
		}
		size, err := unpackXZ(f, packed, maxUnpackedData)
		if err == nil {
			var t table
			if t, err = o.parseMini(wholeFile{f, size}); err == nil {
				return t, nil
			}
		}
		f.Close()
		return nil, err
	}
	return nil, errorf(ReasonNoSymbols, "no .gnu_debugdata")
}

func (o *Object) parseMini(c Content) (table, error) {
	m, err := elffile.Parse(c)
	if err != nil {
		return nil, err
	}
	if m.Machine != o.image.Machine || m.Is64 != o.image.Is64 {
		return nil, errorf(ReasonMalformed, ".gnu_debugdata is of another machine")
	}
	secs, err := m.Sections()
	if err != nil {
		return nil, err
	}
	for _, s := range secs {
		if s.Type != elffile.SHTSymtab {
			continue
		}
		if s.EntSize != m.SymSize() || uint64(s.Link) >= uint64(len(secs)) {
			return nil, errorf(ReasonMalformed, "symbol table of entries of %d bytes", s.EntSize)
		}
		t, err := loadSymTable(m, secs, s.Extent, secs[s.Link].Extent, false, o.sym.maxSymbols())
		if err != nil {
			return nil, err
		}
		return &miniTable{t}, nil
	}
	return nil, errorf(ReasonNoSymbols, "no symbols in .gnu_debugdata")
}

var xzMagic = []byte("\xfd7zXZ\x00")

// unpackXZ unpacks an xz file of at most limit bytes to w, whose blocks are packed with LZMA2 and
// nothing else ("The .xz File Format"). Checksums are not compared: the file has none of
// what else is in it either. The container is read here, as a block's header says how much
// memory its dictionary takes.
func unpackXZ(w io.Writer, b []byte, limit int64) (n int64, err error) {
	if len(b) < 24 || !bytes.HasPrefix(b, xzMagic) {
		return 0, errorf(ReasonMalformed, "not an xz file")
	}
	checkSize := [16]int{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}[b[7]&0xf]
	buf := make([]byte, 64<<10)
	b = b[12:]
	for range maxXZBlocks {
		if len(b) == 0 || b[0] == 0 {
			return n, nil // the index
		}
		size := (int(b[0]) + 1) * 4
		if size > len(b) {
			return 0, errorf(ReasonMalformed, "xz block header of %d bytes", size)
		}
		dictionary, err := blockDictionary(b[:size])
		if err != nil {
			return 0, err
		}
		src := bytes.NewReader(b[size:])
		in := bufio.NewReaderSize(src, 4<<10)
		r, err := lzma.Reader2Config{DictCap: dictionary}.NewReader2(in)
		if err != nil {
			return 0, errorf(ReasonMalformed, "unpack: %w", err)
		}
		part, err := io.CopyBuffer(struct{ io.Writer }{w}, io.LimitReader(r, limit-n+1), buf)
		if err != nil {
			return 0, errorf(ReasonMalformed, "unpack: %w", err)
		}
		if n += part; n > limit {
			return 0, errorf(ReasonTooLarge, "more than %d bytes unpacked", limit)
		}
		used := len(b) - size - src.Len() - in.Buffered()
		used += -used & 3
		if size+used+checkSize > len(b) {
			return 0, errorf(ReasonMalformed, "xz block ends beyond the end")
		}
		b = b[size+used+checkSize:]
	}
	return 0, errorf(ReasonTooLarge, "xz file of more than %d blocks", maxXZBlocks)
}

// blockDictionary reads the header of a block whose only filter is LZMA2, and returns the
// size of its dictionary.
func blockDictionary(h []byte) (int, error) {
	const lzma2 = 0x21
	flags := h[1]
	h = h[2 : len(h)-4] // the CRC
	for _, bit := range []byte{0x40, 0x80} {
		if flags&bit != 0 { // a size
			_, n := binary.Uvarint(h)
			if n <= 0 {
				return 0, errorf(ReasonMalformed, "xz block header")
			}
			h = h[n:]
		}
	}
	if flags&3 != 0 || len(h) < 3 || h[0] != lzma2 || h[1] != 1 {
		return 0, errorf(ReasonUnsupported, "xz filters other than LZMA2")
	}
	bits := h[2]
	if bits > 40 {
		return 0, errorf(ReasonMalformed, "xz dictionary %d", bits)
	}
	size := int64(2|bits&1) << (bits/2 + 11)
	if size > maxDictionary {
		return 0, errorf(ReasonTooLarge, "xz dictionary of %d bytes", size)
	}
	return int(size), nil
}
