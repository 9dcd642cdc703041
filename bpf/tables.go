// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// File names one version of a file, as the kernel knows it. Memory without a file is the
// zero File, the vDSO is VDSO.
type File struct {
	Inode      uint64
	MtimeNanos uint64 // last change of the contents, wall clock
	Device     uint32 // the kernel's dev_t: major << 20 | minor; on some file systems not what stat shows
}

// VDSO is the File of the code that the kernel maps into every process.
var VDSO = File{Inode: 1}

// TableKey names one region of a file: 256 KiB, counted from its start.
type TableKey struct {
	File   File
	Region uint32
}

// Sizes of the unwind tables: see unwind.h.
const (
	RegionShift = int(cpuHfUnwindSizeHF_REGION_SHIFT)
	BucketShift = int(cpuHfUnwindSizeHF_BUCKET_SHIFT)
	chunkWords  = int(cpuHfUnwindSizeHF_CHUNK_WORDS)
	rowWords    = int(cpuHfUnwindSizeHF_ROW_WORDS)
)

// MaxTableWords is the largest table that a chunk holds.
const MaxTableWords = chunkWords - rowWords

// RegionOf returns the region that a file offset is in.
func RegionOf(offset uint64) uint32 { return uint32(offset >> RegionShift) }

// Table is the unwind table of one region, in the layout of unwind.h. One without words
// says that nothing is known there, and that frame pointers are to be tried.
type Table struct {
	FirstBucket uint16 // of the region, that Words begins with
	Buckets     uint16
	Words       []uint16 // an index of Buckets + 1, then rows of three words
}

func (t Table) check() error {
	n := len(t.Words)
	if n == 0 && t.Buckets == 0 {
		return nil
	}
	if t.Buckets == 0 || int(t.FirstBucket)+int(t.Buckets) > 1<<(RegionShift-BucketShift) || n > MaxTableWords || n < int(t.Buckets)+1+rowWords {
		return fmt.Errorf("%d words for %d buckets from %d", n, t.Buckets, t.FirstBucket)
	}
	index := t.Words[:t.Buckets+1]
	if !slices.IsSorted(index) || (n-len(index))/rowWords < int(index[t.Buckets]) {
		return fmt.Errorf("index of %d buckets does not fit %d words", t.Buckets, n)
	}
	return nil
}

// DefaultTableMemory is the default limit of the unwind tables in the kernel, in bytes.
const DefaultTableMemory = 32 << 20

// ErrNoRoom says that a table does not fit into the memory limit, even alone.
var ErrNoRoom = errors.New("no room for the unwind table")

// Tables are the unwind tables that the kernel holds, under a limit of bytes: of those that
// find no room the least recently sampled one goes. All programs that walk stacks share
// them. The methods may be called from any goroutine.
type Tables struct {
	limit   uint64
	index   *ebpf.Map // hf_tables
	outer   *ebpf.Map // hf_chunks
	count   *ebpf.Map // hf_changes
	inner   *ebpf.MapSpec
	mu      sync.Mutex
	changed uint32 // as hf_changes has it
	placed  map[TableKey]*placement
	equal   map[[sha256.Size]byte]*placement // by their words
	chunks  []*chunk
	stats   TableStats
	// Pieces that a walk on another CPU may still read; free once a moment has passed.
	retired []retired
	now     func() uint64 // ktime
	sleep   func(time.Duration)
}

// placement is where a table lies. Copies of a file, as containers bring them, share it.
type placement struct {
	chunk, word, words int
	rows               uint64
	digest             [sha256.Size]byte
	keys               int // that it is the table of
}

// chunk is one map of words, and what of it is free: sorted, and never two pieces in touch.
type chunk struct {
	words *ebpf.Map
	free  []piece
}

type piece struct{ at, n int }

// wholeChunk is what of an empty chunk can be used: the kernel reads a row before each row.
var wholeChunk = piece{rowWords, MaxTableWords}

type retired struct {
	placement
	since uint64
}

// TableStats describe the tables in the kernel.
type TableStats struct {
	Tables  int
	Rows    uint64 // those that several tables share counted once
	Memory  uint64 // bytes that the kernel accounts to the chunks and the index
	Limit   uint64
	Evicted uint64 // tables that made room for others
}

