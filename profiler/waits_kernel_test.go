// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/symbolizer"
)

//go:noinline
func waitInFutex(timeout time.Duration) {
	const wait = 0 // FUTEX_WAIT
	var word uint32
	ts := unix.NsecToTimespec(int64(timeout))
	unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&word)), wait, 0, uintptr(unsafe.Pointer(&ts)), 0, 0)
}

//go:noinline
func waitInNanosleep(timeout time.Duration) {
	ts := unix.NsecToTimespec(int64(timeout))
	unix.Nanosleep(&ts, nil)
}

//go:noinline
func waitBriefly(wait func(time.Duration)) {
	for {
		wait(5 * time.Millisecond)
	}
}

//go:noinline
func waitForLong(wait func(time.Duration)) {
	for {
		wait(time.Hour)
	}
}

// loadWaits has a thread for each way to wait, and for each time.
func loadWaits() error {
	go waitBriefly(waitInFutex)
	go waitForLong(waitInFutex)
	go waitBriefly(waitInNanosleep)
	waitForLong(waitInNanosleep)
	return nil
}

// The stack of a wait is the same whether the thread is sampled when it goes on or while it
// stays blocked, and it ends in what the thread waits for.
func TestKernelWaitStacks(t *testing.T) {
	kerneltest.Require(t)
	sched, err := bpf.NewSched(bpf.SchedConfig{CgroupV1: bpf.CPUControllerV1()})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer sched.Close()
	tables, err := bpf.NewTables(bpf.DefaultTableMemory)
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	waits, err := bpf.NewWaits(sched, tables)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer waits.Close()
	s := symbolizer.New(symbolizer.Config{})
	defer s.Close()
	p, err := New(Config{
		Feeds: []Feed{{Source: waits, Profiles: []bpf.Profile{bpf.ProfileRunqueue, bpf.ProfileCulprit, bpf.ProfileOffCPU}, Observe: waits.Observe}},
		Types: []Type{OffCPU(NewStates(s))}, Symbolizer: s, Tables: tables, Window: time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	windows, end := runKernel(t, p, waits.Detach)
	defer end()
	pid := start(t, "waits")

	type wait struct{ in, time string }
	all := []wait{{"waitInFutex", "waitBriefly"}, {"waitInFutex", "waitForLong"}, {"waitInNanosleep", "waitBriefly"}, {"waitInNanosleep", "waitForLong"}}
	found := map[wait]map[string]bool{} // the kernel's frames, leaf first
	for deadline := time.After(time.Minute); len(found) < len(all); {
		var w *Window
		select {
		case w = <-windows:
		case <-deadline:
			t.Fatalf("after a minute there are stacks of %v only", found)
		}
		profile := pprofOf(t, w.Of("offcpu"))
		for _, sample := range stacksOf(profile, pid).p.Sample {
			var kernel, user []string
			for _, l := range sample.Location {
				for _, line := range l.Line {
					if l.Mapping != nil && l.Mapping.Start >= kernelHalf {
						kernel = append(kernel, line.Function.Name)
					} else {
						user = append(user, line.Function.Name)
					}
				}
			}
			for _, wait := range all {
				stack := strings.Join(user, ";") + ";"
				if !strings.Contains(stack, "."+wait.in+";") || !strings.Contains(stack, "."+wait.time+";") {
					continue
				}
				if found[wait] == nil {
					found[wait] = map[string]bool{}
				}
				found[wait][strings.Join(kernel, ";")] = true
			}
		}
	}
	for i := range 2 {
		goesOn := slices.Sorted(maps.Keys(found[all[2*i]]))
		stays := slices.Sorted(maps.Keys(found[all[2*i+1]]))
		t.Logf("%s: %q", all[2*i].in, stays)
		if len(goesOn) != 1 || !slices.Equal(goesOn, stays) {
			t.Errorf("%s when the thread goes on: %q, while it stays blocked: %q", all[2*i].in, goesOn, stays)
		}
	}
}
