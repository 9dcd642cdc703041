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
	"github.com/hostflame/hostflame/internal/elffile"
)

// vma is one executable mapping of a process.
type vma struct {
	start, end, offset uint64
	major, minor       uint32
	inode              uint64 // 0: anonymous
	path               string // as the process sees it; "" or a name in brackets where there is no file
	mtime              uint64 // of the file, ns since 1970; 0: not known
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
	dir, err := p.dir(PID(s.PID))
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	r, err := p.read(dir, TID(s.TID))
	switch {
	case err != nil:
		return nil, err
	case r.start != s.Start/nanosPerTick, len(r.vmas) == 0:
		return nil, errExited
	case r.comm != s.Comm:
		return nil, errReplaced
	}
	return r.vmas, nil
}

// reading is what /proc tells of a process.
type reading struct {
	procStat
	vmas []vma
}

// readProcess reads the mappings and state of a process. The main thread can be gone
// before the others; then tid, if it is one of them, tells the mappings.
func (p *procfs) readProcess(pid PID, tid TID) (reading, error) {
	dir, err := p.dir(pid)
	if err != nil {
		return reading{}, err
	}
	defer unix.Close(dir)
	return p.read(dir, tid)
}

func (p *procfs) dir(pid PID) (int, error) {
	dir, err := unix.Open(filepath.Join(p.root, strconv.FormatUint(uint64(pid), 10)), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, procError(err)
	}
	return dir, nil
}

func (p *procfs) read(dir int, tid TID) (r reading, err error) {
	root := p.readRoot(dir)
	r.vmas, err = p.readMaps(dir, "maps", root)
	if err == nil && len(r.vmas) == 0 && tid != 0 {
		r.vmas, err = p.readMaps(dir, fmt.Sprintf("task/%d/maps", tid), root)
	}
	if err != nil {
		return reading{}, procError(err)
	}
	// After the maps: an execve in between must show here, by the name.
	if r.procStat, err = p.readStat(dir); err != nil {
		return reading{}, procError(err)
	}
	return r, nil
}

// readRoot returns the root directory of a process where that is another one than ours, in
// the same mount namespace: the kernel shows us its paths from our root.
func (p *procfs) readRoot(dir int) string {
	var buf [512]byte
	n, err := unix.Readlinkat(dir, "root", buf[:])
	if err != nil || n == len(buf) || n == 1 {
		return ""
	}
	return string(buf[:n])
}

// pids lists the processes.
func (p *procfs) pids() ([]PID, error) {
	dir, err := os.Open(p.root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	var pids []PID
	for _, name := range names {
		if pid, err := strconv.ParseUint(name, 10, 32); err == nil {
			pids = append(pids, PID(pid))
		}
	}
	return pids, err
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

func (p *procfs) readMaps(dir int, name, root string) ([]vma, error) {
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
		if inside, ok := bytes.CutPrefix(path, []byte(root)); ok && root != "" && len(inside) > 0 && inside[0] == '/' {
			path = inside
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
const (
	userHZ       = 100
	nanosPerTick = 1e9 / userHZ
)

// procStat is what we want of /proc/PID/stat.
type procStat struct {
	comm    bpf.Comm // of the leader
	kernel  bool     // a kernel thread
	threads int      // those that have not ended, and the leader in any case
	start   uint64   // ticks of the boot clock
}

func (p *procfs) readStat(dir int) (procStat, error) {
	f, err := openAt(dir, "stat")
	if err != nil {
		return procStat{}, err
	}
	defer f.Close()
	var buf [1024]byte
	n, err := f.Read(buf[:])
	if err != nil {
		return procStat{}, err
	}
	return parseStat(buf[:n])
}

// parseStat parses /proc/PID/stat: fields 2, 9, 20 and 22 of proc(5).
func parseStat(stat []byte) (s procStat, err error) {
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return s, fmt.Errorf("parse stat: no name in %q", stat)
	}
	s.comm = bpf.MakeComm(string(stat[open+1 : end]))
	fields := bytes.Fields(stat[end+1:])
	// The first field here is the third.
	const flags, threads, start = 9 - 3, 20 - 3, 22 - 3
	if len(fields) <= start {
		return s, fmt.Errorf("parse stat: %d fields", len(fields))
	}
	var numbers [3]uint64
	for i, field := range []int{flags, threads, start} {
		if numbers[i], err = strconv.ParseUint(string(fields[field]), 10, 63); err != nil {
			return s, fmt.Errorf("parse stat: %w", err)
		}
	}
	const kernelThread = 0x00200000 // PF_KTHREAD
	s.kernel = numbers[0]&kernelThread != 0
	s.threads, s.start = int(numbers[1]), numbers[2]
	return s, nil
}

// open opens the very file that a process has mapped, if it is a regular file: by the
// mapping itself, which works for files that were deleted or belong to another mount
// namespace; where that is closed to us or the process is gone, by its path, if the file
// there is the same one. It may be called from any goroutine.
func (p *procfs) open(pid PID, v vma) (*os.File, error) {
	f, err := p.openMapped(pid, v.start, v.end, v)
	if err == nil || !strings.HasPrefix(v.path, "/") {
		return f, err
	}
	for _, root := range []string{p.rootOf(pid), "/"} {
		if f, err2 := openIn(root, v); err2 == nil {
			return f, nil
		} else if !errors.Is(err2, fs.ErrNotExist) {
			err = err2
		}
	}
	return nil, err
}

func (p *procfs) rootOf(pid PID) string {
	return filepath.Join(p.root, strconv.FormatUint(uint64(pid), 10), "root")
}

// openMapped opens the file that a process has mapped from start to end, if it is that of v.
func (p *procfs) openMapped(pid PID, start, end uint64, v vma) (*os.File, error) {
	path := fmt.Sprintf("%s/%d/map_files/%x-%x", p.root, pid, start, end)
	return elffile.OpenRegular(unix.AT_FDCWD, path, 0, v.isMapped)
}

// openIn opens the path of a mapping under a root directory, never outside of it, if the
// file there is that of the mapping.
func openIn(root string, v vma) (*os.File, error) {
	return elffile.OpenBelow(root, strings.TrimSuffix(v.path, deletedSuffix), v.isNamed)
}

// isMapped tells whether a file that is mapped where v was can be that of v. A file system
// on a device of its own (overlay, a btrfs subvolume) shows other devices, and sometimes
// inodes, than the mappings of its files do.
func (v *vma) isMapped(st *unix.Stat_t) bool {
	device := unix.Mkdev(v.major, v.minor)
	return st.Ino == v.inode && st.Dev == device || st.Dev != device && unix.Major(st.Dev) == 0
}

// isNamed tells whether a file that has the path of v is that of v.
func (v *vma) isNamed(st *unix.Stat_t) bool {
	switch {
	case v.mtime != 0 && uint64(st.Mtim.Nano()) != v.mtime:
		return false
	case st.Dev == unix.Mkdev(v.major, v.minor):
		return st.Ino == v.inode
	case unix.Major(st.Dev) != 0:
		return false
	}
	// Overlay can have the number of the layer in the high bits.
	return uint32(st.Ino) == uint32(v.inode)
}
