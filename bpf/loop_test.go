// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// attachLoop makes file a loop device, one that is free, and returns its path. By ioctls,
// because the virtual machines of test/kernels have no losetup.
func attachLoop(t *testing.T, file string) string {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatalf("find a free loop device: %v", err)
		}
		device := fmt.Sprintf("/dev/loop%d", n)
		err = configureLoop(device, file)
		if errors.Is(err, unix.EBUSY) {
			continue // another was faster
		}
		if err != nil {
			t.Fatal(err)
		}
		return device
	}
}

func configureLoop(device, file string) error {
	backing, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer backing.Close()
	d, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	// Newer kernels choose direct I/O by themselves.
	config := unix.LoopConfig{Fd: uint32(backing.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_DIRECT_IO}}
	if err := unix.IoctlLoopConfigure(int(d.Fd()), &config); err != nil {
		return fmt.Errorf("make %s of %s: %w", device, file, err)
	}
	return nil
}

// detachLoop ends what attachLoop made, once nobody has it open.
func detachLoop(device string) error {
	d, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	if _, err := unix.IoctlRetInt(int(d.Fd()), unix.LOOP_CLR_FD); err != nil {
		return fmt.Errorf("detach %s: %w", device, err)
	}
	return nil
}
