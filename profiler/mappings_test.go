// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
)

// vmas parses "1000-2000 0 /bin/a" and the like: start, end, offset, path. The inode comes
// from the path.
func vmas(t *testing.T, text ...string) []vma {
	t.Helper()
	var list []vma
	for _, line := range text {
		var v vma
		if _, err := fmt.Sscanf(line, "%x-%x %x %s", &v.start, &v.end, &v.offset, &v.path); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if v.path == "anon" {
			v.path = ""
		} else {
			v.inode, v.major = inodeOf(v.path), 8
		}
		list = append(list, v)
	}
	return list
}

func inodeOf(path string) (n uint64) {
	for _, c := range path {
		n = 131*n + uint64(c)
	}
	return n
}

func TestImagePut(t *testing.T) {
	for _, test := range []struct {
		name      string
		put, want []string
	}{
		{"apart", []string{"5000-6000 0 /b", "1000-2000 0 /a"}, []string{"1000-2000 0 /a", "5000-6000 0 /b"}},
		{"the same again", []string{"1000-2000 0 /a", "1000-2000 0 /a"}, []string{"1000-2000 0 /a"}},
		{"over all of it", []string{"2000-3000 0 /a", "1000-5000 0 /b"}, []string{"1000-5000 0 /b"}},
		{"over several", []string{"2000-3000 0 /a", "4000-5000 0 /c", "1000-6000 0 /b"}, []string{"1000-6000 0 /b"}},
		{"over the start", []string{"2000-5000 1000 /a", "1000-3000 0 /b"}, []string{"1000-3000 0 /b", "3000-5000 2000 /a"}},
		{"over the end", []string{"2000-5000 1000 /a", "4000-6000 0 /b"}, []string{"2000-4000 1000 /a", "4000-6000 0 /b"}},
		{"inside", []string{"2000-9000 1000 /a", "4000-6000 0 anon"}, []string{"2000-4000 1000 /a", "4000-6000 0 anon", "6000-9000 5000 /a"}},
		{"between two", []string{"1000-3000 0 /a", "5000-8000 7000 /c", "2000-6000 0 /b"}, []string{"1000-2000 0 /a", "2000-6000 0 /b", "6000-8000 8000 /c"}},
		{"in touch", []string{"1000-2000 0 /a", "3000-4000 0 /c", "2000-3000 0 /b"}, []string{"1000-2000 0 /a", "2000-3000 0 /b", "3000-4000 0 /c"}},
	} {
		var i image
		for _, v := range vmas(t, test.put...) {
			if !i.put(v, 1) {
				t.Errorf("%s: no room", test.name)
			}
		}
		if d := cmp.Diff(vmas(t, test.want...), i.vmas, cmp.AllowUnexported(vma{})); d != "" {
			t.Errorf("%s: %s", test.name, d)
		}
	}
}

// put agrees with an array of pages that are mapped one by one.
func TestImagePutAgainstPages(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var i image
	var pages [64]vma // of one page each
	for n := range 20_000 {
		start := random.Uint64N(60)
		v := vma{start: start << 12, end: (start + 1 + random.Uint64N(4)) << 12, offset: random.Uint64N(4) << 12, inode: random.Uint64N(3)}
		if v.inode == 0 {
			v.offset = 0
		}
		i.put(v, uint64(n))
		for a := v.start; a < v.end; a += 1 << 12 {
			p := v
			p.start, p.end = a, a+1<<12
			if v.inode != 0 {
				p.offset += a - v.start
			}
			pages[a>>12] = p
		}
		for k, p := range pages {
			at := uint64(k) << 12
			got := vmaAt(i.vmas, at+100)
			switch {
			case p.end == 0:
				if got != nil {
					t.Fatalf("step %d: page %d: %+v, want none", n, k, got)
				}
			case got == nil, got.inode != p.inode, p.inode != 0 && got.offset+at-got.start != p.offset:
				t.Fatalf("step %d: page %d: %+v, want %+v", n, k, got, p)
			}
		}
		if !slices.IsSortedFunc(i.vmas, func(a, b vma) int {
			if a.end <= b.start {
				return -1
			}
			return 1
		}) {
			t.Fatalf("step %d: %+v", n, i.vmas)
		}
		if len(i.former) > maxFormer {
			t.Fatalf("%d former mappings", len(i.former))
		}
	}
}

