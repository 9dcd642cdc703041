// SPDX-License-Identifier: Apache-2.0

package kerneltest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The kernel of the machine that the tests run on hides process 1, which drives the virtual
// machine, from BPF: while one of its threads is current no program runs, also for what
// happens in interrupts, and nothing counts that. perf's own tracepoint events see it.

// TracepointCounter counts a tracepoint on all CPUs.
type TracepointCounter []int

// CountTracepoint counts the passes of a tracepoint ("block/block_rq_complete") that a filter
// takes (Documentation/trace/events.rst), all if it is empty, until the test ends.
func CountTracepoint(t testing.TB, name, filter string) (c TracepointCounter) {
	t.Helper()
	id := tracepointID(t, name)
	cpus, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range cpus {
		cpu, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), "cpu"))
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.PerfEventOpen(&unix.PerfEventAttr{
			Type: unix.PERF_TYPE_TRACEPOINT, Config: id, Size: uint32(unix.PERF_ATTR_SIZE_VER5),
		}, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
		if errors.Is(err, unix.ENODEV) {
			continue // offline
		}
		if err != nil {
			t.Fatalf("count %s: %v", name, err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if filter != "" {
			if err := unix.IoctlSetString(fd, unix.PERF_EVENT_IOC_SET_FILTER, filter); err != nil {
				t.Fatalf("count with filter %s: %v", filter, err)
			}
		}
		c = append(c, fd)
	}
	return c
}

func tracepointID(t testing.TB, name string) uint64 {
	t.Helper()
	const tracefs = "/sys/kernel/tracing"
	file := filepath.Join(tracefs, "events", name, "id")
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		if err := unix.Mount("tracefs", tracefs, "tracefs", 0, ""); err != nil {
			t.Fatalf("mount tracefs: %v", err)
		}
		b, err = os.ReadFile(file)
	}
	if err != nil {
		t.Fatal(err)
	}
	id, err := strconv.ParseUint(string(bytes.TrimSpace(b)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// Read is how often it has passed.
func (c TracepointCounter) Read(t testing.TB) (n uint64) {
	t.Helper()
	for _, fd := range c {
		var b [8]byte
		if _, err := unix.Read(fd, b[:]); err != nil {
			t.Fatal(err)
		}
		n += binary.NativeEndian.Uint64(b[:])
	}
	return n
}

// CountHiddenCompletions counts the completions of block I/O that run no program: of a device,
// or of all if that is empty, and of those the ones that a filter takes, if it is not empty.
func CountHiddenCompletions(t testing.TB, device, filter string) TracepointCounter {
	t.Helper()
	threads, err := os.ReadDir("/proc/1/task")
	if err != nil {
		t.Fatal(err)
	}
	var ofProcess1 []string
	for _, thread := range threads {
		ofProcess1 = append(ofProcess1, "common_pid=="+thread.Name())
	}
	all := []string{"(" + strings.Join(ofProcess1, "||") + ")"}
	if device != "" {
		var st unix.Stat_t
		if err := unix.Stat(device, &st); err != nil {
			t.Fatalf("stat %s: %v", device, err)
		}
		// The kernel's own encoding of a dev_t.
		all = append(all, fmt.Sprintf("dev==%d", unix.Major(st.Rdev)<<20|unix.Minor(st.Rdev)))
	}
	if filter != "" {
		all = append(all, filter)
	}
	return CountTracepoint(t, "block/block_rq_complete", strings.Join(all, "&&"))
}
