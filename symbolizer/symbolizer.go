// SPDX-License-Identifier: Apache-2.0

// Package symbolizer turns addresses into functions and lines: addresses of ELF files
// (.symtab, .dynsym, Go's pclntab), of the kernel and its modules and BPF programs, of
// the vDSO, and of JIT code by perf maps. It is a leaf: of processes it knows no more
// than how to open what is mapped, and it never runs another program.
//
// Files of other containers are hostile input. Only regular files are read, by pread and
// never by mmap (a truncated file would be a SIGBUS); every count and offset is checked
// against the size of the file before memory is reserved; names are cut at a length that
// the demangler can take, and are valid UTF-8 without control characters.
//
// What could not be found is an answer with a Reason, not an error.
package symbolizer

import (
	"container/list"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/hostflame/hostflame/internal/elffile"
)

// Line is one function at an address. Function is demangled, without parameters;
// SystemName is the name in the symbol table. Line and StartLine are 0, and File is empty,
// where the source knows no lines.
type Line struct {
	Function   string
	SystemName string
	File       string
	Line       int64 // source line of the address, or of the call for an inlined-into function
	StartLine  int64 // line where the function starts
}

// Result is the answer for one address: the inlined functions first, innermost first,
// then the function that they were inlined into. Lines is shared with later answers and
// must not be changed. Reason is empty exactly when there are Lines.
type Result struct {
	Lines  []Line
	Reason Reason

	// Module is, for kernel addresses, what the code is of: "[kernel.kallsyms]", or the name
	// of the module in brackets; "[bpf]" are BPF programs and trampolines.
	Module string

	// Provisional: the debug information is still being read. Later answers can have lines
	// and inlined functions where this has none.
	Provisional bool

	exact bool // the debug information has nothing to add
	made  bool // the name is made up from another, or from the address
}

// Reason says why there is no line. The values are fit to be metric labels.
type Reason = elffile.Reason

// The reasons.
const (
	ReasonNotFound     = Reason("not_found")         // there are symbols, but none covers the address
	ReasonNoSymbols    = Reason("no_symbols")        // the file has no symbol table that we read
	ReasonUnreadable   = Reason("unreadable")        // opening or reading failed; for a perf map: the process has gone
	ReasonNoPermission = Reason("no_permission")     // as ReasonUnreadable, for want of a capability; kernel: no CAP_SYSLOG, or kptr_restrict
	ReasonNotRegular   = elffile.NotRegular          // a device, FIFO, directory or socket
	ReasonMalformed    = Reason("malformed")         // not ELF, or its headers contradict its size
	ReasonUnsupported  = Reason("unsupported")       // an ELF file of a kind that cannot run here: big-endian, an object file
	ReasonTooLarge     = Reason("too_large")         // over a limit of Config
	ReasonChanged      = Reason("file_changed")      // written to since it was first seen
	ReasonNoPerfMap    = Reason("no_perf_map")       // the process has not written one
	ReasonUntrusted    = Reason("untrusted_file")    // a perf map that belongs to neither the process's user nor root
	ReasonStale        = Reason("stale_perf_map")    // a perf map last written before the process started
	ReasonClosed       = Reason("symbolizer_closed") // after Close
)

// Error is why a file is of no use. It carries the Reason that its frames get.
type Error = elffile.Error

func errorf(r Reason, format string, args ...any) *Error { return elffile.Errorf(r, format, args...) }

// ReasonOf is the Reason that err carries, else ReasonNoPermission for an access error and
// ReasonUnreadable for any other. It is empty for nil.
func ReasonOf(err error) Reason {
	var e *Error
	switch {
	case err == nil:
		return ""
	case errors.As(err, &e):
		return e.Reason
	case errors.Is(err, fs.ErrPermission):
		return ReasonNoPermission
	}
	return ReasonUnreadable
}

// File says how a binary is named and opened.
type File struct {
	// Path is for people, as the process sees it. It is not opened.
	Path string
	// Open opens the very file that is mapped (/proc/PID/map_files, /proc/PID/root + path,
	// a pinned descriptor), with O_NONBLOCK where it could be a FIFO. It can be called at
	// any later time and from any goroutine; what it returns is the symbolizer's to close.
	Open func() (*os.File, error)
	// Roots are the directories below which separate debug files are looked for, in this
	// order: the root of a process that maps the file, the host's. Without, there are none.
	Roots []string
}

