// SPDX-License-Identifier: Apache-2.0

package index

import (
	"io"
	"os"

	"github.com/hostflame/hostflame/internal/elffile"
)

const spoolBuffer = 64 << 10 // bytes

// spool is what waits in a file without a name for its place in the index, so that it takes
// no memory.
type spool struct {
	file *os.File
	buf  []byte
	size int64
	err  error // the first one
}

func newSpool(dir string) (*spool, error) {
	f, err := elffile.TempFile(dir)
	return &spool{file: f}, err
}

func (s *spool) Close() error { return s.file.Close() }

// appended is to be called after something was appended to buf.
func (s *spool) appended(n int) {
	s.size += int64(n)
	if len(s.buf) >= spoolBuffer {
		s.flush()
	}
}

func (s *spool) flush() {
	if s.err == nil {
		_, s.err = s.file.Write(s.buf)
	}
	s.buf = s.buf[:0]
}

// reader reads what was appended, after which nothing may be.
func (s *spool) reader() (io.Reader, error) {
	s.flush()
	return io.NewSectionReader(s.file, 0, s.size), s.err
}
