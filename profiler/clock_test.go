// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"testing"
	"time"
)

func TestNow(t *testing.T) {
	boot, wall := bootTime(), time.Now()
	at := now()
	if d := at.boot - boot; d < 0 || d > time.Second {
		t.Errorf("boot clock %v after itself", d)
	}
	if d := at.wall.Sub(wall); d.Abs() > time.Second {
		t.Errorf("wall clock %v after itself", d)
	}
}
