// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/dwarf"
	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/overlap"
)

// Stats is what a building did.
type Stats struct {
	Units       int   // read
	BrokenUnits int   // left out, as they could not be read
	FirstBroken error // of them
	Pieces      int   // of code
	Functions   int
	Files       int
	Bytes       int64 // of the index
}

// Options are where an index goes, and how it is made.
type Options struct {
	Identity   Identity
	File       *os.File // empty, for the index
	Spool      *os.File // empty, for what is in the way meanwhile
	Workers    int      // goroutines; 1
	Background bool     // they give way to all other threads
}

const partBuffer = 256 << 10 // bytes of parts that are written at once

// niceness of a background worker: it gets about a tenth of what others want.
const niceness = 10

// Build writes an index of what d says, in one pass over its units. It takes a few
// megabytes and some for each worker, beside the names' hashes and what the largest unit's
// line table takes. Units that are malformed are left out.
func Build(ctx context.Context, d *dwarf.Data, o Options) (Stats, error) {
	n, err := d.ReadUnits()
	if err != nil {
		return Stats{}, err
	}
	if d.Alt != nil {
		if _, err := d.Alt.ReadUnits(); err != nil {
			return Stats{}, err
		}
	}
	if len(d.Code) == 0 {
		return Stats{}, elffile.Errorf(elffile.Missing, "index: no code")
	}
	b := &builder{data: d, file: o.File, names: newNames(o.Spool), units: n}
	b.header = header{identity: o.Identity, base: d.Code[0].Low}
	b.off.Store(headerSize)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for range min(max(1, o.Workers), max(1, n)) {
		wg.Go(func() {
			if o.Background {
				// The thread ends with the goroutine, as it stays locked.
				runtime.LockOSThread()
				_ = unix.Setpriority(unix.PRIO_PROCESS, 0, niceness)
			}
			if err := b.guarded(ctx); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	if err := context.Cause(ctx); err != nil {
		return b.stats, err
	}
	if err := b.finish(); err != nil {
		return b.stats, fmt.Errorf("write index: %w", err)
	}
	return b.stats, nil
}

type builder struct {
	data   *dwarf.Data
	file   *os.File
	names  *names
	header header
	units  int
	next   atomic.Int64 // unit
	off    atomic.Int64 // where the next parts go

	mu     sync.Mutex
	blocks []block
	stats  Stats
}

// guarded is work, whose panics are errors: what is read may be hostile, and bugs that
// fuzzing has not found yet are to end the index, not the agent.
func (b *builder) guarded(ctx context.Context) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = elffile.Errorf(elffile.Malformed, "index: panic: %v", r)
		}
	}()
	return b.work(ctx)
}

// work encodes units until there are no more.
func (b *builder) work(ctx context.Context) error {
	r := b.data.NewReader(b.names)
	e := &encoder{base: b.header.base}
	var units, broken int
	var first error
	for ctx.Err() == nil {
		i := int(b.next.Add(1) - 1)
		if i >= b.units {
			break
		}
		c, err := r.Code(i)
		switch {
		case err != nil && elffile.ReasonIs(err, elffile.Changed):
			return err
		case err != nil:
			broken++
			first = cmp.Or(first, err)
		case c != nil:
			units++
			e.add(uint32(i), c)
		}
		if len(e.buf) >= partBuffer {
			if err := b.write(e); err != nil {
				return err
			}
		}
	}
	if err := b.write(e); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stats.Units += units
	b.stats.BrokenUnits += broken
	b.stats.FirstBroken = cmp.Or(b.stats.FirstBroken, first)
	return nil
}

// write writes what an encoder has.
func (b *builder) write(e *encoder) error {
	at := b.off.Add(int64(len(e.buf))) - int64(len(e.buf))
	if at+int64(len(e.buf)) > maxFile/2 {
		return elffile.Errorf(elffile.TooLarge, "index of more than %d bytes", at)
	}
	if _, err := b.file.WriteAt(e.buf, at); err != nil {
		return fmt.Errorf("write index: %w", err)
	}
	for i := range e.blocks {
		e.blocks[i].at += uint32(at)
	}
	b.mu.Lock()
	b.blocks = append(b.blocks, e.blocks...)
	b.mu.Unlock()
	e.buf, e.blocks = e.buf[:0], e.blocks[:0]
	return nil
}

// finish writes the directory, the tables and the header.
func (b *builder) finish() error {
	addrs, refs := b.directory()
	h := &b.header
	h.directory, h.pieces = uint64(b.off.Load()), uint64(len(addrs))
	h.functions, h.files = uint64(len(b.names.functions)), uint64(len(b.names.files))
	h.functionTable = h.directory + 8*h.pieces
	h.strings = h.functionTable + 8*h.functions + 4*h.files
	h.size = h.strings + b.names.size
	if h.size > maxFile {
		return elffile.Errorf(elffile.TooLarge, "index of %d bytes", h.size)
	}
	if _, err := b.file.Seek(b.off.Load(), 0); err != nil {
		return err
	}
	w := bufio.NewWriterSize(b.file, 64<<10)
	var word [4]byte
	for _, part := range [][]uint32{addrs, refs} {
		for _, v := range part {
			binary.LittleEndian.PutUint32(word[:], v)
			w.Write(word[:]) // the error is sticky
		}
	}
	if err := b.names.write(w); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if _, err := b.file.WriteAt(h.encode(), 0); err != nil {
		return err
	}
	var err error
	if h.crc, err = checksum(b.file, int64(h.size)); err != nil {
		return err
	}
	_, err = b.file.WriteAt(h.encode(), 0)
	b.stats.Pieces, b.stats.Functions, b.stats.Files = len(addrs), len(b.names.functions), len(b.names.files)
	b.stats.Bytes = int64(h.size)
	return err
}

// directory sorts the blocks. Where they overlap the first unit counts.
func (b *builder) directory() (addrs, refs []uint32) {
	slices.SortFunc(b.blocks, func(x, y block) int {
		return cmp.Or(cmp.Compare(y.unit, x.unit), cmp.Compare(x.at, y.at))
	})
	spans := make([]overlap.Span, len(b.blocks))
	for i, x := range b.blocks {
		spans[i] = overlap.Span{Start: x.low, End: x.high, Name: x.at, Prio: uint32(i)}
	}
	b.blocks = nil
	slices.SortFunc(spans, func(x, y overlap.Span) int { return cmp.Compare(x.Start, y.Start) })
	addrs, refs = make([]uint32, 0, len(spans)+1), make([]uint32, 0, len(spans)+1)
	add := func(addr uint64, ref uint32) {
		addrs, refs = append(addrs, uint32(addr-b.header.base)), append(refs, ref)
	}
	end := b.header.base
	overlap.Flatten(spans, func(s *overlap.Span, low, high uint64) {
		if low != end {
			add(end, 0)
		}
		add(low, s.Name)
		end = high
	})
	add(end, 0)
	return addrs, refs
}
