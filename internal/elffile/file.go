// SPDX-License-Identifier: Apache-2.0

// Package elffile reads the headers of ELF files that may be hostile: by pread and never
// by mmap, every count and offset checked against the size of the file before memory is
// reserved.
package elffile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
)

// Reason says why a file, or a part of one, is of no use. The values are fit to be metric
// labels.
type Reason string

// The reasons of the readers.
const (
	Malformed   = Reason("malformed")    // not ELF, or its headers contradict its size
	Unsupported = Reason("unsupported")  // an ELF file of a kind that cannot run here: big-endian, an object file
	TooLarge    = Reason("too_large")    // over a limit
	Changed     = Reason("file_changed") // shorter than it was
	Missing     = Reason("no_symbols")   // there is no such table
	NotFound    = Reason("not_found")    // the table does not know the address
	NotRegular  = Reason("not_regular_file")
)

// Error is why a file is of no use.
type Error struct {
	Reason Reason
	Err    error
}

func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an Error.
func Errorf(r Reason, format string, args ...any) *Error {
	return &Error{Reason: r, Err: fmt.Errorf(format, args...)}
}

// Content is the bytes of one ELF image.
type Content interface {
	io.ReaderAt
	Size() int64
}

// FromBytes is an image that was read as a whole.
func FromBytes(b []byte) Content { return bytes.NewReader(b) }

// ReadAt fills p from off. That the range lies within the image is checked here, so that
// callers need not guard against overflow.
func ReadAt(c Content, p []byte, off uint64) error {
	size := uint64(c.Size())
	if off > size || uint64(len(p)) > size-off {
		return Errorf(Malformed, "%d bytes at %#x are beyond the end, %#x", len(p), off, size)
	}
	n, err := c.ReadAt(p, int64(off))
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return Errorf(Changed, "file is shorter than it was")
	}
	return err
}

// ReasonIs tells whether err carries a reason.
func ReasonIs(err error, r Reason) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Reason == r
}
