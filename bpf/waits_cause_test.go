// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// stopped says whether none of the threads of a process runs or will.
func stopped(t *testing.T, pid int) bool {
	t.Helper()
	for _, tid := range threads(t, pid) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stat", pid, tid))
		if err != nil {
			t.Fatal(err)
		}
		if _, rest, _ := strings.Cut(string(b), ") "); !strings.HasPrefix(rest, "T") {
			return false
		}
	}
	return true
}

// Of one wait a thread can spend a part for a thread of its own container, in one run, and as much
// for two others that take turns, in many: by cause the samples add up to what the hook counts,
// within four standard errors.
func TestWaitsByCause(t *testing.T) {
	if kerneltest.Require(t); !CPUControllerV1() {
		t.Skip("threads of one process are put into different cgroups, which the cpu controller of v2 does not take")
	}
	kerneltest.MeasureLock(t)
	s, w := newWaits(t, WaitSampling{Wait: time.Nanosecond, Blocked: -1, PerSecond: 4000})
	known := kerneltest.BuildProgram(t, "known")
	turns := startWorkload(t, known, lastCPU(t), "pingpong", "1000000000")
	for _, tid := range threads(t, turns.cmd.Process.Pid) {
		newCgroup(t, "turn"+strconv.Itoa(tid)).heavy(t).set(t, "tasks", strconv.Itoa(tid))
	}
	t.Cleanup(func() { turns.cmd.Process.Kill() })
	busy := turns
	for busy.cmd.Process.Pid%16 == turns.cmd.Process.Pid%16 { // else they share the samples
		busy = startWorkload(t, known, lastCPU(t), "busy", "2")
	}
	g := newCgroup(t, "causes").heavy(t)
	g.add(t, busy)
	if _, err := io.WriteString(turns.in, "\n"); err != nil {
		t.Fatal(err)
	}
	// While they stand still what is drained and what is read are the same.
	signal := func(sig syscall.Signal) {
		if err := busy.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		for sig == syscall.SIGSTOP && !stopped(t, busy.cmd.Process.Pid) {
			time.Sleep(10 * time.Millisecond)
		}
	}
	t.Cleanup(func() { signal(syscall.SIGCONT) }) // before it is told to end
	time.Sleep(300 * time.Millisecond)
	signal(syscall.SIGSTOP)
	w.drainFor(t, 0, func(*Sample) {})
	var nanos, variance [Causes]float64
	grown := growth(t, s, func() {
		take := func(x *Sample) {
			if x.Profile != ProfileRunqueue || strconv.FormatUint(x.Cgroup, 10) != g.name {
				return
			}
			d, v := float64(x.Duration), float64(x.Value)
			nanos[x.Cause] += v
			for c := range variance { // of a share p of d: d^2 p (1 - p), which is 1/4 at most
				variance[c] += d*d/4 + v*(v-d)
			}
		}
		signal(syscall.SIGCONT)
		w.drainFor(t, 2*causesFor, take)
		signal(syscall.SIGSTOP)
		w.drainFor(t, 0, take)
	}, g.name)[g.name]
	if own, all := grown.DelayNanos[CauseOwn], grown.Latency.Sum; own < all/5 || own > all*4/5 {
		t.Errorf("%v of %v were waited for its own container: the load does not do what it should", time.Duration(own), time.Duration(all))
	}
	for c := range Causes {
		exact := float64(grown.DelayNanos[c])
		allowed := 4*math.Sqrt(variance[c]) + 0.01*float64(grown.Latency.Sum)
		t.Logf("%v: %.3f s, by samples %.3f s (allowed %.3f s)", c, exact/1e9, nanos[c]/1e9, allowed/1e9)
		if math.Abs(nanos[c]-exact) > allowed {
			t.Errorf("%v: samples stand for %.3f s, exactly it is %.3f s", c, nanos[c]/1e9, exact/1e9)
		}
	}
}
