// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// record makes one as the kernel does.
func record(kind uint32, misc uint16, time uint64, body ...any) []byte {
	var b bytes.Buffer
	for _, part := range body {
		if s, ok := part.(string); ok {
			b.WriteString(s)
			b.Write(make([]byte, 8-len(s)%8)) // at least one NUL
			continue
		}
		binary.Write(&b, binary.NativeEndian, part)
	}
	binary.Write(&b, binary.NativeEndian, time)
	head := binary.NativeEndian.AppendUint32(nil, kind)
	head = binary.NativeEndian.AppendUint16(head, misc)
	head = binary.NativeEndian.AppendUint16(head, uint16(recordHeader+b.Len()))
	return append(head, b.Bytes()...)
}

func mmap2(time uint64, pid uint32, start, length, offset uint64, minor uint32, inode uint64, path string) []byte {
	return record(unix.PERF_RECORD_MMAP2, 0, time, []uint32{pid, pid + 1}, []uint64{start, length, offset},
		[]uint32{8, minor}, []uint64{inode, 99}, []uint32{5, 2}, path)
}

func fork(time uint64, pid, parent uint32) []byte {
	return record(unix.PERF_RECORD_FORK, 0, time, []uint32{pid, parent, pid, parent}, time-1)
}

func lost(time, n uint64) []byte { return record(unix.PERF_RECORD_LOST, 0, time, uint64(1), n) }

func TestMappingEventDecode(t *testing.T) {
	anonymous := record(unix.PERF_RECORD_MMAP2, 0, 5, []uint32{1, 2}, []uint64{0x1000, 0x1000, 0x1000}, []uint32{0, 0}, []uint64{0, 0}, []uint32{7, 2}, "//anon")
	for _, test := range []struct {
		record []byte
		want   string // the dump
	}{
		{mmap2(1_000_000_005, 7, 0x5000, 0x2000, 0x1000, 1, 42, "/usr/bin/cat"), "1.000000005 map 7/8 5000-7000 00001000 08:01 42 /usr/bin/cat"},
		{mmap2(5, 7, 0x5000, 0x2000, 0x1000, 1, 42, "/12345/8"), "0.000000005 map 7/8 5000-7000 00001000 08:01 42 /12345/8"},
		{mmap2(5, 7, 0x5000, 0x2000, 0, 1, 42, "//toolong"), "0.000000005 map 7/8 5000-7000 00000000 08:01 42 ?"},
		{anonymous, "0.000000005 map 1/2 1000-2000 00000000 00:00 0 "},
		{record(unix.PERF_RECORD_COMM, 0, 5, []uint32{7, 8}, "a name"), `0.000000005 comm 7/8 "a name"`},
		{record(unix.PERF_RECORD_COMM, 0, 5, []uint32{7, 8}, ""), `0.000000005 comm 7/8 ""`},
		{record(unix.PERF_RECORD_COMM, unix.PERF_RECORD_MISC_COMM_EXEC, 5, []uint32{7, 7}, "fifteen letters"), `0.000000005 exec 7/7 "fifteen letters"`},
		{fork(5, 7, 6), "0.000000005 fork 7/7 parent 6/6"},
		{record(unix.PERF_RECORD_EXIT, 0, 5, []uint32{7, 6, 8, 6}, uint64(5)), "0.000000005 exit 7/8 parent 6/6"},
		{lost(5, 3), "0.000000005 lost 3"},
		{record(unix.PERF_RECORD_THROTTLE, 0, 5, []uint64{1, 2, 3}), "unknown"},
		{mmap2(5, 7, 0x5000, 0, 0, 1, 42, "/empty"), "bad"},
		{mmap2(5, 7, 0x5000, ^uint64(0), 0, 1, 42, "/wraps"), "bad"},
		{record(unix.PERF_RECORD_MMAP2, unix.PERF_RECORD_MISC_MMAP_BUILD_ID, 5, make([]uint64, 9)), "bad"},
		{record(unix.PERF_RECORD_MMAP2, 0, 5, make([]uint64, 8)), "bad"},
		{record(unix.PERF_RECORD_COMM, 0, 5, []uint32{7, 8}, []byte("no end!!")), "bad"},
		{record(unix.PERF_RECORD_FORK, 0, 5, make([]uint64, 2)), "bad"},
		{record(unix.PERF_RECORD_LOST, 0, 5, make([]uint64, 1)), "bad"},
		{record(unix.PERF_RECORD_COMM, 0, 5)[:8], "bad"},
	} {
		var e MappingEvent
		known, ok := e.decode(test.record)
		got := e.String()
		switch {
		case !ok:
			got = "bad"
		case !known:
			got = "unknown"
		}
		if got != test.want {
			t.Errorf("%x: %q, want %q", test.record, got, test.want)
		}
	}
}

