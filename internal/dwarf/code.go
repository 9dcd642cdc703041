// SPDX-License-Identifier: Apache-2.0

package dwarf

import (
	"maps"
	"slices"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/internal/overlap"
)

// Interner gives numbers to what units have in common. Numbers start at 1. What it is
// given is valid during the call only.
type Interner interface {
	// Function is called with the linkage name, or the name where there is no linkage
	// name, and the line where the function starts, 0 if that is not known.
	Function(name []byte, startLine uint32) uint32
	File(path []byte) uint32
}

// Node is a function, or a call that was inlined.
type Node struct {
	Function uint32 // as the Interner has it; 0: without a name
	Parent   uint32 // 1 + the index of the node that this was inlined into; 0: a function
	CallFile uint32 // where that calls it
	CallLine uint32
}

// Code is what a unit, or a part of one, says of its code.
type Code struct {
	Nodes []Node // parents before children
	// Spans say where a node's instructions are: Name is 1 + its index. They are in the order
	// of the entries, which is parents before children, and where they overlap the later
	// one counts: Prio is the index. The receiver may sort them.
	Spans []overlap.Span
	Lines *Lines // of the whole unit

	// Part is 0 for a unit that comes as a whole. What is too big for that comes in parts,
	// numbered from 1, that say something of the addresses of their spans only, and of
	// those more than the parts before. Last comes number 0 with the lines of all others.
	Part int
}

// Reader reads units. It is for one goroutine; a Data may have several.
type Reader struct {
	data    *Data
	names   Interner
	current *Data // what the entries that are read are in: data, or of a split unit

	info, side, peek, lists, line, abbrev, strings cursor

	unit       unitContext
	others     map[unitKey]*unitContext // whose entries are referred to by other units
	tables     map[tableKey]*table      // of theirs
	tableSpecs int                      // of all these
	split      unitContext
	own        [2]table // of unit and split
	scratch    table
	table      lineTable
	rows       lineRows
	code       Code
	add        func(*Code) error
	stack      []frame
	functions  map[functionKey]uint32
	origins    map[ref]origin
	work       int // done for the unit; what is shared can be referred to without end
	pathBuf    []byte
	nameBuf    []byte
}

type unitKey struct {
	data  *Data
	index int
}

// functionKey is a function by where its name is.
type functionKey struct {
	name text
	line uint32
}

// origin is what is known of a function by its abstract origin or specification.
type origin struct {
	name text
	line uint64
}

const (
	infoWindow    = 256 << 10
	otherWindow   = 16 << 10
	maxFunctions  = 1 << 15 // that a reader remembers
	maxOthers     = 1 << 12 // units that it remembers, and tables of abbreviations
	maxTableSpecs = 1 << 18 // of all these tables
	openWork      = 16      // that reading an attribute of an abbreviation is, in ranges
	stringsWindow = maxString
)

// NewReader makes a reader of d.
func (d *Data) NewReader(names Interner) *Reader {
	r := &Reader{
		data: d, names: names,
		others:    map[unitKey]*unitContext{},
		tables:    map[tableKey]*table{},
		functions: map[functionKey]uint32{},
		origins:   map[ref]origin{},
	}
	r.info.buf = make([]byte, infoWindow)
	r.line.buf = make([]byte, infoWindow/2)
	r.side.buf = make([]byte, otherWindow)
	r.lists.buf = make([]byte, otherWindow)
	r.abbrev.buf = make([]byte, otherWindow)
	r.strings.buf = make([]byte, stringsWindow)
	return r
}

// frame is an entry whose children are being read.
type frame struct {
	node uint32 // of the innermost function or inlined call
}

