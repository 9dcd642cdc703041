// SPDX-License-Identifier: Apache-2.0

package symbolizer

import "io"

// Content is the bytes of a file. It may be used from any goroutine, and reads a file that
// was closed meanwhile by opening it again.
type Content interface {
	io.ReaderAt
	Size() int64
}

// Content returns the bytes of the object's file, for those who look for more in it than
// names.
func (o *Object) Content() Content { return o.image.Content }

// Stat returns device and inode, as stat(2) has them, and the modification time in Unix ns
// of the object's file; ok is false where it has none (the vDSO).
func (o *Object) Stat() (dev, inode uint64, mtime int64, ok bool) {
	f, ok := o.image.Content.(*openFile)
	if !ok {
		return 0, 0, 0, false
	}
	return f.id.dev, f.id.ino, f.id.mtime, true
}
