// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"cmp"
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
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/symbolizer/index"
)

const (
	indexSuffix   = ".index"
	versionSuffix = ".version"
	newPrefix     = ".new-"

	maxIndexFiles = 1 << 16
	touchAfter    = time.Hour // a use is noted on disk when the last note is older
)

// Cache is a directory in which indexes of debug information are kept between starts. Of
// those that do not fit the quota the least recently used go. An index is a file named by
// the hash of what it is made of; a link, named by the hash of the binary's stat, leads to
// it, so that the binary need not be read to find it.
type Cache struct{ indexCache }

func (c *Cache) indexes() *indexCache {
	if c == nil {
		return nil
	}
	return &c.indexCache
}

type indexCache struct {
	path    string
	quota   int64
	bytes   atomic.Int64 // of the files, when they were last counted
	evicted atomic.Int64 // files that made room for others
	mu      sync.Mutex   // of changes of the directory
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
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("open cache %s: %w", dir, err)
	}
	if int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("open cache %s: belongs to user %d", dir, st.Uid)
	}
	if err := unix.Fchmod(fd, 0o700); err != nil {
		return nil, fmt.Errorf("open cache %s: %w", dir, err)
	}
	c := &Cache{indexCache{path: dir, quota: quota}}
	if _, err := c.trim(); err != nil {
		return nil, fmt.Errorf("read cache: %w", err)
	}
	return c, nil
}

// statKey names versions of files by stat, nil where there is none. A file's user can not
// set the time of change (ctime), so it tells more than the modification time.
func statKey(images ...*elffile.Image) []byte {
	h := sha256.New()
	for _, m := range images {
		if m == nil {
			continue
		}
		var st unix.Stat_t
		switch f := m.Content.(type) {
		case *openFile:
			file, err := f.acquire()
			if err != nil {
				return nil
			}
			err = unix.Fstat(int(file.Fd()), &st)
			f.release()
			if err != nil {
				return nil
			}
		case wholeFile:
			if unix.Fstat(int(f.Fd()), &st) != nil {
				return nil
			}
		default:
			return nil
		}
		binary.Write(h, binary.LittleEndian, [5]int64{int64(st.Dev), int64(st.Ino), st.Size, st.Mtim.Nano(), st.Ctim.Nano()})
	}
	return h.Sum(nil)
}

func (c *indexCache) indexPath(id index.Identity) string {
	return filepath.Join(c.path, hex.EncodeToString(id[:])+indexSuffix)
}

func (c *indexCache) versionPath(version []byte) string {
	return filepath.Join(c.path, hex.EncodeToString(version)+versionSuffix)
}

// byVersion opens the index of a binary by its stat.
func (c *indexCache) byVersion(version []byte) *index.Index {
	target, err := os.Readlink(c.versionPath(version))
	if err != nil {
		return nil
	}
	var id index.Identity
	name, ok := strings.CutSuffix(target, indexSuffix)
	if b, err := hex.DecodeString(name); !ok || err != nil || copy(id[:], b) != len(id) {
		return nil
	}
	ix, _ := c.open(id, nil)
	return ix
}

// open opens an index by what it was made of, and notes that it is used: also by this
// version, if there is one. What is damaged is removed.
func (c *indexCache) open(id index.Identity, version []byte) (ix *index.Index, refused bool) {
	path := c.indexPath(id)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, false
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if ix, err = index.Open(f, id); err != nil {
		os.Remove(path)
		return nil, true
	}
	now := time.Now()
	if fi, err := f.Stat(); err == nil && now.Sub(fi.ModTime()) > touchAfter {
		_ = os.Chtimes(path, now, now)
	}
	c.link(id, version)
	return ix, false
}

func (c *indexCache) link(id index.Identity, version []byte) {
	if version != nil {
		// Where that fails the binary is read again, no more.
		_ = os.Remove(c.versionPath(version))
		_ = os.Symlink(filepath.Base(c.indexPath(id)), c.versionPath(version))
	}
}

// create makes the file of a new index.
func (c *indexCache) create() (*os.File, error) { return os.CreateTemp(c.path, newPrefix+"*") }

func (c *indexCache) discard(f *os.File) { _ = os.Remove(f.Name()) }

// keep gives a file its name, and makes room for it.
func (c *indexCache) keep(f *os.File, id index.Identity, version []byte) error {
	if err := os.Rename(f.Name(), c.indexPath(id)); err != nil {
		c.discard(f)
		return fmt.Errorf("keep index: %w", err)
	}
	c.link(id, version)
	_, err := c.trim()
	return err
}

// trim removes the least recently used indexes over the quota, links that lead nowhere, and
// what an end in the middle of a building has left.
func (c *indexCache) trim() (evicted int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	entries, err := os.ReadDir(c.path)
	if err != nil {
		return 0, err
	}
	type file struct {
		name string
		size int64
		used time.Time
	}
	var files []file
	var total int64
	kept := map[string]bool{}
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			continue
		}
		switch {
		case strings.HasPrefix(e.Name(), newPrefix):
			if time.Since(fi.ModTime()) > touchAfter {
				_ = os.Remove(filepath.Join(c.path, e.Name()))
			}
		case (strings.HasSuffix(e.Name(), indexSuffix) || strings.HasSuffix(e.Name(), debugSuffix)) && fi.Mode().IsRegular():
			files = append(files, file{e.Name(), fi.Size(), fi.ModTime()})
			total += fi.Size()
			kept[e.Name()] = true
		}
	}
	slices.SortFunc(files, func(a, b file) int { return cmp.Or(a.used.Compare(b.used), cmp.Compare(a.name, b.name)) })
	for len(files) > 0 && (total > c.quota || len(files) > maxIndexFiles) {
		if err := os.Remove(filepath.Join(c.path, files[0].name)); err == nil {
			evicted++
		}
		total -= files[0].size
		delete(kept, files[0].name)
		files = files[1:]
	}
	c.bytes.Store(total)
	c.evicted.Add(int64(evicted))
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), versionSuffix) {
			continue
		}
		path := filepath.Join(c.path, e.Name())
		if target, err := os.Readlink(path); err != nil || !kept[target] {
			_ = os.Remove(path)
		}
	}
	return evicted, nil
}
