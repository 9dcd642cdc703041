// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bytes"
	"cmp"
	"container/list"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	cacheMagic   = "hfunwind"
	cacheVersion = 1 // of the file's layout, the rows' layout and what rows are made of what
	cacheSuffix  = ".table"
	cacheTemp    = ".new"

	maxCacheFile  = 512 + 2*maxWords
	maxCacheFiles = 1 << 18
	touchAfter    = time.Hour // a use is noted on disk when the last note is older
)

// CacheKey names one version of a file. Two files that share a build id, which says what
// their maker likes, still have keys of their own.
type CacheKey struct {
	BuildID    string
	Size       int64
	MtimeNanos int64
}

// Cache keeps tables in a directory, one file each, between starts of the agent. Of files
// that do not fit the quota the least recently used go. Its methods may be called from any
// goroutine.
type Cache struct {
	dir   *os.File
	quota int64

	mu     sync.Mutex
	files  map[string]*list.Element // of *cacheFile, by name
	recent *list.List               // the newest use first
	stats  CacheStats
}

// CacheStats counts what a cache has done since it was opened, and what it holds.
type CacheStats struct {
	Hits, Misses uint64
	Refused      uint64 // files that are damaged, or are not what their name says; they were removed
	Evicted      uint64
	Files        int
	Bytes        int64
}

type cacheFile struct {
	name string
	size int64
	used time.Time
}

// OpenCache opens a directory of at most quota bytes, and makes it if there is none. It
// must belong to the user that the process runs as; others lose access to it.
func OpenCache(dir string, quota int64) (*Cache, error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return nil, fmt.Errorf("make cache: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("make cache: %w", err)
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open cache %s: %w", dir, err)
	}
	d := os.NewFile(uintptr(fd), dir)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err == nil && int(st.Uid) != os.Geteuid() {
		err = fmt.Errorf("belongs to user %d", st.Uid)
		d.Close()
		return nil, fmt.Errorf("open cache %s: %w", dir, err)
	}
	if err := d.Chmod(0o700); err != nil {
		d.Close()
		return nil, fmt.Errorf("open cache: %w", err)
	}
	c := &Cache{dir: d, quota: quota, files: map[string]*list.Element{}, recent: list.New()}
	if err := c.scan(); err != nil {
		d.Close()
		return nil, fmt.Errorf("read cache: %w", err)
	}
	return c, nil
}

// Close closes the directory. It is idempotent.
func (c *Cache) Close() error {
	if err := c.dir.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Stats returns the counters.
func (c *Cache) Stats() CacheStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.Files = len(c.files)
	return s
}

// scan finds what is there, and removes what a crash left behind.
func (c *Cache) scan() error {
	entries, err := c.dir.ReadDir(maxCacheFiles)
	if err != nil && len(entries) == 0 && !strings.Contains(err.Error(), "EOF") {
		return err
	}
	var found []*cacheFile
	for _, e := range entries {
		switch name := e.Name(); {
		case strings.HasSuffix(name, cacheTemp):
			c.unlink(name)
		case strings.HasSuffix(name, cacheSuffix):
			if info, err := e.Info(); err == nil {
				found = append(found, &cacheFile{name, info.Size(), info.ModTime()})
			}
		}
	}
	slices.SortFunc(found, func(a, b *cacheFile) int { return cmp.Or(b.used.Compare(a.used), strings.Compare(a.name, b.name)) })
	for _, f := range found {
		c.files[f.name] = c.recent.PushBack(f)
		c.stats.Bytes += f.size
	}
	c.trim()
	return nil
}

func (c *Cache) unlink(name string) { unix.Unlinkat(int(c.dir.Fd()), name, 0) }

// trim evicts until the quota holds.
func (c *Cache) trim() {
	for c.stats.Bytes > c.quota && c.recent.Len() > 0 {
		c.remove(c.recent.Back())
		c.stats.Evicted++
	}
}

func (c *Cache) remove(el *list.Element) {
	f := c.recent.Remove(el).(*cacheFile)
	delete(c.files, f.name)
	c.stats.Bytes -= f.size
	c.unlink(f.name)
}

// name is the file of a region.
func (k *CacheKey) name(region uint32) string {
	sum := sha256.Sum256(k.header(region))
	return hex.EncodeToString(sum[:16]) + cacheSuffix
}

// header is what a file begins with.
func (k *CacheKey) header(region uint32) []byte {
	b := append([]byte(cacheMagic), cacheVersion)
	b = binary.LittleEndian.AppendUint32(b, region)
	b = binary.LittleEndian.AppendUint64(b, uint64(k.Size))
	b = binary.LittleEndian.AppendUint64(b, uint64(k.MtimeNanos))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(k.BuildID)))
	return append(b, k.BuildID...)
}

