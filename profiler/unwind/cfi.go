// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bytes"
	"encoding/binary"

	"github.com/hostflame/hostflame/internal/elffile"
)

// Why something of a file has no rule.
const (
	SkipMalformed    = Skip("malformed")      // a record or an instruction contradicts itself or the file's size
	SkipEncoding     = Skip("encoding")       // a pointer encoding that needs the running process, or a DWARF extension
	SkipAugmentation = Skip("augmentation")   // an augmentation that we do not know
	SkipInstruction  = Skip("instruction")    // a call frame instruction that we do not know
	SkipExpression   = Skip("expression")     // a DWARF expression that no rule stands for
	SkipCFA          = Skip("cfa")            // a CFA that is not defined, too far off or unaligned
	SkipReturn       = Skip("return_address") // the return address is not where a rule could find it
	SkipStack        = Skip("stack_pointer")  // the caller's stack pointer is not the CFA
	SkipIndex        = Skip("index")          // the sorted table of .eh_frame_hdr is wrong; .eh_frame was read instead
	SkipLimit        = Skip("limit")          // over one of our limits
	SkipGo           = Skip("go")             // a function of Go without a frame size
	SkipDebugFile    = Skip("debug_file")     // the separate debug file can not be read
)

const (
	maxRecord     = 1 << 20 // bytes of one CIE or FDE
	maxCIEs       = 1 << 12 // kept, of one section
	maxRead       = 64 << 20
	windowSize    = 64 << 10
	smallWindow   = 4 << 10
	cieIDDebug    = 0xffffffff
	extendedSize  = 0xfffffff0 // lengths from here on are escapes (DWARF 4, 7.4)
	minRecordSize = 4
)

// Pointer encodings (LSB, "DWARF Extensions"): a format and what it is relative to.
const (
	peAbsptr   = 0x00
	peULEB     = 0x01
	peUdata2   = 0x02
	peUdata4   = 0x03
	peUdata8   = 0x04
	peSLEB     = 0x09
	peSdata2   = 0x0a
	peSdata4   = 0x0b
	peSdata8   = 0x0c
	pePCRel    = 0x10
	peDataRel  = 0x30
	peIndirect = 0x80
	peOmit     = 0xff
)

// section is .eh_frame or .debug_frame.
type section struct {
	arch    *arch
	content elffile.Content
	off     uint64 // in content
	addr    uint64
	size    uint64
	debug   bool // .debug_frame

	cies    map[uint64]*cie // by offset in the section
	lastOff uint64
	lastCIE *cie

	// A window of the section.
	window   []byte
	windowAt uint64
	read     uint64 // bytes read since the budget was set
}

// cie is what the FDEs of one kind have in common.
type cie struct {
	skip        Skip // why its FDEs are of no use
	codeAlign   uint64
	dataAlign   int64
	encoding    byte
	augmented   bool // has 'z'
	signal      bool
	initial     state
	initialSkip Skip
}

// fde describes a function.
type fde struct {
	start, end uint64 // ELF virtual addresses
	cie        *cie
	off, size  uint64 // of its instructions, in the section
}

// bytes is the n bytes at off. They are valid until the next call.
func (s *section) bytes(off, n uint64) ([]byte, bool) {
	if off > s.size || n > s.size-off {
		return nil, false
	}
	if off < s.windowAt || off+n > s.windowAt+uint64(len(s.window)) {
		// Records follow one another, mostly. Who jumps about gets less at a time.
		want := uint64(smallWindow)
		if end := s.windowAt + uint64(len(s.window)); off >= s.windowAt && off <= end+windowSize {
			want = windowSize
		}
		want = min(max(want, n), s.size-off)
		if s.read += want; s.read > maxRead {
			return nil, false
		}
		if uint64(cap(s.window)) < want {
			s.window = make([]byte, max(want, windowSize))
		}
		s.window, s.windowAt = s.window[:want], off
		if elffile.ReadAt(s.content, s.window, s.off+off) != nil {
			s.window = s.window[:0]
			return nil, false
		}
	}
	return s.window[off-s.windowAt:][:n], true
}

// record is the frame of a CIE or FDE.
type record struct {
	off, size uint64 // of what follows the identifier, in the section
	next      uint64
	isCIE     bool
	cie       uint64 // offset of the FDE's CIE
}

