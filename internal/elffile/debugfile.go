// SPDX-License-Identifier: Apache-2.0

package elffile

import (
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	debugDirectory = "/usr/lib/debug"
	minBuildID     = 8       // bytes
	maxChecked     = 1 << 30 // bytes read of a debug file to compare its checksum
)

// DebugFile is a place where a debug file can be: a path below a root directory.
type DebugFile struct{ Root, Path string }

// Open opens what is there, if it is a regular file within the root.
func (d DebugFile) Open() (*os.File, error) { return OpenBelow(d.Root, d.Path, nil) }

// DebugFiles are the places where a file's separate debug file can be, as GDB has them
// ("Debugging Information in Separate Files"): by build id, else by the name in
// .gnu_debuglink beside the file, in .debug beside it, and below /usr/lib/debug. With a
// build id it is the caller's to compare that of what is found; without, the checksum.
func DebugFiles(roots []string, file, buildID, link string) []DebugFile {
	var paths []string
	if p := BuildIDPath(buildID); p != "" {
		paths = append(paths, p)
	}
	if dir := filepath.Dir(file); link != "" && filepath.IsAbs(file) {
		paths = append(paths, filepath.Join(dir, link), filepath.Join(dir, ".debug", link), filepath.Join(debugDirectory, dir, link))
	}
	var found []DebugFile
	for _, root := range roots {
		for _, p := range paths {
			if p != file { // a link to itself
				found = append(found, DebugFile{root, p})
			}
		}
	}
	return found
}

// OpenDebugFile opens the first of DebugFiles that is there, and has the link's checksum where
// there is no build id to compare.
func OpenDebugFile(roots []string, file, buildID, link string, crc uint32) (*os.File, int64, error) {
	for _, d := range DebugFiles(roots, file, buildID, link) {
		f, err := d.Open()
		if err != nil {
			continue
		}
		info, err := f.Stat()
		if err == nil && (buildID != "" || SumMatches(sizedFile{f, info.Size()}, crc)) {
			return f, info.Size(), nil
		}
		f.Close()
	}
	return nil, 0, fmt.Errorf("open debug file of %s: %w", file, fs.ErrNotExist)
}

// BuildIDPath is where the debug file of a build id is, or empty: an id is hex digits, and
// nothing else goes into a path.
func BuildIDPath(id string) string {
	if len(id) < 2*minBuildID || len(id) > 2*MaxBuildID {
		return ""
	}
	for _, c := range []byte(id) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return ""
		}
	}
	return filepath.Join(debugDirectory, ".build-id", id[:2], id[2:]+".debug")
}

// SumMatches compares a file's CRC-32 with the one in .gnu_debuglink. Files of more than
// 1 GiB are not read.
func SumMatches(c Content, crc uint32) bool {
	if c.Size() > maxChecked {
		return false
	}
	h := crc32.NewIEEE()
	_, err := io.CopyBuffer(struct{ io.Writer }{h}, io.NewSectionReader(c, 0, c.Size()), make([]byte, 64<<10))
	return err == nil && h.Sum32() == crc
}

// OpenBelow opens a regular file by its path under a root directory, never outside of it,
// whatever links lead there. With meant, the file must be the one that is.
func OpenBelow(root, path string, meant func(*unix.Stat_t) bool) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", root, err)
	}
	defer unix.Close(dir)
	return OpenRegular(dir, path, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS, meant)
}

// OpenRegular opens a file by openat2(2) with some RESOLVE flags. Nothing but a regular file
// is opened for reading, as that can have effects.
func OpenRegular(dir int, path string, resolve uint64, meant func(*unix.Stat_t) bool) (*os.File, error) {
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: resolve})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, Errorf(NotRegular, "open %s: not a regular file", path)
	}
	if meant != nil && !meant(&st) {
		return nil, fmt.Errorf("open %s: %w: another file is there now", path, fs.ErrNotExist)
	}
	// os.OpenFile would try to have it polled.
	readable, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return os.NewFile(uintptr(readable), path), nil
}