const (
	chunkBytes = uint64(2 * chunkWords)
	// entryBytes is what the kernel takes for one entry of hf_tables: an element of a hash
	// without preallocation, key and value.
	entryBytes = 48 + uint64(unsafe.Sizeof(cpuHfTableKey{})) + uint64(unsafe.Sizeof(cpuHfTable{}))
	// retireNanos is longer than any walk.
	retireNanos = 100e6
	// evictShare of the limit is made free at a time.
	evictShare = 16
)

// NewTables makes the maps. limit is in bytes of kernel memory, at least a chunk (256 KiB).
func NewTables(limit uint64) (_ *Tables, err error) {
	spec, err := loadCpu()
	if err != nil {
		return nil, fmt.Errorf("parse cpu object: %w", err)
	}
	chunks := limit / chunkBytes
	if chunks < 1 {
		return nil, fmt.Errorf("make unwind tables: limit of %d bytes is below %d", limit, chunkBytes)
	}
	t := &Tables{limit: limit, placed: map[TableKey]*placement{}, equal: map[[sha256.Size]byte]*placement{}, now: ktime, sleep: time.Sleep}
	index, outer := spec.Maps[cpuMapHfTables].Copy(), spec.Maps[cpuMapHfChunks].Copy()
	// Tables take 10 KiB on average; half of that leaves room for many small ones.
	index.MaxEntries = uint32(max(limit/5000, 256))
	outer.MaxEntries = uint32(chunks)
	t.inner = outer.InnerMap.Copy()
	t.inner.Name = "hf_chunk"
	if t.index, err = ebpf.NewMap(index); err != nil {
		return nil, fmt.Errorf("make index of unwind tables: %w", err)
	}
	if t.outer, err = ebpf.NewMap(outer); err != nil {
		t.index.Close()
		return nil, fmt.Errorf("make chunks of unwind tables: %w", err)
	}
	if t.count, err = ebpf.NewMap(spec.Maps[cpuMapHfChanges]); err != nil {
		t.index.Close()
		t.outer.Close()
		return nil, fmt.Errorf("make counter of unwind tables: %w", err)
	}
	return t, nil
}

func ktime() uint64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // does not fail
	return uint64(ts.Nano())
}

// replace makes the programs of spec use these tables: the maps are what it is loaded with.
func (t *Tables) replace(spec *ebpf.CollectionSpec) map[string]*ebpf.Map {
	spec.Maps[cpuMapHfTables].MaxEntries = t.index.MaxEntries()
	spec.Maps[cpuMapHfChunks].MaxEntries = t.outer.MaxEntries()
	return map[string]*ebpf.Map{cpuMapHfTables: t.index, cpuMapHfChunks: t.outer, cpuMapHfChanges: t.count}
}

func (k TableKey) raw() cpuHfTableKey {
	var r cpuHfTableKey
	r.File.Inode, r.File.MtimeNs, r.File.Device = k.File.Inode, k.File.MtimeNanos, k.File.Device
	r.Region = k.Region
	return r
}

// Put gives the kernel the table of key, in place of one that is there. Words is copied.
// The error is ErrNoRoom where the limit is too small for it.
func (t *Tables) Put(key TableKey, table Table) error {
	if err := table.check(); err != nil {
		return fmt.Errorf("put unwind table: %w", err)
	}
	digest := sha256.Sum256(bytesOf(table.Words))
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remove(key)
	p, err := t.placeWords(table, digest)
	if err != nil {
		return err
	}
	raw := key.raw()
	value := cpuHfTable{
		Chunk: uint32(p.chunk), Word: uint32(p.word),
		FirstBucket: table.FirstBucket, Buckets: table.Buckets,
		UsedNs: t.now(),
	}
	if err := t.index.Put(&raw, &value); err != nil {
		t.drop(p)
		return fmt.Errorf("put unwind table: %w", err)
	}
	t.placed[key] = p
	return t.tell()
}

