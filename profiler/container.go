// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
)

const (
	// rootName is the container of what is in the root cgroup: the host's own.
	rootName = "/"
	// otherName stands for all containers, stacks or processes that there is no room for.
	otherName = "~other"
	// unknownName is the container of a cgroup that was removed before it could be named,
	// or that this process may not look up.
	unknownName = "~unknown"
)

// ContainerName is the container that a cgroup path belongs to: the first 12 hex digits of
// the innermost container id in it, else the systemd unit, else the path itself. The root
// is "/".
//
// A container id is 64 hex digits, alone or as part of a name, as Docker, containerd,
// CRI-O and Podman have it, or the 32 digits and a number of a Fargate task. The unit is
// the first element, from the root, that is one and not a slice, as for systemctl status.
func ContainerName(cgroup string) string {
	cgroup = path.Clean("/" + cgroup)
	elements := strings.Split(cgroup, "/")[1:]
	for _, e := range slices.Backward(elements) {
		if id := containerID(e); id != "" {
			return id
		}
	}
	for _, e := range elements {
		// systemd escapes names that could be a controller's with an underscore.
		if unit := strings.TrimPrefix(e, "_"); isUnit(unit) {
			return unit
		}
	}
	return cgroup
}

const shortID = 12

// containerID is the short container id in a path element, "" if there is none. The id
// stands alone or between separators: docker-ID.scope, cri-containerd:ID, ID.
func containerID(element string) string {
	for i := 0; i < len(element); {
		n := hexDigits(element[i:])
		end := i + n
		switch {
		case n == 64 && (i == 0 || strings.IndexByte("-:_.", element[i-1]) >= 0) && (end == len(element) || element[end] == '.'),
			n == 32 && i == 0 && isTaskNumber(element[end:]):
			return element[i : i+shortID]
		}
		i += n + 1
	}
	return ""
}

func hexDigits(s string) int {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return i
		}
	}
	return len(s)
}

// isTaskNumber tells whether s is the "-1234567890" after the id of a Fargate task.
func isTaskNumber(s string) bool {
	if len(s) < 2 || s[0] != '-' {
		return false
	}
	_, err := strconv.ParseUint(s[1:], 10, 64)
	return err == nil
}

func isUnit(s string) bool {
	i := strings.LastIndexByte(s, '.')
	if i <= 0 {
		return false
	}
	switch s[i+1:] {
	case "service", "scope", "socket", "mount", "swap":
		return true
	}
	return false
}

// Containers names the cgroups of one hierarchy. It may be used from any goroutine.
type Containers struct {
	proc  string
	v1    string // the controller whose hierarchy of v1 it is; the unified one if empty
	mount string
	root  string // the cgroup that is mounted there, "/" but in a container
	fd    int    // of the mount, -1 if there is none

	mu         sync.Mutex
	young, old map[uint64]string // names by cgroup id; old is dropped when young is full
}

// maxCachedNames bounds each of the two generations of names.
const maxCachedNames = 4096

// NewContainers finds the hierarchy that the kernel side takes cgroup ids from: that of the
// controller, cpu or blkio, where it is on v1 (bpf.ControllerV1), else the unified one.
// Without a mount of it names come from /proc/PID/cgroup alone.
func NewContainers(controller string) *Containers {
	if !bpf.ControllerV1(controller) {
		controller = ""
	}
	return newContainers("/proc", controller)
}

func newContainers(proc, v1 string) *Containers {
	c := &Containers{proc: proc, v1: v1, fd: -1, young: map[uint64]string{}}
	f, err := os.Open(filepath.Join(proc, "self/mountinfo"))
	if err != nil {
		return c
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		mount, root, ok := parseMountinfo(lines.Text(), v1)
		if !ok {
			continue
		}
		fd, err := unix.Open(mount, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		c.mount, c.root, c.fd = mount, root, fd
		break
	}
	return c
}

// Close gives up the mount. Names that are not cached are unknown from then on.
func (c *Containers) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return nil
	}
	fd := c.fd
	c.fd = -1
	return unix.Close(fd)
}