// told are events that a test makes up, and a proc file system beside them.
type told struct {
	t      *testing.T
	list   []bpf.MappingEvent
	clock  uint64
	root   string
	err    error
	source *eventMappings
}

func newTold(t *testing.T, limit int) *told {
	told := &told{t: t, root: t.TempDir(), clock: 100e9}
	var err error
	if told.source, err = newEventMappings(told, newProcfs(told.root), limit); err != nil {
		t.Fatal(err)
	}
	return told
}

func (e *told) Drain(fn func(*bpf.MappingEvent)) (uint64, error) {
	for i := range e.list {
		fn(&e.list[i])
	}
	e.list = nil
	return e.clock, e.err
}

func (e *told) Wait(ctx context.Context, d time.Duration) error {
	<-ctx.Done()
	return ctx.Err()
}

// tell adds an event, 10 ms after the one before.
func (e *told) tell(event bpf.MappingEvent) uint64 {
	e.clock += 10e6
	event.Time = e.clock
	e.list = append(e.list, event)
	return e.clock
}

func (e *told) fork(parent, pid uint32) uint64 {
	return e.tell(bpf.MappingEvent{Type: bpf.MappingFork, PID: pid, TID: pid, Parent: parent, ParentTID: parent})
}

func (e *told) thread(pid, tid uint32) {
	e.tell(bpf.MappingEvent{Type: bpf.MappingFork, PID: pid, TID: tid, Parent: pid, ParentTID: pid})
}

func (e *told) exec(pid uint32, comm string) uint64 {
	return e.tell(bpf.MappingEvent{Type: bpf.MappingExec, PID: pid, TID: pid, Comm: bpf.MakeComm(comm)})
}

func (e *told) exit(pid, tid uint32) uint64 {
	return e.tell(bpf.MappingEvent{Type: bpf.MappingExit, PID: pid, TID: tid})
}

func (e *told) maps(pid uint32, text ...string) (at uint64) {
	for _, v := range vmas(e.t, text...) {
		at = e.tell(bpf.MappingEvent{
			Type: bpf.MappingMap, PID: pid, TID: pid, Start: v.start, End: v.end, Offset: v.offset,
			Major: v.major, Minor: v.minor, Inode: v.inode, Path: []byte(v.path),
		})
	}
	return at
}

// expect checks the mappings of a sample.
func (e *told) expect(what string, s bpf.Sample, want ...string) {
	e.t.Helper()
	got, err := e.source.mappings(&s)
	if err != nil {
		e.t.Errorf("%s: %v", what, err)
		return
	}
	if d := cmp.Diff(vmas(e.t, want...), got, cmp.AllowUnexported(vma{})); d != "" {
		e.t.Errorf("%s: %s", what, d)
	}
}

func (e *told) expectError(what string, s bpf.Sample, want error) {
	e.t.Helper()
	if got, err := e.source.mappings(&s); !errors.Is(err, want) {
		e.t.Errorf("%s: %v, %v, want %v", what, got, err, want)
	}
}

func (e *told) reads() (n uint64) {
	for _, count := range e.source.stats().Reads {
		n += count
	}
	return n
}

