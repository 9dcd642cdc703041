// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"os"
	"strconv"
	"strings"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/symbolizer"
)

// program is one version of a file that samples have fallen into, by whatever process.
type program struct {
	path   string // as the first of them saw it
	object *symbolizer.Object
	jit    bool // not a program: a JIT compiler can keep its code in a file or memfd too
}

// fileTable knows files by what the kernel tells of them in a sample, so that a process
// that nobody has heard of is attributed without a look at /proc, also when it is gone.
// It is for one goroutine.
type fileTable struct {
	symbols    *symbolizer.Symbolizer
	young, old map[bpf.File]*program // old is dropped when young is full
}

// maxFiles bounds each of the two generations.
const maxFiles = 4 << 10

func newFileTable(symbols *symbolizer.Symbolizer) *fileTable {
	return &fileTable{symbols: symbols, young: map[bpf.File]*program{}}
}

func (t *fileTable) find(id bpf.File) *program {
	if f := t.young[id]; f != nil {
		return f
	}
	f := t.old[id]
	if f != nil {
		t.put(id, f)
	}
	return f
}

func (t *fileTable) put(id bpf.File, f *program) {
	if len(t.young) >= maxFiles {
		t.old, t.young = t.young, make(map[bpf.File]*program, maxFiles)
	}
	t.young[id] = f
}

// vdso returns the file of the vDSO, nil if it can not be read.
func (t *fileTable) vdso() *program {
	if f := t.find(bpf.VDSO); f != nil {
		return f
	}
	o, err := t.symbols.VDSO()
	if err != nil {
		return nil
	}
	f := &program{path: "[vdso]", object: o}
	t.put(bpf.VDSO, f)
	return f
}

// rootsOf are the directories below which files that a process speaks of are looked for.
func rootsOf(pid PID) []string {
	return []string{"/proc/" + strconv.FormatUint(uint64(pid), 10) + "/root", "/"}
}

// openFile looks at the file of a mapping. The error is why it could not be opened, which may
// pass; a file that is no program is a file.
func openFile(symbols *symbolizer.Symbolizer, source mappingSource, pid PID, v vma) (*program, error) {
	f := &program{path: strings.TrimSuffix(v.path, deletedSuffix)}
	var err error
	f.object, err = symbols.Object(symbolizer.File{
		Path:  f.path,
		Open:  func() (*os.File, error) { return source.open(pid, v) },
		Roots: rootsOf(pid),
	})
	switch symbolizer.ReasonOf(err) {
	case "":
		if err != nil {
			return nil, err
		}
	case symbolizer.ReasonMalformed, symbolizer.ReasonUnsupported, symbolizer.ReasonNotRegular:
		f.jit = true
	default:
		return nil, err
	}
	return f, nil
}

// areaOf returns what an area of a sample is a mapping of; nil while that is not known. It
// reads nothing but the headers of a file that is new, and the mappings of p that are known.
func (t *processTable) areaOf(p *process, id bpf.Area) *area {
	a := p.sampled[id]
	if a != nil && (a.retry.IsZero() || t.now().Before(a.retry)) {
		if m := a.mapping.perfMap; m != nil && m != t.perfMap(p) {
			a.usePerfMap(t.perfMap(p), a.mapping.File)
		}
		return a
	}
	if a = t.resolveArea(p, id); a == nil {
		return nil
	}
	if len(p.sampled) >= maxVMAs {
		clear(p.sampled)
	}
	if p.sampled == nil {
		p.sampled = map[bpf.Area]*area{}
	}
	p.sampled[id] = a
	return a
}

func (t *processTable) resolveArea(p *process, id bpf.Area) *area {
	a := &area{vma: vma{start: id.Start, end: id.End, offset: id.Offset, inode: id.File.Inode}}
	f := t.files.find(id.File)
	var err error
	switch {
	case id.File == bpf.File{}:
		a.usePerfMap(t.perfMap(p), "[anon]")
		return a
	case id.File == bpf.VDSO:
		// That of a 32-bit process is another one.
		if f = t.files.vdso(); f == nil || id.Start < 1<<32 {
			a.useRaw("[vdso]")
			return a
		}
	case f == nil:
		known := p.find(id.Start)
		if known == nil || known.path == "" || id.Start-known.start+known.offset != id.Offset {
			return nil
		}
		a.path = known.path
		version := known.vma
		version.mtime = id.File.MtimeNanos
		if f, err = openFile(t.symbols, t.source, p.id.pid, version); err != nil {
			a.useRaw(strings.TrimSuffix(known.path, deletedSuffix))
			a.retry = t.now().Add(retryInterval)
			return a
		}
		t.files.put(id.File, f)
	}
	t.use(p, a, f)
	return a
}

// use makes an area of p a mapping of f.
func (t *processTable) use(p *process, a *area, f *program) {
	switch {
	case f.object != nil && a.useObject(f.object, f.path):
		t.unnamed = true
	case f.jit, f.object != nil:
		a.usePerfMap(t.perfMap(p), f.path)
	default:
		a.useRaw(f.path)
	}
}
