// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"container/list"
	"errors"
	"io/fs"
	"os"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/symbolizer"
)

// mappingSource is where the process table learns what processes have mapped. procfs
// reads it when it is asked; a source that is told by the kernel fits here as well.
type mappingSource interface {
	// mappings returns the executable mappings, by address, of the program image that s
	// was taken in. The errors are errExited, errReplaced, or why they can not be read.
	mappings(s *bpf.Sample) ([]vma, error)
	// open opens the file of a mapping. It may be called from any goroutine.
	open(pid PID, v vma) (*os.File, error)
}

// imageID names one program image: a process between two calls of execve.
type imageID struct {
	pid         PID
	start, exec uint64
}

// process is one program image and what is known of its mappings. A new read makes a
// new generation.
type process struct {
	id         imageID
	comm       bpf.Comm
	areas      []area             // by address
	sampled    map[bpf.Area]*area // those that samples have told of
	absence    *absence
	generation int
	next       time.Time     // when the mappings may be read again
	backoff    time.Duration // since reading them did not help

	perfMap   *symbolizer.PerfMap
	perfMapAt time.Time // when it was asked for
}

// area is a mapping of a process and, once a sample fell into it, what it is a mapping of.
type area struct {
	vma
	mapping *Mapping
	slide   uint64    // address in the process - address in the mapping
	retry   time.Time // the file could not be opened; when to try again
}

// absence is why no mapping of a process is known.
type absence struct {
	frame   *Mapping
	outcome outcome
}

var (
	absenceExited    = &absence{frameExited, outcomeExited}
	absenceReplaced  = &absence{frameReplaced, outcomeReplaced}
	absenceForbidden = &absence{frameForbidden, outcomeNoPermission}
)

const (
	// minReadInterval and maxReadInterval bound how often the mappings of one process are
	// read; in between a process gets at most 1/readShare of the time.
	minReadInterval = 200 * time.Millisecond
	maxReadInterval = 30 * time.Second
	readShare       = 100
	// retryInterval is how long a file that did not open is left alone.
	retryInterval = 10 * time.Second
	// perfMapInterval is how long a perf map is held without asking for it again: the
	// symbolizer gives up those that were not used for two minutes.
	perfMapInterval = time.Minute
)

// processTable knows the processes that were sampled lately. It is for one goroutine.
type processTable struct {
	source  mappingSource
	symbols *symbolizer.Symbolizer
	files   *fileTable
	now     func() time.Time
	limit   int
	byID    map[imageID]*list.Element // of *process
	recent  *list.List                // the one that was sampled last in front
	areas   []*area                   // of the sample that is looked at
	// Since they were last cleared there was a new image, or something whose names nobody has
	// looked for yet: a file in an image, or JIT code.
	grown, unnamed bool
}

func newProcessTable(source mappingSource, symbols *symbolizer.Symbolizer, limit int) *processTable {
	return &processTable{
		source:  source,
		symbols: symbols,
		files:   newFileTable(symbols),
		now:     time.Now,
		limit:   limit,
		byID:    map[imageID]*list.Element{},
		recent:  list.New(),
	}
}

// lookup returns the program image that s was taken in. It reads nothing. An image that
// was not sampled for a while may be forgotten and made anew.
func (t *processTable) lookup(s *bpf.Sample) *process {
	id := imageID{PID(s.PID), s.Start, s.ExecID}
	if el := t.byID[id]; el != nil {
		t.recent.MoveToFront(el)
		return el.Value.(*process)
	}
	p := &process{id: id, comm: s.Comm}
	t.byID[id] = t.recent.PushFront(p)
	t.grown = true
	for t.recent.Len() > t.limit {
		delete(t.byID, t.recent.Remove(t.recent.Back()).(*process).id)
	}
	return p
}

// stale tells whether complete could come to another stack for tr than it did.
func (t *processTable) stale(p *process, tr *trace) bool {
	return p.generation != tr.generation || !tr.whole && !t.now().Before(p.next)
}

// update reads the mappings of p where an address of s lies in none of them, unless that
// was done just before.
func (t *processTable) update(p *process, s *bpf.Sample) {
	if t.misses(p, s) {
		t.read(p, s)
	}
}

