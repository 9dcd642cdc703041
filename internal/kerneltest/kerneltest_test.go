// SPDX-License-Identifier: Apache-2.0

package kerneltest

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestLockExcludes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(path, 0)
	if err != nil {
		t.Fatal(err)
	}
	// flock belongs to the open file, so a second open in this process is another holder.
	if _, err := lock(path, 100*time.Millisecond); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Fatalf("second lock: %v, want %v", err, unix.EWOULDBLOCK)
	}
	unlock()
	unlock, err = lock(path, 0)
	if err != nil {
		t.Fatalf("after unlock: %v", err)
	}
	unlock()
}
