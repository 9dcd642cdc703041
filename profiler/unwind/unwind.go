// SPDX-License-Identifier: Apache-2.0

// Package unwind makes unwind tables of ELF files for the walker in the kernel, and walks
// stacks by them in user space. The layout of a table is that of bpf/unwind.h.
//
// Rows come from .eh_frame, from .debug_frame where there is none (also that of a separate
// debug file), from Go's pclntab, and from the code of signal trampolines. A table covers
// one region, 256 KiB of the file, and is made when it is asked for: of an .eh_frame with a
// sorted table only what describes the region is read.
//
// Files are hostile input: they are read by pread, counts and offsets are checked against
// the file's size, and time and memory are bounded whatever they say. What can not be
// expressed costs a counted reason (Skip), and its addresses have no rule: there the
// walker follows frame pointers.
package unwind

import (
	"errors"
	"io"
)

// A file is covered in regions of RegionSize bytes, those in buckets of BucketSize.
const (
	RegionShift = 18
	RegionSize  = 1 << RegionShift
	BucketShift = 9
	BucketSize  = 1 << BucketShift

	rowWords = 3
	maxWords = 1<<17 - rowWords // of a table: a chunk of the map
)

// Skip is why something of a file has no rule. The values are fit to be metric labels.
type Skip string

// Region is the table of a region. Without words nothing is known of it.
type Region struct {
	// FirstBucket is the first one that the table covers, counted from the region's start.
	FirstBucket uint16
	// Words is the index, one more word than there are buckets, and then the rows, three
	// words each: the low half of the offset in the region, the low half of the rule, its
	// high half.
	Words []uint16
	// Rows is their number. The rule of wide rows takes two.
	Rows int
	// Skipped counts what could not be expressed or believed, by reason.
	Skipped map[Skip]int
}

// Buckets is how many buckets the table covers.
func (r *Region) Buckets() int {
	if len(r.Words) == 0 {
		return 0
	}
	return len(r.Words) - r.Rows*rowWords - 1
}

// DebugFunc opens the separate debug file of a binary, which is asked for where the binary
// itself has no unwind information. link is the name in .gnu_debuglink, crc the file's
// CRC-32 that stands beside it; both can be empty, as can buildID (hex). The caller closes
// what it opened when it is done with the File. An error means that there is none.
type DebugFunc func(buildID, link string, crc uint32) (r io.ReaderAt, size int64, err error)

// Errors of Open that say what a file is.
var (
	ErrNotELF      = errors.New("not an ELF file")
	ErrUnsupported = errors.New("unsupported kind of ELF file") // 32 bits, another machine or byte order, an object file
)
