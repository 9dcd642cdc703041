// SPDX-License-Identifier: Apache-2.0

package profiler

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

// maxChecked bounds what is read of a debug file to compare its checksum.
const maxChecked = 1 << 30

// openDebugFile opens the separate debug file of a program, as GDB looks for it ("Debugging
// Information in Separate Files"): by build id, else by the link's name beside the program,
// in .debug beside it, and below /usr/lib/debug. It looks in the root of the process first
// and then in the host's, never outside of them. With a build id it is the caller's to
// compare that; without, the file's CRC is compared here.
func openDebugFile(pid PID, program, buildID, link string, crc uint32) (*os.File, int64, error) {
	const debug = "/usr/lib/debug"
	var paths []string
	if len(buildID) > 2 {
		paths = append(paths, filepath.Join(debug, ".build-id", buildID[:2], buildID[2:]+".debug"))
	}
	if dir := filepath.Dir(program); link != "" && filepath.IsAbs(program) {
		paths = append(paths, filepath.Join(dir, link), filepath.Join(dir, ".debug", link), filepath.Join(debug, dir, link))
	}
	for _, root := range rootsOf(pid) {
		for _, path := range paths {
			if path == program {
				continue // a link to itself
			}
			f, err := openBelow(root, path)
			if err != nil {
				continue
			}
			info, err := f.Stat()
			if err == nil && (buildID != "" || sumMatches(f, info.Size(), crc)) {
				return f, info.Size(), nil
			}
			f.Close()
		}
	}
	return nil, 0, fmt.Errorf("open debug file of %s: %w", program, fs.ErrNotExist)
}

// rootsOf are the directories below which files that a process speaks of are looked for.
func rootsOf(pid PID) []string {
	return []string{"/proc/" + strconv.FormatUint(uint64(pid), 10) + "/root", "/"}
}

// openBelow opens a regular file by its path under a root directory.
func openBelow(root, path string) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", root, err)
	}
	defer unix.Close(dir)
	how := unix.OpenHow{Flags: unix.O_PATH, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	return openRegular(dir, path, &how, func(*unix.Stat_t) bool { return true })
}

func sumMatches(f *os.File, size int64, crc uint32) bool {
	if size > maxChecked {
		return false
	}
	h := crc32.NewIEEE()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, size)); err != nil {
		return false
	}
	return h.Sum32() == crc
}
