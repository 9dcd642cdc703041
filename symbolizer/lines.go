// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"cmp"
	"time"

	"github.com/hostflame/hostflame/internal/dwarf"
	"github.com/hostflame/hostflame/symbolizer/index"
)

// noIndex is the settled lineIndex of what has no debug information.
var noIndex = func() *lineIndex {
	r := &lineIndex{ready: make(chan struct{}), err: errorf(ReasonNoSymbols, "no debug information")}
	close(r.ready)
	return r
}()

// findLines looks for the debug information, once: the file's own, else a separate file.
func (o *Object) findLines() {
	if o.lines != nil {
		return
	}
	if len(o.file.Roots) == 0 && o.file.Open == nil {
		o.lines = noIndex // what is in memory only
		return
	}
	if time.Now().Before(o.linesAfter) {
		return
	}
	secs, err := o.image.Sections()
	switch r := ReasonOf(err); {
	case r == ReasonUnreadable, r == ReasonNoPermission:
		o.linesAfter = time.Now().Add(retryAfter)
	case err == nil && dwarf.Has(o.image, secs):
		o.lines = o.sym.index.request(o)
	default:
		o.lines = noIndex
		if o.role == roleMapped {
			if o.debug = o.findDebug(secs); o.debug == nil {
				o.fetch = o.sym.remote.request(o.image.BuildID)
			}
		}
	}
}

// addLines improves results by what the debug information says.
func (o *Object) addLines(t *tables, addrs []uint64, results []Result) {
	o.findLines()
	o.fetched()
	if o.debug != nil {
		o.askDebug(addrs, results)
		return
	}
	if o.lines == nil {
		return
	}
	if o.sym.cfg.WaitForIndex {
		<-o.lines.ready
	}
	if !o.lines.settled() || o.fetch != nil {
		for i := range results {
			results[i].Provisional = !results[i].exact
		}
		return
	}
	ix := o.lines.index
	if ix == nil {
		return
	}
	err := ix.Batch(func() {
		for i, addr := range addrs {
			if results[i].exact {
				continue
			}
			t.frames = ix.Lookup(addr, t.frames[:0])
			if len(t.frames) > 0 {
				results[i] = t.names.result(ix, t.frames, results[i])
			}
		}
	})
	if err != nil {
		o.lines = &lineIndex{ready: o.lines.ready, err: err}
	}
}

// askDebug takes over what the separate debug file knows better.
func (o *Object) askDebug(addrs []uint64, results []Result) {
	var ask []uint64
	var at []int
	for i, addr := range addrs {
		if !results[i].exact {
			ask, at = append(ask, addr), append(at, i)
		}
	}
	for i, r := range o.debug.Symbolize(ask) {
		if len(r.Lines) > 0 {
			results[at[i]] = r
		} else {
			results[at[i]].Provisional = r.Provisional
		}
	}
}

// lineNames keeps the names of an index that were asked for.
type lineNames struct {
	functions map[uint32]Line
	files     map[uint32]string
	held      int64
	demangle  demangler
}

// result makes lines of frames. The outermost function is called what the symbol table
// calls it, as that tells the parts and clones that compilers make of a function.
func (n *lineNames) result(ix *index.Index, frames []index.Frame, symbol Result) Result {
	if n.held > maxHeldNames || n.functions == nil {
		n.functions, n.files, n.held = map[uint32]Line{}, map[uint32]string{}, 0
	}
	lines := make([]Line, len(frames))
	for i, f := range frames {
		lines[i] = n.function(ix, f.Function)
		lines[i].File, lines[i].Line = n.file(ix, f.File), int64(f.Line)
	}
	if last := &lines[len(lines)-1]; len(symbol.Lines) > 0 && (!symbol.made || last.Function == "") {
		last.Function, last.SystemName = symbol.Lines[0].Function, symbol.Lines[0].SystemName
	}
	for i := range lines {
		lines[i].Function = cmp.Or(lines[i].Function, unknownFunction)
		lines[i].SystemName = cmp.Or(lines[i].SystemName, unknownFunction)
	}
	return Result{Lines: lines}
}

// unknownFunction stands for a function of which only the line is known.
const unknownFunction = "??"

func (n *lineNames) function(ix *index.Index, number uint32) Line {
	l, ok := n.functions[number]
	if !ok {
		name, start := ix.Function(number)
		name = cleanName(name)
		l = Line{Function: n.demangle.name(name), SystemName: name, StartLine: int64(start)}
		n.functions[number] = l
		n.held += lineSize + int64(len(l.Function)+len(name))
	}
	return l
}

func (n *lineNames) file(ix *index.Index, number uint32) string {
	path, ok := n.files[number]
	if !ok {
		path = cleanName(ix.File(number))
		n.files[number] = path
		n.held += int64(len(path)) + 48
	}
	return path
}