func FuzzMappingEventDecode(f *testing.F) {
	f.Add(mmap2(5, 7, 0x5000, 0x2000, 0x1000, 1, 42, "/usr/bin/cat"))
	f.Add(record(unix.PERF_RECORD_COMM, unix.PERF_RECORD_MISC_COMM_EXEC, 5, []uint32{7, 7}, "cat"))
	f.Add(fork(5, 7, 6))
	f.Add(lost(5, 3))
	f.Fuzz(func(t *testing.T, b []byte) {
		var e MappingEvent
		if known, ok := e.decode(b); known && ok {
			if e.Type == MappingMap && e.End <= e.Start {
				t.Errorf("%v", &e)
			}
			_ = e.String()
		}
	})
}

// fakeRing is a ring that the test writes instead of the kernel.
func fakeRing(size int) *perfRing {
	return &perfRing{page: new(unix.PerfEventMmapPage), data: alignedBytes(size)}
}

func alignedBytes(n int) []byte {
	words := make([]uint64, n/8)
	return unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), n)
}

// put writes a record as the kernel does: where there is no room, not at all.
func (r *perfRing) put(b []byte) bool {
	if r.page.Data_head+uint64(len(b))-r.page.Data_tail > uint64(len(r.data)) {
		return false
	}
	n := copy(r.data[r.page.Data_head&uint64(len(r.data)-1):], b)
	copy(r.data, b[n:])
	r.page.Data_head += uint64(len(b))
	return true
}

func fakeMappings(rings ...*perfRing) *Mappings {
	m := &Mappings{rings: map[int]*perfRing{}}
	for i, r := range rings {
		m.rings[i] = r
	}
	return m
}

func drainDump(t *testing.T, m *Mappings) []string {
	t.Helper()
	var got []string
	if _, err := m.Drain(func(e *MappingEvent) { got = append(got, e.String()) }); err != nil {
		t.Fatal(err)
	}
	return got
}

// The events of all rings come in order of time, those that are newer than the drain later.
func TestMappingsMerge(t *testing.T) {
	rings := []*perfRing{fakeRing(4096), fakeRing(4096), fakeRing(4096)}
	m := fakeMappings(rings...)
	future := bootNanos(t) + 3600e9
	rings[0].put(fork(10, 1, 0))
	rings[0].put(fork(40, 4, 0))
	rings[0].put(fork(future, 9, 0))
	rings[1].put(fork(20, 2, 0))
	rings[1].put(fork(50, 5, 0))
	rings[2].put(fork(30, 3, 0))
	rings[2].put(lost(60, 12))
	var want []string
	for i := 1; i <= 5; i++ {
		want = append(want, fmt.Sprintf("0.0000000%d0 fork %d/%d parent 0/0", i, i, i))
	}
	want = append(want, "0.000000060 lost 12")
	if got := drainDump(t, m); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if got := drainDump(t, m); len(got) > 0 {
		t.Errorf("again: %q", got)
	}
	if left := rings[0].page.Data_head - rings[0].page.Data_tail; left != uint64(len(fork(1, 1, 1))) {
		t.Errorf("%d bytes held back", left)
	}
	s := m.Stats()
	if s.Lost[MappingLossRingFull] != 12 || s.Events[MappingFork] != 5 || s.Events[MappingLost] != 1 {
		t.Errorf("%+v", s)
	}
}

// Records go round and round in a ring, and any length of them comes out whole.
func TestMappingsWrap(t *testing.T) {
	r := fakeRing(4096)
	m := fakeMappings(r)
	var want, got []string
	for i := range 1000 {
		path := "/" + strings.Repeat("x", i%97)
		for !r.put(mmap2(uint64(i), 7, 0x1000, 0x1000, 0, 1, uint64(i), path)) {
			got = append(got, drainDump(t, m)...)
		}
		want = append(want, fmt.Sprintf("0.%09d map 7/8 1000-2000 00000000 08:01 %d %s", i, i, path))
	}
	got = append(got, drainDump(t, m)...)
	if !slices.Equal(got, want) {
		t.Errorf("%d events, want %d", len(got), len(want))
	}
}

