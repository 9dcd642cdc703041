// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// seated is what is known of the threads that have a seat, by thread id.
func seated(t *testing.T, s *Sched) map[int]schedHfTask {
	t.Helper()
	seats, err := mapped[schedHfTask](s.coll.Maps[schedMapHfSeats])
	if err != nil {
		t.Fatal(err)
	}
	known := map[int]schedHfTask{}
	for i := range uint32(1) << s.seatBits {
		var task schedHfTask
		if err := seats.read(i, &task); err != nil {
			t.Fatal(err)
		}
		if task.Task != 0 {
			known[int(task.Tid)] = task
		}
	}
	return known
}

// stored is what is known of a thread that has none, false if nothing is.
func stored(t *testing.T, s *Sched, tid int) (task schedHfTask, ok bool) {
	t.Helper()
	fd, err := unix.PidfdOpen(tid, unix.PIDFD_THREAD)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.9, for the first thread of a process only
		fd, err = unix.PidfdOpen(tid, 0)
	}
	if err != nil {
		t.Fatalf("open pidfd of thread %d: %v", tid, err)
	}
	defer unix.Close(fd)
	err = s.coll.Maps[schedMapHfTasks].Lookup(int32(fd), &task)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatalf("look up thread %d: %v", tid, err)
	}
	return task, err == nil
}

// A thread that dies leaves its seat, and no other has it.
func TestSchedSeats(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	s := newSched(t)
	dead := func() (tids []int) {
		for tid := range seated(t, s) {
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", tid)); err != nil {
				tids = append(tids, tid)
			}
		}
		return tids
	}
	before, unseen := len(seated(t, s)), dead() // before there was a hook on switches
	startWorkload(t, kerneltest.BuildProgram(t, "known"), lastCPU(t), "fork", "3001").run(t)
	var left []int
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		left = slices.DeleteFunc(dead(), func(tid int) bool { return slices.Contains(unseen, tid) })
		if len(left) == 0 {
			break
		}
	}
	after := seated(t, s)
	t.Logf("%d seats taken before 3,001 births and deaths, %d after", before, len(after))
	if len(left) > 0 {
		t.Errorf("%d seats of threads that are dead: %v", len(left), left)
	}
	_, has := after[os.Getpid()]
	if _, stored := stored(t, s, os.Getpid()); has == stored {
		t.Errorf("this thread: has a seat %v, in task storage %v; want one of them", has, stored)
	}
}

// Threads without a seat count as well.
func TestSchedSeatless(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	hurry(t)
	for name, test := range map[string]func(*testing.T, *Sched){"count": countsEverySwitchIn, "wait": knownWaits} {
		t.Run(name, func(t *testing.T) {
			s := newRunningSched(t, SchedConfig{CgroupV1: CPUControllerV1(), seatBits: 1})
			test(t, s)
			if n := len(seated(t, s)); n > 2 {
				t.Errorf("%d threads have one of two seats", n)
			}
		})
	}
}
