// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// initramfs is an archive in the format of cpio -H newc, the one that the kernel unpacks
// at boot (Documentation/driver-api/early-userspace/buffer-format.rst).
type initramfs struct {
	mtime time.Time // of all files
	buf   bytes.Buffer
	inode int
	dirs  map[string]bool
}

// Modes of newc are those of stat(2).
const (
	modeDir  = 0o040000
	modeFile = 0o100000
)

// add puts a file with its folders into the archive. name is absolute.
func (a *initramfs) add(name string, perm fs.FileMode, data []byte) {
	a.mkdir(path.Dir(name))
	a.entry(name, modeFile|uint32(perm.Perm()), data)
}

// addFile puts a file of this machine into the archive.
func (a *initramfs) addFile(name, file string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	st, err := os.Stat(file)
	if err != nil {
		return err
	}
	a.add(name, st.Mode(), data)
	return nil
}

// addTree puts a folder of this machine into the archive, but for links and what else is
// no file.
func (a *initramfs) addTree(name, dir string) error {
	return filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		below, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		return a.addFile(path.Join(name, filepath.ToSlash(below)), file)
	})
}

func (a *initramfs) mkdir(name string) {
	if name == "/" || a.dirs[name] {
		return
	}
	a.mkdir(path.Dir(name))
	if a.dirs == nil {
		a.dirs = map[string]bool{}
	}
	a.dirs[name] = true
	a.entry(name, modeDir|0o755, nil)
}

func (a *initramfs) entry(name string, mode uint32, data []byte) {
	a.inode++
	name = strings.TrimPrefix(name, "/")
	const user, group, links, major, minor, checksum = 0, 0, 1, 0, 0, 0
	fmt.Fprintf(&a.buf, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		a.inode, mode, user, group, links, uint32(a.mtime.Unix()), len(data), major, minor, major, minor, len(name)+1, checksum, name)
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *initramfs) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

// bytes ends the archive, and returns it.
func (a *initramfs) bytes() []byte {
	a.entry("TRAILER!!!", 0, nil)
	return a.buf.Bytes()
}