// Code reads the i-th unit, and calls add with what it says, if that is something: once, or
// for each part of a big one. What add is given is valid during the call. Units of Go are
// skipped, as its binaries have something better. After an error there can have been parts.
func (r *Reader) Code(i int, add func(*Code) error) error {
	var root entry
	u := &r.unit
	h, err := readHeader(&r.info, r.data.Info, r.data.units[i])
	switch {
	case err != nil:
		return err
	case h.kind == unitType || h.kind == unitSplitType || h.kind == unitPartial:
		return nil
	}
	if err := u.open(&r.info, r.data, i, &root, r.ownTable); err != nil {
		return err
	}
	if root.language == langGo && root.is(fieldLanguage) {
		return nil
	}
	r.code = Code{Nodes: r.code.Nodes[:0], Spans: r.code.Spans[:0]}
	r.rows.reset()
	clear(r.origins)
	r.work, r.add = 0, add
	r.table = lineTable{dirs: r.table.dirs[:0], files: r.table.files[:0], interned: r.table.interned[:0], compDir: r.table.compDir[:0]}
	if root.is(fieldStmtList) {
		at := r.info.pos()
		if err := r.lines(u, root.stmtList); err != nil && elffile.ReasonIs(err, elffile.Changed) {
			return err
		}
		if root.is(fieldCompDir) {
			r.table.compDir = append(r.table.compDir, r.string(root.compDir)...)
		}
		r.info.seek(at)
	}
	r.current = r.data
	if s := r.splitUnit(u, &root); s != nil {
		err = r.splitCode(u, s)
		s.Done()
	} else {
		err = r.entries(&r.info, u, isC(root.language))
	}
	if err != nil {
		return err
	}
	if r.code.Part == 0 {
		return r.pass(0)
	}
	if err := r.nextPart(); err != nil {
		return err
	}
	return r.pass(0)
}

// pass passes on what was read since the part before.
func (r *Reader) pass(part int) error {
	r.code.Part, r.code.Lines = part, &Lines{reader: r}
	err := r.add(&r.code)
	r.code.Nodes, r.code.Spans = r.code.Nodes[:0], r.code.Spans[:0]
	return err
}

func (r *Reader) nextPart() error {
	if r.code.Part+1 >= MaxParts {
		return elffile.Errorf(elffile.TooLarge, "dwarf: unit of more than %d parts", MaxParts)
	}
	return r.pass(r.code.Part + 1)
}

func isC(language uint64) bool {
	switch language {
	case langC89, langC, langC99, langC11, langC17, langAsm:
		return true
	}
	return false
}

// splitUnit finds the unit that a skeleton stands for.
func (r *Reader) splitUnit(u *unitContext, root *entry) *SplitUnit {
	if !root.is(fieldDwoName) || r.data.Split == nil {
		return nil
	}
	path := r.pathBuf[:0]
	name := r.string(root.dwoName)
	if len(name) > 0 && name[0] != '/' {
		path = appendPath(path, r.table.compDir)
	}
	path = appendPath(path, name)
	r.pathBuf = path
	return r.data.Split(u.id, string(path))
}

func (r *Reader) splitCode(skeleton *unitContext, s *SplitUnit) error {
	var root entry
	u := &r.split
	if err := u.open(&r.info, s.Data, s.Index, &root, r.ownTable); err != nil {
		return err
	}
	r.current = s.Data
	u.low, u.addr, u.addrBase = skeleton.low, skeleton.addr, skeleton.addrBase
	u.ranges, u.rangesBase = skeleton.ranges, skeleton.rangesBase
	return r.entries(&r.info, u, isC(root.language))
}

// entries reads the entries below a unit's own, after which c stands.
func (r *Reader) entries(c *cursor, u *unitContext, c89 bool) error {
	r.stack = append(r.stack[:0], frame{})
	var e entry
	for len(r.stack) > 0 && c.left() > 0 {
		code := c.uleb()
		if code == 0 {
			r.stack = r.stack[:len(r.stack)-1]
			continue
		}
		a := u.abbrevs.get(code)
		top := frame{}
		switch a.kind {
		case kindNone:
			c.fail("abbreviation %d of unit %#x", code, u.off)
			continue
		case kindSubprogram, kindInlined:
			top = r.stack[len(r.stack)-1]
			if top.node == 0 && len(r.code.Spans) >= partSpans {
				if err := r.nextPart(); err != nil {
					return err
				}
			}
			at := c.pos()
			u.read(c, a, &e)
			if e.is(fieldLow) || e.is(fieldRanges) {
				top.node = r.function(u, a.kind, &e, top)
			} else if a.children && c89 && e.is(fieldSibling) && e.sibling > at && e.sibling <= u.end {
				c.seek(e.sibling) // abstract, or a declaration
				continue
			}
		default:
			at := c.pos()
			u.read(c, a, &e)
			if !a.children {
				continue
			}
			if a.kind == kindType && c89 && e.is(fieldSibling) && e.sibling > at && e.sibling <= u.end {
				c.seek(e.sibling)
				continue
			}
			top = r.stack[len(r.stack)-1]
		}
		if a.children {
			if len(r.stack) >= maxDepth {
				return elffile.Errorf(elffile.TooLarge, "dwarf: entries nested deeper than %d", maxDepth)
			}
			r.stack = append(r.stack, top)
		}
	}
	return c.err
}

