// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hostflame/hostflame/internal/dwarf"
	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/symbolizer/index"
)

// Budgets of one file.
const (
	inflateMemory = 4 << 20 // bytes of compressed sections that are small enough for memory
	inflateDisk   = 8 << 30
	maxDebugBytes = 16 << 30 // bytes of debug sections
	maxQueue      = 1024     // objects
	freeAfter     = 16 << 20 // bytes of debug sections that indexes were made of
)

// lineIndex is an object's index, or why there is none. The fields below ready are set when
// it is closed.
type lineIndex struct {
	ready chan struct{}
	index *index.Index
	err   error
}

func (l *lineIndex) settled() bool {
	select {
	case <-l.ready:
		return true
	default:
		return false
	}
}

// indexer makes the indexes of objects with debug information, one after the other.
type indexer struct {
	workers    int
	background bool
	timeout    time.Duration
	cache      *indexCache // nil: indexes live as long as their objects
	temp       string      // directory for files that are in the way

	ctx    context.Context
	cancel context.CancelFunc

	mu      sync.Mutex
	idle    sync.WaitGroup
	running bool
	queue   []indexJob
	stats   IndexStats
}

type indexJob struct {
	object *Object
	result *lineIndex
}

// IndexStats is what was done about debug information.
type IndexStats struct {
	Built    int           // indexes made
	Loaded   int           // indexes found in the cache directory
	Failed   int           // files with debug information of which none could be made
	Waiting  int           // files whose index is being made or waits for it
	Broken   int           // units that were left out, as they are malformed
	Bytes    int64         // of the indexes made and loaded
	Input    int64         // bytes of debug sections that they were made of
	Time     time.Duration // that making and loading took
	Refused  int           // files in the cache directory that were damaged or of another binary
	Evicted  int           // files of the cache directory removed to stay within the quota
	LastFail error         // what was wrong with the last file that failed

	CacheBytes, CacheLimit int64 // of the cache directory: bytes of its files, and its quota
}

func (x *indexer) init(cfg Config) {
	x.workers, x.background, x.timeout = cfg.IndexWorkers, !cfg.WaitForIndex, cfg.IndexTimeout
	x.cache, x.temp = cfg.Cache.indexes(), os.TempDir()
	if x.cache != nil {
		x.temp = x.cache.path
	}
	x.ctx, x.cancel = context.WithCancel(context.Background())
}

// close ends the building and waits for it.
func (x *indexer) close() {
	x.cancel()
	x.idle.Wait()
}

func (x *indexer) snapshot() IndexStats {
	x.mu.Lock()
	st := x.stats
	x.mu.Unlock()
	if x.cache != nil {
		st.Evicted = int(x.cache.evicted.Load())
		st.CacheBytes, st.CacheLimit = x.cache.bytes.Load(), x.cache.quota
	}
	return st
}

// request queues an object. The result is settled later.
func (x *indexer) request(o *Object) *lineIndex {
	r := &lineIndex{ready: make(chan struct{})}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.ctx.Err() != nil || len(x.queue) >= maxQueue {
		r.err = errClosed
		close(r.ready)
		return r
	}
	x.queue = append(x.queue, indexJob{o, r})
	x.stats.Waiting++
	if !x.running {
		x.running = true
		x.idle.Go(x.run)
	}
	return r
}

// run works the queue off.
func (x *indexer) run() {
	built := int64(0) // of debug sections
	defer func() {
		// What big units took is of no use until the next file.
		if x.background && built > freeAfter {
			debug.FreeOSMemory()
		}
	}()
	for {
		x.mu.Lock()
		if len(x.queue) == 0 {
			x.running = false
			x.mu.Unlock()
			return
		}
		j := x.queue[0]
		x.queue = x.queue[1:]
		x.mu.Unlock()
		start := time.Now()
		ix, stats, err := x.make(j.object)
		x.mu.Lock()
		s := &x.stats
		s.Waiting--
		s.Time += time.Since(start)
		s.Input += stats.input
		s.Broken += stats.BrokenUnits
		s.Refused += stats.refused
		switch {
		case err != nil:
			s.Failed++
			s.LastFail = err
		case stats.loaded:
			s.Loaded++
		default:
			s.Built++
		}
		if !stats.loaded {
			built += stats.input
		}
		if err == nil {
			s.Bytes += int64(ix.Size())
		}
		x.mu.Unlock()
		j.result.index, j.result.err = ix, err
		close(j.result.ready)
	}
}

type makeStats struct {
	index.Stats
	input   int64
	loaded  bool
	refused int
}

