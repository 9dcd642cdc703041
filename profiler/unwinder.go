// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"debug/elf"
	"errors"
	"io"
	"log/slog"
	"runtime"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/profiler/unwind"
	"github.com/hostflame/hostflame/symbolizer"
)

// unwinder makes the unwind tables that samples were found to lack, in the background, and
// finishes the stacks of those samples in user space by the same tables. What it hands back
// are ordinary samples.
type unwinder struct {
	tables  *bpf.Tables
	symbols *symbolizer.Symbolizer
	source  mappingSource
	cache   *unwind.Cache // nil: none
	log     *slog.Logger
	work    chan *unfinished
	hurry   atomic.Bool // deliver what is queued as it is

	mu      sync.Mutex
	done    []*bpf.Sample
	pending int           // handed in and not yet collected
	idle    chan struct{} // closed when nothing is left to do; nil while nobody waits
	stats   UnwindStats

	// The rest is of the goroutine that works.
	walker *unwind.Walker
	files  generations[*symbolizer.Object, *unwind.File]
	made   generations[madeKey, *unwind.Region]
	opened generations[openedKey, openedFile]
	failed map[bpf.TableKey]failure

	cacheFailing bool
}

// failure is that a file could not be opened. The next process of it can do better, but not
// every sample of one that is closed to us is to come with its stack: after some tries an
// empty table stands in, for a while.
type failure struct {
	tries int
	since time.Time
}

// maxOpenTries is how many samples of a file that does not open come with their stack.
const maxOpenTries = 20

type madeKey struct {
	object *symbolizer.Object
	region uint32
}

type openedKey struct {
	image imageID
	vma   vma
}

// openedFile is what the file of a mapping is, or when to try again to open it.
type openedFile struct {
	program *program // nil: it did not open
	retry   time.Time
}

// unfinished is a sample whose walk is to go on, and the code of its process.
type unfinished struct {
	sample *bpf.Sample
	image  imageID
	areas  []sampledArea // that the sample itself tells of
	rest   []area        // by address; only what is read-only of them
}

type sampledArea struct {
	bpf.Area
	program *program // nil: not known
}

const (
	// maxUnfinished bounds the samples that wait, some 20 KB each.
	maxUnfinished = 256
	submitWithin  = 50 * time.Millisecond
	// maxUnwindFiles and maxMadeRegions bound each of two generations; a region is some 30 KB.
	maxUnwindFiles = 128
	maxMadeRegions = 128
	// maxOpenedFiles likewise.
	maxOpenedFiles = 512
	// smallFile is how many regions a file may have for all of them to be made at once.
	smallFile = 16
)

func newUnwinder(cfg *Config, source mappingSource) (*unwinder, error) {
	machine := elf.EM_X86_64
	if runtime.GOARCH == "arm64" {
		machine = elf.EM_AARCH64
	}
	walker, err := unwind.NewWalker(machine, nil)
	if err != nil {
		return nil, err
	}
	walker.AddressMask = bpf.AddressMask()
	u := &unwinder{
		walker: walker,
		tables: cfg.Tables, cache: cfg.TableCache, symbols: cfg.Symbolizer, source: source, log: cfg.Logger,
		work:   make(chan *unfinished, maxUnfinished),
		failed: map[bpf.TableKey]failure{},
		stats:  UnwindStats{Skipped: map[string]uint64{}},
	}
	u.files.limit, u.made.limit, u.opened.limit = maxUnwindFiles, maxMadeRegions, maxOpenedFiles
	return u, nil
}

// submit hands in a sample, which is copied. It returns false where there is no room, after
// some waiting for it: tables are made in no time, mostly.
func (u *unwinder) submit(job *unfinished) bool {
	job.sample = job.sample.Clone()
	u.mu.Lock()
	u.pending++
	u.mu.Unlock()
	select {
	case u.work <- job:
		return true
	default:
	}
	t := time.NewTimer(submitWithin)
	defer t.Stop()
	select {
	case u.work <- job:
		return true
	case <-t.C:
		u.mu.Lock()
		u.pending--
		u.mu.Unlock()
		return false
	}
}

// collect returns the samples that are finished.
func (u *unwinder) collect() []*bpf.Sample {
	u.mu.Lock()
	defer u.mu.Unlock()
	done := u.done
	u.done = nil
	u.pending -= len(done)
	return done
}

