// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"hash/maphash"
	"slices"
	"unsafe"

	"github.com/hostflame/hostflame/bpf"
)

// trace is a raw stack of one process, kept once: equal stacks are merged before anything
// is looked up for them. It belongs to the goroutine that drains.
type trace struct {
	next          *trace // of the same hash
	id            imageID
	comm          bpf.Comm // this and the next two are of the first of its samples
	tid           uint32
	time          uint64
	frames        []uint64 // the kernel's and then the program's
	kernel        int      // how many are the kernel's
	areas         []bpf.Area
	stack         Stack
	generation    int // of the mappings that the stack was made with
	kernelOutcome bpf.Outcome
	userOutcome   bpf.Outcome
	outcome       outcome
	whole         bool // every address is in a known mapping
	kept          bool
}

// sample is the first of the samples of t, as far as its stack needs it.
func (t *trace) sample() *bpf.Sample {
	return &bpf.Sample{
		PID: uint32(t.id.pid), Start: t.id.start, ExecID: t.id.exec, TID: t.tid, Time: t.time, Comm: t.comm,
		KernelOutcome: t.kernelOutcome, UserOutcome: t.userOutcome,
		Kernel: t.frames[:t.kernel], User: t.frames[t.kernel:], Areas: t.areas,
	}
}

// traces finds the trace of a sample.
type traces struct {
	seed   maphash.Seed
	byHash map[uint64]*trace
	n      int
}

func newTraces() *traces {
	return &traces{seed: maphash.MakeSeed(), byHash: map[uint64]*trace{}}
}

func addrBytes(a []uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(a))), 8*len(a))
}

func (t *traces) hash(p *process, s *bpf.Sample) uint64 {
	const odd = 0x9e3779b97f4a7c15
	h := (uint64(p.id.pid)^p.id.start)*odd ^ p.id.exec
	h = h*odd ^ maphash.Bytes(t.seed, addrBytes(s.Kernel))
	return h*odd ^ maphash.Bytes(t.seed, addrBytes(s.User))
}

func (t *trace) equal(p *process, s *bpf.Sample) bool {
	return t.id == p.id && t.kernelOutcome == s.KernelOutcome && t.userOutcome == s.UserOutcome &&
		slices.Equal(t.frames[:t.kernel], s.Kernel) && slices.Equal(t.frames[t.kernel:], s.User) &&
		slices.Equal(t.areas, s.Areas)
}

// find returns the trace of s, nil if there is none.
func (t *traces) find(p *process, s *bpf.Sample) *trace {
	for tr := t.byHash[t.hash(p, s)]; tr != nil; tr = tr.next {
		if tr.equal(p, s) {
			return tr
		}
	}
	return nil
}

// insert makes the trace of s, which there is none of yet.
func (t *traces) insert(p *process, s *bpf.Sample) *trace {
	hash := t.hash(p, s)
	tr := &trace{
		next: t.byHash[hash], id: p.id, comm: s.Comm, tid: s.TID, time: s.Time,
		frames: slices.Concat(s.Kernel, s.User), kernel: len(s.Kernel), areas: slices.Clone(s.Areas),
		kernelOutcome: s.KernelOutcome, userOutcome: s.UserOutcome,
	}
	t.byHash[hash] = tr
	t.n++
	return tr
}

// retain drops the traces that are not kept, and clears the mark of those that are.
func (t *traces) retain() {
	t.n = 0
	for h, tr := range t.byHash {
		var chain *trace
		for tr != nil {
			next := tr.next
			if tr.kept {
				tr.kept, tr.next = false, chain
				chain = tr
				t.n++
			}
			tr = next
		}
		if chain == nil {
			delete(t.byHash, h)
		} else {
			t.byHash[h] = chain
		}
	}
}

// key is where to look for the samples that can be one sample of a profile.
type key struct {
	trace *trace
	tid   TID
}

// variant is what else samples must share for that.
type variant struct {
	comm, thread bpf.Comm
	container    string
	attributes   attributes
}

// row is one sample of a profile: a stack, its labels and its values. It is what the
// aggregation hands out, and does not change.
type row struct {
	stack        Stack
	pid          PID
	tid          TID
	comm, thread string
	container    string
	labels       [maxLabels]string
	last         uint64             // when the last of them was, boot clock, ns
	count        uint64             // observations that the samples stand for
	values       [maxValues]uint64  // by the type's Values
	numbers      [maxNumbers]uint64 // sums by weight, of the type's Numbers
}

// maxVariants bounds the rows of a key: a thread can have a new name with every sample.
const maxVariants = 512

// aggregate merges the samples of one type, of a window or of a capture.
type aggregate struct {
	typ      *Type
	limit    int         // of rows
	index    map[key]int // the last row of a key
	rows     []row
	sources  []source // of rows
	samples  uint64   // as bpf.Sample.Due counts them
	overflow row      // what found no room
}

// source is what a row is made of.
type source struct {
	trace   *trace
	variant variant
	before  int // another row of the same key, or -1
}

// newAggregate makes an aggregate of at most limit rows, with room for some.
func newAggregate(t *Type, limit, room int) *aggregate {
	a := &aggregate{
		typ: t, limit: limit,
		index:    make(map[key]int, room),
		rows:     make([]row, 0, room),
		sources:  make([]source, 0, room),
		overflow: row{stack: Stack{{Mapping: frameOverflow}}, comm: otherName, thread: otherName, container: otherName},
	}
	for i := range t.Labels {
		a.overflow.labels[i] = otherName
	}
	return a
}

// full tells whether a new trace would find no room.
func (a *aggregate) full() bool { return len(a.rows) >= a.limit }

// add counts s; tr is nil where there was no room for its trace. It returns whether the
// sample was counted with its stack.
func (a *aggregate) add(s *bpf.Sample, tr *trace, container string) bool {
	a.samples += s.Due()
	k := key{tr, TID(s.TID)}
	v := variant{s.Comm, s.Thread, container, a.typ.attributes(s)}
	last, ok := a.index[k]
	if !ok {
		last = -1
	}
	i, tries := last, 0
	for i >= 0 && a.sources[i].variant != v {
		i, tries = a.sources[i].before, tries+1
	}
	if i < 0 {
		if tr == nil || a.full() || tries >= maxVariants {
			a.overflow.add(a.typ, s)
			return false
		}
		i = len(a.rows)
		a.index[k] = i
		a.sources = append(a.sources, source{tr, v, last})
		a.rows = append(a.rows, row{
			pid: PID(s.PID), tid: k.tid,
			comm: s.Comm.String(), thread: s.Thread.String(), container: container,
			labels: v.attributes.labels,
		})
	}
	a.rows[i].add(a.typ, s)
	return true
}

func (r *row) add(t *Type, s *bpf.Sample) {
	r.last = max(r.last, s.Time)
	r.count += uint64(s.Weight)
	for i := range t.Values {
		r.values[i] += t.Values[i].Of(s)
	}
	for i := range t.Numbers {
		r.numbers[i] += t.Numbers[i].Of(s) * uint64(s.Weight)
	}
}

// keepTraces marks the traces of a for traces.retain.
func (a *aggregate) keepTraces() {
	for i := range a.sources {
		a.sources[i].trace.kept = true
	}
}

// result returns the rows so far, in the order of their first samples, until the next add.
func (a *aggregate) result() []row {
	for i := range a.sources {
		a.rows[i].stack = a.sources[i].trace.stack
	}
	if a.overflow.count > 0 {
		return append(a.rows, a.overflow)
	}
	return a.rows
}
