// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/pclntab"
)

// padding is how far functions may be apart without a row that says that nothing is known
// of what lies between them.
const padding = 16

func sortedRegions(r []uint32) []uint32 {
	slices.Sort(r)
	return r
}

// piece is a range of addresses that one source describes.
type piece struct {
	start, end uint64
	source     source
	index      int32 // of builder.fdes or builder.functions
}

type source uint8

const (
	fromFDE = source(iota)
	fromGo
	fromCode // a signal trampoline
)

// part is what a region and an executable segment have in common.
type part struct {
	lo, hi uint64 // ELF virtual addresses
	bias   uint64 // from address to file offset
}

// builder makes the table of one region. Its buffers serve one region after the other.
type builder struct {
	file    *File
	base    uint64 // file offset
	rows    []row
	end     uint64 // offset in the region where what is known ends
	skipped map[Skip]int

	pieces    []piece
	fdes      []fde
	code      []byte // the instructions of fdes
	functions []pclntab.Func
	program   program
}

func (b *builder) reset(f *File, n uint32) {
	b.file, b.base, b.end, b.skipped = f, uint64(n)<<RegionShift, 0, map[Skip]int{}
	b.rows = b.rows[:0]
}

// row is a rule and the offset in the region from which on it holds.
type row struct {
	off  uint32
	rule Rule
}

// Region makes the table of region n of the file. What is wrong with the file's contents
// is in the result; an error is one of reading.
func (f *File) Region(n uint32) (Region, error) {
	b := &f.builder
	b.reset(f, n)
	var parts []part
	size := uint64(f.image.Size())
	for _, s := range f.image.Loads {
		if !s.Executable || s.Offset >= size {
			continue
		}
		lo, hi := max(s.Offset, b.base), min(s.Offset+s.Filesz, b.base+RegionSize, size)
		if lo < hi {
			bias := s.Offset - s.Vaddr
			parts = append(parts, part{lo - bias, hi - bias, bias})
		}
	}
	// Of two segments that map the same bytes, the first one counts.
	slices.SortStableFunc(parts, func(x, y part) int { return cmp.Compare(x.lo+x.bias, y.lo+y.bias) })
	done := uint64(0)
	for _, p := range parts {
		if start := p.lo + p.bias; start < done {
			if p.hi+p.bias <= done {
				continue
			}
			p.lo = done - p.bias
		}
		done = p.hi + p.bias
		b.part(p)
	}
	if err := f.failed(); err != nil {
		return Region{}, fmt.Errorf("read region %d: %w", n, err)
	}
	r := b.table()
	for s, count := range f.once {
		r.Skipped[s] += count
	}
	clear(f.once)
	return r, nil
}

// part adds the rows of one part.
func (b *builder) part(p part) {
	f := b.file
	b.fdes, b.code, b.functions = b.fdes[:0], b.code[:0], b.functions[:0]
	functions := b.golang(b.pieces[:0], p)
	pieces := functions
	if x := f.frameIndex(); x != nil {
		var ok bool
		pieces, ok = b.frames(pieces, x, f.frames, p)
		if !ok && f.sorted {
			f.distrust()
			pieces, _ = b.frames(functions, f.frameIndex(), f.frames, p)
		}
	}
	b.pieces = pieces
	pieces = arrange(pieces, p)
	if gap := uncovered(pieces, p); gap >= padding {
		if f.gotab == nil && f.own == nil && gap > (p.hi-p.lo)/2 {
			f.openSeparate()
		}
		if x := f.debugIndex(); x != nil {
			more, _ := b.frames(nil, x, f.own, p)
			pieces = fill(pieces, arrange(more, p))
		}
	}
	pieces = b.trampolines(pieces, p)
	for i := range pieces {
		b.piece(&pieces[i], p)
	}
}

