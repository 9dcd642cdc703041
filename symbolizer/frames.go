// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"encoding/binary"
	"fmt"
	"path"
	"strings"

	"github.com/hostflame/hostflame/internal/elffile"
)

// frameTable knows where functions start by .eh_frame_hdr, which all programs have whose
// stacks can be unwound: names for code that has none, so that its samples come together.
type frameTable struct {
	pager     elffile.Pager
	image     *elffile.Image
	file      string // the file's name, which goes into names
	base      uint64 // address of .eh_frame_hdr
	off       uint64 // of its table, in the file
	n         uint64
	lines     map[uint64][]Line // by where the function starts
	lineBytes int64
}

// The encodings of .eh_frame_hdr and of FDEs that linkers and compilers use (LSB, "DWARF
// Extensions").
const (
	pePcrelSdata4   = 0x1b
	peDatarelSdata4 = 0x3b
	peUdata4        = 0x03

	maxFDEs = 1 << 24
)

func (o *Object) readFrames() (table, error) {
	seg := o.image.EHFrame
	if seg.Filesz < 12 {
		return nil, errorf(ReasonNoSymbols, "no .eh_frame_hdr")
	}
	t := &frameTable{pager: elffile.Pager{Content: o.image}, image: o.image, file: fileName(o.file.Path), base: seg.Vaddr, off: seg.Offset + 12, lines: map[uint64][]Line{}}
	h, err := t.pager.Slice(seg.Offset, 12)
	if err != nil {
		return nil, err
	}
	if h[0] != 1 || h[1] != pePcrelSdata4 || h[2] != peUdata4 || h[3] != peDatarelSdata4 {
		return nil, errorf(ReasonUnsupported, ".eh_frame_hdr of encodings %x", h[:4])
	}
	t.n = uint64(binary.LittleEndian.Uint32(h[8:]))
	if t.n == 0 || t.n > maxFDEs || t.n > (seg.Filesz-12)/8 {
		return nil, errorf(ReasonMalformed, ".eh_frame_hdr of %d entries", t.n)
	}
	return t, nil
}

// fileName is the last element of a path, fit to be part of a name.
func fileName(file string) string {
	return cleanName(strings.TrimSuffix(path.Base(file), " (deleted)"))
}

// entry is the i-th function's start and the address of its FDE.
func (t *frameTable) entry(i uint64) (start, fde uint64, err error) {
	b, err := t.pager.Slice(t.off+8*i, 8)
	if err != nil {
		return 0, 0, err
	}
	rel := func(b []byte) uint64 { return t.base + uint64(int64(int32(binary.LittleEndian.Uint32(b)))) }
	return rel(b), rel(b[4:]), nil
}

func (t *frameTable) lookup(addr uint64) ([]Line, error) {
	lo, hi := uint64(0), t.n
	for lo < hi {
		mid := (lo + hi) / 2
		start, _, err := t.entry(mid)
		if err != nil {
			return nil, err
		}
		if start <= addr {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 {
		return nil, nil
	}
	start, fde, err := t.entry(lo - 1)
	if err != nil {
		return nil, err
	}
	size, err := t.size(fde)
	if err != nil || start > addr || addr-start >= size {
		return nil, err
	}
	lines := t.lines[start]
	if lines == nil {
		name := fmt.Sprintf("[%s+%#x]", t.file, start)
		lines = []Line{{Function: name, SystemName: name}}
		if t.lineBytes > maxHeldNames {
			clear(t.lines)
			t.lineBytes = 0
		}
		t.lines[start] = lines
		t.lineBytes += lineSize
	}
	return lines, nil
}

// size is how many bytes of code an FDE is of: length, distance to the CIE, start and size,
// of 32 bits each, as all but the largest code models have them.
func (t *frameTable) size(fde uint64) (uint64, error) {
	at, ok := t.image.FileOffset(fde)
	if !ok || at.Size < 16 {
		return 0, errorf(ReasonMalformed, "FDE at %#x", fde)
	}
	b, err := t.pager.Slice(at.Off, 16)
	if err != nil {
		return 0, err
	}
	if length := binary.LittleEndian.Uint32(b); length < 12 || length == 1<<32-1 {
		return 0, errorf(ReasonUnsupported, "FDE of %#x bytes", length)
	}
	return uint64(binary.LittleEndian.Uint32(b[12:])), nil
}

func (t *frameTable) bytes() int64 { return t.pager.Bytes() + t.lineBytes + 256 }
