// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/symbolizer/index"
)

// Object is one version of an ELF file, whatever it is mapped by. It stays usable for as
// long as it is held, also after the caches have forgotten it.
type Object struct {
	sym   *Symbolizer
	image *elffile.Image
	file  File
	role  role

	mu     sync.Mutex
	tables atomic.Pointer[tables] // nil before the first use and after an eviction
	failed [tableKinds]failure    // by kind; guarded by mu
	lines  *lineIndex             // of the file's own debug information; nil before it was looked for
	debug  *Object                // the separate debug file, or nil
	// Where the debug file can be too, if it has the build id.
	debugPaths []string
	fetch      *fetch // of it, from elsewhere; nil when that is done

	linesAfter time.Time // when to look for debug information again, after reading failed
}

// role is what an object is for. A file that is mapped and the debug file of another has
// two objects, so that no two objects can wait for each other.
type role int

const (
	roleMapped = role(iota)
	roleDebug  // has no debug file of its own
	roleModule // as roleDebug, and was not linked
)

// BuildID is the GNU build id in hex, else Go's build id, else empty.
func (o *Object) BuildID() string { return o.image.BuildID }

// Segments returns the PT_LOAD segments in the order of the program headers.
func (o *Object) Segments() []Segment { return slices.Clone(o.image.Loads) }

// Address is the ELF virtual address of the byte at a file offset, by the executable
// segment that maps it. It is false where none does.
func (o *Object) Address(fileOffset uint64) (uint64, bool) { return o.image.Address(fileOffset) }

// The tables of an object, in the order in which they are asked. Each is read when those
// before it do not know an address.
type tableKind int

const (
	tableGo     = tableKind(iota) // pclntab
	tableSymtab                   // .symtab
	tableMini                     // .gnu_debugdata
	tableDynsym                   // .dynsym
	tablePLT                      // stubs, by relocations
	tableFrames                   // .eh_frame_hdr: starts of functions without a name
	tableKinds  = 6
)

// table is one of them. lookup returns neither lines nor an error where it knows nothing
// of the address. What a table says is lost to callers is its bytes: it is for one
// goroutine at a time.
type table interface {
	lookup(addr uint64) ([]Line, error)
	bytes() int64
}

// tables is what is in memory of an object.
type tables struct {
	resident
	byKind [tableKinds]table
	names  lineNames // of the index
	frames []index.Frame
	file   atomic.Pointer[os.File] // of a miniTable
}

// dropped closes the file of tables that are evicted, when those who use them are done. If
// they are evicted before they have it, that is left to the garbage collector.
func (o *Object) dropped(t *tables) {
	o.tables.CompareAndSwap(t, nil)
	if f := t.file.Load(); f != nil {
		go func() {
			o.mu.Lock()
			defer o.mu.Unlock()
			f.Close()
		}()
	}
}

// failure remembers that a table can not be read: for good where the file is to blame,
// for retryAfter where reading it failed.
type failure struct {
	reason Reason
	until  time.Time // zero: for good
}

const retryAfter = 10 * time.Second

// Symbolize answers for ELF virtual addresses, one result each, in order. The address of
// a caller is to be its return address minus one. The first use reads the symbol tables,
// and has an index made of the debug information, the file's own or in a separate file.
// Until that is done results are Provisional: names, and no lines.
func (o *Object) Symbolize(addrs []uint64) []Result {
	results := make([]Result, len(addrs))
	o.mu.Lock()
	defer o.mu.Unlock()
	t := o.memory()
	wanted := false // what the debug information says
	for i, addr := range addrs {
		results[i] = o.named(t, addr)
		wanted = wanted || !results[i].exact
	}
	if wanted {
		o.addLines(t, addrs, results)
	}
	bytes := int64(256) + t.names.held
	for _, tab := range t.byKind {
		if tab != nil {
			bytes += tab.bytes()
		}
	}
	o.sym.memory.set(&t.resident, bytes)
	return results
}

// debugLines answers by the debug information alone.
func (o *Object) debugLines(addrs []uint64) []Result {
	results := make([]Result, len(addrs))
	o.mu.Lock()
	defer o.mu.Unlock()
	t := o.memory()
	o.addLines(t, addrs, results)
	o.sym.memory.set(&t.resident, int64(256)+t.names.held)
	return results
}

// memory is what is in memory of o.
func (o *Object) memory() *tables {
	t := o.tables.Load()
	if t == nil {
		t = new(tables)
		t.drop = func() { o.dropped(t) }
		o.tables.Store(t)
	}
	return t
}

