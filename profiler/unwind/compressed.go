// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"compress/zlib"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/hostflame/hostflame/internal/elffile"
)

const (
	chdrSize        = 24
	compressZlib    = 1
	maxDecompressed = 32 << 20
)

// decompress reads a section with SHF_COMPRESSED (gABI, "Section Compression").
func decompress(m *elffile.Image, sec elffile.Section) ([]byte, error) {
	var h [chdrSize]byte
	if sec.Size < chdrSize {
		return nil, elffile.Errorf(elffile.Malformed, "compressed section of %d bytes", sec.Size)
	}
	if err := elffile.ReadAt(m, h[:], sec.Off); err != nil {
		return nil, err
	}
	typ, size := binary.LittleEndian.Uint32(h[:]), binary.LittleEndian.Uint64(h[8:])
	if typ != compressZlib {
		return nil, elffile.Errorf(elffile.Unsupported, "compression %d", typ)
	}
	if size > maxDecompressed {
		return nil, elffile.Errorf(elffile.TooLarge, "%d bytes of .debug_frame", size)
	}
	z, err := zlib.NewReader(io.NewSectionReader(m, int64(sec.Off)+chdrSize, int64(sec.Size)-chdrSize))
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	// What the header says is believed only as a bound: memory grows with what is there.
	b, err := io.ReadAll(io.LimitReader(z, int64(size)))
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	return b, nil
}
