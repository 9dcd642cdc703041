// SPDX-License-Identifier: Apache-2.0

package index

import (
	"encoding/binary"
	"hash/maphash"
	"io"
	"sync"

	"github.com/hostflame/hostflame/internal/elffile"
)

// names gives numbers to functions and files, and spools what they are called. Memory holds
// hashes of those that were asked for lately and no more: what comes again after that has
// another number then, and is twice in the file. It may be used from any goroutine.
type names struct {
	mu      sync.Mutex
	seed    maphash.Seed // hashes can not be foreseen, so names that collide can not be made
	strings recent[uint64]
	byName  recent[functionKey]
	byPath  recent[uint32] // by the path's offset

	text, functionTable, fileTable *spool

	functions, files uint32
	err              error
}

type functionKey struct{ name, line uint32 }

const (
	maxNames    = 1 << 24 // functions of an index, and so many files
	recentNames = 3 << 15 // twice as many are remembered, in some 40 bytes each
)

// recent is a map that forgets what was not asked for while recentNames others came.
type recent[K comparable] struct{ young, old map[K]uint32 }

func (r *recent[K]) get(k K) (uint32, bool) {
	v, ok := r.young[k]
	if !ok {
		if v, ok = r.old[k]; ok {
			r.put(k, v)
		}
	}
	return v, ok
}

func (r *recent[K]) put(k K, v uint32) {
	if r.young == nil || len(r.young) >= recentNames {
		r.young, r.old = r.old, r.young
		if r.young == nil {
			r.young = map[K]uint32{}
		}
		clear(r.young)
	}
	r.young[k] = v
}

// newNames makes names that are spooled into a directory.
func newNames(dir string) (*names, error) {
	n := &names{seed: maphash.MakeSeed()}
	for _, s := range []**spool{&n.text, &n.functionTable, &n.fileTable} {
		var err error
		if *s, err = newSpool(dir); err != nil {
			n.Close()
			return nil, err
		}
	}
	return n, nil
}

// Close gives the spools back.
func (n *names) Close() {
	for _, s := range []*spool{n.text, n.functionTable, n.fileTable} {
		if s != nil {
			s.Close()
		}
	}
}

// string returns where a string is among the strings.
func (n *names) string(s []byte) uint32 {
	h := maphash.Bytes(n.seed, s)
	if off, ok := n.strings.get(h); ok {
		return off
	}
	off := n.text.size
	if off > maxFile {
		n.err = errTooMany
		return 0
	}
	n.strings.put(h, uint32(off))
	before := len(n.text.buf)
	n.text.buf = binary.AppendUvarint(n.text.buf, uint64(len(s)))
	n.text.buf = append(n.text.buf, s...)
	n.text.appended(len(n.text.buf) - before)
	return uint32(off)
}

var errTooMany = elffile.Errorf(elffile.TooLarge, "index: too many names")

// Function implements dwarf.Interner.
func (n *names) Function(name []byte, startLine uint32) uint32 {
	n.mu.Lock()
	defer n.mu.Unlock()
	k := functionKey{n.string(name), startLine}
	i, ok := n.byName.get(k)
	if ok {
		return i
	}
	if n.functions >= maxNames {
		n.err = errTooMany
		return 0
	}
	n.functions++
	n.byName.put(k, n.functions)
	t := n.functionTable
	t.buf = binary.LittleEndian.AppendUint32(t.buf, k.name)
	t.buf = binary.LittleEndian.AppendUint32(t.buf, k.line)
	t.appended(8)
	return n.functions
}

// File implements dwarf.Interner.
func (n *names) File(path []byte) uint32 {
	n.mu.Lock()
	defer n.mu.Unlock()
	off := n.string(path)
	i, ok := n.byPath.get(off)
	if ok {
		return i
	}
	if n.files >= maxNames {
		n.err = errTooMany
		return 0
	}
	n.files++
	n.byPath.put(off, n.files)
	n.fileTable.buf = binary.LittleEndian.AppendUint32(n.fileTable.buf, off)
	n.fileTable.appended(4)
	return n.files
}

// forget gives the memory back. No more may come.
func (n *names) forget() {
	n.strings, n.byName, n.byPath = recent[uint64]{}, recent[functionKey]{}, recent[uint32]{}
}

// write appends the tables and the strings to w.
func (n *names) write(w io.Writer) error {
	for _, s := range []*spool{n.functionTable, n.fileTable, n.text} {
		r, err := s.reader()
		if err != nil {
			return err
		}
		if _, err := io.Copy(w, r); err != nil {
			return err
		}
	}
	return nil
}
