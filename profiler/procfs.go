// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
)

// vma is one executable mapping of a process, as /proc/PID/maps shows it.
type vma struct {
	start, end, offset uint64
	major, minor       uint32
	inode              uint64 // 0: anonymous
	path               string // "" or a name in brackets where there is no file
}

// deletedSuffix is what the kernel adds to the path of a file that has no name any more.
const deletedSuffix = " (deleted)"

// Why the mappings of a process can not be had.
var (
	errExited   = errors.New("process has exited")
	errReplaced = errors.New("process has executed another program")
)

// maxVMAs bounds what is kept of a process.
const maxVMAs = 16 << 10

// procfs reads processes from a proc file system. It is for one goroutine, except open.
type procfs struct {
	root   string // "/proc"
	buffer *bufio.Reader
	paths  map[string]string // so that a path is kept once, not once a process
}

func newProcfs(root string) *procfs {
	return &procfs{root: root, buffer: bufio.NewReaderSize(nil, 64<<10), paths: map[string]string{}}
}

// mappings returns the executable mappings, by address, of the program image that s was
// taken in. The errors are errExited and errReplaced, those of file permissions, or worse.
func (p *procfs) mappings(s *bpf.Sample) ([]vma, error) {
	// The directory stays that of this process, even when its id is used again meanwhile.
	dir, err := unix.Open(filepath.Join(p.root, strconv.FormatUint(uint64(s.PID), 10)), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, procError(err)
	}
	defer unix.Close(dir)
	vmas, err := p.readMaps(dir, "maps")
	if err == nil && len(vmas) == 0 {
		// The main thread can be gone before the others.
		vmas, err = p.readMaps(dir, fmt.Sprintf("task/%d/maps", s.TID))
	}
	if err != nil {
		return nil, procError(err)
	}
	// After the maps: an execve in between must show here, by the name.
	comm, start, err := p.readStat(dir)
	if err != nil {
		return nil, procError(err)
	}
	switch {
	case start != s.Start/(1e9/userHZ), len(vmas) == 0:
		return nil, errExited
	case comm != s.Comm:
		return nil, errReplaced
	}
	return vmas, nil
}

// procError tells the errors of a process that is gone from others.
func procError(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return errExited
	}
	return err
}