// busy tells whether there are samples to finish or to collect.
func (u *unwinder) busy() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.pending > 0
}

// settle waits until all samples are finished, but not longer than d.
func (u *unwinder) settle(d time.Duration) {
	u.mu.Lock()
	if u.pending == len(u.done) {
		u.mu.Unlock()
		return
	}
	idle := make(chan struct{})
	u.idle = idle
	u.mu.Unlock()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-idle:
	case <-t.C:
	}
}

// run works until work is closed.
func (u *unwinder) run() {
	retry := time.NewTicker(retryInterval)
	defer retry.Stop()
	for {
		select {
		case job, ok := <-u.work:
			if !ok {
				return
			}
			if !u.hurry.Load() {
				u.finish(job)
			}
			u.mu.Lock()
			u.stats.Finished++
			u.done = append(u.done, job.sample)
			if u.idle != nil && u.pending == len(u.done) {
				close(u.idle)
				u.idle = nil
			}
			u.mu.Unlock()
		case now := <-retry.C:
			for key, f := range u.failed {
				if now.Sub(f.since) >= retryInterval {
					u.tables.Delete(key)
					delete(u.failed, key)
				}
			}
		}
	}
}

// finish makes the tables that the stack of job needs, and the rest of the stack.
func (u *unwinder) finish(job *unfinished) {
	s := job.sample
	u.walker.Lookup = func(addr uint64) (*unwind.Region, uint64, bool) { return u.lookup(job, addr) }
	// The last frame is the one that the walk stopped at.
	stopped := max(len(s.User)-1, 0)
	s.User, s.UserOutcome = u.walker.Walk(s.User[:stopped], s.Stop, stopped, s.Stack, s.StackStart)
	s.Stack = nil
}

// lookup finds the table for an address of the process of job.
func (u *unwinder) lookup(job *unfinished, addr uint64) (r *unwind.Region, offset uint64, ok bool) {
	for i := range job.areas {
		if a := &job.areas[i]; addr >= a.Start && addr < a.End {
			offset = addr - a.Start + a.Offset
			return u.region(job.image.pid, a.program, a.File, bpf.RegionOf(offset)), offset, true
		}
	}
	i := sort.Search(len(job.rest), func(i int) bool { return job.rest[i].end > addr })
	if i == len(job.rest) || job.rest[i].start > addr {
		return nil, 0, false
	}
	v := &job.rest[i].vma
	offset = addr - v.start + v.offset
	if v.inode == 0 {
		return nil, offset, true
	}
	p := u.open(job.image, v)
	if p == nil {
		return nil, offset, true
	}
	return u.region(job.image.pid, p, fileOf(p.object), bpf.RegionOf(offset)), offset, true
}

// open returns what a mapping of an image is of, nil where its file does not open.
func (u *unwinder) open(image imageID, v *vma) *program {
	key := openedKey{image, *v}
	f, ok := u.opened.get(key)
	if ok && (f.program != nil || time.Now().Before(f.retry)) {
		return f.program
	}
	p, err := openFile(u.symbols, u.source, image.pid, *v)
	if err != nil {
		p = nil
	}
	u.opened.put(key, openedFile{p, time.Now().Add(retryInterval)})
	return p
}

// fileOf is what the kernel calls the file of an object, on most file systems.
func fileOf(o *symbolizer.Object) bpf.File {
	if o == nil {
		return bpf.File{}
	}
	dev, inode, mtime, ok := o.Stat()
	if !ok {
		return bpf.VDSO
	}
	return bpf.File{Inode: inode, MtimeNanos: uint64(mtime), Device: unix.Major(dev)<<20 | unix.Minor(dev)}
}

