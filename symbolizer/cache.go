// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"container/list"
	"errors"
	"os"
	"sync"
	"time"
)

const (
	// recheckAfter is how long a file is trusted to be unchanged.
	recheckAfter = time.Second
	// closeIdleAfter is when a descriptor that nobody has used is closed: it keeps a
	// deleted file's blocks allocated, and a container's file system mounted.
	closeIdleAfter = 2 * time.Minute
)

// files keeps a bounded number of descriptors open.
type files struct {
	mu     sync.Mutex
	max    int
	lru    *list.List // of *openFile with a descriptor, the newest use first
	closed bool
}

func (c *files) init(max int) { c.max, c.lru = max, list.New() }

func (c *files) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lru.Len()
}

// trim takes out what is over the bound or idle. The caller closes it without the lock:
// on a file system in user space even a close can block.
func (c *files) trim(now time.Time) (victims []*os.File) {
	for el := c.lru.Back(); el != nil; {
		f, prev := el.Value.(*openFile), el.Prev()
		if c.lru.Len() <= c.max && now.Sub(f.used) < closeIdleAfter {
			break
		}
		if f.pins == 0 {
			victims = append(victims, f.detach())
		}
		el = prev
	}
	return victims
}

func (c *files) close() error {
	c.mu.Lock()
	c.closed = true
	var victims []*os.File
	for el := c.lru.Front(); el != nil; {
		f, next := el.Value.(*openFile), el.Next()
		victims = append(victims, f.detach())
		el = next
	}
	c.mu.Unlock()
	return closeAll(victims)
}

func closeAll(fs []*os.File) error {
	var errs []error
	for _, f := range fs {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// openFile is one version of a file. Its descriptor comes and goes. All fields below
// cache and id are guarded by cache.mu.
type openFile struct {
	cache *files
	id    fileID

	open    func() (*os.File, error)
	file    *os.File
	el      *list.Element
	pins    int       // readers that are using file
	used    time.Time // by a reader
	checked time.Time // when the identity was last seen to be id
	broken  error     // the file is another one now: for good
}

// Size is the size when the file was first seen.
func (f *openFile) Size() int64 { return f.id.size }

// adopt takes over file, just opened by open and found to be of this identity.
func (f *openFile) adopt(open func() (*os.File, error), file *os.File) {
	now := time.Now()
	c := f.cache
	c.mu.Lock()
	f.open = open // the newest is the likeliest to work: its process lives
	f.checked = now
	surplus := file
	if f.file == nil && !c.closed && f.broken == nil {
		f.attach(file, now)
		surplus = nil
	}
	victims := c.trim(now)
	c.mu.Unlock()
	if surplus != nil {
		victims = append(victims, surplus)
	}
	closeAll(victims)
}

func (f *openFile) attach(file *os.File, now time.Time) {
	f.file, f.used = file, now
	f.el = f.cache.lru.PushFront(f)
}

func (f *openFile) detach() *os.File {
	file := f.file
	f.cache.lru.Remove(f.el)
	f.file, f.el = nil, nil
	return file
}

func (f *openFile) close() {
	c := f.cache
	c.mu.Lock()
	var file *os.File
	if f.file != nil && f.pins == 0 {
		file = f.detach()
	}
	c.mu.Unlock()
	if file != nil {
		file.Close()
	}
}

// ReadAt implements io.ReaderAt. It opens the file again where its descriptor was given
// up, and fails for good once the file is no longer the version it was.
func (f *openFile) ReadAt(p []byte, off int64) (int, error) {
	file, err := f.acquire()
	if err != nil {
		return 0, err
	}
	defer f.release()
	return file.ReadAt(p, off)
}

func (f *openFile) acquire() (*os.File, error) {
	now := time.Now()
	c := f.cache
	c.mu.Lock()
	for f.file == nil || f.broken != nil {
		open, err := f.open, f.broken
		if c.closed {
			err = errClosed
		}
		c.mu.Unlock()
		if err != nil {
			return nil, err
		}
		file, err := open()
		if err != nil {
			return nil, err
		}
		id, err := identify(file)
		if err != nil {
			file.Close()
			return nil, err
		}
		c.mu.Lock()
		switch {
		case id != f.id:
			f.broken = errorf(ReasonChanged, "file is another version now")
			fallthrough
		case f.file != nil || c.closed:
			c.mu.Unlock()
			file.Close()
			c.mu.Lock()
		default:
			f.attach(file, now)
			f.checked = now
		}
	}
	file := f.file
	f.pins++
	f.used = now
	c.lru.MoveToFront(f.el)
	check := now.Sub(f.checked) >= recheckAfter
	victims := c.trim(now)
	c.mu.Unlock()
	closeAll(victims)
	if check {
		if err := f.recheck(file, now); err != nil {
			f.release()
			return nil, err
		}
	}
	return file, nil
}

func (f *openFile) recheck(file *os.File, now time.Time) error {
	id, err := identify(file)
	f.cache.mu.Lock()
	defer f.cache.mu.Unlock()
	if err == nil && id != f.id {
		err = errorf(ReasonChanged, "file was written to")
		f.broken = err
	}
	f.checked = now
	return err
}

func (f *openFile) release() {
	c := f.cache
	c.mu.Lock()
	f.pins--
	var file *os.File
	if f.file != nil && f.pins == 0 && f.broken != nil {
		file = f.detach()
	}
	c.mu.Unlock()
	if file != nil {
		file.Close()
	}
}

// memory bounds what the tables take together.
type memory struct {
	mu               sync.Mutex
	limit, total     int64
	lru              *list.List // of *resident, the newest use first
	closed           bool
	loads, evictions uint64
}

// resident is one evictable piece of memory. Its fields are guarded by memory.mu.
type resident struct {
	bytes int64
	el    *list.Element
	gone  bool
	drop  func() // forgets the piece; must not block, those who are using it finish with it
}

func (m *memory) init(limit int64) { m.limit, m.lru = limit, list.New() }

// set says that r is in use and takes so many bytes, and makes room by dropping others.
func (m *memory) set(r *resident, bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.gone {
		return
	}
	if m.closed {
		r.gone = true
		r.drop()
		return
	}
	if r.el == nil {
		r.el = m.lru.PushFront(r)
		m.loads++
	} else {
		m.lru.MoveToFront(r.el)
	}
	m.total += bytes - r.bytes
	r.bytes = bytes
	for m.total > m.limit && m.lru.Len() > 0 {
		m.evict(m.lru.Back().Value.(*resident))
		m.evictions++
	}
}

func (m *memory) evict(r *resident) {
	m.lru.Remove(r.el)
	m.total -= r.bytes
	r.gone = true
	r.drop()
}

func (m *memory) remove(r *resident) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.el != nil && !r.gone {
		m.evict(r)
	}
}

func (m *memory) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	for m.lru.Len() > 0 {
		m.evict(m.lru.Back().Value.(*resident))
	}
}

func (m *memory) stats() (n int, bytes int64, loads, evictions uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lru.Len(), m.total, m.loads, m.evictions
}
