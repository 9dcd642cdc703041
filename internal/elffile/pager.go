// SPDX-License-Identifier: Apache-2.0

package elffile

import (
	"bytes"
	"encoding/binary"
)

const (
	pageSize  = 4 << 10
	pageSlots = 32
)

// Pager reads an image by pages and keeps the last of them, at most 128 KiB, so that a
// table that is walked again and again costs neither memory nor a system call a step.
// What it returns is valid until the next call. It is for one goroutine.
type Pager struct {
	Content Content
	slots   [pageSlots]*page
	scratch []byte
	pages   int
}

type page struct {
	number uint64
	n      int // bytes in use
	data   [pageSize]byte
}

// Bytes is the memory that the Pager holds.
func (p *Pager) Bytes() int64 { return int64(p.pages)*(pageSize+16) + int64(len(p.slots)*8) }

func (p *Pager) page(number uint64) (*page, error) {
	slot := &p.slots[number%pageSlots]
	if *slot != nil && (*slot).number == number {
		return *slot, nil
	}
	size := uint64(p.Content.Size())
	off := number * pageSize
	if off >= size {
		return nil, Errorf(Malformed, "page at %#x is beyond the end, %#x", off, size)
	}
	pg := *slot
	if pg == nil {
		pg = new(page)
		p.pages++
	}
	*slot = nil // in case the read fails half way
	pg.number, pg.n = number, int(min(pageSize, size-off))
	if err := ReadAt(p.Content, pg.data[:pg.n], off); err != nil {
		p.pages--
		return nil, err
	}
	*slot = pg
	return pg, nil
}

// Chunk is what the page that holds off has from there on, at least a byte.
func (p *Pager) Chunk(off uint64) ([]byte, error) {
	pg, err := p.page(off / pageSize)
	if err != nil {
		return nil, err
	}
	if i := int(off % pageSize); i < pg.n {
		return pg.data[i:pg.n], nil
	}
	return nil, Errorf(Malformed, "offset %#x is beyond the end", off)
}

// Slice is the n bytes at off.
func (p *Pager) Slice(off uint64, n int) ([]byte, error) {
	b, err := p.Chunk(off)
	if err != nil {
		return nil, err
	}
	if len(b) >= n {
		return b[:n], nil
	}
	p.scratch = p.scratch[:0]
	for {
		p.scratch = append(p.scratch, b[:min(len(b), n-len(p.scratch))]...)
		if len(p.scratch) == n {
			return p.scratch, nil
		}
		if b, err = p.Chunk(off + uint64(len(p.scratch))); err != nil {
			return nil, err
		}
	}
}

func (p *Pager) U32(off uint64) (uint32, error) {
	b, err := p.Slice(off, 4)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(b), nil
}

// CString is the string at off, which ends with a NUL, at end or after limit bytes.
func (p *Pager) CString(off, end uint64, limit int) (string, error) {
	p.scratch = p.scratch[:0]
	for off < end && len(p.scratch) < limit {
		b, err := p.Chunk(off)
		if err != nil {
			return "", err
		}
		b = b[:min(uint64(len(b)), end-off, uint64(limit-len(p.scratch)))]
		i := bytes.IndexByte(b, 0)
		if i >= 0 && len(p.scratch) == 0 {
			return string(b[:i]), nil
		}
		if i >= 0 {
			return string(append(p.scratch, b[:i]...)), nil
		}
		p.scratch = append(p.scratch, b...)
		off += uint64(len(b))
	}
	return string(p.scratch), nil
}