// Segment is one PT_LOAD of an ELF file.
type Segment = elffile.Segment

// Config holds the limits. The zero value of a field stands for its default.
type Config struct {
	Proc          string // where procfs is mounted; /proc
	Sys           string // where sysfs is mounted; /sys
	Root          string // below which the kernel's debug information is looked for; /
	MaxObjects    int    // files known by identity, those that failed included; 4096
	MaxFiles      int    // descriptors kept open; 512
	MaxTableBytes int64  // symbol tables, names and perf maps together; 32 MiB. The kernel's table is not counted (about 24 bytes a symbol)

	// Cache keeps what was made of debug information; nil: for as long as it is used.
	Cache        *Cache
	IndexWorkers int           // threads that read debug information; 1
	IndexTimeout time.Duration // to give a file up after; 5 minutes
	// Debuginfod, if it has URLs, is asked for debug files that are not on the host. It needs
	// a Cache.
	Debuginfod Debuginfod
	// WaitForIndex makes Symbolize wait for the debug information: no result is
	// Provisional. Without, it is read by threads that give way to all others.
	WaitForIndex bool
}

func (c *Config) setDefaults() {
	if c.Proc == "" {
		c.Proc = "/proc"
	}
	if c.Sys == "" {
		c.Sys = "/sys"
	}
	if c.Root == "" {
		c.Root = "/"
	}
	if c.MaxObjects <= 0 {
		c.MaxObjects = 4096
	}
	if c.MaxFiles <= 0 {
		c.MaxFiles = 512
	}
	if c.MaxTableBytes <= 0 {
		c.MaxTableBytes = 32 << 20
	}
	if c.IndexWorkers <= 0 {
		c.IndexWorkers = 1
	}
	if c.IndexTimeout <= 0 {
		c.IndexTimeout = 5 * time.Minute
	}
}

// Symbolizer holds the caches. Its methods, and those of what it hands out, may be called
// from any goroutine.
type Symbolizer struct {
	cfg    Config
	files  files
	memory memory
	kernel kernel
	index  indexer
	remote fetcher

	bigTable sync.Mutex // held while a big symbol table is read

	mu       sync.Mutex
	closed   bool
	objects  map[objectKey]*list.Element // of *entry
	recent   *list.List                  // the newest use first
	perfMaps map[uint32]*list.Element    // of *PerfMap, by pid
	recentPM *list.List
	vdso     *Object
}

// entry is a file that was looked at: an object, or why it is none.
type entry struct {
	key    objectKey
	object *Object
	err    error
}

// objectKey is what an object is known by.
type objectKey struct {
	file fileID
	role role
}

// New makes a Symbolizer. Nothing is read before it is asked for.
func New(cfg Config) *Symbolizer {
	cfg.setDefaults()
	s := &Symbolizer{
		cfg:      cfg,
		objects:  map[objectKey]*list.Element{},
		recent:   list.New(),
		perfMaps: map[uint32]*list.Element{},
		recentPM: list.New(),
	}
	s.files.init(cfg.MaxFiles)
	s.memory.init(cfg.MaxTableBytes)
	s.kernel.init(s)
	s.index.init(cfg)
	s.remote.init(cfg)
	return s
}

// Close closes all files. Objects and perf maps that are still held answer with
// ReasonClosed from then on. It is idempotent.
func (s *Symbolizer) Close() error {
	s.mu.Lock()
	s.closed = true
	var maps []*PerfMap
	for _, el := range s.perfMaps {
		maps = append(maps, el.Value.(*PerfMap))
	}
	clear(s.objects)
	clear(s.perfMaps)
	s.recent.Init()
	s.recentPM.Init()
	s.vdso = nil
	s.mu.Unlock()
	for _, pm := range maps {
		pm.retire(ReasonClosed)
	}
	s.remote.close()
	s.index.close()
	s.memory.close()
	return s.files.close()
}

var errClosed = errorf(ReasonClosed, "symbolizer is closed")

// Object returns the ELF file that f opens. Only headers are read, at once, so that build
// id and segments are known while the process lives; the file is kept open for the tables
// (a bounded number of files is, the least recently used are opened again by f.Open). The
// same file, by device, inode, size and modification time, is the same Object. What
// fails carries a Reason (see ReasonOf) and is remembered too, except for a failing Open.
func (s *Symbolizer) Object(f File) (*Object, error) { return s.object(f, roleMapped) }