// A process is known from its fork to some seconds after its end, each of its programs by
// the time of the sample.
func TestMappingsOfProcess(t *testing.T) {
	e := newTold(t, 100)
	e.exec(10, "sh")
	e.maps(10, "1000-2000 0 /bin/sh", "5000-6000 0 /lib/c")
	before := e.fork(10, 20) + 1
	exec := e.exec(20, "ls")
	e.maps(20, "3000-4000 0 /bin/ls")
	e.maps(20, "7000-8000 0 /lib/c")
	exited := e.exit(20, 20)
	child := bpf.Sample{PID: 20, TID: 20, Start: before - 1000}
	at := func(time uint64) bpf.Sample { child.Time = time; return child }
	e.expect("after fork", at(before), "1000-2000 0 /bin/sh", "5000-6000 0 /lib/c")
	e.expect("after execve", at(exec+1), "3000-4000 0 /bin/ls", "7000-8000 0 /lib/c")
	e.expect("at the end", at(exited), "3000-4000 0 /bin/ls", "7000-8000 0 /lib/c")
	e.expectError("another process of that id", bpf.Sample{PID: 20, Start: exited + 1, Time: exited + 2}, errExited)
	if n := e.reads(); n != 1 {
		t.Errorf("/proc was read %d times: %v", n, e.source.stats().Reads)
	}
	e.clock += keepEnded + 1e9
	e.source.drain()
	e.expectError("long after", at(exec+1), errExited)
	if s := e.source.stats(); s.Processes != 1 || s.Ended != 0 {
		t.Errorf("%+v", s)
	}
}

// A child has what its parent had; what either maps then is its own.
func TestMappingsFork(t *testing.T) {
	e := newTold(t, 100)
	e.exec(10, "server")
	e.maps(10, "1000-2000 0 /bin/server")
	born := e.fork(10, 20)
	e.maps(10, "3000-4000 0 /lib/parent")
	e.maps(20, "5000-6000 0 /lib/child")
	e.fork(20, 30)
	e.fork(20, 40)
	e.maps(40, "1000-2000 0 anon")
	e.expect("parent", bpf.Sample{PID: 10, Time: e.clock}, "1000-2000 0 /bin/server", "3000-4000 0 /lib/parent")
	e.expect("child", bpf.Sample{PID: 20, Start: born - 1, Time: e.clock}, "1000-2000 0 /bin/server", "5000-6000 0 /lib/child")
	e.expect("grandchild", bpf.Sample{PID: 30, Start: e.clock - 40e6, Time: e.clock}, "1000-2000 0 /bin/server", "5000-6000 0 /lib/child")
	e.expect("another one", bpf.Sample{PID: 40, Start: e.clock - 30e6, Time: e.clock}, "1000-2000 0 anon", "5000-6000 0 /lib/child")
	child, grandchild := e.source.lives.byPID[20].image.vmas, e.source.lives.byPID[30].image.vmas
	if &child[0] != &grandchild[0] {
		t.Error("the mappings of a child are a copy")
	}
}

// A process lives as long as any of its threads.
func TestMappingsThreads(t *testing.T) {
	e := newTold(t, 100)
	e.exec(1, "init")
	born := e.fork(1, 20)
	e.exec(20, "server")
	e.maps(20, "1000-2000 0 /bin/server")
	e.thread(20, 21)
	e.exit(20, 20)
	e.clock += 2 * keepEnded
	e.source.drain()
	s := bpf.Sample{PID: 20, TID: 21, Start: born - 1, Time: e.clock}
	e.expect("main thread gone", s, "1000-2000 0 /bin/server")
	// The thread executes: it becomes the main thread, under the id of the process.
	e.exec(20, "worker")
	e.maps(20, "3000-4000 0 /bin/worker")
	s.Time = e.clock
	e.expect("execve in a thread", s, "3000-4000 0 /bin/worker")
	e.exit(20, 20)
	s.Time = e.clock
	e.expect("at the end", s, "3000-4000 0 /bin/worker")
	e.clock += 2 * keepEnded
	e.source.drain()
	if n := e.source.stats(); n.Processes != 1 || n.Ended != 0 {
		t.Errorf("%+v", n)
	}
}