func openAt(dir int, name string) (*os.File, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (p *procfs) readMaps(dir int, name string) ([]vma, error) {
	f, err := openAt(dir, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p.buffer.Reset(f)
	var vmas []vma
	for {
		line, err := p.buffer.ReadSlice('\n')
		if err == io.EOF {
			return vmas, nil
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return nil, err
		}
		v, path, ok := parseMapsLine(line)
		if !ok || len(vmas) == maxVMAs {
			continue
		}
		v.path = p.intern(path)
		vmas = append(vmas, v)
	}
}

func (p *procfs) intern(path []byte) string {
	if s, ok := p.paths[string(path)]; ok {
		return s
	}
	if len(p.paths) >= 8<<10 {
		clear(p.paths)
	}
	s := string(path)
	// The kernel escapes newlines only.
	s = strings.ReplaceAll(s, `\012`, "\n")
	p.paths[string(path)] = s
	return s
}

// parseMapsLine parses a line of /proc/PID/maps; ok is false where the mapping is not
// executable or the line is not one. path is part of line.
func parseMapsLine(line []byte) (v vma, path []byte, ok bool) {
	field := func(sep byte) []byte {
		i := bytes.IndexByte(line, sep)
		if i < 0 {
			return nil
		}
		f := line[:i]
		line = line[i+1:]
		return f
	}
	line = bytes.TrimSuffix(line, []byte{'\n'})
	start, end, perms := field('-'), field(' '), field(' ')
	if len(perms) < 4 || perms[2] != 'x' {
		return vma{}, nil, false
	}
	offset, major, minor := field(' '), field(':'), field(' ')
	// What is left is the inode, spaces, and the path if there is one.
	inode := line
	if i := bytes.IndexByte(line, ' '); i >= 0 {
		inode, path = line[:i], bytes.TrimLeft(line[i:], " ")
	}
	numbers := [...]struct {
		text []byte
		base int
		bits int
		to   *uint64
	}{{start, 16, 64, &v.start}, {end, 16, 64, &v.end}, {offset, 16, 64, &v.offset}, {inode, 10, 64, &v.inode}}
	for _, n := range numbers {
		var err error
		if *n.to, err = strconv.ParseUint(unsafeString(n.text), n.base, n.bits); err != nil {
			return vma{}, nil, false
		}
	}
	maj, err1 := strconv.ParseUint(unsafeString(major), 16, 32)
	min, err2 := strconv.ParseUint(unsafeString(minor), 16, 32)
	if err1 != nil || err2 != nil || v.start >= v.end {
		return vma{}, nil, false
	}
	v.major, v.minor = uint32(maj), uint32(min)
	return v, path, true
}

// unsafeString is b as a string for the length of a call that keeps nothing of it.
func unsafeString(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// userHZ is the rate of the clock ticks that the kernel shows to user space.
const userHZ = 100

// readStat returns the leader's name and the start time in ticks, of the boot clock.
func (p *procfs) readStat(dir int) (comm bpf.Comm, start uint64, err error) {
	f, err := openAt(dir, "stat")
	if err != nil {
		return comm, 0, err
	}
	defer f.Close()
	var buf [1024]byte
	n, err := f.Read(buf[:])
	if err != nil {
		return comm, 0, err
	}
	return parseStat(buf[:n])
}

// parseStat parses /proc/PID/stat: fields 2 and 22 of proc(5).
func parseStat(stat []byte) (comm bpf.Comm, start uint64, err error) {
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return comm, 0, fmt.Errorf("parse stat: no name in %q", stat)
	}
	comm = bpf.MakeComm(string(stat[open+1 : end]))
	fields := bytes.Fields(stat[end+1:])
	const starttime = 22 - 3 // the first field here is the third
	if len(fields) <= starttime {
		return comm, 0, fmt.Errorf("parse stat: %d fields", len(fields))
	}
	start, err = strconv.ParseUint(string(fields[starttime]), 10, 64)
	if err != nil {
		return comm, 0, fmt.Errorf("parse stat: %w", err)
	}
	return comm, start, nil
}

// open opens the very file that a process has mapped, if it is a regular file: by the
// mapping itself, which works for files that were deleted or belong to another mount
// namespace; where that is closed to us or the process is gone, by its path, if device
// and inode are those of the mapping. It may be called from any goroutine.
func (p *procfs) open(pid PID, v vma) (*os.File, error) {
	dir := filepath.Join(p.root, strconv.FormatUint(uint64(pid), 10))
	f, err := openRegular(unix.AT_FDCWD, fmt.Sprintf("%s/map_files/%x-%x", dir, v.start, v.end), &unix.OpenHow{Flags: unix.O_PATH}, nil)
	if err == nil || !strings.HasPrefix(v.path, "/") {
		return f, err
	}
	for _, root := range []string{filepath.Join(dir, "root"), "/"} {
		if f, err2 := p.openIn(root, v); err2 == nil {
			return f, nil
		} else if !errors.Is(err2, fs.ErrNotExist) {
			err = err2
		}
	}
	return nil, err
}

// openIn opens the path of a mapping under a root directory, never outside of it.
func (p *procfs) openIn(root string, v vma) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", root, err)
	}
	defer unix.Close(dir)
	path := strings.TrimSuffix(v.path, deletedSuffix)
	return openRegular(dir, path, &unix.OpenHow{Flags: unix.O_PATH, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}, &v)
}

// openRegular opens a file that turns out to be regular, and to be the one of v if v is
// given. Nothing but a regular file is opened for reading, as that can have effects.
func openRegular(dir int, path string, how *unix.OpenHow, v *vma) (*os.File, error) {
	how.Flags |= unix.O_CLOEXEC
	fd, err := unix.Openat2(dir, path, how)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("open %s: not a regular file", path)
	}
	if v != nil && (st.Ino != v.inode || unix.Major(st.Dev) != v.major || unix.Minor(st.Dev) != v.minor) {
		return nil, fmt.Errorf("open %s: %w: another file has this path now", path, fs.ErrNotExist)
	}
	f, err := os.OpenFile("/proc/self/fd/"+strconv.Itoa(fd), os.O_RDONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return f, nil
}
