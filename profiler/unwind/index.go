// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"encoding/binary"
	"slices"

	"github.com/hostflame/hostflame/internal/elffile"
)

const (
	hdrVersion = 1
	hdrTable   = peDataRel | peSdata4
	hdrEntry   = 8
	maxScanned = 4 << 20 // FDEs of a section without a sorted table
	maxFDEs    = 1 << 16 // of a region
	maxCode    = 8 << 20 // bytes of their instructions
)

// index finds the FDEs of a section by address.
type index interface {
	// collect calls f for the records of FDEs that begin from lo to hi - 1, in order of
	// address, before them for the last one that begins before lo, and with the address
	// that the index gives the FDE. f returns false to end it. A false result means that
	// the index is not to be believed.
	collect(lo, hi uint64, f func(start, off uint64) bool) bool
}

// hdrIndex is the sorted table in .eh_frame_hdr.
type hdrIndex struct {
	pager   elffile.Pager
	off     uint64 // of the table, in the file
	addr    uint64 // of .eh_frame_hdr
	n       uint64
	section *section
}

// openHdr reads .eh_frame_hdr (LSB, "Exception Frames"). It returns the address of
// .eh_frame, 0 if that is not told, and the table if it has one of the usual form.
func openHdr(m *elffile.Image) (frame uint64, x *hdrIndex) {
	h := m.EHFrame
	if h.Filesz < 4 {
		return 0, nil
	}
	b := make([]byte, min(h.Filesz, 32))
	if elffile.ReadAt(m, b, h.Offset) != nil || b[0] != hdrVersion {
		return 0, nil
	}
	d := cursor{b: b[4:]}
	at := func() uint64 { return h.Vaddr + uint64(len(b)-d.left()) }
	frameEnc, countEnc, tableEnc := b[1], b[2], b[3]
	if frameEnc == peOmit {
		return 0, nil
	}
	frame, ok := hdrPointer(&d, frameEnc, at(), h.Vaddr)
	if !ok {
		return 0, nil
	}
	if countEnc == peOmit || tableEnc != hdrTable {
		return frame, nil
	}
	n, ok := hdrPointer(&d, countEnc, at(), h.Vaddr)
	table := uint64(len(b) - d.left())
	if !ok || d.bad || n == 0 || n > (h.Filesz-table)/hdrEntry {
		return frame, nil
	}
	return frame, &hdrIndex{
		pager: elffile.Pager{Content: m}, off: h.Offset + table, addr: h.Vaddr, n: n,
	}
}

func hdrPointer(d *cursor, enc byte, at, hdr uint64) (uint64, bool) {
	if enc&0x70 == peDataRel {
		v, ok := d.pointer(enc&0x0f, 0)
		return v + hdr, ok && enc&peIndirect == 0
	}
	return d.pointer(enc, at)
}

// entry is where an FDE begins to hold, and its offset in the section.
func (x *hdrIndex) entry(i uint64) (start, off uint64, ok bool) {
	b, err := x.pager.Slice(x.off+i*hdrEntry, hdrEntry)
	if err != nil {
		return 0, 0, false
	}
	start = x.addr + uint64(int64(int32(binary.LittleEndian.Uint32(b))))
	off = x.addr + uint64(int64(int32(binary.LittleEndian.Uint32(b[4:])))) - x.section.addr
	return start, off, off < x.section.size
}

func (x *hdrIndex) collect(lo, hi uint64, f func(start, off uint64) bool) bool {
	first, end := uint64(0), x.n
	for first < end {
		mid := (first + end) / 2
		start, _, ok := x.entry(mid)
		if !ok {
			return false
		}
		if start < lo {
			first = mid + 1
		} else {
			end = mid
		}
	}
	if first > 0 {
		first--
	}
	last := uint64(0)
	for i := first; i < x.n; i++ {
		start, off, ok := x.entry(i)
		if !ok || start < last {
			return false
		}
		last = start
		if start >= hi || !f(start, off) {
			break
		}
	}
	return true
}

// scanIndex is made by reading a section from end to end. It has one word an FDE: the
// start, from base on, and the offset in the section, 32 bits each.
type scanIndex struct {
	base uint64
	fdes []uint64
}

// scan reads the headers of all records. FDEs outside of lo to hi, which are of code that
// was not linked, are left out.
func scan(s *section, lo, hi uint64, skip func(Skip)) *scanIndex {
	x := &scanIndex{base: lo}
	if hi-lo > 1<<32 {
		hi = lo + 1<<32
		skip(SkipLimit)
	}
	budget := s.read
	for off := uint64(0); off < s.size; {
		s.read = 0 // a section is read once; its size is the bound
		r, ok := s.record(off)
		if !ok || r.next <= off {
			skip(SkipMalformed)
			break
		}
		if r.size == 0 && r.off == 0 { // terminator
			if !s.debug && r.next == off+4 && off+8 >= s.size {
				break
			}
			off = r.next
			continue
		}
		if !r.isCIE {
			f, why := s.fdeAt(r)
			switch {
			case why != "":
				skip(why)
			case f.start >= lo && f.start < hi && f.end > f.start && off < 1<<32:
				x.fdes = append(x.fdes, (f.start-lo)<<32|off)
			}
		}
		if len(x.fdes) >= maxScanned {
			skip(SkipLimit)
			break
		}
		off = r.next
	}
	s.read = budget
	slices.Sort(x.fdes)
	x.fdes = slices.Clip(x.fdes)
	return x
}

func (x *scanIndex) collect(lo, hi uint64, f func(start, off uint64) bool) bool {
	first := 0
	if lo > x.base {
		first, _ = slices.BinarySearch(x.fdes, (lo-x.base)<<32)
		if lo-x.base >= 1<<32 {
			first = len(x.fdes)
		}
	}
	for _, e := range x.fdes[max(first-1, 0):] {
		if start := x.base + e>>32; start >= hi || !f(start, e&(1<<32-1)) {
			break
		}
	}
	return true
}