// record reads the header at off. Without ok, the section can not be read on.
func (s *section) record(off uint64) (r record, ok bool) {
	b, ok := s.bytes(off, 4)
	if !ok {
		return r, false
	}
	at, size, wide := off+4, uint64(binary.LittleEndian.Uint32(b)), false
	if size >= extendedSize {
		if b, ok = s.bytes(off+4, 8); size != 0xffffffff || !ok {
			return r, false
		}
		at, size, wide = off+12, binary.LittleEndian.Uint64(b), true
	}
	if size > s.size-at {
		return r, false
	}
	r.next = at + size
	if size < minRecordSize {
		return r, size == 0 // a terminator
	}
	// .eh_frame has 32-bit identifiers whatever the length's format.
	idSize := uint64(4)
	if wide && s.debug {
		idSize = 8
	}
	if size < idSize {
		return r, false
	}
	b, ok = s.bytes(at, idSize)
	if !ok {
		return r, false
	}
	id := uint64(binary.LittleEndian.Uint32(b))
	if idSize == 8 {
		id = binary.LittleEndian.Uint64(b)
	}
	r.off, r.size = at+idSize, size-idSize
	switch {
	case !s.debug:
		r.isCIE = id == 0
		r.cie = at - id
		if id > at {
			return r, false
		}
	default:
		r.isCIE = id == cieIDDebug && idSize == 4 || id == ^uint64(0)
		r.cie = id
	}
	return r, true
}

// cieAt is the CIE at an offset, good or bad.
func (s *section) cieAt(off uint64) *cie {
	if s.lastCIE != nil && s.lastOff == off {
		return s.lastCIE
	}
	c := s.cies[off]
	if c == nil {
		c = s.addCIE(off)
	}
	s.lastOff, s.lastCIE = off, c
	return c
}

func (s *section) addCIE(off uint64) *cie {
	if len(s.cies) >= maxCIEs {
		clear(s.cies)
	}
	if s.cies == nil {
		s.cies = map[uint64]*cie{}
	}
	c := s.readCIE(off)
	s.cies[off] = c
	return c
}

func (s *section) readCIE(off uint64) *cie {
	r, ok := s.record(off)
	if !ok || !r.isCIE || r.size > maxRecord {
		return &cie{skip: SkipMalformed}
	}
	b, ok := s.bytes(r.off, r.size)
	if !ok {
		return &cie{skip: SkipMalformed}
	}
	c := &cie{}
	d := cursor{b: b}
	version := d.u8()
	augmentation, ok := d.cstring()
	switch {
	case !ok || version != 1 && version != 3 && version != 4:
		return &cie{skip: SkipMalformed}
	case version == 4:
		if addrSize, segSize := d.u8(), d.u8(); addrSize != 8 || segSize != 0 {
			return &cie{skip: SkipEncoding}
		}
	}
	c.codeAlign, c.dataAlign = d.uleb(), d.sleb()
	ra := uint64(0)
	if version == 1 {
		ra = uint64(d.u8())
	} else {
		ra = d.uleb()
	}
	if ra != uint64(s.arch.ra) || c.codeAlign == 0 || c.codeAlign > 16 || c.dataAlign < -16 || c.dataAlign > 16 {
		return &cie{skip: SkipReturn}
	}
	c.encoding = peAbsptr
	if len(augmentation) > 0 && augmentation[0] == 'z' {
		c.augmented = true
		augmentation = augmentation[1:]
		data := cursor{b: d.take(d.uleb())}
		c.skip = c.augment(augmentation, &data)
		if data.bad {
			c.skip = SkipMalformed
		}
	} else {
		c.skip = c.augment(augmentation, &d)
	}
	if d.bad {
		c.skip = SkipMalformed
	}
	if c.skip != "" {
		return c
	}
	p := program{arch: s.arch, cie: c}
	p.state.reset()
	c.initialSkip = p.run(d.b[d.at:], 0, 0, nil)
	c.initial = p.state
	return c
}

// augment reads the data of an augmentation string.
func (c *cie) augment(s []byte, d *cursor) Skip {
	for _, ch := range s {
		switch ch {
		case 'R':
			c.encoding = d.u8()
		case 'L':
			d.u8()
		case 'P':
			if !d.skipPointer(d.u8()) {
				return SkipEncoding
			}
		case 'S':
			c.signal = true
		case 'B', 'G': // return addresses are signed with the B key; memory tags
		default:
			return SkipAugmentation
		}
	}
	return ""
}

