// SPDX-License-Identifier: Apache-2.0

package kerneltest

import (
	"fmt"
	"os"
	"testing"
	"time"
)

// HostCPU is CPU time of the whole host since boot.
type HostCPU struct {
	Busy   time.Duration
	Stolen time.Duration // by the hypervisor, while something was to be run
}

// ReadHostCPU reads /proc/stat (proc_stat(5)). A virtual machine that is busy can have
// half of its time stolen; timers run on meanwhile, and so does the sampling.
func ReadHostCPU(t testing.TB) HostCPU {
	t.Helper()
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		t.Fatal(err)
	}
	var user, nice, system, idle, iowait, irq, softirq, steal int64
	if _, err := fmt.Sscanf(string(b), "cpu %d %d %d %d %d %d %d %d",
		&user, &nice, &system, &idle, &iowait, &irq, &softirq, &steal); err != nil {
		t.Fatalf("/proc/stat: %v", err)
	}
	const tick = 10 * time.Millisecond
	return HostCPU{
		Busy:   time.Duration(user+nice+system+irq+softirq) * tick,
		Stolen: time.Duration(steal) * tick,
	}
}

// Since is what has been used and stolen since an earlier moment.
func (c HostCPU) Since(begin HostCPU) HostCPU {
	return HostCPU{Busy: c.Busy - begin.Busy, Stolen: c.Stolen - begin.Stolen}
}

// Stretch is how much longer than it runs a busy CPU seems to be busy.
func (c HostCPU) Stretch() float64 { return float64(c.Busy+c.Stolen) / float64(max(c.Busy, 1)) }
