// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"container/list"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/hostflame/hostflame/bpf"
)

// life is a process from its birth to some time after its end: a process id is used by one
// life after the other.
type life struct {
	pid      PID
	parent   PID // who forked it; 0: not known
	born     uint64
	ticks    uint64 // its birth in ticks; unknownTicks
	readAt   uint64 // when /proc was asked: what happened before shows there
	died     uint64 // when its last thread ended; 0: it lives
	threads  int    // 0: not counted
	epoch    uint64 // that threads was counted in
	headless bool   // the main thread has ended
	image    *image
	previous *life // with the same id, ended
	el       *list.Element
}

const unknownTicks = ^uint64(0)

// fits tells whether a process with this birth can be l.
func (l *life) fits(start uint64) bool {
	if l.ticks != unknownTicks {
		return l.ticks == start/nanosPerTick
	}
	return start <= l.born
}

// at returns the image that l had at a time, nil if it is not known.
func (l *life) at(time uint64) *image {
	for i := l.image; i != nil; i = i.previous {
		if i.since <= time {
			return i
		}
	}
	return nil
}

// fileKey is a file as mappings name it.
type fileKey struct {
	major, minor uint32
	inode        uint64
}

// holder is a process that has a file mapped.
type holder struct {
	pid        PID
	born       uint64
	start, end uint64
}

// lives are the processes of the host, by what the kernel tells of them. It is for one
// goroutine.
type lives struct {
	limit    int
	read     func(PID) (reading, error) // of /proc
	intern   func([]byte) string
	byPID    map[PID]*life // the newest
	living   *list.List    // of *life, the one that was touched last in front
	ended    *list.List    // of *life, the one that ended last in front
	execs    []replacement // in order of time
	holders  map[fileKey]holder
	epoch    uint64 // counts losses of events
	evicted  uint64
	overflow uint64 // mappings beyond the limit of a process
	parents  uint64 // read because of a fork
}

// replacement is an image that execve replaced.
type replacement struct {
	life *life
	at   uint64
}

const (
	// keepEnded is how long a process that has ended, and what was before an execve, are
	// known: drains are a second apart at most, and the agent can be late.
	keepEnded = 5e9
	maxHeld   = 8 << 10
)

func newLives(limit int, read func(PID) (reading, error), intern func([]byte) string) *lives {
	return &lives{
		limit: limit, read: read, intern: intern,
		byPID: map[PID]*life{}, living: list.New(), ended: list.New(), holders: map[fileKey]holder{},
	}
}

// find returns the life of a process that was born at start, nil if it is not known.
func (t *lives) find(pid PID, start uint64) *life {
	var found *life
	// The oldest that fits: those that were born later fit too.
	for l := t.byPID[pid]; l != nil && (l.died == 0 || l.died >= start); l = l.previous {
		if l.fits(start) {
			found = l
		}
	}
	return found
}

// current returns the life that has the process id now, nil if none is known.
func (t *lives) current(pid PID) *life {
	if l := t.byPID[pid]; l != nil && l.died == 0 {
		t.living.MoveToFront(l.el)
		return l
	}
	return nil
}

// add begins a life.
func (t *lives) add(pid PID, at uint64) *life {
	previous := t.byPID[pid]
	if previous != nil && previous.died == 0 {
		t.end(previous, at) // we were not told
	}
	l := &life{pid: pid, born: at, ticks: unknownTicks, epoch: t.epoch, previous: previous}
	l.image = &image{since: at, epoch: t.epoch}
	t.byPID[pid] = l
	l.el = t.living.PushFront(l)
	for t.living.Len()+t.ended.Len() > t.limit {
		t.evicted++
		if el := t.ended.Back(); el != nil {
			t.remove(el.Value.(*life))
		} else {
			t.remove(t.living.Back().Value.(*life))
		}
	}
	return l
}

// learn begins a life, or completes one, with what /proc says.
func (t *lives) learn(pid PID, at uint64, r reading) *life {
	l := t.current(pid)
	if l == nil || !l.fits(r.start*nanosPerTick) {
		l = t.add(pid, at)
		l.image.since = 0
	}
	l.ticks, l.readAt = r.start, at
	t.renew(l, r)
	return l
}

// renew replaces what is known of the newest image of l.
func (t *lives) renew(l *life, r reading) {
	l.image.vmas, l.image.shared = r.vmas, true
	l.image.complete, l.image.epoch, l.image.comm = true, t.epoch, r.comm
	for _, v := range r.vmas {
		t.hold(l, v)
	}
}

func (t *lives) end(l *life, at uint64) {
	l.died = max(at, 1)
	t.living.Remove(l.el)
	l.el = t.ended.PushFront(l)
}

func (t *lives) remove(l *life) {
	if l.died == 0 {
		t.living.Remove(l.el)
	} else {
		t.ended.Remove(l.el)
	}
	if t.byPID[l.pid] == l {
		if l.previous == nil {
			delete(t.byPID, l.pid)
		} else {
			t.byPID[l.pid] = l.previous
		}
		return
	}
	for next := t.byPID[l.pid]; next != nil; next = next.previous {
		if next.previous == l {
			next.previous = l.previous
		}
	}
}