// tooLarge ends the unit.
func (r *Reader) tooLarge() {
	if r.info.err == nil {
		r.info.err = elffile.Errorf(elffile.TooLarge, "dwarf: function of more than %d ranges, or unit of ranges without end", maxSpans-partSpans)
	}
	r.info.fail("") // nothing more is read
}

// function adds a node for an entry that has addresses, and returns its number; that of
// the parent where the linker removed it.
func (r *Reader) function(u *unitContext, kind uint8, e *entry, top frame) uint32 {
	if len(r.code.Spans) >= maxSpans || r.work > maxWork {
		r.tooLarge()
		return 0
	}
	number := uint32(len(r.code.Nodes) + 1)
	before := len(r.code.Spans)
	r.ranges(u, e, func(low, high uint64) {
		if len(r.code.Spans) >= maxSpans {
			r.tooLarge()
			return
		}
		r.code.Spans = append(r.code.Spans, overlap.Span{Start: low, End: high, Name: number, Prio: uint32(len(r.code.Spans))})
	})
	if len(r.code.Spans) == before {
		return top.node
	}
	n := Node{Function: r.functionOf(u, e)}
	if kind == kindInlined {
		n.Parent = top.node
		if e.is(fieldCallFile) {
			n.CallFile = r.file(&r.table, e.callFile)
		}
		if e.is(fieldCallLine) {
			n.CallLine = uint32(min(e.callLine, 1<<32-1))
		}
	}
	r.code.Nodes = append(r.code.Nodes, n)
	return number
}

// functionOf is the Interner's number of an entry's function.
func (r *Reader) functionOf(u *unitContext, e *entry) uint32 {
	var o origin
	switch {
	case e.is(fieldLinkageName):
		o.name = e.linkageName
	case e.is(fieldOrigin):
		o = r.origin(u, e.origin, maxHops)
	case e.is(fieldSpecification):
		o = r.origin(u, e.specification, maxHops)
	}
	if o.name.sec == nil && e.is(fieldName) {
		o.name = e.name
	}
	if e.is(fieldDeclLine) {
		o.line = e.declLine
	} else if e.is(fieldLinkageName) && (e.is(fieldOrigin) || e.is(fieldSpecification)) {
		to := e.origin
		if !e.is(fieldOrigin) {
			to = e.specification
		}
		o.line = r.origin(u, to, maxHops).line
	}
	if o.name.sec == nil {
		return 0
	}
	k := functionKey{o.name, uint32(min(o.line, 1<<32-1))}
	id, ok := r.functions[k]
	if !ok {
		if name := r.string(o.name); len(name) > 0 {
			id = r.names.Function(name, k.line)
		}
		if len(r.functions) >= maxFunctions {
			clear(r.functions)
		}
		r.functions[k] = id
	}
	return id
}