// read reads the mappings of p, unless that was done just before.
func (t *processTable) read(p *process, s *bpf.Sample) {
	now := t.now()
	if now.Before(p.next) {
		return
	}
	vmas, err := t.source.mappings(s)
	took := t.now().Sub(now)
	p.next = now.Add(max(minReadInterval, readShare*took))
	if err != nil {
		if p.generation == 0 {
			p.absence = absenceOf(err)
		}
		return
	}
	p.generation++
	p.absence = nil
	p.areas = mergeAreas(p.areas, vmas)
	if !t.misses(p, s) {
		p.backoff = 0
		return
	}
	p.backoff = min(max(2*p.backoff, 2*minReadInterval), maxReadInterval)
	p.next = now.Add(max(p.backoff, readShare*took))
}

// unfinished is s with what is known of the code of its process, read now if nothing is:
// it may be gone when the stack is finished.
func (t *processTable) unfinished(s *bpf.Sample) *unfinished {
	p := t.lookup(s)
	if p.generation == 0 {
		t.read(p, s)
	} else {
		t.update(p, s)
	}
	u := &unfinished{sample: s, image: p.id, rest: p.areas}
	for _, a := range s.Areas {
		sa := sampledArea{Area: a}
		if t.areaOf(p, a) != nil {
			sa.program = t.files.find(a.File)
		}
		u.areas = append(u.areas, sa)
	}
	return u
}

func absenceOf(err error) *absence {
	switch {
	case errors.Is(err, errReplaced):
		return absenceReplaced
	case errors.Is(err, fs.ErrPermission):
		return absenceForbidden
	}
	return absenceExited
}

// mergeAreas is vmas with what was found out about those that are as they were.
func mergeAreas(old []area, vmas []vma) []area {
	areas := make([]area, len(vmas))
	for i, v := range vmas {
		areas[i].vma = v
		j := sort.Search(len(old), func(j int) bool { return old[j].start >= v.start })
		if j < len(old) && old[j].vma == v {
			areas[i] = old[j]
		}
	}
	return areas
}

// misses tells whether something that s says of its user stack is not known yet: what one
// of its areas is a mapping of, or, of an address in none, the mapping.
func (t *processTable) misses(p *process, s *bpf.Sample) bool {
	if slices.Contains(t.areasOf(p, s), nil) {
		return true
	}
	return slices.ContainsFunc(s.User, func(addr uint64) bool {
		const lowest = 4096
		addr &^= bpf.ExactAddr
		return addr >= lowest && addr < kernelHalf && areaIn(s, addr) < 0 && p.find(addr) == nil
	})
}

// areaIn returns which area of s addr, which can be a return address, is in; -1 if in none.
func areaIn(s *bpf.Sample, addr uint64) int {
	for i := range s.Areas {
		if a := &s.Areas[i]; addr >= a.Start && addr <= a.End {
			return i
		}
	}
	return -1
}

// areasOf returns areaOf for each area of s, until the next call.
func (t *processTable) areasOf(p *process, s *bpf.Sample) []*area {
	t.areas = t.areas[:0]
	for _, id := range s.Areas {
		t.areas = append(t.areas, t.areaOf(p, id))
	}
	return t.areas
}

// find returns the mapping that addr is in, nil if there is none. The end of a mapping is
// taken to be in it, as a return address can be.
func (p *process) find(addr uint64) *area {
	i := sort.Search(len(p.areas), func(i int) bool { return p.areas[i].end >= addr })
	// addr may be the end of one and the start of the next.
	if i+1 < len(p.areas) && p.areas[i+1].start <= addr {
		i++
	}
	if i == len(p.areas) || p.areas[i].start > addr {
		return nil
	}
	return &p.areas[i]
}

