// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"time"

	"golang.org/x/sys/unix"
)

// instant is one moment on both clocks: the boot clock, which the kernel's samples carry
// and which neither steps nor stops in suspend, and the wall clock, which is for people.
type instant struct {
	boot time.Duration
	wall time.Time
}

// now reads the wall clock between two readings of the boot clock.
func now() instant {
	before := bootTime()
	wall := time.Now()
	after := bootTime()
	return instant{boot: before + (after-before)/2, wall: wall.Round(0)}
}

func bootTime() time.Duration {
	var ts unix.Timespec
	// It fails for unknown clocks and bad pointers only.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return time.Duration(ts.Nano())
}
