// SPDX-License-Identifier: Apache-2.0

// Package index keeps what DWARF says of a binary's code, functions, inlined calls and
// lines, in a compact file that is looked up without parsing.
//
// A file is, all integers little-endian:
//
//	header     magic, version, CRC-32C of what follows it, size of the file, identity of the
//	           binary, place and size of the parts, lowest address, counts
//	parts      one for each unit, several for a big one: nodes, then blocks of rows
//	addresses  the directory: where pieces of code start, u32 from the lowest address, sorted
//	blocks     the block of each piece, as the offset of the file in u32; 0: nothing is known
//	functions  name (offset in strings, u32) and first line (u32)
//	files      path (offset in strings, u32)
//	strings    each with its length before it, a varint
//
// A node is a function or an inlined call: number of the function, distance back to the
// node that it was inlined into (0: none) and, where there is one, file and line of the
// call, as varints. A block has up to blockRows rows: distance back to the part's nodes,
// its first address (from the lowest), number of rows; then for each row
//
//	varint   bytes since the row before << 2 | file differs << 1 | node differs
//	zigzag   if the node differs: its offset among the part's nodes + 1, less the last
//	varint   if the file differs: its number
//	zigzag   the line, less the last
//
// and the bytes from the last row to the block's end. Node 0, file 0 and line 0 are
// unknown.
package index

import (
	"encoding/binary"
	"errors"
)

const (
	magic      = "hfindex\x00"
	version    = 1
	headerSize = 128

	blockRows = 64
	maxFile   = 1<<32 - 1 // bytes of an index
	maxChain  = 256       // frames of an answer
)

// Identity tells versions of a binary apart.
type Identity [32]byte

// header is the file's first bytes. The offsets are of the file.
type header struct {
	crc              uint32
	size             uint64
	identity         Identity
	base             uint64 // lowest address
	pieces           uint64
	directory        uint64 // addresses, then blocks
	functions, files uint64 // numbers of
	functionTable    uint64
	strings          uint64
}

func (h *header) encode() []byte {
	b := make([]byte, 0, headerSize)
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint32(b, version)
	b = binary.LittleEndian.AppendUint32(b, h.crc)
	b = binary.LittleEndian.AppendUint64(b, h.size)
	b = append(b, h.identity[:]...)
	for _, v := range []uint64{h.base, h.pieces, h.directory, h.functions, h.files, h.functionTable, h.strings} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return append(b, make([]byte, headerSize-len(b))...)
}

// Errors of Open.
var (
	ErrDamaged = errors.New("index is damaged")
	ErrForeign = errors.New("index is of another binary or version")
)

const crcStart = 16 // what the checksum covers begins here

func (h *header) decode(b []byte) error {
	if len(b) < headerSize || string(b[:8]) != magic {
		return ErrDamaged
	}
	if binary.LittleEndian.Uint32(b[8:]) != version {
		return ErrForeign
	}
	h.crc = binary.LittleEndian.Uint32(b[12:])
	h.size = binary.LittleEndian.Uint64(b[16:])
	b = b[24+copy(h.identity[:], b[24:]):]
	for i, p := range []*uint64{&h.base, &h.pieces, &h.directory, &h.functions, &h.files, &h.functionTable, &h.strings} {
		*p = binary.LittleEndian.Uint64(b[8*i:])
	}
	return nil
}

func zigzag(v int64) uint64   { return uint64(v<<1) ^ uint64(v>>63) }
func unzigzag(v uint64) int64 { return int64(v>>1) ^ -int64(v&1) }
