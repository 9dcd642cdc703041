// SPDX-License-Identifier: Apache-2.0

package kerneltest

import (
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
)

// PeakMemory is the most that f adds to the resident memory of this process, in bytes, with
// the collector as the agent has it.
func PeakMemory(t testing.TB, f func()) int64 {
	t.Helper()
	defer debug.SetGCPercent(debug.SetGCPercent(50))
	debug.FreeOSMemory()
	before := resident(t, "VmRSS")
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		t.Fatal(err) // VmHWM begins anew
	}
	f()
	return resident(t, "VmHWM") - before
}

// resident reads a size of this process.
func resident(t testing.TB, name string) int64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == name+":" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatalf("no %s", name)
	return 0
}
