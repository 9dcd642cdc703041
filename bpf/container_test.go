// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// tendSlots is what Sched does once a second, at a time of the test's choice.
func tendSlots(t *testing.T, s *Sched, now time.Time) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.books.slots.tend(now); err != nil {
		t.Fatal(err)
	}
}

// newSlotted makes hooks with room for few containers, that are tended by the test alone.
func newSlotted(t *testing.T, slots int) *Sched {
	t.Helper()
	s, err := NewSched(SchedConfig{CgroupV1: CPUControllerV1(), slots: slots})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { s.Close() })
	s.cancel()
	s.tended.Wait()
	return s
}

// A cgroup that does more gets the slot of one that does less; what a slot counted before
// stays with whom it was counted for; and a cgroup that is gone leaves its slot to others.
func TestSchedSlots(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	known := kerneltest.BuildProgram(t, "known")
	s := newSlotted(t, 3)
	read := func() (SchedCells, map[string]SchedContainer) {
		t.Helper()
		host, list, err := s.Read()
		if err != nil {
			t.Fatal(err)
		}
		return host, byName(list)
	}
	now := time.Now()
	// This test's own threads take one slot of two.
	lazy, keen := newCgroup(t, "lazy"), newCgroup(t, "keen")
	// As often as it is switched out, it waits; it is preempted as others please.
	run := func(g *cgroup, mode string, n int) (switches uint64) {
		t.Helper()
		l := startWorkload(t, known, lastCPU(t), mode, strconv.Itoa(n))
		g.add(t, l)
		l.run(t)
		voluntary, preempted := switchOuts(t, l)
		l.in.Close()
		l.cmd.Wait()
		return voluntary + preempted
	}
	switches := run(lazy, "sleep", 101)
	run(keen, "pingpong", 5003)
	_, all := read()
	before := all[lazy.name].Latency.Count()
	if before < 101 || before > switches+19 {
		t.Errorf("%d waits of the first cgroup, want the 101 and at most a few above %d", before, switches)
	}
	if _, ok := all[keen.name]; ok {
		t.Error("the second cgroup has a slot, of which there are two")
	}
	if n := all[OtherContainers].Latency.Count(); n < 2*5003 {
		t.Errorf("%d waits of all others, want at least 10006", n)
	}

	// The second has had more events.
	now = now.Add(slotRivalry)
	tendSlots(t, s, now)
	now = now.Add(slotGrace)
	tendSlots(t, s, now)
	switches = run(keen, "pingpong", 5003)
	host, all := read()
	if n := all[keen.name].Latency.Count(); n < 2*5003 || n > 2*switches+50 {
		t.Errorf("%d waits of the cgroup with the slot that was the other's, want 10006 and at most a few above %d", n, 2*switches) // of two processes
	}
	if n := all[lazy.name].Latency.Count(); n != before {
		t.Errorf("%d waits of the cgroup that lost its slot, want the %d", n, before)
	}
	var sum uint64
	for _, c := range all {
		sum += c.Latency.Count()
	}
	if n := host.Latency.Count(); n != sum {
		t.Errorf("%d waits on the host, %d by container", n, sum)
	}
	if _, all := read(); all[lazy.name].Name != "" {
		t.Error("the cgroup that lost its slot is there although it was read")
	}

	// Its threads are gone, and it with them.
	if err := syscall.Rmdir(keen.dir); err != nil {
		t.Fatal(err)
	}
	tendSlots(t, s, now)
	if _, all := read(); all[keen.name].Latency.Count() < 2*5003 {
		t.Error("a cgroup that is gone is not read once more")
	}
	tendSlots(t, s, now)
	now = now.Add(slotGrace)
	tendSlots(t, s, now)
	read()
	if _, all := read(); all[keen.name].Name != "" {
		t.Error("a cgroup that is gone is there for ever")
	}
	// It had events while it had no slot: the next is for one.
	run(lazy, "sleep", 101)
	tendSlots(t, s, now)
	switches = run(lazy, "sleep", 101)
	_, all = read()
	if n := all[lazy.name].Latency.Count(); n < 101 || n > switches+19 {
		t.Errorf("%d waits in a slot that was free again, want the 101 and at most a few above %d", n, switches)
	}
}