// The lives that had one process id one after the other are told apart by their birth.
func TestMappingsReuse(t *testing.T) {
	e := newTold(t, 100)
	e.exec(1, "init")
	var births, times []uint64
	for n := range 5 {
		births = append(births, e.fork(1, 20)-1000)
		e.exec(20, "x")
		e.maps(20, fmt.Sprintf("1000-2000 0 /bin/%d", n))
		times = append(times, e.clock)
		e.exit(20, 20)
	}
	for n := range births {
		e.expect(fmt.Sprint("life ", n), bpf.Sample{PID: 20, Start: births[n], Time: times[n]}, fmt.Sprintf("1000-2000 0 /bin/%d", n))
	}
	// The end of one was not told.
	e.fork(1, 30)
	e.maps(30, "1000-2000 0 /bin/a")
	again := e.fork(1, 30)
	e.exec(30, "b")
	e.maps(30, "1000-2000 0 /bin/b")
	e.expect("untold end", bpf.Sample{PID: 30, Start: again - 1, Time: e.clock}, "1000-2000 0 /bin/b")
}

// A library that took the place of another one is not taken for it.
func TestMappingsReplaced(t *testing.T) {
	e := newTold(t, 100)
	e.exec(10, "x")
	e.maps(10, "1000-2000 0 /bin/x")
	e.maps(10, "5000-8000 0 /lib/old")
	before := e.clock
	e.maps(10, "6000-7000 1000 /lib/new")
	e.expect("now", bpf.Sample{PID: 10, Time: e.clock}, "1000-2000 0 /bin/x", "5000-6000 0 /lib/old", "6000-7000 1000 /lib/new", "7000-8000 2000 /lib/old")
	e.expect("before", bpf.Sample{PID: 10, Time: before}, "1000-2000 0 /bin/x", "5000-8000 0 /lib/old")
	// Code that is moved to huge pages.
	e.maps(10, "1000-2000 0 anon")
	e.expect("huge pages", bpf.Sample{PID: 10, Time: e.clock}, "1000-2000 0 anon", "5000-6000 0 /lib/old", "6000-7000 1000 /lib/new", "7000-8000 2000 /lib/old")
}

// procLine is a line of /proc/PID/maps of what vmas makes of text.
func procLine(t *testing.T, text string) string {
	v := vmas(t, text)[0]
	return fmt.Sprintf("%x-%x r-xp %08x %02x:%02x %d %s\n", v.start, v.end, v.offset, v.major, v.minor, v.inode, v.path)
}

// Those that were there before the events are read once, and so are their children known.
func TestMappingsInitial(t *testing.T) {
	root := t.TempDir()
	fakeProcess(t, root, 42, "old", 7000, procLine(t, "1000-2000 0 /bin/old"))
	fakeProcess(t, root, 43, "zombie", 7000, "")
	e := &told{t: t, root: root, clock: uint64(bootTime()) + 10e9}
	var err error
	if e.source, err = newEventMappings(e, newProcfs(root), 100); err != nil {
		t.Fatal(err)
	}
	old := bpf.Sample{PID: 42, TID: 42, Start: 70_000_000_123, Time: 1, Comm: bpf.MakeComm("old")}
	e.expect("initial process", old, "1000-2000 0 /bin/old")
	// What /proc has shown already does not happen again.
	e.list = append(e.list, bpf.MappingEvent{Type: bpf.MappingExec, Time: 71e9, PID: 42, TID: 42})
	born := e.fork(42, 50)
	e.exit(50, 50)
	e.expect("its child", bpf.Sample{PID: 50, Start: born - 1, Time: born}, "1000-2000 0 /bin/old")
	e.expectError("zombie", bpf.Sample{PID: 43, TID: 43, Start: 70_000_000_123, Comm: bpf.MakeComm("zombie")}, errExited)
	old.Comm = bpf.MakeComm("before")
	e.expectError("what it was before it was read", old, errReplaced)
	if err := os.RemoveAll(filepath.Join(root, "42")); err != nil {
		t.Fatal(err)
	}
	gone := e.exit(42, 42)
	e.expect("after its end", bpf.Sample{PID: 42, Start: 70_000_000_123, Time: gone, Comm: bpf.MakeComm("old")}, "1000-2000 0 /bin/old")
	e.clock += 2 * keepEnded
	e.source.drain()
	if s := e.source.stats(); s.Processes != 0 || s.Ended != 0 || s.Reads["initial"] != 2 || s.Reads["parent"] != 0 {
		t.Errorf("%+v", s)
	}
}