func (s *Symbolizer) object(f File, r role) (*Object, error) {
	file, err := f.Open()
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", f.Path, err)
	}
	id, err := identify(file)
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("open %s: %w", f.Path, err)
	}
	key := objectKey{id, r}
	if e, err := s.known(key); err != nil || e != nil {
		if err == nil && e.err == nil {
			e.object.image.Content.(*openFile).adopt(f.Open, file)
			return e.object, nil
		}
		file.Close()
		if err == nil {
			err = e.err
		}
		return nil, err
	}
	content := &openFile{cache: &s.files, id: id, open: f.Open}
	content.adopt(f.Open, file)
	e := &entry{key: key}
	parse := elffile.Parse
	if r == roleModule {
		parse = elffile.ParseObject
	}
	if img, err := parse(content); err != nil {
		e.err = fmt.Errorf("parse %s: %w", f.Path, err)
	} else {
		e.object = &Object{sym: s, image: img, file: f, role: r}
	}
	if e.err != nil {
		content.close()
		if r := ReasonOf(e.err); r == ReasonUnreadable || r == ReasonNoPermission {
			return nil, e.err // the reading failed, not the file: worth another try
		}
	}
	e = s.remember(e)
	return e.object, e.err
}

// known returns what is remembered of a file, nil if nothing is.
func (s *Symbolizer) known(key objectKey) (*entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	el := s.objects[key]
	if el == nil {
		return nil, nil
	}
	s.recent.MoveToFront(el)
	return el.Value.(*entry), nil
}

// remember stores e, or returns what another goroutine has stored meanwhile.
func (s *Symbolizer) remember(e *entry) *entry {
	var dropped []*entry
	s.mu.Lock()
	if el := s.objects[e.key]; el != nil {
		dropped = append(dropped, e)
		e = el.Value.(*entry)
	} else if !s.closed {
		s.objects[e.key] = s.recent.PushFront(e)
		for s.recent.Len() > s.cfg.MaxObjects {
			old := s.recent.Remove(s.recent.Back()).(*entry)
			delete(s.objects, old.key)
			dropped = append(dropped, old)
		}
	}
	s.mu.Unlock()
	// A dropped object still works for those who hold it: it opens its file again.
	for _, d := range dropped {
		if d.object != nil && d.object != e.object {
			d.object.image.Content.(*openFile).close()
		}
	}
	return e
}

// fileID is the identity of one version of a file.
type fileID struct {
	dev, ino    uint64
	size, mtime int64 // bytes, Unix ns
}

func identify(f *os.File) (fileID, error) {
	fi, err := f.Stat()
	if err != nil {
		return fileID{}, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.Mode().IsRegular() {
		return fileID{}, errorf(ReasonNotRegular, "not a regular file")
	}
	return fileID{dev: uint64(st.Dev), ino: st.Ino, size: fi.Size(), mtime: fi.ModTime().UnixNano()}, nil
}

// Stats is what the symbolizer holds and has done.
type Stats struct {
	Objects    int    // files known, those that failed included
	OpenFiles  int    // descriptors kept open
	Tables     int    // files and perf maps with tables in memory
	TableBytes int64  // of them
	TableLimit int64  // MaxTableBytes
	TableLoads uint64 // tables read, again after an eviction too
	Evictions  uint64 // tables dropped to stay within MaxTableBytes
	PerfMaps   int    // processes whose perf map is followed
	Kernel     KernelStats
	Index      IndexStats
}

// Stats returns current figures.
func (s *Symbolizer) Stats() Stats {
	var st Stats
	s.mu.Lock()
	st.Objects, st.PerfMaps = s.recent.Len(), s.recentPM.Len()
	s.mu.Unlock()
	st.OpenFiles = s.files.count()
	st.Tables, st.TableBytes, st.TableLoads, st.Evictions = s.memory.stats()
	st.Kernel = s.kernel.stats()
	st.TableLimit = s.cfg.MaxTableBytes
	st.Index = s.index.snapshot()
	return st
}

func (s *Symbolizer) proc(elem ...string) string {
	return filepath.Join(append([]string{s.cfg.Proc}, elem...)...)
}
