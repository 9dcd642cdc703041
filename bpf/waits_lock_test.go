// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// A thread that hangs on a mutex of the kernel is sampled as one that waits for a lock, though no
// frame of its stack tells.
func TestWaitsObserveKernelLocks(t *testing.T) {
	kerneltest.Require(t)
	if !taskHas(t, "blocked_on") && !taskHas(t, "blocker") {
		t.Skip("this kernel does not note down which mutex a task waits for")
	}
	_, w := newWaits(t, WaitSampling{PerSecond: 2000})
	// Whoever writes to a terminal that nobody reads holds its write lock.
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	slave, err := unix.Open(fmt.Sprintf("/dev/pts/%d", n), unix.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	var tids [2]uint32
	done := make(chan error, len(tids))
	for i := range tids {
		tid := make(chan int)
		go func() {
			runtime.LockOSThread()
			tid <- unix.Gettid()
			var err error
			for b := make([]byte, 4096); err == nil; {
				_, err = unix.Write(slave, b)
			}
			done <- err
		}()
		tids[i] = uint32(<-tid)
		time.Sleep(200 * time.Millisecond)
	}
	states := map[uint32]State{}
	for range 3 {
		if err := w.Observe(); err != nil {
			t.Fatal(err)
		}
		w.drainFor(t, 0, func(x *Sample) { states[x.TID] = x.State })
		time.Sleep(100 * time.Millisecond)
	}
	if holds, waits := states[tids[0]], states[tids[1]]; holds != StateOther || waits != StateLock {
		t.Errorf("who writes is in state %v, who waits for it in %v", holds, waits)
	}
	// The writes fail when the other side is gone.
	if err := master.Close(); err != nil {
		t.Fatal(err)
	}
	for range tids {
		if err := <-done; !errors.Is(err, unix.EIO) {
			t.Error(err)
		}
	}
	unix.Close(slave)
}

// taskHas says whether struct task_struct has the member here.
func taskHas(t *testing.T, member string) bool {
	t.Helper()
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	var task *btf.Struct
	if err := spec.TypeByName("task_struct", &task); err != nil {
		t.Fatal(err)
	}
	for _, m := range task.Members {
		if m.Name == member {
			return true
		}
	}
	return false
}