// A process that no event told of is read when it is sampled, or when it forks.
func TestMappingsUnknown(t *testing.T) {
	e := newTold(t, 100)
	e.clock = uint64(bootTime()) + 10e9
	fakeProcess(t, e.root, 42, "x", 7000, procLine(t, "1000-2000 0 /bin/x"))
	fakeProcess(t, e.root, 43, "y", 7000, procLine(t, "1000-2000 0 /bin/y"))
	x := bpf.Sample{PID: 42, TID: 42, Start: 70_000_000_123, Time: e.clock, Comm: bpf.MakeComm("x")}
	e.expect("sampled", x, "1000-2000 0 /bin/x")
	e.expect("sampled again", x, "1000-2000 0 /bin/x")
	born := e.fork(43, 50)
	e.expect("child of an unknown process", bpf.Sample{PID: 50, Start: born - 1, Time: born}, "1000-2000 0 /bin/y")
	if s := e.source.stats(); s.Reads["unknown"] != 1 || s.Reads["parent"] != 1 || e.reads() != 2 {
		t.Errorf("%+v", s)
	}
}

// Lost events make all that is known doubtful: it is read again, once.
func TestMappingsLost(t *testing.T) {
	e := newTold(t, 100)
	e.exec(42, "x")
	e.maps(42, "1000-2000 0 /bin/x")
	e.exec(43, "y")
	e.maps(43, "1000-2000 0 /bin/y")
	seen := e.clock
	fakeProcess(t, e.root, 42, "x", 7000, procLine(t, "1000-2000 0 /bin/x")+procLine(t, "3000-4000 0 /lib/lost"))
	e.tell(bpf.MappingEvent{Type: bpf.MappingLost, Lost: 1})
	x := bpf.Sample{PID: 42, TID: 42, Start: 70_000_000_123, Time: e.clock, Comm: bpf.MakeComm("x")}
	for range 3 {
		e.expect("after a loss", x, "1000-2000 0 /bin/x", "3000-4000 0 /lib/lost")
	}
	if s := e.source.stats(); s.Reads["lost"] != 1 {
		t.Errorf("%+v", s)
	}
	e.expect("gone", bpf.Sample{PID: 43, TID: 43, Time: seen, Comm: bpf.MakeComm("y")}, "1000-2000 0 /bin/y")
	e.expectError("gone, and it was another program", bpf.Sample{PID: 43, TID: 43, Time: seen, Comm: bpf.MakeComm("z")}, errExited)
}