// Thousands of threads, cgroups and births: memory stays as it was, each switch-in is counted,
// by container or among all others, or is a drop, and the samples of the waits add up to them.
func TestSchedCrowd(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.SkipInVM(t, "starts 10,000 threads, which says nothing of the kernel")
	kerneltest.MeasureLock(t)
	const (
		processes = 2000 // of five threads, in a cgroup each
		births    = 1000 // at least, a second
		parents   = 4
		children  = 10_000 // of each parent
	)
	known := kerneltest.BuildProgram(t, "known")
	s, w := newWaits(t, WaitSampling{Wait: time.Millisecond, PerSecond: 1000})
	j := newJudge(t)
	memory := func() (sum uint64) {
		of := map[uint32]uint64{} // by id: some maps both objects have
		for _, stats := range []func() (Stats, error){s.Stats, w.Stats} {
			stats, err := stats()
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range stats.Maps {
				if m.Name != schedMapHfTasks { // a thread's own, gone with it
					of[m.ID] = m.Memory
				}
			}
		}
		for _, n := range of {
			sum += n
		}
		return sum
	}
	empty := memory()
	l := startWorkload(t, known, lastCPU(t), "crowd", strconv.Itoa(processes))
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", l.cmd.Process.Pid, l.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	pids := strings.Fields(string(b))
	if len(pids) != processes {
		t.Fatalf("%d processes, want %d", len(pids), processes)
	}
	parent := newCgroup(t, "crowd")
	t.Cleanup(func() {
		l.in.Close()
		l.cmd.Wait()
		for i := range pids {
			// Its process is still about to die.
			for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
				if err := syscall.Rmdir(fmt.Sprintf("%s/%d", parent.dir, i)); err != syscall.EBUSY {
					break
				}
			}
		}
	})
	for i, pid := range pids {
		dir := fmt.Sprintf("%s/%d", parent.dir, i)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir+"/cgroup.procs", []byte(pid), 0); err != nil {
			t.Fatal(err)
		}
	}
	// Before all that is outside of the test.
	family := newCgroup(t, "births").heavy(t)
	var forks [parents]*workload
	for i := range forks {
		forks[i] = startWorkload(t, known, []string{"0", lastCPU(t)}[i%2], "fork", strconv.Itoa(children))
		family.add(t, forks[i])
	}
	var waits sampled
	var samples uint64
	take := func(x *Sample) {
		samples++
		if x.Profile == ProfileRunqueue {
			waits.add(x)
		}
	}
	// What is drained is between what the kernel has delivered before and after.
	drain := func() (delivered [2]uint64) {
		delivered[0] = waitStats(t, w).Delivered
		w.drainFor(t, 0, take)
		delivered[1] = waitStats(t, w).Delivered
		return delivered
	}
	deliveredBefore := drain()
	waits, samples = sampled{}, 0
	before := observe(t, s, j)
	start := time.Now()
	var born sync.WaitGroup
	for _, l := range forks {
		born.Go(func() { l.run(t) })
	}
	over := make(chan time.Duration)
	go func() {
		born.Wait()
		over <- time.Since(start)
	}()
	var took time.Duration
	for took == 0 {
		w.drainFor(t, 250*time.Millisecond, take)
		select {
		case took = <-over:
		default:
		}
	}
	w.drainFor(t, 2*time.Second, take)
	d := observe(t, s, j).since(before)
	delivered := drain()
	rate := parents * children / took.Seconds()
	t.Logf("%d recorded, %v dropped, by time stamps %d; %.0f births a second; %d bytes of maps, %d without load; process 1 switched in %d times",
		d.Latency.Count(), d.dropped, d.wait.Count()+d.unknown, rate, memory(), empty, d.hidden)
	if rate < births {
		t.Errorf("%.0f births a second, want %d", rate, births)
	}
	least, most := delivered[0]-deliveredBefore[1], delivered[1]-deliveredBefore[0]
	t.Logf("%d samples, the kernel delivered %d to %d; %v dropped", samples, least, most, waitStats(t, w).Dropped)
	if samples < least || samples > most {
		t.Errorf("%d samples, the kernel delivered %d to %d", samples, least, most)
	}
	waits.check(t, "waits", d.waited, 0.03)
	if n := d.wait.Count() + d.unknown; n < d.seen[0] || n > d.seen[1] {
		t.Errorf("%d to %d switch-ins recorded or dropped, by time stamps %d", d.seen[0], d.seen[1], n)
	}
	if n := memory(); n != empty {
		t.Errorf("maps take %d bytes, without load %d", n, empty)
	}
	host, list, err := s.Read()
	if err != nil {
		t.Fatal(err)
	}
	var sum uint64
	for _, c := range list {
		sum += c.Latency.Count()
	}
	// None of them is gone.
	if n := host.Latency.Count(); n != sum || len(list) > maxSlots {
		t.Errorf("%d waits on the host, %d in %d containers, of which there can be %d", n, sum, len(list), maxSlots)
	}
	checkKnownOnce(t, s, pids)
}

func waitStats(t *testing.T, w *Waits) Stats {
	t.Helper()
	stats, err := w.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return stats
}

// checkKnownOnce holds that of each thread of processes there is a seat or an entry in task
// storage, so that the memory of these is bounded by the threads that live.
func checkKnownOnce(t *testing.T, s *Sched, pids []string) {
	t.Helper()
	seats := seated(t, s)
	var all, entries int
	for _, pid := range pids {
		n, err := strconv.Atoi(pid)
		if err != nil {
			t.Fatal(err)
		}
		for _, tid := range threads(t, n) {
			_, has := seats[tid]
			_, stored := stored(t, s, tid)
			if has == stored {
				t.Errorf("thread %d: has a seat %v, in task storage %v; want one of them", tid, has, stored)
			}
			all++
			if stored {
				entries++
			}
		}
	}
	t.Logf("%d of %d threads have no seat of %d, but an entry of %d bytes", entries, all, 1<<s.seatBits, unsafe.Sizeof(schedHfTask{}))
}
