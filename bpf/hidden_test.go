// SPDX-License-Identifier: Apache-2.0

package bpf

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

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// The kernel of the machine that the tests run on hides process 1, which drives the virtual
// machine, from BPF: while one of its threads is current no program runs, also for what
// happens in interrupts, and nothing counts that. perf's own tracepoint events see it.

// tracepointCounter counts a tracepoint on all CPUs.
type tracepointCounter []int

// countTracepoint counts the passes of a tracepoint ("block/block_rq_complete"), those only
// at which a thread of process 1 is current if hidden is true.
func countTracepoint(t *testing.T, name string, hidden bool) tracepointCounter {
	t.Helper()
	id := tracepointID(t, name)
	if !hidden {
		return openTracepoint(t, id, "")
	}
	return openTracepoint(t, id, ofProcess1(t))
}

func tracepointID(t *testing.T, name string) uint64 {
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

// hiddenCompletions counts the completions of a disk that run no program.
func hiddenCompletions(t *testing.T, device string) tracepointCounter {
	t.Helper()
	major, minor := numberOf(t, device)
	// The kernel's own encoding of a dev_t.
	return openTracepoint(t, tracepointID(t, "block/block_rq_complete"),
		fmt.Sprintf("dev==%d && (%s)", major<<20|minor, ofProcess1(t)))
}

// ofProcess1 is the filter of what happens while a thread of process 1 is current.
func ofProcess1(t *testing.T) string {
	t.Helper()
	threads, err := os.ReadDir("/proc/1/task")
	if err != nil {
		t.Fatal(err)
	}
	var filter []string
	for _, thread := range threads {
		filter = append(filter, "common_pid=="+thread.Name())
	}
	return strings.Join(filter, "||")
}

func openTracepoint(t *testing.T, id uint64, filter string) tracepointCounter {
	t.Helper()
	cpus, err := OnlineCPUs()
	if err != nil {
		t.Fatal(err)
	}
	var c tracepointCounter
	for _, cpu := range cpus {
		fd, err := unix.PerfEventOpen(&unix.PerfEventAttr{
			Type: unix.PERF_TYPE_TRACEPOINT, Config: id, Size: uint32(unix.PERF_ATTR_SIZE_VER5),
		}, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
		if err != nil {
			t.Fatalf("count tracepoint %d: %v", id, err)
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

func (c tracepointCounter) read(t *testing.T) (n uint64) {
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

// TestBlockLosesOnlyTheHidden: every completion that perf sees runs our program, but for those
// that come while process 1 is current, where the kernel hides it; and these are counted.
func TestBlockLosesOnlyTheHidden(t *testing.T) {
	kerneltest.RequireTool(t, "fio")
	b := newTestBlock(t)
	kerneltest.MeasureLock(t)
	all := countTracepoint(t, "block/block_rq_complete", false)
	hidden := countTracepoint(t, "block/block_rq_complete", true)
	// seen is read before and after the others, since the disk is never still.
	type counts struct{ seen, hidden, ran, noEnd, seenAfter int64 }
	read := func() (c counts) {
		c.seen = int64(all.read(t))
		c.hidden = int64(hidden.read(t))
		s, err := b.Stats()
		if err != nil {
			t.Fatal(err)
		}
		c.ran, c.noEnd = int64(s.Programs[2].Runs), int64(s.Dropped[DropNoEnd])
		c.seenAfter = int64(all.read(t))
		return c
	}
	file := filepath.Join(t.TempDir(), "data")
	fio := func(args ...string) {
		output(t, "fio", append([]string{"--name=job", "--filename=" + file, "--size=64M", "--bs=4k",
			"--direct=1", "--ioengine=psync"}, args...)...)
	}
	fio("--rw=write", "--bs=1M", "--end_fsync=1")
	before := read()
	fio("--rw=randread", "--time_based", "--runtime=5")
	after := read()
	// Process 1 can run for long at the end. So that every place is taken once more:
	fio("--rw=randread", "--io_size=16M")
	settled := read().noEnd - before.noEnd
	ran, whileHidden, noEnd := after.ran-before.ran, after.hidden-before.hidden, after.noEnd-before.noEnd
	least, most := after.seen-before.seenAfter-ran, after.seenAfter-before.seen-ran
	t.Logf("of %d completions %d to %d ran no program, %d came while process 1 was current, %d were counted as no_end, and later %d",
		after.seen-before.seen, least, most, whileHidden, noEnd, settled)
	// Where process 1 is not hidden none is lost. A place that was not taken again tells
	// nothing yet.
	const slack = 3
	if (least > slack || most < -slack) && (least > whileHidden+slack || most < whileHidden-slack) {
		t.Error("completions that ran no program are not those that came while process 1 was current")
	}
	if noEnd > max(0, most)+slack || settled < least-slack {
		t.Error("completions that ran no program are not those that were counted")
	}
	if ran < 10_000 {
		t.Errorf("%d completions: no judgement", ran)
	}
}
