// SPDX-License-Identifier: Apache-2.0

package dwarf

// ranges calls f for the ranges of an entry, without those that the linker removed.
func (r *Reader) ranges(u *unitContext, e *entry, f func(low, high uint64)) {
	switch {
	case e.is(fieldRanges):
		if u.version >= 5 {
			r.rnglist(u, e, f)
		} else {
			r.rangelist(u, e.ranges, f)
		}
	case e.is(fieldLow) && e.is(fieldHigh):
		high := e.high
		if e.highIsLen {
			high += e.low
		}
		r.emit(e.low, high, f)
	}
}

// emit passes on what can be code. Ranges of code that the linker removed start at 0, 1,
// or at the highest addresses, or were not relocated.
func (r *Reader) emit(low, high uint64, f func(low, high uint64)) {
	if low >= high || low == 0 {
		return
	}
	if end, ok := r.data.inCode(low); ok {
		f(low, min(high, end))
	}
}

// rnglist reads a list of .debug_rnglists (DWARF 5, section 7.25).
func (r *Reader) rnglist(u *unitContext, e *entry, f func(low, high uint64)) {
	sec := u.data.Rnglists
	if sec == nil {
		return
	}
	off := e.ranges
	if e.rangesX {
		var b [8]byte
		if off > 1<<32 || !u.indexed(sec, u.rnglistsBase, off, u.offsetSize(), &b) {
			return
		}
		off = u.rnglistsBase + little(b[:], u.offsetSize())
	}
	c := &r.lists
	c.start(sec, off, sec.Size)
	size := int(u.addrSize)
	base, ok := u.low, true
	for n := 0; n < maxRanges && c.err == nil; n++ {
		r.work++
		var low, high uint64
		lowOK, highOK := true, true
		switch kind := c.u8(); kind {
		case rleEndOfList:
			return
		case rleBaseAddressx:
			base, ok = u.indexedAddress(c.uleb())
			continue
		case rleBaseAddress:
			base, ok = c.uint(size), true
			continue
		case rleStartxEndx:
			low, lowOK = u.indexedAddress(c.uleb())
			high, highOK = u.indexedAddress(c.uleb())
		case rleStartxLength:
			low, lowOK = u.indexedAddress(c.uleb())
			high = low + c.uleb()
		case rleOffsetPair:
			low, high = base+c.uleb(), base+c.uleb()
			lowOK = ok
		case rleStartEnd:
			low, high = c.uint(size), c.uint(size)
		case rleStartLength:
			low = c.uint(size)
			high = low + c.uleb()
		default:
			return
		}
		if c.err == nil && lowOK && highOK {
			r.emit(low, high, f)
		}
	}
}

// rangelist reads a list of .debug_ranges (DWARF 4, section 2.17.3).
func (r *Reader) rangelist(u *unitContext, off uint64, f func(low, high uint64)) {
	sec := u.ranges
	if sec == nil {
		return
	}
	c := &r.lists
	c.start(sec, u.rangesBase+off, sec.Size)
	size := int(u.addrSize)
	highest := ^uint64(0) >> (64 - 8*size)
	base := u.low
	for n := 0; n < maxRanges && c.err == nil; n++ {
		r.work++
		low, high := c.uint(size), c.uint(size)
		switch {
		case low == 0 && high == 0 || c.err != nil:
			return
		case low == highest:
			base = high
		default:
			r.emit(base+low, base+high, f)
		}
	}
}