// origin follows a reference. A linkage name counts before a name, the nearest line first.
func (r *Reader) origin(u *unitContext, to ref, hops int) origin {
	if to.alt {
		if u.data.Alt == nil || to.off == 0 {
			return origin{}
		}
	} else if to.off == 0 {
		return origin{}
	}
	// References from other files' units are rare, and not remembered.
	own := u.data == r.current && !to.alt
	if own {
		if o, ok := r.origins[to]; ok {
			return o
		}
	}
	if hops == 0 {
		return origin{}
	}
	var o origin
	var e entry
	if target := r.find(u, to, &e); target != nil {
		if e.is(fieldLinkageName) {
			o.name = e.linkageName
		}
		var next origin
		switch {
		case e.is(fieldOrigin):
			next = r.origin(target, e.origin, hops-1)
		case e.is(fieldSpecification):
			next = r.origin(target, e.specification, hops-1)
		}
		if o.name.sec == nil {
			o.name = next.name
		}
		if o.name.sec == nil && e.is(fieldName) {
			o.name = e.name
		}
		o.line = next.line
		if e.is(fieldDeclLine) {
			o.line = e.declLine
		}
	}
	if own {
		if len(r.origins) >= maxFunctions {
			clear(r.origins)
		}
		r.origins[to] = o
	}
	return o
}

// find reads the function's entry that is referred to, and returns its unit.
func (r *Reader) find(u *unitContext, to ref, e *entry) *unitContext {
	d := u.data
	if to.alt {
		d = d.Alt
	}
	if d != u.data || to.off < u.dies || to.off >= u.end {
		i, ok := d.unitAt(to.off)
		if !ok {
			return nil
		}
		if u = r.other(d, i); u == nil || to.off < u.dies || to.off >= u.end {
			return nil
		}
	}
	c := &r.side
	if w := &r.info; w.sec == d.Info && to.off >= w.base && to.off-w.base+otherWindow/8 <= uint64(len(w.b)) {
		// It is in the window already, which may not move.
		r.peek = *w
		r.peek.buf = r.side.buf
		r.peek.i, r.peek.end = int(to.off-w.base), u.end
		r.side.b = nil // peek can write there
		return r.readFunction(&r.peek, u, e)
	}
	c.start(d.Info, to.off, u.end)
	return r.readFunction(c, u, e)
}

func (r *Reader) readFunction(c *cursor, u *unitContext, e *entry) *unitContext {
	a := u.abbrevs.get(c.uleb())
	if a.kind != kindSubprogram && a.kind != kindInlined {
		return nil
	}
	u.read(c, a, e)
	if c.err != nil {
		return nil
	}
	return u
}

// other is another unit than the one that is read.
func (r *Reader) other(d *Data, i int) *unitContext {
	k := unitKey{d, i}
	if u, ok := r.others[k]; ok {
		return u
	}
	u := &unitContext{}
	var root entry
	r.work += openWork
	if u.open(&r.side, d, i, &root, r.tableOf) != nil {
		u = nil
	}
	if len(r.others) >= maxOthers {
		clear(r.others)
	}
	r.others[k] = u
	return u
}

// ownTable is the table of the unit that is read. The next one's goes into its place.
func (r *Reader) ownTable(u *unitContext) (*table, error) {
	t := &r.own[0]
	if u == &r.split {
		t = &r.own[1]
	}
	return t, t.open(&r.abbrev, u)
}

// tableOf is the table of another unit, shared with all that have the same.
func (r *Reader) tableOf(u *unitContext) (*table, error) {
	if t, ok := r.tables[u.tableKey()]; ok {
		return t, nil
	}
	if len(r.tables) >= maxOthers || r.tableSpecs > maxTableSpecs {
		clear(r.others) // they hold tables
		clear(r.tables)
		r.tableSpecs = 0
	}
	// It is copied to size: what grows leaves several times that behind.
	s := &r.scratch
	s.key = tableKey{}
	err := s.open(&r.abbrev, u)
	r.work += openWork * s.specs
	if err != nil {
		return nil, err
	}
	t := &table{key: s.key, dense: slices.Clone(s.dense), sparse: maps.Clone(s.sparse), ops: slices.Clone(s.ops)}
	r.tableSpecs += t.size()
	r.tables[t.key] = t
	return t, nil
}

// string reads a string. It is valid until the next call.
func (r *Reader) string(t text) []byte {
	if t.sec == nil || t.off >= t.sec.Size {
		return nil
	}
	c := &r.strings
	c.start(t.sec, t.off, t.sec.Size)
	return c.str()
}