// frames appends the FDEs that describe a part. It is false if the index is wrong.
func (b *builder) frames(pieces []piece, x index, s *section, p part) ([]piece, bool) {
	last := ^uint64(0)
	good := true
	s.read = 0
	ok := x.collect(p.lo, p.hi, func(start, off uint64) bool {
		if len(b.fdes) >= maxFDEs || len(b.code) >= maxCode {
			b.skipped[SkipLimit]++
			return false
		}
		r, ok := s.record(off)
		if !ok || r.isCIE || r.size == 0 {
			if s.read > maxRead {
				b.skipped[SkipLimit]++
				return false
			}
			good = false
			return false
		}
		f, skip := s.fdeAt(r)
		if skip != "" {
			b.skipped[skip]++
			return true
		}
		if f.start != start {
			good = false
			return false
		}
		if start == last {
			return true // the first one counts
		}
		last = start
		if f.end > p.lo {
			code, ok := s.bytes(f.off, f.size)
			if !ok {
				b.skipped[SkipMalformed]++
				return true
			}
			f.off = uint64(len(b.code))
			b.code = append(b.code, code...)
			pieces = append(pieces, piece{start: f.start, end: f.end, source: fromFDE, index: int32(len(b.fdes))})
			b.fdes = append(b.fdes, f)
		}
		return true
	})
	return pieces, ok && good
}

// arrange sorts pieces and cuts them so that none goes beyond the next one's start, as
// unwinders see them that search for the last start before an address.
func arrange(pieces []piece, p part) []piece {
	byStart := func(x, y piece) int { return cmp.Compare(x.start, y.start) }
	if !slices.IsSortedFunc(pieces, byStart) {
		slices.SortStableFunc(pieces, byStart)
	}
	out := pieces[:0]
	for i := range pieces {
		q := pieces[i]
		q.end = min(q.end, p.hi)
		if i+1 < len(pieces) {
			q.end = min(q.end, pieces[i+1].start)
		}
		if q.end > max(q.start, p.lo) {
			out = append(out, q)
		}
	}
	return out
}

// uncovered is how many bytes of a part no piece describes.
func uncovered(pieces []piece, p part) uint64 {
	n := p.hi - p.lo
	for i := range pieces {
		n -= pieces[i].end - max(pieces[i].start, p.lo)
	}
	return n
}

// fill adds of more what lies between the pieces.
func fill(pieces, more []piece) []piece {
	var out []piece
	i := 0
	for _, q := range more {
		for i < len(pieces) && pieces[i].start <= q.start {
			out = append(out, pieces[i])
			i++
		}
		if i > 0 && q.start < pieces[i-1].end {
			continue
		}
		if i < len(pieces) {
			q.end = min(q.end, pieces[i].start)
		}
		out = append(out, q)
	}
	return append(out, pieces[i:]...)
}

// trampolines finds the code that returns from signal handlers where no piece describes
// it. The handler returns to its first byte, for which the byte before is looked up.
func (b *builder) trampolines(pieces []piece, p part) []piece {
	var found []piece
	look := func(lo, hi uint64) {
		if hi-lo < padding { // functions are aligned; what is smaller is no function
			return
		}
		code := make([]byte, min(hi-lo+padding, uint64(b.file.image.Size())-(lo+p.bias)))
		if elffile.ReadAt(b.file.image, code, lo+p.bias) != nil {
			return
		}
		for _, want := range b.file.arch.trampolines {
			for at := 0; ; {
				i := bytes.Index(code[at:], want)
				if i < 0 {
					break
				}
				start := lo + uint64(at+i)
				if start > hi || len(found) >= 64 {
					break
				}
				at += i + len(want)
				found = append(found, piece{
					start: start - 1, end: min(start+uint64(len(want)), p.hi), source: fromCode,
				})
			}
		}
	}
	at := p.lo
	for i := range pieces {
		if pieces[i].start > at {
			look(at, pieces[i].start)
		}
		at = pieces[i].end
	}
	look(at, p.hi)
	if len(found) == 0 {
		return pieces
	}
	return arrange(append(pieces, found...), p)
}