// named answers by the tables.
func (o *Object) named(t *tables, addr uint64) Result {
	if _, ok := o.image.ExecutableAt(addr); !ok {
		return Result{Reason: ReasonNotFound, exact: true}
	}
	reason, broken := ReasonNoSymbols, Reason("")
	for kind := range tableKind(tableKinds) {
		if t.byKind[kind] == nil {
			if r := o.load(t, kind); r != "" {
				if reason == ReasonNoSymbols {
					reason = r
				}
				continue
			}
		}
		lines, err := t.byKind[kind].lookup(addr)
		if len(lines) > 0 {
			return Result{Lines: lines, exact: kind == tableGo, made: kind >= tablePLT}
		}
		if err != nil {
			broken = ReasonOf(err)
		}
		reason = ReasonNotFound
	}
	if broken != "" {
		return Result{Reason: broken}
	}
	return Result{Reason: reason}
}

// load reads one table, or says why it is not there.
func (o *Object) load(t *tables, kind tableKind) Reason {
	f := &o.failed[kind]
	if f.reason != "" && (f.until.IsZero() || time.Now().Before(f.until)) {
		return f.reason
	}
	tab, err := o.read(kind)
	if err == nil {
		*f = failure{}
		t.byKind[kind] = tab
		if m, ok := tab.(*miniTable); ok {
			t.file.Store(m.file)
		}
		return ""
	}
	*f = failure{reason: ReasonOf(err)}
	if f.reason == ReasonUnreadable || f.reason == ReasonNoPermission {
		f.until = time.Now().Add(retryAfter)
	}
	return f.reason
}

func (o *Object) read(kind tableKind) (table, error) {
	secs, err := o.image.Sections()
	if kind == tableDynsym && len(secs) == 0 {
		if tab, strtab, ok := o.image.DynamicSymbols(); ok {
			return o.readSymbols(nil, tab, strtab, true)
		}
	}
	if err != nil {
		return nil, err
	}
	want := uint32(elffile.SHTSymtab)
	switch kind {
	case tableGo:
		return loadGoTable(o.image, secs)
	case tableMini:
		return o.readMini(secs)
	case tablePLT:
		return o.readPLT(secs)
	case tableFrames:
		return o.readFrames()
	case tableDynsym:
		want = elffile.SHTDynsym
	}
	for _, s := range secs {
		if s.Type != want {
			continue
		}
		if s.EntSize != o.image.SymSize() || s.Flags&elffile.SHFCompressed != 0 || uint64(s.Link) >= uint64(len(secs)) {
			return nil, errorf(ReasonMalformed, "symbol table of entries of %d bytes, strings in section %d", s.EntSize, s.Link)
		}
		return o.readSymbols(secs, s.Extent, secs[s.Link].Extent, kind == tableDynsym)
	}
	return nil, errorf(ReasonNoSymbols, "no symbol table")
}

func (o *Object) readSymbols(secs []elffile.Section, tab, strtab elffile.Extent, dynamic bool) (table, error) {
	const big = 4 << 20
	if tab.Size >= big {
		// One at a time: while a table is read it takes twice what it takes later.
		o.sym.bigTable.Lock()
		defer o.sym.bigTable.Unlock()
	}
	return loadSymTable(o.image, secs, tab, strtab, dynamic, o.sym.maxSymbols())
}

// Aliases are the other names, as in the symbol table, of the function at an address that
// Symbolize has answered for: names that the source gave it, and functions that a linker has
// folded into it as their code is equal. Nothing tells these apart.
func (o *Object) Aliases(addr uint64) []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	if t := o.tables.Load(); t != nil {
		for _, tab := range t.byKind {
			st, ok := tab.(*symTable)
			if !ok {
				continue
			}
			if id, ok := st.find(addr); ok {
				if names, err := st.namesOf(id); err == nil && len(names) > 1 {
					return names[1:]
				}
				return nil
			}
		}
	}
	if o.debug != nil {
		return o.debug.Aliases(addr)
	}
	return nil
}

// Sources says, for people, where what Symbolize has answered so far came from.
func (o *Object) Sources() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	var found []string
	if t := o.tables.Load(); t != nil {
		for kind, tab := range t.byKind {
			if tab != nil {
				found = append(found, o.file.Path+" "+tableNames[kind])
			}
		}
	}
	if o.lines != nil && o.lines.settled() && o.lines.index != nil {
		found = append(found, o.file.Path+" debug information")
	}
	if o.debug != nil {
		found = append(found, o.debug.Sources()...)
	}
	return found
}

var tableNames = [tableKinds]string{
	tableGo: "pclntab", tableSymtab: ".symtab", tableMini: ".gnu_debugdata",
	tableDynsym: ".dynsym", tablePLT: "PLT", tableFrames: ".eh_frame_hdr",
}