// location returns where addr, of a frame of s, is, once the file of its mapping was looked
// at. What the sample itself says of its mappings, areas, holds before what is known of the
// process.
func (t *processTable) location(p *process, s *bpf.Sample, areas []*area, addr Addr) (Location, bool) {
	var a *area
	if i := areaIn(s, uint64(addr)); i >= 0 && uint64(addr) < s.Areas[i].End {
		if a = areas[i]; a == nil {
			return Location{}, false
		}
	} else {
		if a = p.find(uint64(addr)); a == nil || uint64(addr) >= a.end {
			return Location{}, false
		}
		switch {
		case a.mapping == nil,
			!a.retry.IsZero() && !t.now().Before(a.retry),
			a.mapping.perfMap != nil && a.mapping.perfMap != t.perfMap(p):
			t.resolve(p, a)
		}
	}
	mapping, slide := a.mapping, a.slide
	t.unnamed = t.unnamed || mapping.perfMap != nil
	// One area can span several segments of its file.
	if o := mapping.object; o != nil && (uint64(addr)-slide < mapping.Start || uint64(addr)-slide >= mapping.Limit) {
		if m, s, ok := segmentMapping(o, mapping.File, uint64(addr), uint64(addr)-a.start+a.offset); ok {
			mapping, slide = m, s
		}
	}
	return Location{mapping, addr - Addr(slide)}, true
}

// resolve finds out what an area is a mapping of.
func (t *processTable) resolve(p *process, a *area) {
	a.retry = time.Time{}
	file := strings.TrimSuffix(a.path, deletedSuffix)
	switch {
	case a.path == "[vdso]":
		// That of a 32-bit process is another one.
		if a.start >= 1<<32 {
			if o, err := t.symbols.VDSO(); err == nil && a.useObject(o, file) {
				return
			}
		}
		a.useRaw(file)
		return
	case a.inode == 0:
		if file == "" || strings.HasPrefix(file, "[anon") {
			file = "[anon]"
		}
		a.usePerfMap(t.perfMap(p), file)
		return
	}
	f, err := openFile(t.symbols, t.source, p.id.pid, a.vma)
	if err != nil {
		a.useRaw(file)
		a.retry = t.now().Add(retryInterval)
		return
	}
	t.use(p, a, f)
}

func (t *processTable) perfMap(p *process) *symbolizer.PerfMap {
	if now := t.now(); p.perfMap == nil || now.Sub(p.perfMapAt) >= perfMapInterval {
		p.perfMap, p.perfMapAt = t.symbols.PerfMap(uint32(p.id.pid)), now
	}
	return p.perfMap
}

// useObject makes a a mapping of the segment of o that it begins in.
func (a *area) useObject(o *symbolizer.Object, file string) bool {
	m, slide, ok := segmentMapping(o, file, a.start, a.offset)
	if !ok {
		// The mapping begins on a page boundary, before the segment.
		for _, s := range o.Segments() {
			if s.Executable && s.Offset > a.offset && s.Offset-a.offset < a.end-a.start {
				m, slide, ok = segmentMapping(o, file, a.start+s.Offset-a.offset, s.Offset)
				break
			}
		}
	}
	if ok {
		a.mapping, a.slide = m, slide
	}
	return ok
}

// segmentMapping is the mapping of the executable segment of o that has the file offset,
// and the difference between an address in the process and in that mapping.
func segmentMapping(o *symbolizer.Object, file string, addr, offset uint64) (m *Mapping, slide uint64, ok bool) {
	vaddr, ok := o.Address(offset)
	if !ok {
		return nil, 0, false
	}
	for _, s := range o.Segments() {
		if s.Executable && vaddr >= s.Vaddr && vaddr-s.Vaddr < s.Memsz {
			return &Mapping{
				Start: s.Vaddr, Limit: s.Vaddr + s.Memsz, Offset: s.Offset,
				File: file, BuildID: o.BuildID(), object: o,
			}, addr - vaddr, true
		}
	}
	return nil, 0, false
}

// useRaw makes a a mapping of a file of which nothing is known; addresses are its offsets.
func (a *area) useRaw(file string) {
	a.mapping = &Mapping{Start: a.offset, Limit: a.offset + a.end - a.start, Offset: a.offset, File: file}
	a.slide = a.start - a.offset
}

// usePerfMap makes a a mapping of code that the process made; addresses are as they are.
func (a *area) usePerfMap(m *symbolizer.PerfMap, file string) {
	a.mapping = &Mapping{Start: a.start, Limit: a.end, File: file, perfMap: m}
	a.slide = 0
}
