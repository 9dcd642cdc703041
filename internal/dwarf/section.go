// SPDX-License-Identifier: Apache-2.0

package dwarf

import (
	"bytes"
	"encoding/binary"

	"github.com/hostflame/hostflame/internal/elffile"
)

// Section is the bytes of one debug section, not compressed.
type Section struct {
	Content elffile.Content
	Off     uint64 // in Content
	Size    uint64
}

func (s *Section) read(p []byte, off uint64) error {
	if off > s.Size || uint64(len(p)) > s.Size-off {
		return elffile.Errorf(elffile.Malformed, "dwarf: %d bytes at %#x are beyond the end of a section of %#x", len(p), off, s.Size)
	}
	return elffile.ReadAt(s.Content, p, s.Off+off)
}

// cursor reads a section in sequence through a window, whose size is that of buf. Its error
// is sticky: after one it reads zeros, and whoever loops looks at err.
type cursor struct {
	sec  *Section
	b    []byte // the window
	i    int    // position in it
	base uint64 // offset of b[0] in the section
	end  uint64 // offset in the section where what is read ends
	buf  []byte // memory of windows
	err  error
}

// start makes the cursor read from off to end.
func (c *cursor) start(sec *Section, off, end uint64) {
	if c.sec != sec {
		c.sec, c.b = sec, nil
	}
	c.err = nil
	c.end = min(end, sec.Size)
	c.seek(off)
}

func (c *cursor) pos() uint64 { return c.base + uint64(c.i) }

// left is how many bytes there are until the end.
func (c *cursor) left() uint64 {
	if p := c.pos(); c.err == nil && p < c.end {
		return c.end - p
	}
	return 0
}

func (c *cursor) seek(off uint64) {
	if off >= c.base && off-c.base <= uint64(len(c.b)) {
		c.i = int(off - c.base)
		return
	}
	c.b, c.i, c.base = nil, 0, off
}

func (c *cursor) fail(format string, args ...any) {
	if c.err == nil {
		c.err = elffile.Errorf(elffile.Malformed, "dwarf: "+format, args...)
	}
	c.base, c.b, c.i, c.end = c.pos(), nil, 0, 0
}

// need makes n bytes available at the position.
func (c *cursor) need(n int) bool {
	if len(c.b)-c.i >= n {
		return true
	}
	if c.err != nil {
		return false
	}
	at := c.pos()
	if at > c.end || uint64(n) > c.end-at || n > len(c.buf) {
		c.fail("%d bytes at %#x, which end at %#x", n, at, c.end)
		return false
	}
	// The window can go on beyond end: another part of the section comes next.
	b := c.buf[:min(uint64(len(c.buf)), c.sec.Size-at)]
	if err := c.sec.read(b, at); err != nil {
		c.b, c.i, c.base, c.end, c.err = nil, 0, at, 0, err
		return false
	}
	c.b, c.i, c.base = b, 0, at
	return true
}

func (c *cursor) u8() uint8 {
	if c.i >= len(c.b) && !c.need(1) {
		return 0
	}
	v := c.b[c.i]
	c.i++
	return v
}

func (c *cursor) u16() uint16 {
	if !c.need(2) {
		return 0
	}
	v := binary.LittleEndian.Uint16(c.b[c.i:])
	c.i += 2
	return v
}

func (c *cursor) u32() uint32 {
	if !c.need(4) {
		return 0
	}
	v := binary.LittleEndian.Uint32(c.b[c.i:])
	c.i += 4
	return v
}

func (c *cursor) u64() uint64 {
	if !c.need(8) {
		return 0
	}
	v := binary.LittleEndian.Uint64(c.b[c.i:])
	c.i += 8
	return v
}

// uint reads an unsigned integer of 1, 2, 3, 4 or 8 bytes.
func (c *cursor) uint(size int) uint64 {
	switch size {
	case 1:
		return uint64(c.u8())
	case 2:
		return uint64(c.u16())
	case 3:
		v := uint64(c.u16())
		return v | uint64(c.u8())<<16
	case 4:
		return uint64(c.u32())
	case 8:
		return c.u64()
	}
	c.fail("integer of %d bytes", size)
	return 0
}

// offset reads an offset of a section.
func (c *cursor) offset(is64 bool) uint64 {
	if is64 {
		return c.u64()
	}
	return uint64(c.u32())
}

func (c *cursor) uleb() uint64 {
	if c.i < len(c.b) {
		if v := c.b[c.i]; v < 0x80 {
			c.i++
			return uint64(v)
		}
	}
	return c.ulebLong()
}

func (c *cursor) ulebLong() (v uint64) {
	for shift := uint(0); shift < 70; shift += 7 {
		b := c.u8()
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return v
		}
	}
	c.fail("LEB128 of more than 10 bytes")
	return 0
}

func (c *cursor) sleb() int64 {
	var v int64
	for shift := uint(0); shift < 70; shift += 7 {
		b := c.u8()
		v |= int64(b&0x7f) << shift
		if b < 0x80 {
			if shift+7 < 64 && b&0x40 != 0 {
				v |= -1 << (shift + 7)
			}
			return v
		}
	}
	c.fail("LEB128 of more than 10 bytes")
	return 0
}

func (c *cursor) skip(n uint64) {
	if n <= uint64(len(c.b)-c.i) {
		c.i += int(n)
		return
	}
	if n > c.left() {
		c.fail("%d bytes at %#x, which end at %#x", n, c.pos(), c.end)
		return
	}
	c.seek(c.pos() + n)
}

// skipString skips a string and its NUL.
func (c *cursor) skipString() {
	for c.need(1) {
		if n := bytes.IndexByte(c.b[c.i:], 0); n >= 0 {
			c.i += n + 1
			return
		}
		c.i = len(c.b)
	}
}

// str is the string at the position, without its NUL, cut at what fits into the window. It
// is valid until the next read.
func (c *cursor) str() []byte {
	if !c.need(1) {
		return nil
	}
	n := bytes.IndexByte(c.b[c.i:], 0)
	if n < 0 && c.i > 0 {
		c.b, c.base, c.i = nil, c.pos(), 0
		if !c.need(1) {
			return nil
		}
		n = bytes.IndexByte(c.b[c.i:], 0)
	}
	if n < 0 {
		s := c.b[c.i:]
		c.skipString()
		return s
	}
	s := c.b[c.i : c.i+n]
	c.i += n + 1
	return s
}