// tell makes walks look at the tables again; what they know of them is for a second only.
func (t *Tables) tell() error {
	t.changed++
	if err := t.count.Put(uint32(0), t.changed); err != nil {
		return fmt.Errorf("count change of unwind tables: %w", err)
	}
	return nil
}

// placeWords returns where the words of a table are, for one key more.
func (t *Tables) placeWords(table Table, digest [sha256.Size]byte) (*placement, error) {
	if t.equal[digest] != nil {
		// Room for the entry; that may cost the very table.
		if err := t.place(&placement{}); err != nil {
			return nil, err
		}
		if p := t.equal[digest]; p != nil {
			p.keys++
			return p, nil
		}
	}
	p := &placement{words: len(table.Words), rows: rowsOf(table), digest: digest, keys: 1}
	if err := t.place(p); err != nil {
		return nil, err
	}
	if p.words > 0 {
		if err := t.write(p, table.Words); err != nil {
			t.release(*p)
			return nil, err
		}
	}
	t.equal[digest] = p
	return p, nil
}

// drop takes a key away from p.
func (t *Tables) drop(p *placement) {
	if p.keys--; p.keys > 0 {
		return
	}
	delete(t.equal, p.digest)
	if p.words > 0 {
		t.retired = append(t.retired, retired{*p, t.now()})
	}
}

func bytesOf(words []uint16) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), 2*len(words))
}

func rowsOf(t Table) uint64 {
	if t.Buckets == 0 {
		return 0
	}
	return uint64(t.Words[t.Buckets])
}

// Has tells whether the kernel holds the table of key.
func (t *Tables) Has(key TableKey) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.placed[key] != nil
}

// Delete takes the table of key away.
func (t *Tables) Delete(key TableKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remove(key)
}

func (t *Tables) remove(key TableKey) {
	p := t.placed[key]
	if p == nil {
		return
	}
	raw := key.raw()
	// It is there, as only this type writes; if not, it is gone as wanted.
	_ = t.index.Delete(&raw)
	_ = t.tell()
	delete(t.placed, key)
	t.drop(p)
}

// place finds room for p.words words: in the free pieces, in a new chunk, or by eviction.
func (t *Tables) place(p *placement) error {
	for range 3 {
		t.reclaim()
		if t.memory()+entryBytes <= t.limit && len(t.placed) < int(t.index.MaxEntries()) {
			if p.words == 0 || t.fit(p) {
				return nil
			}
			if t.memory()+entryBytes+chunkBytes <= t.limit {
				if err := t.addChunk(); err != nil {
					return err
				}
				if t.fit(p) {
					return nil
				}
			}
		}
		if len(t.placed) == 0 {
			return ErrNoRoom
		}
		if err := t.evict(); err != nil {
			return err
		}
	}
	return ErrNoRoom
}

// fit takes the first free piece that is large enough.
func (t *Tables) fit(p *placement) bool {
	for i, c := range t.chunks {
		if c == nil {
			continue
		}
		for j, f := range c.free {
			if f.n < p.words {
				continue
			}
			p.chunk, p.word = i, f.at
			if f.n == p.words {
				c.free = slices.Delete(c.free, j, j+1)
			} else {
				c.free[j] = piece{f.at + p.words, f.n - p.words}
			}
			return true
		}
	}
	return false
}

func (t *Tables) addChunk() error {
	m, err := ebpf.NewMap(t.inner)
	if err != nil {
		return fmt.Errorf("make chunk of unwind tables: %w", err)
	}
	i := slices.Index(t.chunks, nil)
	if i < 0 {
		i = len(t.chunks)
		t.chunks = append(t.chunks, nil)
	}
	if err := t.outer.Put(uint32(i), m); err != nil {
		m.Close()
		return fmt.Errorf("install chunk of unwind tables: %w", err)
	}
	t.chunks[i] = &chunk{words: m, free: []piece{wholeChunk}}
	return nil
}

// reclaim makes free what no walk can be reading any more, and gives empty chunks back.
func (t *Tables) reclaim() {
	now := t.now()
	t.retired = slices.DeleteFunc(t.retired, func(r retired) bool {
		if now-r.since < retireNanos {
			return false
		}
		t.release(r.placement)
		return true
	})
}