// fdeAt reads the FDE whose record is r.
func (s *section) fdeAt(r record) (fde, Skip) {
	if r.isCIE || r.size > maxRecord {
		return fde{}, SkipMalformed
	}
	c := s.cieAt(r.cie)
	if c.skip != "" {
		return fde{}, c.skip
	}
	b, ok := s.bytes(r.off, r.size)
	if !ok {
		return fde{}, SkipMalformed
	}
	d := cursor{b: b}
	enc := c.encoding
	if s.debug {
		enc = peAbsptr
	}
	start, ok := d.pointer(enc, s.addr+r.off)
	if !ok {
		return fde{}, SkipEncoding
	}
	size, ok := d.pointer(enc&0x0f, 0)
	if !ok {
		return fde{}, SkipEncoding
	}
	if c.augmented {
		d.take(d.uleb())
	}
	if d.bad || start+size < start {
		return fde{}, SkipMalformed
	}
	return fde{start: start, end: start + size, cie: c, off: r.off + uint64(d.at), size: uint64(d.left())}, ""
}

// cursor reads fields one after the other. Past the end it is bad, and reads zeros.
type cursor struct {
	b   []byte
	at  int
	bad bool
}

func (d *cursor) left() int { return len(d.b) - d.at }

func (d *cursor) take(n uint64) []byte {
	if n > uint64(d.left()) {
		d.at, d.bad = len(d.b), true
		return nil
	}
	d.at += int(n)
	return d.b[d.at-int(n) : d.at]
}

func (d *cursor) u8() byte {
	if d.at >= len(d.b) {
		d.bad = true
		return 0
	}
	d.at++
	return d.b[d.at-1]
}

func (d *cursor) u16() uint16 {
	if b := d.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (d *cursor) u32() uint32 {
	if b := d.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (d *cursor) u64() uint64 {
	if b := d.take(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

// uleb reads an unsigned LEB128. What does not fit into 64 bits is bad.
func (d *cursor) uleb() uint64 {
	var v uint64
	for shift := uint(0); shift < 70; shift += 7 {
		b := d.u8()
		if shift == 63 && b > 1 {
			break
		}
		v |= uint64(b&0x7f) << shift
		if b&0x80 == 0 {
			return v
		}
	}
	d.bad = true
	return 0
}

// sleb reads a signed LEB128.
func (d *cursor) sleb() int64 {
	var v int64
	for shift := uint(0); shift < 70; shift += 7 {
		b := d.u8()
		v |= int64(b&0x7f) << shift
		if b&0x80 == 0 {
			if shift < 57 && b&0x40 != 0 {
				v |= -1 << (shift + 7)
			}
			return v
		}
	}
	d.bad = true
	return 0
}

// cstring reads up to a NUL.
func (d *cursor) cstring() ([]byte, bool) {
	rest := d.b[d.at:]
	i := bytes.IndexByte(rest, 0)
	if i < 0 {
		d.at, d.bad = len(d.b), true
		return nil, false
	}
	d.at += i + 1
	return rest[:i], true
}

// pointer reads an encoded pointer at address at. It is false for encodings whose value
// only the process knows.
func (d *cursor) pointer(enc byte, at uint64) (uint64, bool) {
	var v uint64
	switch enc & 0x0f {
	case peAbsptr, peUdata8, peSdata8:
		v = d.u64()
	case peULEB:
		v = d.uleb()
	case peUdata2:
		v = uint64(d.u16())
	case peUdata4:
		v = uint64(d.u32())
	case peSLEB:
		v = uint64(d.sleb())
	case peSdata2:
		v = uint64(int16(d.u16()))
	case peSdata4:
		v = uint64(int32(d.u32()))
	default:
		return 0, false
	}
	switch enc &^ 0x0f {
	case 0:
	case pePCRel:
		v += at
	default:
		return 0, false
	}
	return v, true
}

// skipPointer skips an encoded pointer.
func (d *cursor) skipPointer(enc byte) bool {
	if enc == peOmit {
		return true
	}
	_, ok := d.pointer(enc&0x0f, 0)
	return ok && enc&0x70 != 0x50 // aligned
}
