// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"io"
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
	Dir        string   // for files that are in the way meanwhile
	Workers    int      // goroutines; 1
	Background bool     // they give way to all other threads
}

const (
	partBuffer = 256 << 10 // bytes of parts that are written at once
	maxBlocks  = 1 << 20   // of an index; each takes 24 bytes of memory at the end
	manyBlocks = 1 << 17   // more than honest files of a gigabyte have
)

// niceness of a background worker: it gets about a tenth of what others want.
const niceness = 10

// GiveWay lets the calling goroutine give way to all other threads from now on.
func GiveWay() {
	// The thread ends with the goroutine, as it stays locked.
	runtime.LockOSThread()
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, niceness)
}

// Build writes an index of what d says, in one pass over its units. What it takes has a
// limit whatever d is: 9 MB for the hashes of names, for each worker 12 MB for the packed
// line table of the unit that it is at, 8 MB for a part of its functions and as much for what
// it remembers, and in the end, instead of that, 24 bytes a block. A kernel takes a quarter of
// what one worker may. Units that are malformed are left out.
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
	names, err := newNames(o.Dir)
	if err != nil {
		return Stats{}, fmt.Errorf("make index: %w", err)
	}
	defer names.Close()
	blocks, err := newSpool(o.Dir)
	if err != nil {
		return Stats{}, fmt.Errorf("make index: %w", err)
	}
	defer blocks.Close()
	b := &builder{data: d, file: o.File, names: names, blocks: blocks, units: n}
	b.header = header{identity: o.Identity, base: d.Code[0].Low}
	b.off.Store(headerSize)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for range min(max(1, o.Workers), max(1, n)) {
		wg.Go(func() {
			if o.Background {
				GiveWay()
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
	blocks *spool // of blockSize bytes each
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
	var stop error // what ends the whole index
	e := &encoder{base: b.header.base}
	e.full = func() { stop = cmp.Or(stop, b.write(e), ctx.Err()) }
	var units, broken int
	var first error
	for ctx.Err() == nil {
		i := int(b.next.Add(1) - 1)
		if i >= b.units {
			break
		}
		whole := false
		err := r.Code(i, func(c *dwarf.Code) error {
			e.add(uint32(i), c)
			whole = c.Part == 0
			return stop
		})
		switch {
		case stop != nil:
			return stop
		case err != nil && elffile.ReasonIs(err, elffile.Changed):
			return err
		case err != nil:
			broken++
			first = cmp.Or(first, err)
		case whole:
			units++
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

// write writes what an encoder has, which is empty then.
func (b *builder) write(e *encoder) error {
	at := b.off.Add(int64(len(e.buf))) - int64(len(e.buf))
	e.place(at)
	defer func() { e.buf, e.blocks = e.buf[:0], e.blocks[:0] }()
	if at+int64(len(e.buf)) > maxFile/2 {
		return elffile.Errorf(elffile.TooLarge, "index of more than %d bytes", at)
	}
	if _, err := b.file.WriteAt(e.buf, at); err != nil {
		return fmt.Errorf("write index: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, x := range e.blocks {
		b.blocks.buf = x.append(b.blocks.buf)
		b.blocks.appended(blockSize)
	}
	if b.blocks.size > maxBlocks*blockSize {
		return elffile.Errorf(elffile.TooLarge, "index of more than %d blocks", maxBlocks)
	}
	return nil
}

// finish writes the directory, the tables and the header.
func (b *builder) finish() error {
	if b.names.err != nil {
		return b.names.err
	}
	b.names.forget()
	if b.blocks.size > manyBlocks*blockSize {
		runtime.GC() // what the workers had makes room
	}
	blocks, err := b.sortedBlocks()
	if err != nil {
		return err
	}
	h := &b.header
	h.directory, h.pieces = uint64(b.off.Load()), 0
	b.directory(blocks, func(uint64, uint32) { h.pieces++ })
	h.functions, h.files = uint64(b.names.functions), uint64(b.names.files)
	h.functionTable = h.directory + 8*h.pieces
	h.strings = h.functionTable + 8*h.functions + 4*h.files
	h.size = h.strings + uint64(b.names.text.size)
	if h.size > maxFile {
		return elffile.Errorf(elffile.TooLarge, "index of %d bytes", h.size)
	}
	if _, err := b.file.Seek(b.off.Load(), 0); err != nil {
		return err
	}
	w := bufio.NewWriterSize(b.file, 64<<10)
	put := func(v uint32) { w.Write(binary.LittleEndian.AppendUint32(w.AvailableBuffer(), v)) } // its error is sticky
	b.directory(blocks, func(addr uint64, _ uint32) { put(uint32(addr - h.base)) })
	b.directory(blocks, func(_ uint64, ref uint32) { put(ref) })
	if err := b.names.write(w); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if _, err := b.file.WriteAt(h.encode(), 0); err != nil {
		return err
	}
	if h.crc, err = checksum(b.file, int64(h.size)); err != nil {
		return err
	}
	_, err = b.file.WriteAt(h.encode(), 0)
	b.stats.Pieces, b.stats.Functions, b.stats.Files = int(h.pieces), int(h.functions), int(h.files)
	b.stats.Bytes = int64(h.size)
	return err
}

// sortedBlocks are all blocks by their first address.
func (b *builder) sortedBlocks() ([]overlap.Span, error) {
	r, err := b.blocks.reader()
	if err != nil {
		return nil, err
	}
	in := bufio.NewReaderSize(r, spoolBuffer)
	blocks := make([]overlap.Span, b.blocks.size/blockSize)
	var buf [blockSize]byte
	for i := range blocks {
		if _, err := io.ReadFull(in, buf[:]); err != nil {
			return nil, err
		}
		blocks[i] = decodeBlock(buf[:])
	}
	slices.SortFunc(blocks, func(x, y overlap.Span) int { return cmp.Compare(x.Start, y.Start) })
	return blocks, nil
}

// directory calls add for the pieces of code from low to high addresses: where they start,
// and the block that says what is there, 0 if none does.
func (b *builder) directory(blocks []overlap.Span, add func(addr uint64, ref uint32)) {
	end := b.header.base
	overlap.Flatten(blocks, func(s *overlap.Span, low, high uint64) {
		if low != end {
			add(end, 0)
		}
		add(low, s.Name)
		end = high
	})
	add(end, 0)
}