// What is no record costs what is in that ring, no more.
func TestMappingsMalformed(t *testing.T) {
	for name, bad := range map[string][]byte{
		"size 0":         {1, 0, 0, 0, 0, 0, 0, 0},
		"too long":       record(unix.PERF_RECORD_COMM, 0, 5, make([]uint64, 3))[:24],
		"odd size":       {1, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"without a time": {1, 0, 0, 0, 0, 0, 8, 0},
		"not of its own": record(unix.PERF_RECORD_FORK, 0, 5, uint64(1)),
	} {
		t.Run(name, func(t *testing.T) {
			broken, other := fakeRing(4096), fakeRing(4096)
			m := fakeMappings(broken, other)
			broken.put(bad)
			other.put(fork(7, 1, 0))
			got := drainDump(t, m)
			if len(got) != 2 || !slices.Contains(got, "0.000000007 fork 1/1 parent 0/0") || m.Stats().Lost[MappingLossMalformed] != 1 {
				t.Errorf("%q, %+v", got, m.Stats())
			}
			broken.put(fork(8, 2, 0))
			if got := drainDump(t, m); !slices.Equal(got, []string{"0.000000008 fork 2/2 parent 0/0"}) {
				t.Errorf("afterwards: %q", got)
			}
		})
	}
}

func FuzzMappingsDrain(f *testing.F) {
	f.Add(append(fork(5, 7, 6), lost(6, 1)...), uint16(0))
	f.Add(mmap2(5, 7, 0x5000, 0x2000, 0x1000, 1, 42, "/usr/bin/cat"), uint16(4088))
	f.Fuzz(func(t *testing.T, b []byte, at uint16) {
		r := fakeRing(4096)
		start := uint64(at) &^ 7
		r.page.Data_head, r.page.Data_tail, r.tail = start, start, start
		r.put(b)
		m := fakeMappings(r)
		for range 2 {
			if _, err := m.Drain(func(e *MappingEvent) { _ = e.String() }); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func newMappings(t testing.TB, cfg MappingsConfig) *Mappings {
	t.Helper()
	kerneltest.Require(t)
	m, err := NewMappings(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// collect drains into a list of the events of interest.
func collect(t *testing.T, m *Mappings, want func(*MappingEvent) bool) []MappingEvent {
	t.Helper()
	var events []MappingEvent
	var last uint64
	until, err := m.Drain(func(e *MappingEvent) {
		if e.Type != MappingLost {
			if e.Time < last {
				t.Errorf("%v after %d", e, last)
			}
			last = e.Time
		}
		if want(e) {
			c := *e
			c.Path = slices.Clone(e.Path)
			events = append(events, c)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if last > until {
		t.Errorf("an event of %d in a drain until %d", last, until)
	}
	return events
}

// A program is told from its fork to its exit, in that order, with its files as stat knows them.
func TestMappingsOfProgram(t *testing.T) {
	kerneltest.RequireTool(t, "/bin/sh")
	m := newMappings(t, MappingsConfig{})
	before := bootNanos(t)
	cmd := exec.Command("/bin/sh", "-c", "exit 0")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	after := bootNanos(t)
	pid := uint32(cmd.Process.Pid)
	events := collect(t, m, func(e *MappingEvent) bool { return e.PID == pid })
	shell, err := filepath.EvalSymlinks("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(shell, &st); err != nil {
		t.Fatal(err)
	}
	var order []MappingEventType
	var files []string
	for _, e := range events {
		if e.Time < before || e.Time > after {
			t.Errorf("%v is not between %d and %d", &e, before, after)
		}
		if n := len(order); n == 0 || order[n-1] != e.Type {
			order = append(order, e.Type)
		}
		if e.Type != MappingMap {
			continue
		}
		files = append(files, string(e.Path))
		if string(e.Path) == shell && (e.Inode != st.Ino || e.Major != unix.Major(st.Dev) || e.Minor != unix.Minor(st.Dev)) {
			t.Errorf("%v, want %d:%d %d", &e, unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
		}
	}
	if want := []MappingEventType{MappingFork, MappingExec, MappingMap, MappingExit}; !slices.Equal(order, want) {
		t.Errorf("order %v, want %v", order, want)
	}
	if len(events) > 0 && events[0].Parent != uint32(os.Getpid()) {
		t.Errorf("%v, want parent %d", &events[0], os.Getpid())
	}
	if !slices.Contains(files, shell) || !slices.Contains(files, "[vdso]") ||
		!slices.ContainsFunc(files, func(f string) bool { return strings.Contains(f, "libc.so") }) {
		t.Errorf("files %q", files)
	}
}

// A few events end the wait; a ring that overflows says how much is missing.
func TestMappingsWaitAndLoss(t *testing.T) {
	m := newMappings(t, MappingsConfig{RingSize: 1 << 14})
	collect(t, m, func(*MappingEvent) bool { return false })
	quiet := time.Now()
	if err := m.Wait(context.Background(), 50*time.Millisecond); err != nil || time.Since(quiet) < 50*time.Millisecond {
		t.Logf("waited %v, %v", time.Since(quiet), err) // other programs may be many
	}
	woken := make(chan time.Duration, 1)
	go func() {
		start := time.Now()
		m.Wait(context.Background(), time.Minute)
		woken <- time.Since(start)
	}()
	remap(t, 10)
	select {
	case d := <-woken:
		t.Logf("woken after %v", d)
	case <-time.After(20 * time.Second):
		t.Error("no wakeup by ten events")
	}
	remap(t, 1000)
	collect(t, m, func(*MappingEvent) bool { return false })
	remap(t, 1) // the kernel tells of a loss with the next event
	collect(t, m, func(*MappingEvent) bool { return false })
	s := m.Stats()
	if n := s.Lost[MappingLossRingFull]; n < 500 || s.Events[MappingLost] == 0 {
		t.Errorf("%d events lost of some 1,000, %+v", n, s)
	}

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := m.Wait(ctx, time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("wait with an ended context: %v", err)
	}
	m.Close()
	if _, err := m.Drain(nil); !errors.Is(err, os.ErrClosed) {
		t.Errorf("drain after close: %v", err)
	}
}

// remap makes n mapping events, on one CPU.
func remap(t testing.TB, n int) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var old, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &old); err != nil {
		t.Fatal(err)
	}
	one.Set(0)
	unix.SchedSetaffinity(0, &one)
	defer unix.SchedSetaffinity(0, &old)
	for range n {
		b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			t.Fatal(err)
		}
		unix.Munmap(b)
	}
}

// CAP_PERFMON is enough; then the memory of the rings is limited, and smaller ones do.
func TestMappingsPrivileges(t *testing.T) {
	kerneltest.Require(t)
	paranoid, err := os.ReadFile("/proc/sys/kernel/perf_event_paranoid")
	if err != nil {
		t.Fatal(err)
	}
	refused := strings.TrimSpace(string(paranoid)) == "3" // Debian's: CAP_SYS_ADMIN or nothing
	for _, test := range []struct {
		capabilities uint64
		ok           bool
	}{{0, false}, {1 << unix.CAP_PERFMON, !refused}} {
		ended := make(chan error, 1)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread goes, and its capabilities with it
			ended <- func() error {
				header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
				caps := test.capabilities
				data := [2]unix.CapUserData{
					{Effective: uint32(caps), Permitted: uint32(caps)},
					{Effective: uint32(caps >> 32), Permitted: uint32(caps >> 32)},
				}
				if err := unix.Capset(&header, &data[0]); err != nil {
					t.Error(err)
				}
				m, err := NewMappings(MappingsConfig{RingSize: 64 << 20})
				if err != nil {
					return err
				}
				t.Logf("%d bytes of rings", m.Stats().Memory)
				return m.Close()
			}()
		}()
		if err := <-ended; (err == nil) != test.ok {
			t.Errorf("capabilities %#x: %v", test.capabilities, err)
		}
	}
}

// A CPU that went and came back is observed again; that it was not is told.
func TestMappingsHotplug(t *testing.T) {
	m := newMappings(t, MappingsConfig{})
	remap(t, 7)
	m.forget(0)
	remap(t, 11)
	if err := m.sync(); err != nil {
		t.Fatal(err)
	}
	remap(t, 13)
	mine := uint32(os.Getpid())
	maps, gaps := 0, 0
	for range 2 {
		for _, e := range collect(t, m, func(e *MappingEvent) bool { return e.Type == MappingLost || e.PID == mine }) {
			switch e.Type {
			case MappingLost:
				gaps++
			case MappingMap:
				maps++
			}
		}
	}
	// What was in the ring that went is not lost.
	if maps != 7+13 || gaps != 1 || m.Stats().Lost[MappingLossCPUOnline] != 1 {
		t.Errorf("%d mappings, %d gaps, %+v", maps, gaps, m.Stats())
	}
}

// BenchmarkMappingsDrain is the cost of an event in user space; the rings are as the kernel fills them.
func BenchmarkMappingsDrain(b *testing.B) {
	r := fakeRing(512 << 10)
	m := fakeMappings(r, fakeRing(4096))
	one := mmap2(5, 7, 0x5000, 0x2000, 0x1000, 1, 42, "/usr/lib/x86_64-linux-gnu/libc.so.6")
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		if !r.put(one) {
			b.Fatal("full")
		}
		if n++; n%1000 == 0 {
			m.Drain(func(*MappingEvent) {})
		}
	}
}
