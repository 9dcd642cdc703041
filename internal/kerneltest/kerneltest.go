// SPDX-License-Identifier: Apache-2.0

// Package kerneltest is for tests that need the kernel: the right to load BPF programs,
// and the machine to themselves.
package kerneltest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Require skips the test when it does not run as root. As root nothing is skipped: what
// then does not work is a failure, not a reason to look away. With the race detector kernel
// tests skip, because nearly all of them measure or keep up with something.
func Require(t testing.TB) {
	t.Helper()
	Timed(t)
	if os.Geteuid() != 0 {
		t.Skip("loads BPF programs: run it as root (sudo make test)")
	}
}

// Timed skips a test that promises times under the race detector, which slows everything
// down tenfold: make test runs such packages without it as well.
func Timed(t testing.TB) {
	t.Helper()
	if Race {
		t.Skip("promises times: not with the race detector")
	}
}

// lockWait bounds the wait for the measuring lock: several holders of up to two minutes.
const lockWait = 10 * time.Minute

// lockPath is one file for all packages and for the benchmarks.
func lockPath() string { return filepath.Join(os.TempDir(), "hostflame-measure.lock") }

// MeasureLock holds, until the test ends, a lock that all measuring tests of the
// repository share, so that minutes under load of different packages never overlap.
// It waits for its turn.
func MeasureLock(t testing.TB) {
	t.Helper()
	unlock, err := lock(lockPath(), lockWait)
	if err != nil {
		t.Fatalf("wait for the measuring lock: %v", err)
	}
	t.Cleanup(unlock)
}

// lock takes an exclusive flock on path within d. The kernel lets go of it when the
// process dies, so that a killed test never blocks the next.
func lock(path string, d time.Duration) (unlock func(), err error) {
	// Readable and writable by all: tests run as root and as others.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(d); ; time.Sleep(50 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(end) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
	}
}
