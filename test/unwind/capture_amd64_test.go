// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// captureStacks stops the main thread of a process that this process started n times, every
// few milliseconds, and copies its registers and its stack.
func captureStacks(pid, n, size int) (copies []Copy, err error) {
	runtime.LockOSThread() // ptrace knows threads
	defer runtime.UnlockOSThread()
	if err := unix.PtraceSeize(pid); err != nil {
		return nil, fmt.Errorf("seize %d: %w", pid, err)
	}
	for i := range n {
		if err := pass(pid, time.Duration(500+i*7919%3000)*time.Microsecond); err != nil {
			return copies, err
		}
		if err := unix.PtraceInterrupt(pid); err != nil {
			return copies, fmt.Errorf("interrupt %d: %w", pid, err)
		}
		if err := pass(pid, time.Minute); err != nil {
			return copies, err
		}
		c, err := copyStack(pid, size)
		if err != nil {
			return copies, err
		}
		copies = append(copies, c)
		if err := unix.PtraceCont(pid, 0); err != nil {
			return copies, fmt.Errorf("continue %d: %w", pid, err)
		}
	}
	unix.PtraceInterrupt(pid)
	if err := pass(pid, time.Minute); err != nil {
		return copies, err
	}
	return copies, unix.PtraceDetach(pid)
}

// pass lets signals through for a while, or until the process stops as it was told to.
func pass(pid int, d time.Duration) error {
	for end := time.Now().Add(d); time.Now().Before(end); {
		var status unix.WaitStatus
		n, err := unix.Wait4(pid, &status, unix.WALL|unix.WNOHANG, nil)
		if err != nil {
			return fmt.Errorf("wait for %d: %w", pid, err)
		}
		if n == 0 {
			runtime.Gosched() // what sleeps, sleeps too long
			continue
		}
		if !status.Stopped() {
			return fmt.Errorf("%d ended: %#x", pid, int(status))
		}
		const eventStop = 128 // PTRACE_EVENT_STOP
		if int(status)>>16 == eventStop {
			return nil
		}
		if err := unix.PtraceCont(pid, int(status.StopSignal())); err != nil {
			return fmt.Errorf("continue %d: %w", pid, err)
		}
	}
	return nil
}

func copyStack(pid, size int) (c Copy, err error) {
	var r unix.PtraceRegs
	if err := unix.PtraceGetRegs(pid, &r); err != nil {
		return c, fmt.Errorf("read registers: %w", err)
	}
	// System V ABI for AMD64, figure 3.36: DWARF register numbers.
	c.Regs = []uint64{r.Rax, r.Rdx, r.Rcx, r.Rbx, r.Rsi, r.Rdi, r.Rbp, r.Rsp,
		r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15, r.Rip}
	c.Address = r.Rsp
	c.Bytes = make([]byte, size)
	local := []unix.Iovec{{Base: &c.Bytes[0]}}
	local[0].SetLen(size)
	n, err := unix.ProcessVMReadv(pid, local, pages(r.Rsp, size), 0)
	if err != nil && !errors.Is(err, unix.EFAULT) {
		return c, fmt.Errorf("read the stack: %w", err)
	}
	c.Bytes = c.Bytes[:max(n, 0)]
	return c, nil
}

// pages cuts a range at page boundaries: a read ends with the last whole range.
func pages(at uint64, size int) (all []unix.RemoteIovec) {
	for size > 0 {
		n := min(size, 4096-int(at%4096))
		all = append(all, unix.RemoteIovec{Base: uintptr(at), Len: n})
		at, size = at+uint64(n), size-n
	}
	return all
}