// Memory that no event told of (mremap) is looked for in /proc, but not again and again.
func TestMappingsMissing(t *testing.T) {
	e := newTold(t, 100)
	e.exec(42, "x")
	e.maps(42, "1000-2000 0 /bin/x")
	fakeProcess(t, e.root, 42, "x", 7000, procLine(t, "1000-2000 0 /bin/x")+procLine(t, "3000-4000 0 /lib/moved"))
	x := bpf.Sample{PID: 42, TID: 42, Start: 70_000_000_123, Time: e.clock, Comm: bpf.MakeComm("x"), User: []uint64{0x1800}}
	e.expect("known", x, "1000-2000 0 /bin/x")
	x.User = []uint64{bpf.ExactAddr | 0x3800, 0x1800}
	e.expect("moved", x, "1000-2000 0 /bin/x", "3000-4000 0 /lib/moved")
	x.User = []uint64{bpf.ExactAddr | 0x9800}
	for range 10 {
		e.expect("nowhere", x, "1000-2000 0 /bin/x", "3000-4000 0 /lib/moved")
	}
	if n := e.source.stats().Reads["missing"]; n != 1 && n != 2 {
		t.Errorf("read %d times", n)
	}
	// An area that is something else than what was told.
	y := bpf.Sample{PID: 42, TID: 42, Start: 70_000_000_123, Time: e.clock, Comm: bpf.MakeComm("x")}
	y.Areas = []bpf.Area{{Start: 0x1000, End: 0x2000, File: bpf.File{Inode: 5}}}
	if known, _ := e.source.mappings(&y); misses(known, &y) {
		t.Error("an area of a file, at the offset that was told, is missing")
	}
	y.Areas[0].File.Inode = 0
	if known, _ := e.source.mappings(&y); !misses(known, &y) {
		t.Error("anonymous memory passes for a file")
	}
	y.Areas[0] = bpf.Area{Start: 0x1000, End: 0x2000, Offset: 0x5000, File: bpf.File{Inode: 5}}
	if known, _ := e.source.mappings(&y); !misses(known, &y) {
		t.Error("another offset passes")
	}
}

// Without events everything comes from /proc.
func TestMappingsBroken(t *testing.T) {
	e := newTold(t, 100)
	fakeProcess(t, e.root, 42, "x", 7000, procLine(t, "1000-2000 0 /bin/x"))
	e.err = os.ErrClosed
	x := bpf.Sample{PID: 42, TID: 42, Start: 70_000_000_123, Time: e.clock + 1, Comm: bpf.MakeComm("x")}
	e.expect("read", x, "1000-2000 0 /bin/x")
	fakeProcess(t, e.root, 42, "y", 7000, procLine(t, "1000-2000 0 /bin/y"))
	x.Comm = bpf.MakeComm("y")
	e.expect("read again", x, "1000-2000 0 /bin/y")
}

// Memory is bounded: those that have ended go first, then those that were not heard of for longest.
func TestMappingsLimit(t *testing.T) {
	const limit = 50
	e := newTold(t, limit)
	e.exec(1, "init")
	e.maps(1, "1000-2000 0 /bin/init")
	for pid := uint32(100); pid < 1100; pid++ {
		e.fork(1, pid)
		if pid%2 == 0 {
			e.exec(pid, "x")
		}
		if pid%3 == 0 {
			e.exit(pid, pid)
		}
		e.source.drain()
	}
	s := e.source.stats()
	if s.Processes+s.Ended > limit || s.Forgotten < 1000-limit-10 || len(e.source.lives.byPID) > limit {
		t.Errorf("%+v, %d ids", s, len(e.source.lives.byPID))
	}
	e.expect("the parent of all", bpf.Sample{PID: 1, Time: e.clock}, "1000-2000 0 /bin/init")
	for k := range maxVMAs + 10 {
		e.maps(1, fmt.Sprintf("%x-%x 0 /lib/%d", 0x10000+k<<13, 0x11000+k<<13, k))
	}
	e.source.drain()
	if n := e.source.stats().Overflowed; n != 11 {
		t.Errorf("%d mappings too many, want 11", n)
	}
	var dump bytes.Buffer
	e.source.dump(&dump)
	if !strings.Contains(dump.String(), "    1000-2000 00000000 08:00 ") {
		t.Error("no mapping in the dump")
	}
}