const maxBuildID = 256

// Get returns a table that was put. Its Skipped is nil.
func (c *Cache) Get(key CacheKey, region uint32) (Region, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(key.BuildID) > maxBuildID {
		return Region{}, false
	}
	name := key.name(region)
	el := c.files[name]
	if el == nil {
		c.stats.Misses++
		return Region{}, false
	}
	r, err := c.read(name, key.header(region))
	if err != nil {
		c.remove(el)
		c.stats.Refused++
		c.stats.Misses++
		return Region{}, false
	}
	c.stats.Hits++
	c.recent.MoveToFront(el)
	if f, now := el.Value.(*cacheFile), time.Now(); now.Sub(f.used) > touchAfter {
		f.used = now
		unix.UtimesNanoAt(int(c.dir.Fd()), name, []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}, unix.AT_SYMLINK_NOFOLLOW)
	}
	return r, true
}

var errDamaged = errors.New("damaged")

func (c *Cache) read(name string, header []byte) (Region, error) {
	fd, err := unix.Openat(int(c.dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return Region{}, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Region{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxCacheFile || int(st.Uid) != os.Geteuid() {
		return Region{}, errDamaged
	}
	b := make([]byte, st.Size)
	if _, err := f.ReadAt(b, 0); err != nil {
		return Region{}, err
	}
	return decodeTable(b, header)
}

// encodeTable is the contents of a file: header, first bucket, rows, words, and the SHA-256
// of all that.
func encodeTable(r *Region, header []byte) []byte {
	b := slices.Grow(slices.Clone(header), 8+2*len(r.Words)+sha256.Size)
	b = binary.LittleEndian.AppendUint16(b, r.FirstBucket)
	b = binary.LittleEndian.AppendUint32(b, uint32(r.Rows))
	for _, w := range r.Words {
		b = binary.LittleEndian.AppendUint16(b, w)
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

func decodeTable(b, header []byte) (Region, error) {
	const fixed = 6
	n := len(b) - sha256.Size
	if n < len(header)+fixed || !bytes.Equal(b[:len(header)], header) || (n-len(header))%2 != 0 {
		return Region{}, errDamaged
	}
	if sha256.Sum256(b[:n]) != [sha256.Size]byte(b[n:]) {
		return Region{}, errDamaged
	}
	d := cursor{b: b[len(header):n]}
	r := Region{FirstBucket: d.u16(), Rows: int(d.u32())}
	if n := d.left() / 2; n > 0 {
		r.Words = make([]uint16, n)
		for i := range r.Words {
			r.Words[i] = d.u16()
		}
	}
	if !r.valid() {
		return Region{}, errDamaged
	}
	return r, nil
}

// valid is whether a table has the layout that readers rely on.
func (r *Region) valid() bool {
	if len(r.Words) == 0 {
		return r.Rows == 0 && r.FirstBucket == 0
	}
	buckets := len(r.Words) - r.Rows*rowWords - 1
	return r.Rows > 0 && r.Rows < 1<<16 && buckets > 0 && len(r.Words) <= maxWords &&
		int(r.FirstBucket)+buckets <= RegionSize/BucketSize && r.Words[0] == 0 &&
		slices.IsSorted(r.Words[:buckets+1]) && int(r.Words[buckets]) == r.Rows
}

// Put keeps a table. What cannot be written is not kept; the error is for counting.
func (c *Cache) Put(key CacheKey, region uint32, r *Region) error {
	if len(key.BuildID) > maxBuildID {
		return fmt.Errorf("write cache: build id of %d bytes", len(key.BuildID))
	}
	name := key.name(region)
	b := encodeTable(r, key.header(region))
	if int64(len(b)) > c.quota {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if el := c.files[name]; el != nil {
		c.remove(el)
	}
	if err := c.write(name, b); err != nil {
		return fmt.Errorf("write cache: %w", err)
	}
	c.files[name] = c.recent.PushFront(&cacheFile{name, int64(len(b)), time.Now()})
	c.stats.Bytes += int64(len(b))
	c.trim()
	return nil
}

// write makes the file in one step: under another name first.
func (c *Cache) write(name string, b []byte) error {
	dir := int(c.dir.Fd())
	temp := rand.Text() + cacheTemp
	fd, err := unix.Openat(dir, temp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), temp)
	_, err = f.Write(b)
	if err2 := f.Close(); err == nil {
		err = err2
	}
	if err == nil {
		err = unix.Renameat(dir, temp, dir, name)
	}
	if err != nil {
		c.unlink(temp)
	}
	return err
}
