// SPDX-License-Identifier: Apache-2.0

package index

import (
	"encoding/binary"
	"errors"
	"hash/maphash"
	"io"
	"os"
	"sync"
)

// names gives numbers to functions and files, and spools what they are called into a file,
// so that memory holds a hash of each and no more. It may be used from any goroutine.
type names struct {
	mu        sync.Mutex
	seed      maphash.Seed // hashes can not be foreseen, so names that collide can not be made
	strings   map[uint64]uint32
	byName    map[functionKey]uint32
	byPath    map[uint32]uint32 // by the path's offset
	functions []functionKey
	files     []uint32
	spool     *os.File
	buf       []byte
	size      uint64
	err       error
}

type functionKey struct{ name, line uint32 }

// maxNames bounds the different names of a file; each takes about 40 bytes of memory.
const maxNames = 4 << 20

func newNames(spool *os.File) *names {
	return &names{
		seed: maphash.MakeSeed(), strings: map[uint64]uint32{}, spool: spool,
		byName: map[functionKey]uint32{}, byPath: map[uint32]uint32{},
	}
}

var errTooMany = errors.New("too many names")

// text returns where a string is among the strings.
func (n *names) text(s []byte) uint32 {
	h := maphash.Bytes(n.seed, s)
	if off, ok := n.strings[h]; ok {
		return off
	}
	off := n.size
	if len(n.strings) >= maxNames || off > maxFile {
		n.err = errTooMany
		return 0
	}
	n.strings[h] = uint32(off)
	before := len(n.buf)
	n.buf = binary.AppendUvarint(n.buf, uint64(len(s)))
	n.buf = append(n.buf, s...)
	n.size += uint64(len(n.buf) - before)
	if len(n.buf) >= 64<<10 {
		n.flush()
	}
	return uint32(off)
}

func (n *names) flush() {
	if n.err == nil {
		_, n.err = n.spool.Write(n.buf)
	}
	n.buf = n.buf[:0]
}

// Function implements dwarf.Interner.
func (n *names) Function(name []byte, startLine uint32) uint32 {
	n.mu.Lock()
	defer n.mu.Unlock()
	k := functionKey{n.text(name), startLine}
	i, ok := n.byName[k]
	if !ok && len(n.functions) < maxNames {
		n.functions = append(n.functions, k)
		i = uint32(len(n.functions))
		n.byName[k] = i
	}
	return i
}

// File implements dwarf.Interner.
func (n *names) File(path []byte) uint32 {
	n.mu.Lock()
	defer n.mu.Unlock()
	off := n.text(path)
	i, ok := n.byPath[off]
	if !ok {
		n.files = append(n.files, off)
		i = uint32(len(n.files))
		n.byPath[off] = i
	}
	return i
}

// write appends the tables and the strings to w.
func (n *names) write(w io.Writer) error {
	n.flush()
	if n.err != nil {
		return n.err
	}
	var b []byte
	for _, f := range n.functions {
		b = binary.LittleEndian.AppendUint32(b, f.name)
		b = binary.LittleEndian.AppendUint32(b, f.line)
	}
	for _, off := range n.files {
		b = binary.LittleEndian.AppendUint32(b, off)
	}
	if _, err := w.Write(b); err != nil {
		return err
	}
	_, err := io.Copy(w, io.NewSectionReader(n.spool, 0, int64(n.size)))
	return err
}