// Whatever is told, in whatever order, the books stay straight.
func FuzzMappings(f *testing.F) {
	f.Add([]byte("aAbBcCdDeEfFgGhHiIjJkK"))
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 8
		root := t.TempDir()
		e := &told{t: t, root: root, clock: 1000e9}
		var err error
		if e.source, err = newEventMappings(e, newProcfs(root), limit); err != nil {
			t.Fatal(err)
		}
		for len(b) >= 4 {
			pid, other := uint32(b[1]%12), uint32(b[2]%12)
			switch b[0] % 8 {
			case 0:
				e.fork(other, pid)
			case 1:
				e.thread(pid, 100+other)
			case 2:
				e.exec(pid, "x")
			case 3:
				e.exit(pid, pid)
			case 4:
				e.exit(pid, 100+other)
			case 5:
				e.maps(pid, fmt.Sprintf("%x000-%x000 0 /f%d", b[3]+1, int(b[3])+2+int(other), other))
			case 6:
				e.tell(bpf.MappingEvent{Type: bpf.MappingLost})
			case 7:
				e.clock += uint64(b[3]) * 1e8
				e.source.mappings(&bpf.Sample{PID: pid, Start: e.clock - uint64(b[2])*1e9, Time: e.clock})
			}
			b = b[4:]
		}
		e.source.drain()
		l := e.source.lives
		known := 0
		for pid := range l.byPID {
			for life := l.byPID[pid]; life != nil; life = life.previous {
				known++
				if life.pid != pid || life.image == nil || life.previous != nil && life.previous.died == 0 {
					t.Errorf("life %+v", life)
				}
			}
		}
		if known != l.living.Len()+l.ended.Len() || known > limit {
			t.Errorf("%d lives by id, %d that live, %d that ended", known, l.living.Len(), l.ended.Len())
		}
	})
}

// The file of a process that is gone is found where another process has it mapped, in the
// root of an ancestor, or in our own, and it must be the same file.
func TestMappingsOpen(t *testing.T) {
	e := newTold(t, 100)
	dir := t.TempDir()
	file := func(path, content string) vma {
		write(t, path, content)
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return vma{start: 0x1000, end: 0x2000, major: unix.Major(st.Dev), minor: unix.Minor(st.Dev), inode: st.Ino, mtime: uint64(st.Mtim.Nano())}
	}
	read := func(pid PID, v vma) string {
		f, err := e.source.open(pid, v)
		if err != nil {
			return "error"
		}
		defer f.Close()
		b, err := io.ReadAll(f)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	e.exec(10, "parent")
	e.fork(10, 20)
	e.fork(20, 30)
	e.exit(20, 20)
	e.exit(30, 30)
	e.source.drain()

	// In the root of the parent of the parent.
	v := file(filepath.Join(e.root, "10/root", dir, "contained"), "contained")
	v.path = filepath.Join(dir, "contained")
	if got := read(30, v); got != "contained" {
		t.Errorf("root of an ancestor: %q", got)
	}
	if got := read(99, v); got != "error" {
		t.Errorf("no relative: %q", got)
	}
	v.mtime++
	if got := read(30, v); got != "error" {
		t.Errorf("changed since: %q", got)
	}
	// By another process that maps it.
	deleted := file(filepath.Join(dir, "deleted"), "deleted")
	deleted.path = "/somewhere"
	e.tell(bpf.MappingEvent{Type: bpf.MappingMap, PID: 10, Start: 0x7000, End: 0x8000, Major: deleted.major, Minor: deleted.minor, Inode: deleted.inode, Path: []byte("/elsewhere")})
	e.source.drain()
	if err := os.MkdirAll(filepath.Join(e.root, "10/map_files"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "deleted"), filepath.Join(e.root, "10/map_files/7000-8000")); err != nil {
		t.Fatal(err)
	}
	if got := read(30, deleted); got != "deleted" {
		t.Errorf("mapped by another process: %q", got)
	}
	e.exit(10, 10)
	e.source.drain()
	if got := read(30, deleted); got != "error" {
		t.Errorf("mapped by a process that is gone: %q", got)
	}
}

func TestMappingsRunEnds(t *testing.T) {
	e := newTold(t, 100)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- e.source.run(ctx, func() {}) }()
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("run did not end with its context")
	}
}
