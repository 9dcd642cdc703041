// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// output is a file that appears whole or not at all: it is written beside its place and
// renamed. A pipe or a device is written as it is.
type output struct {
	path string
	w    io.Writer // standard output or a device; nil for a regular file
	temp *os.File
}

// newOutput checks that path can be written, and makes the temporary file.
func newOutput(path string, stdout io.Writer) (*output, error) {
	// kingpin makes an empty value of the argument in "-o -".
	if path == "-" || path == "" {
		return &output{path: "standard output", w: stdout}, nil
	}
	info, err := os.Stat(path)
	switch {
	case err == nil && info.IsDir():
		return nil, hintf("name a file in it: -o "+filepath.Join(path, "cpu.pb.gz"), "write %s: it is a directory", path)
	case err == nil && !info.Mode().IsRegular():
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return nil, fmt.Errorf("write %s: %w", path, reason(err))
		}
		return &output{path: path, w: f}, nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("write %s: %w", path, reason(err))
	}
	temp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return nil, hintf("the directory has to exist and to be writable", "write %s: %w", path, reason(err))
	}
	return &output{path: path, temp: temp}, nil
}

// commit writes the content and puts the file in its place.
func (o *output) commit(encode func(io.Writer) error) (err error) {
	defer func() {
		if errors.Is(err, unix.ENOSPC) {
			err = hintf("make room, or name another place with -o", "%w", err)
		}
	}()
	if o.w != nil {
		if err := encode(o.w); err != nil {
			return fmt.Errorf("write %s: %w", o.path, reason(err))
		}
		return nil
	}
	// A temporary file is 0600; a profile tells a lot, but a file that the user asked for
	// has the mode that the umask gives.
	mask := unix.Umask(0)
	unix.Umask(mask)
	for _, step := range []func() error{
		func() error { return encode(o.temp) },
		func() error { return o.temp.Chmod(fs.FileMode(0o666 &^ mask)) },
		o.temp.Sync,
		o.temp.Close,
		func() error { return os.Rename(o.temp.Name(), o.path) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("write %s: %w", o.path, reason(err))
		}
	}
	o.temp = nil
	return nil
}

// discard removes what was not committed. It is idempotent.
func (o *output) discard() {
	if o.temp != nil {
		o.temp.Close()
		os.Remove(o.temp.Name())
		o.temp = nil
	}
}

// reason is err without the operation and the path, which the message has already.
func reason(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	if e, ok := errors.AsType[*os.LinkError](err); ok {
		return e.Err
	}
	return err
}