// release returns the words of p to its chunk.
func (t *Tables) release(p placement) {
	if p.words == 0 {
		return
	}
	c := t.chunks[p.chunk]
	i, _ := slices.BinarySearchFunc(c.free, p.word, func(f piece, at int) int { return f.at - at })
	c.free = slices.Insert(c.free, i, piece{p.word, p.words})
	if i+1 < len(c.free) && c.free[i].at+c.free[i].n == c.free[i+1].at {
		c.free[i].n += c.free[i+1].n
		c.free = slices.Delete(c.free, i+1, i+2)
	}
	if i > 0 && c.free[i-1].at+c.free[i-1].n == c.free[i].at {
		c.free[i-1].n += c.free[i].n
		c.free = slices.Delete(c.free, i, i+1)
	}
	if len(c.free) == 1 && c.free[0] == wholeChunk {
		// An error leaves the chunk in the kernel; it is empty.
		_ = t.outer.Delete(uint32(p.chunk))
		c.words.Close()
		t.chunks[p.chunk] = nil
	}
}

// evict takes away the tables that were not sampled for the longest time, until some of
// the limit is free.
func (t *Tables) evict() error {
	type use struct {
		key  TableKey
		used uint64
	}
	uses := make([]use, 0, len(t.placed))
	var raw cpuHfTableKey
	var value cpuHfTable
	it := t.index.Iterate()
	for it.Next(&raw, &value) {
		uses = append(uses, use{TableKey{File{raw.File.Inode, raw.File.MtimeNs, raw.File.Device}, raw.Region}, value.UsedNs})
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read index of unwind tables: %w", err)
	}
	slices.SortFunc(uses, func(a, b use) int {
		if a.used < b.used {
			return -1
		}
		return 1
	})
	want, freed := t.limit/evictShare, uint64(0)
	for _, u := range uses {
		if freed >= want {
			break
		}
		if p := t.placed[u.key]; p != nil {
			freed += entryBytes
			if p.keys == 1 {
				freed += uint64(2 * p.words)
			}
			t.remove(u.key)
			t.stats.Evicted++
		}
	}
	// A moment, so that what was freed can be used.
	t.sleep(retireNanos)
	return nil
}

// write copies words into the kernel's memory, through a mapping that lasts for the copy.
func (t *Tables) write(p *placement, words []uint16) error {
	fd := t.chunks[p.chunk].words.FD()
	page := os.Getpagesize()
	start := 2 * p.word / page * page
	end := (2*(p.word+p.words) + page - 1) / page * page
	mem, err := unix.Mmap(fd, int64(start), end-start, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map chunk of unwind tables: %w", err)
	}
	copy(mem[2*p.word-start:], bytesOf(words))
	if err := unix.Munmap(mem); err != nil {
		return fmt.Errorf("unmap chunk of unwind tables: %w", err)
	}
	return nil
}

func (t *Tables) memory() uint64 {
	n := uint64(len(t.placed)) * entryBytes
	for _, c := range t.chunks {
		if c != nil {
			n += chunkBytes
		}
	}
	return n
}

// Stats describe what is in the kernel now.
func (t *Tables) Stats() TableStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.reclaim()
	s := t.stats
	for _, p := range t.equal {
		s.Rows += p.rows
	}
	s.Tables, s.Memory, s.Limit = len(t.placed), t.memory(), t.limit
	return s
}

// chunkMemory is what the kernel accounts to the chunks, in bytes.
func (t *Tables) chunkMemory() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	var n uint64
	for _, c := range t.chunks {
		if c == nil {
			continue
		}
		if info, err := c.words.Info(); err == nil {
			b, _ := info.Memlock()
			n += b
		}
	}
	return n
}

// Close frees the tables; Put has no room then. Programs that are loaded with them keep
// their own hold. It is idempotent.
func (t *Tables) Close() error {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for i, c := range t.chunks {
		if c != nil {
			errs = append(errs, c.words.Close())
			t.chunks[i] = nil
		}
	}
	clear(t.placed)
	clear(t.equal)
	t.retired, t.limit = nil, 0
	return errors.Join(append(errs, t.index.Close(), t.outer.Close(), t.count.Close())...)
}
