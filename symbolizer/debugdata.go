// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/ulikunitz/xz/lzma"

	"github.com/hostflame/hostflame/internal/elffile"
)

// Limits of .gnu_debugdata.
const (
	maxPackedData   = 16 << 20
	maxUnpackedData = 64 << 20
	maxHeldData     = 4 << 20  // that is held in memory; what is more is in a file
	maxDictionary   = 16 << 20 // of xz -6, which is what is used, 8 MiB
	maxXZBlocks     = 1 << 10
)

// miniTable is the .symtab in .gnu_debugdata: a small ELF file, packed with xz, with the
// symbols that distributions leave in stripped binaries. Of it the names are held in memory;
// where they are big, the whole in a file without a name, which is closed when the table is
// evicted.
type miniTable struct {
	*symTable
	file *os.File // nil: in memory
}

// fileShare is how many bytes of a file count as one of memory: a share is enough to bound
// what is on the disk, and a descriptor counts as 1 MB at the least.
const fileShare = 4

func (t *miniTable) bytes() int64 {
	held := int64(t.strtab.Size)
	if t.file != nil {
		held = t.image.Size() / fileShare
	}
	return t.symTable.bytes() + held
}

// unpacked takes what is unpacked: into memory, and all of it into a file where that is big.
type unpacked struct {
	dir  string
	mem  []byte
	file *os.File
	size int64
	err  error // of the file; that is not the fault of what is unpacked
}

func (u *unpacked) Write(p []byte) (int, error) {
	u.size += int64(len(p))
	if u.file == nil && u.size <= maxHeldData {
		u.mem = append(u.mem, p...)
		return len(p), nil
	}
	if u.file == nil {
		if u.file, u.err = elffile.TempFile(u.dir); u.err != nil {
			return 0, u.err
		}
		if _, u.err = u.file.Write(u.mem); u.err != nil {
			return 0, u.err
		}
		u.mem = nil
	}
	var n int
	n, u.err = u.file.Write(p)
	return n, u.err
}

func (u *unpacked) content() Content {
	if u.file != nil {
		return wholeFile{u.file, u.size}
	}
	return elffile.FromBytes(u.mem)
}

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
		u := &unpacked{dir: o.sym.index.temp}
		_, err := unpackXZ(u, packed, maxUnpackedData)
		var t *symTable
		switch {
		case u.err != nil:
			err = fmt.Errorf("unpack .gnu_debugdata: %w", u.err)
		case err == nil:
			t, err = o.parseMini(u.content())
		}
		if err == nil && t.strtab.Size > maxHeldData {
			return &miniTable{t, u.file}, nil
		}
		if err == nil {
			err = t.holdNames()
		}
		if u.file != nil {
			u.file.Close()
		}
		if err != nil {
			return nil, err
		}
		return &miniTable{symTable: t}, nil
	}
	return nil, errorf(ReasonNoSymbols, "no .gnu_debugdata")
}

// holdNames copies the names to memory: of the file nothing else is read later.
func (t *symTable) holdNames() error {
	b := make([]byte, t.strtab.Size)
	if err := elffile.ReadAt(t.image, b, t.strtab.Off); err != nil {
		return err
	}
	t.image, t.strtab.Off = &elffile.Image{Content: elffile.FromBytes(b)}, 0
	return nil
}

func (o *Object) parseMini(c Content) (*symTable, error) {
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
		return loadSymTable(m, secs, s.Extent, secs[s.Link].Extent, false, o.sym.maxSymbols())
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