// parseMountinfo returns the mount point and the mounted root of a line of
// /proc/self/mountinfo (proc(5)), if it is of the wanted hierarchy.
func parseMountinfo(line, v1 string) (mount, root string, ok bool) {
	head, tail, found := strings.Cut(line, " - ")
	fields, kind := strings.Fields(head), strings.Fields(tail)
	if !found || len(fields) < 5 || len(kind) < 3 {
		return "", "", false
	}
	if v1 != "" {
		ok = kind[0] == "cgroup" && slices.Contains(strings.Split(kind[2], ","), v1)
	} else {
		ok = kind[0] == "cgroup2"
	}
	return unescapeMount(fields[4]), unescapeMount(fields[3]), ok
}

var mountReplacer = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

func unescapeMount(s string) string { return mountReplacer.Replace(s) }

// Name is the container of the cgroup with this kernfs id, in which the process pid was.
// The first call for a cgroup takes some system calls, and must come while the cgroup
// exists: else the name is "~unknown".
func (c *Containers) Name(cgroup uint64, pid PID) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if name, ok := c.young[cgroup]; ok {
		return name
	}
	name, ok := c.old[cgroup]
	if !ok {
		p, err := c.path(cgroup, pid)
		if err != nil {
			return unknownName
		}
		name = ContainerName(p)
	}
	// Ids are never used again, so a name stays right.
	if len(c.young) >= maxCachedNames {
		c.old, c.young = c.young, make(map[uint64]string, maxCachedNames)
	}
	c.young[cgroup] = name
	return name
}

func (c *Containers) path(cgroup uint64, pid PID) (string, error) {
	if c.fd >= 0 {
		if p, err := c.pathByHandle(cgroup); err == nil {
			return p, nil
		}
	}
	return c.pathByProcess(cgroup, pid)
}

// fileidKernfs is FILEID_KERNFS of include/linux/exportfs.h: a file handle that is the
// 64-bit kernfs id.
const fileidKernfs = 0xfe

// pathByHandle asks the cgroup file system itself. It needs CAP_DAC_READ_SEARCH.
func (c *Containers) pathByHandle(cgroup uint64) (string, error) {
	handle := unix.NewFileHandle(fileidKernfs, binary.NativeEndian.AppendUint64(nil, cgroup))
	fd, err := unix.OpenByHandleAt(c.fd, handle, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return "", fmt.Errorf("open cgroup %d: %w", cgroup, err)
	}
	defer unix.Close(fd)
	link, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", fmt.Errorf("read path of cgroup %d: %w", cgroup, err)
	}
	rest, ok := strings.CutPrefix(strings.TrimSuffix(link, deletedSuffix), c.mount)
	if !ok || (rest != "" && rest[0] != '/') {
		return "", fmt.Errorf("cgroup %d is outside of %s", cgroup, c.mount)
	}
	return path.Join(c.root, rest), nil
}

// pathByProcess takes the path of a process that was in the cgroup, if it still is.
func (c *Containers) pathByProcess(cgroup uint64, pid PID) (string, error) {
	b, err := os.ReadFile(filepath.Join(c.proc, strconv.FormatUint(uint64(pid), 10), "cgroup"))
	if err != nil {
		return "", err
	}
	p, ok := parseCgroup(string(b), c.v1)
	if !ok {
		return "", errors.New("no such hierarchy")
	}
	if c.fd >= 0 {
		var st unix.Stat_t
		rel := strings.TrimPrefix(strings.TrimPrefix(p, strings.TrimSuffix(c.root, "/")), "/")
		if err := unix.Fstatat(c.fd, filepath.Join(".", rel), &st, 0); err != nil {
			return "", err
		}
		if st.Ino != cgroup {
			return "", errors.New("process is in another cgroup now")
		}
	}
	return p, nil
}

// parseCgroup returns the path in /proc/PID/cgroup (cgroups(7)) of a controller of v1 or,
// where that is empty, of the unified hierarchy.
func parseCgroup(s, v1 string) (string, bool) {
	for line := range strings.Lines(s) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		if v1 != "" && slices.Contains(strings.Split(f[1], ","), v1) || v1 == "" && f[0] == "0" && f[1] == "" {
			return strings.TrimSuffix(f[2], deletedSuffix), true
		}
	}
	return "", false
}