// region returns the table of a region of a file, and sees that the kernel has it.
func (u *unwinder) region(pid PID, p *program, id bpf.File, n uint32) *unwind.Region {
	if id == (bpf.File{}) {
		return nil
	}
	key := bpf.TableKey{File: id, Region: n}
	if p != nil && p.object == nil {
		if !u.tables.Has(key) {
			u.put(key, &unwind.Region{})
		}
		return nil
	}
	var r *unwind.Region
	if p != nil {
		r = u.make(pid, p, n)
	}
	if r == nil {
		f := failure{u.failed[key].tries + 1, time.Now()}
		u.failed[key] = f
		if f.tries >= maxOpenTries && !u.tables.Has(key) {
			u.put(key, &unwind.Region{})
		}
		return nil
	}
	if _, failed := u.failed[key]; failed {
		u.tables.Delete(key)
		delete(u.failed, key)
	}
	if u.tables.Has(key) {
		return r
	}
	u.put(key, r)
	f, err := u.file(pid, p)
	if f == nil || err != nil || len(f.Regions()) > smallFile {
		return r
	}
	for _, other := range f.Regions() {
		k := bpf.TableKey{File: id, Region: other}
		if u.tables.Has(k) {
			continue
		}
		if more := u.make(pid, p, other); more != nil {
			u.put(k, more)
		}
	}
	return r
}

func (u *unwinder) put(key bpf.TableKey, r *unwind.Region) {
	err := u.tables.Put(key, bpf.Table{FirstBucket: r.FirstBucket, Buckets: uint16(r.Buckets()), Words: r.Words})
	if err != nil {
		u.log.Warn("unwind table is not in the kernel", "inode", key.File.Inode, "region", key.Region, "err", err)
	}
}

// make returns the table of a region of a program, made once; nil where the file could not
// be read.
func (u *unwinder) make(pid PID, p *program, n uint32) *unwind.Region {
	key := madeKey{p.object, n}
	if r, ok := u.made.get(key); ok {
		return r
	}
	r, err := u.read(pid, p, n)
	if err != nil {
		u.log.Debug("no unwind table", "file", p.path, "region", n, "err", err)
		return nil
	}
	u.made.put(key, r)
	return r
}

// read takes the table from the cache on disk, or makes it and puts it there.
func (u *unwinder) read(pid PID, p *program, n uint32) (*unwind.Region, error) {
	_, _, mtime, ok := p.object.Stat()
	cached := unwind.CacheKey{BuildID: p.object.BuildID(), Size: p.object.Content().Size(), MtimeNanos: mtime}
	if ok = ok && u.cache != nil; ok {
		if r, found := u.cache.Get(cached, n); found {
			return &r, nil
		}
	}
	f, err := u.file(pid, p)
	if err != nil {
		return nil, err
	}
	if f == nil {
		return new(unwind.Region), nil
	}
	r, err := f.Region(n)
	if err != nil {
		return nil, err
	}
	u.count(&r)
	if ok {
		if err := u.cache.Put(cached, n, &r); err != nil && !u.cacheFailing {
			u.log.Warn("unwind tables are not kept on disk", "err", err)
			u.cacheFailing = true
		}
	}
	return &r, nil
}

// count counts what was made, and what of it could not be.
func (u *unwinder) count(r *unwind.Region) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.stats.Made++
	for reason, n := range r.Skipped {
		u.stats.Skipped[string(reason)] += uint64(n)
	}
}

// file returns the unwind information of a program, nil if it can have none. The error is
// one of reading.
func (u *unwinder) file(pid PID, p *program) (*unwind.File, error) {
	if f, ok := u.files.get(p.object); ok {
		return f, nil
	}
	c := p.object.Content()
	f, err := unwind.Open(c, c.Size(), func(buildID, link string, crc uint32) (io.ReaderAt, int64, error) {
		// The file is closed when nothing refers to it any more.
		return elffile.OpenDebugFile(rootsOf(pid), p.path, buildID, link, crc)
	})
	if errors.Is(err, unwind.ErrNotELF) || errors.Is(err, unwind.ErrUnsupported) {
		f, err = nil, nil
	}
	if err != nil {
		return nil, err
	}
	u.files.put(p.object, f)
	return f, nil
}

// generations is a map of bounded size: what is used stays, what was not used since limit
// others were is dropped.
type generations[K comparable, V any] struct {
	limit      int
	young, old map[K]V
}

func (g *generations[K, V]) get(k K) (V, bool) {
	if v, ok := g.young[k]; ok {
		return v, true
	}
	v, ok := g.old[k]
	if ok {
		g.put(k, v)
	}
	return v, ok
}

func (g *generations[K, V]) put(k K, v V) {
	if len(g.young) >= g.limit || g.young == nil {
		g.old, g.young = g.young, make(map[K]V)
	}
	g.young[k] = v
}