// make finds or builds the index of an object.
func (x *indexer) make(o *Object) (ix *index.Index, st makeStats, err error) {
	// Bugs in parsers are found by fuzzing, and what it misses is no end of the agent.
	defer func() {
		if r := recover(); r != nil {
			err = errorf(ReasonMalformed, "index: panic: %v", r)
		}
		if errors.Is(err, context.DeadlineExceeded) {
			err = errorf(ReasonTooLarge, "index takes longer than %v", x.timeout)
		}
	}()
	ctx, cancel := context.WithTimeout(x.ctx, x.timeout)
	defer cancel()
	secs, err := o.image.Sections()
	if err != nil {
		return nil, st, err
	}
	z := &elffile.Inflater{Dir: x.temp, Memory: inflateMemory, Disk: inflateDisk}
	defer z.Close()
	var id index.Identity
	var versions []byte // of the files, by stat
	alt, closeAlt := o.openAlt(secs)
	defer closeAlt()
	if x.cache != nil {
		if versions = statKey(o.image, alt); versions != nil {
			if ix = x.cache.byVersion(versions); ix != nil {
				st.loaded = true
				return ix, st, nil
			}
		}
		if id, err = x.identity(ctx, o.image, alt); err != nil {
			return nil, st, err
		}
		var refused bool
		if ix, refused = x.cache.open(id, versions); ix != nil {
			st.loaded = true
			return ix, st, nil
		}
		if refused {
			st.refused++
		}
	}
	d, err := dwarf.Open(o.image, secs, z)
	if err != nil {
		return nil, st, err
	}
	if alt != nil {
		if altSecs, err := alt.Sections(); err == nil {
			if d.Alt, err = dwarf.Open(alt, altSecs, z); err != nil {
				d.Alt = nil
			}
		}
	}
	split := &splitFinder{object: o, z: z}
	defer split.close()
	d.Split = split.find
	if st.input = d.Bytes(); st.input > maxDebugBytes {
		return nil, st, errorf(ReasonTooLarge, "debug sections of %d bytes", st.input)
	}
	var file *os.File
	if x.cache != nil {
		file, err = x.cache.create()
	} else {
		file, err = elffile.TempFile(x.temp)
	}
	if err != nil {
		return nil, st, fmt.Errorf("make index: %w", err)
	}
	defer file.Close()
	st.Stats, err = index.Build(ctx, d, index.Options{
		Identity: id, File: file, Dir: x.temp, Workers: x.workers, Background: x.background,
	})
	if err != nil {
		if x.cache != nil {
			x.cache.discard(file)
		}
		return nil, st, err
	}
	if x.cache != nil {
		if err = x.cache.keep(file, id, versions); err != nil {
			return nil, st, err
		}
	}
	ix, err = index.Open(file, id)
	return ix, st, err
}

// openAlt opens what .gnu_debugaltlink names: nil if that is nothing, or is not there.
func (o *Object) openAlt(secs []elffile.Section) (alt *elffile.Image, done func()) {
	done = func() {}
	path, buildID := o.image.DebugAltLink(secs)
	if path == "" {
		return nil, done
	}
	f, err := o.findAlt(path, buildID)
	if err != nil {
		return nil, done
	}
	fi, err := f.Stat()
	if err == nil {
		alt, err = elffile.ParseObject(wholeFile{f, fi.Size()})
	}
	if err != nil || alt.BuildID != buildID {
		f.Close()
		return nil, done
	}
	return alt, func() { f.Close() }
}

// wholeFile is a file that is kept open for as long as it is read.
type wholeFile struct {
	*os.File
	size int64
}

func (f wholeFile) Size() int64 { return f.size }

// identity hashes what an index is made of, as it is in the files: whoever makes a binary
// chooses its build id, and can choose that of another.
func (x *indexer) identity(ctx context.Context, images ...*elffile.Image) (index.Identity, error) {
	h := sha256.New()
	for _, m := range images {
		if m == nil {
			continue
		}
		secs, err := m.Sections()
		if err != nil {
			return index.Identity{}, err
		}
		fmt.Fprintf(h, "%s %d %d\n", m.BuildID, m.Machine, len(secs))
		for _, s := range secs {
			if s.Executable() {
				binary.Write(h, binary.LittleEndian, [2]uint64{s.Addr, s.Size})
			}
		}
		for _, s := range dwarf.Sections(m, secs) {
			fmt.Fprintf(h, "%d %d\n", s.Flags, s.Size)
			if err := x.hashSection(ctx, h, m, s.Extent); err != nil {
				return index.Identity{}, err
			}
		}
	}
	return index.Identity(h.Sum(nil)), nil
}

// hashSection adds the hashes of a range's pieces to h, which some goroutines make.
func (x *indexer) hashSection(ctx context.Context, h interface{ Write([]byte) (int, error) }, c Content, r elffile.Extent) error {
	const piece = 1 << 20
	n := (r.Size + piece - 1) / piece
	if n > uint64(c.Size())/piece+1 {
		return errorf(ReasonMalformed, "section of %d bytes", r.Size)
	}
	if r.Size > maxDebugBytes {
		return errorf(ReasonTooLarge, "debug section of %d bytes", r.Size)
	}
	sums := make([][sha256.Size]byte, n)
	var next uint64
	var mu sync.Mutex
	var first error
	var wg sync.WaitGroup
	for range min(x.workers, int(n)) {
		wg.Go(func() {
			if x.background {
				index.GiveWay()
			}
			buf := make([]byte, min(piece, r.Size))
			for {
				mu.Lock()
				i, stop := next, first != nil || ctx.Err() != nil
				next++
				mu.Unlock()
				if i >= n || stop {
					return
				}
				b := buf[:min(piece, r.Size-i*piece)]
				if err := elffile.ReadAt(c, b, r.Off+i*piece); err != nil {
					mu.Lock()
					first = err
					mu.Unlock()
					return
				}
				sums[i] = sha256.Sum256(b)
			}
		})
	}
	wg.Wait()
	if first != nil {
		return first
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	for i := range sums {
		h.Write(sums[i][:])
	}
	return nil
}
