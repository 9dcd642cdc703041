// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/elffile"
)

const (
	debugDirectory = "/usr/lib/debug"
	maxChecked     = 1 << 30 // bytes read of a debug file to compare its checksum
)

// debugCandidate is a place where a debug file can be.
type debugCandidate struct{ root, path string }

// debugCandidates are the places where a file's separate debug file can be, as GDB has
// them ("Debugging Information in Separate Files"): by build id, else by the name in
// .gnu_debuglink beside the file, in .debug beside it, and below /usr/lib/debug.
func debugCandidates(roots []string, file, buildID, link string) []debugCandidate {
	var paths []string
	if p := buildIDPath(buildID); p != "" {
		paths = append(paths, p)
	}
	if dir := filepath.Dir(file); link != "" && filepath.IsAbs(file) {
		paths = append(paths, filepath.Join(dir, link), filepath.Join(dir, ".debug", link), filepath.Join(debugDirectory, dir, link))
	}
	var found []debugCandidate
	for _, root := range roots {
		for _, p := range paths {
			if p != file { // a link to itself
				found = append(found, debugCandidate{root, p})
			}
		}
	}
	return found
}

// buildIDPath is where the debug file of a build id is, or empty: an id is hex digits, and
// nothing else goes into a path.
func buildIDPath(id string) string {
	if len(id) < 2*minBuildID || len(id) > 128 {
		return ""
	}
	for _, c := range []byte(id) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return ""
		}
	}
	return filepath.Join(debugDirectory, ".build-id", id[:2], id[2:]+".debug")
}

const minBuildID = 8 // bytes

// OpenBelow opens a regular file by its path under a root directory, never outside of it,
// whatever links lead there. Nothing but a regular file is opened for reading, as that can have effects.
func OpenBelow(root, path string) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", root, err)
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errorf(ReasonNotRegular, "open %s: not a regular file", path)
	}
	return os.Open("/proc/self/fd/" + strconv.Itoa(fd))
}

// sumMatches compares a file's CRC-32 with the one in .gnu_debuglink.
func sumMatches(c Content, crc uint32) bool {
	if c.Size() > maxChecked {
		return false
	}
	h := crc32.NewIEEE()
	_, err := io.CopyBuffer(struct{ io.Writer }{h}, io.NewSectionReader(c, 0, c.Size()), make([]byte, 64<<10))
	return err == nil && h.Sum32() == crc
}

// findDebug returns the object of the first candidate that matches, nil if none does.
func (o *Object) findDebug(secs []elffile.Section) *Object {
	link, crc := o.image.DebugLink(secs)
	for _, c := range debugCandidates(o.file.Roots, o.file.Path, o.image.BuildID, link) {
		d, err := o.sym.object(File{
			Path:  c.path,
			Open:  func() (*os.File, error) { return OpenBelow(c.root, c.path) },
			Roots: o.file.Roots,
		}, roleDebug)
		if err != nil || d.image.Machine != o.image.Machine || d.image.Is64 != o.image.Is64 {
			continue
		}
		if o.image.BuildID != "" && d.image.BuildID == o.image.BuildID ||
			o.image.BuildID == "" && sumMatches(d.image.Content, crc) {
			return d
		}
	}
	return nil
}

// findAlt opens the file that dwz moved common debug information to: by build id, or by its
// path, which can be relative to the debug file's directory.
func (o *Object) findAlt(path, buildID string) (*os.File, error) {
	paths := []string{buildIDPath(buildID), path}
	if !filepath.IsAbs(path) {
		paths[1] = filepath.Join(filepath.Dir(o.file.Path), path)
	}
	for _, root := range o.file.Roots {
		for _, p := range paths {
			if p == "" {
				continue
			}
			if f, err := OpenBelow(root, p); err == nil {
				return f, nil
			}
		}
	}
	return nil, fmt.Errorf("open %s: %w", path, fs.ErrNotExist)
}