// hold remembers that l has the file of v mapped.
func (t *lives) hold(l *life, v vma) {
	if v.inode == 0 {
		return
	}
	key := fileKey{v.major, v.minor, v.inode}
	if h, ok := t.holders[key]; ok && t.holds(h) {
		return
	}
	if len(t.holders) >= maxHeld {
		clear(t.holders)
	}
	t.holders[key] = holder{l.pid, l.born, v.start, v.end}
}

func (t *lives) holds(h holder) bool {
	l := t.byPID[h.pid]
	return l != nil && l.born == h.born && l.died == 0
}

// prune lets go of what ended before a time.
func (t *lives) prune(before uint64) {
	for el := t.ended.Back(); el != nil && el.Value.(*life).died < before; el = t.ended.Back() {
		t.remove(el.Value.(*life))
	}
	n := 0
	for ; n < len(t.execs) && t.execs[n].at < before; n++ {
		for i := t.execs[n].life.image; i != nil; i = i.previous {
			if i.since <= t.execs[n].at {
				i.previous = nil
			}
		}
	}
	t.execs = slices.Delete(t.execs, 0, n)
}

// apply takes in one event. Events come in order of time.
func (t *lives) apply(e *bpf.MappingEvent) {
	pid := PID(e.PID)
	switch {
	case e.Type == bpf.MappingLost:
		t.epoch++
		return
	case pid == 0: // in no pid namespace of ours
		return
	case e.Type == bpf.MappingFork && e.PID != e.Parent:
		t.fork(e)
		return
	}
	l := t.current(pid)
	if l == nil {
		if e.Type == bpf.MappingFork || e.Type == bpf.MappingExit || e.Type == bpf.MappingComm {
			return
		}
		l = t.add(pid, e.Time)
	}
	switch {
	case e.Type == bpf.MappingExit:
		t.exit(l, e)
	case e.Time < l.readAt: // /proc has shown it
	case e.Type == bpf.MappingFork:
		if l.threads > 0 {
			l.threads++
		}
	case e.Type == bpf.MappingComm:
		if e.TID == e.PID {
			l.image.comm = e.Comm
		}
	case e.Type == bpf.MappingExec:
		l.image = &image{since: e.Time, comm: e.Comm, complete: true, epoch: t.epoch, previous: l.image}
		l.headless, l.threads, l.epoch = false, 1, t.epoch // the other threads have ended
		t.execs = append(t.execs, replacement{l, e.Time})
	case e.Type == bpf.MappingMap:
		t.mapped(l, e)
	}
}

func (t *lives) fork(e *bpf.MappingEvent) {
	pid := PID(e.PID)
	if l := t.current(pid); l != nil && e.Time < l.readAt {
		// The same one, that was read when it was there already.
		l.born, l.parent = e.Time, PID(e.Parent)
		return
	}
	parent := t.current(PID(e.Parent))
	if parent == nil || !parent.image.complete && parent.readAt == 0 {
		t.parents++
		at := uint64(bootTime())
		if r, err := t.read(PID(e.Parent)); err == nil && (r.kernel || len(r.vmas) > 0) {
			parent = t.learn(PID(e.Parent), at, r)
		}
	}
	l := t.add(pid, e.Time)
	l.parent, l.threads = PID(e.Parent), 1
	if parent != nil {
		l.image = parent.image.fork(e.Time)
	}
}

func (t *lives) exit(l *life, e *bpf.MappingEvent) {
	if l.threads > 0 && l.epoch == t.epoch {
		if l.threads--; l.threads == 0 {
			t.end(l, e.Time)
		}
		return
	}
	l.threads = 0
	if e.TID == e.PID {
		l.headless = true
	}
	if !l.headless {
		return
	}
	// The main thread of a process is there until all are gone, and then until its parent
	// has asked.
	if r, err := t.read(l.pid); err != nil || r.threads < 2 || l.ticks != unknownTicks && l.ticks != r.start {
		t.end(l, e.Time)
	}
}

func (t *lives) mapped(l *life, e *bpf.MappingEvent) {
	v := vma{
		start: e.Start, end: e.End, offset: e.Offset,
		major: e.Major, minor: e.Minor, inode: e.Inode, path: t.intern(e.Path),
	}
	if e.PathUnknown {
		l.image.complete = false
	}
	if !l.image.put(v, e.Time) {
		t.overflow++
		return
	}
	t.hold(l, v)
}

// ancestors returns the living ones, the parent first.
func (t *lives) ancestors(pid PID) []PID {
	var pids []PID
	const most = 16
	for l := t.byPID[pid]; l != nil && len(pids) < most; l = t.byPID[l.parent] {
		if l.pid != pid && l.died == 0 {
			pids = append(pids, l.pid)
		}
	}
	return pids
}

// dump writes what is known, by process id.
func (t *lives) dump(w io.Writer) {
	for _, pid := range slices.Sorted(maps.Keys(t.byPID)) {
		for l := t.byPID[pid]; l != nil; l = l.previous {
			fmt.Fprintf(w, "process %d parent %d born %d died %d threads %d\n", l.pid, l.parent, l.born, l.died, l.threads)
			for i := l.image; i != nil; i = i.previous {
				fmt.Fprintf(w, "  image since %d %q complete %v\n", i.since, i.comm, i.complete)
				for _, v := range i.vmas {
					fmt.Fprintf(w, "    %x-%x %08x %02x:%02x %d %s\n", v.start, v.end, v.offset, v.major, v.minor, v.inode, v.path)
				}
			}
		}
	}
}