// piece adds the rows of one piece.
func (b *builder) piece(q *piece, p part) {
	lo, hi := max(q.start, p.lo), q.end
	from := uint32(lo + p.bias - b.base)
	if uint64(from) >= b.end+padding {
		b.add(uint32(b.end), 0)
	}
	b.end = hi + p.bias - b.base
	b.add(from, 0) // in case the source has nothing for it
	add := func(addr uint64, r Rule) {
		if addr < hi {
			b.add(uint32(max(addr, lo)+p.bias-b.base), r)
		}
	}
	switch q.source {
	case fromCode:
		add(q.start, Rule(KindSignal))
	case fromGo:
		b.goRules(&b.functions[q.index], hi, add)
	case fromFDE:
		b.fdeRules(q, hi, add)
	}
}

func (b *builder) fdeRules(q *piece, hi uint64, add func(addr uint64, r Rule)) {
	f := &b.fdes[q.index]
	if f.cie.initialSkip != "" {
		b.skipped[f.cie.initialSkip]++
		return
	}
	prog := &b.program
	prog.arch, prog.cie, prog.state, prog.remembered = b.file.arch, f.cie, f.cie.initial, prog.remembered[:0]
	skip := prog.run(b.code[f.off:][:f.size], q.start, hi, func(addr uint64) {
		r, skip := prog.state.compile(prog.arch, f.cie.signal)
		if skip != "" {
			b.skipped[skip]++
		}
		add(addr, r)
	})
	if skip != "" {
		b.skipped[skip]++
		add(prog.loc, 0)
	}
}

// add appends a row; of several at one offset the last counts, and one that says what the
// one before says is left out.
func (b *builder) add(off uint32, r Rule) {
	for n := len(b.rows); n > 0 && b.rows[n-1].off >= off; n-- {
		b.rows = b.rows[:n-1]
	}
	if n := len(b.rows); n > 0 && b.rows[n-1].rule == r || n == 0 && r.Kind() == KindNone {
		return
	}
	b.rows = append(b.rows, row{off, r})
}

// table lays the rows out.
func (b *builder) table() Region {
	reg := Region{Skipped: b.skipped}
	if len(b.rows) == 0 {
		return reg
	}
	end := min(b.end, RegionSize)
	if n := len(b.rows) - 1; b.rows[n].rule == 0 {
		// Nothing is known from there on, which no row need say where a bucket ends.
		if end = uint64(b.rows[n].off); end%BucketSize == 0 {
			b.rows = b.rows[:n]
		}
	} else if end%BucketSize != 0 {
		b.add(uint32(end), 0)
	}
	first := b.rows[0].off >> BucketShift
	last := uint32((end + BucketSize - 1) >> BucketShift) // exclusive
	if first<<BucketShift != b.rows[0].off {
		b.rows = slices.Insert(b.rows, 0, row{first << BucketShift, 0})
	}
	reg.FirstBucket = uint16(first)
	wide := 0
	for _, w := range b.rows {
		if w.rule.Kind() == KindWide {
			wide++
		}
	}
	words := make([]uint16, last-first+1, int(last-first)+1+(len(b.rows)+wide)*rowWords)
	limit := (maxWords - len(words)) / rowWords
	bucket := first
	for i, w := range b.rows {
		for ; bucket < last && bucket<<BucketShift <= w.off; bucket++ {
			words[bucket-first] = uint16(reg.Rows)
		}
		// For this row, and for one that ends what can be told.
		if reg.Rows+3 > limit {
			b.skipped[SkipLimit] += len(b.rows) - i
			words = appendRow(words, w.off, 0)
			reg.Rows++
			break
		}
		if w.rule.Kind() == KindWide {
			words = appendRow(words, w.off, uint32(w.rule>>32))
			reg.Rows++
		}
		words = appendRow(words, w.off, uint32(w.rule))
		reg.Rows++
	}
	for ; bucket <= last; bucket++ {
		words[bucket-first] = uint16(reg.Rows)
	}
	reg.Words = words
	return reg
}

func appendRow(words []uint16, off, rule uint32) []uint16 {
	return append(words, uint16(off), uint16(rule), uint16(rule>>16))
}
