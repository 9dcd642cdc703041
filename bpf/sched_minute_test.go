// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/histogram"
	"github.com/hostflame/hostflame/internal/kerneltest"
)

// A minute of threads that wait for CPUs in many ways, on the host and in three containers,
// judged by the kernel's own schedstat, by time stamps of every wakeup and switch, and by
// runqlat of libbpf-tools, which the virtual machines do not have.
func TestSchedLoadedMinute(t *testing.T) {
	kerneltest.Require(t)
	if !kerneltest.InVM() {
		kerneltest.RequireTool(t, "runqlat", "stdbuf")
	}
	kerneltest.MeasureLock(t)
	hurry(t)
	l := startWorkload(t, kerneltest.BuildProgram(t, "waiters"))
	containers := startContainers(t)
	j := openJudge(t)
	s := newSched(t)
	j.attach(t)
	minute := func() []uint64 { time.Sleep(time.Minute); return nil }
	if !kerneltest.InVM() {
		lat := startRunqlat(t, 60)
		minute = func() []uint64 { return lat.wait(t) }
	} else {
		time.Sleep(2 * time.Second) // the judge knows a cgroup from its first switch on
	}
	before, countedBefore, bookedBefore := observe(t, s, j), counted(t, s, l), booked(t, l)
	slots := minute()
	after := observe(t, s, j)
	d := after.since(before)
	counted, booked := counted(t, s, l)-countedBefore, booked(t, l)-bookedBefore

	t.Logf("%d waits recorded, %v; %v dropped; process 1 switched in %d times",
		d.Latency.Count(), time.Duration(d.Latency.Sum), d.dropped, d.hidden)
	within := func(what string, got, want uint64, percent float64) {
		t.Helper()
		off := 100 * (float64(got)/float64(want) - 1)
		t.Logf("%s: %d, judge %d: %+.3f %%", what, got, want, off)
		if !(math.Abs(off) <= percent) {
			t.Errorf("%s: %d, judge %d: %+.2f %%, want within %g %%", what, got, want, off, percent)
		}
	}
	within("run_delay of the load's threads, schedstat", counted, booked, 1)
	within("run_delay of all threads, sched_info", d.RunDelayNanos, d.delay, 1)
	var lost uint64
	for _, n := range d.dropped {
		lost += n
	}
	within("waits and drops, sched_info", d.Latency.Count()+lost, d.arrivals+d.unbooked, 1)
	within("waits, time stamps", d.Latency.Count(), d.wait.Count(), 2)
	within("sum of waits, time stamps", d.Latency.Sum, d.wait.Sum, 2)
	for name, g := range containers {
		v := after.cgroups[g.name].since(before.cgroups[g.name])
		// A long sleep that ends while the judge is read is in one of these only.
		var of [2]SchedContainer
		for i := range of {
			of[i] = after.containers[i][g.name].since(before.containers[1-i][g.name])
		}
		c := after.containers[0][g.name].since(before.containers[0][g.name])
		t.Logf("%s: by cause %v, preempted %v", name, durations(c.DelayNanos[:]), c.Preempted)
		checkParts(t, c)
		between := func(what string, ours func(SchedContainer) uint64, least, most uint64, percent float64) {
			t.Helper()
			got := [2]uint64{ours(of[0]), ours(of[1])}
			above, below := 100*(float64(got[1])/float64(least)-1), 100*(float64(got[0])/float64(most)-1)
			t.Logf("%s: %s: %d, judges %d and %d: %+.3f and %+.3f %%", name, what, got, least, most, above, below)
			if !(above >= -percent) || !(below <= percent) {
				t.Errorf("%s: %s: %d, judges %d and %d: %+.2f and %+.2f %%, want within %g %%", name, what, got, least, most, above, below, percent)
			}
		}
		within := func(what string, ours func(SchedContainer) uint64, want uint64, percent float64) {
			t.Helper()
			between(what, ours, want, want, percent)
		}
		slept := func(c SchedContainer) uint64 { return c.Blocked.Sum + c.BlockedIO.Sum }
		within("run_delay, sched_info", func(c SchedContainer) uint64 { return c.RunDelayNanos }, v.delay, 1)
		within("waits, time stamps", func(c SchedContainer) uint64 { return c.Latency.Count() }, v.Waits, 2)
		// Of a thread that is woken under process 1, where that is hidden, the judge sees no
		// wakeup, and such waits are long ones: then its stamps are the least, and the kernel's
		// books, which have some sleep as well (delayed dequeue), the most that it waited.
		waited, most := v.WaitNs, v.WaitNs
		if d.hidden > 0 && c.Latency.Count() > v.Waits+v.Waits/1000 {
			most = max(most, v.delay)
		}
		between("sum of waits", func(c SchedContainer) uint64 { return c.Latency.Sum }, waited, most, 2+apart(400, v.Waits, waited))
		if v.Sleeps > 1000 {
			within("sleeps, time stamps", func(c SchedContainer) uint64 { return c.Blocked.Count() + c.BlockedIO.Count() }, v.Sleeps, 2)
			between("sum of waits and sleeps", func(c SchedContainer) uint64 { return c.Latency.Sum + slept(c) },
				waited+v.SleepNs, most+v.SleepNs, 1)
			// A switch-in reads the run queue's clock some time before the hook's stamp.
			between("sum of sleeps", slept, v.LeastSleepNs, v.MostSleepNs, 0.2+apart(2000, v.Sleeps, v.SleepNs))
		}
		if name == "writes" && c.BlockedIO.Count() < 1000 {
			t.Errorf("writes: blocked by block I/O %d times only", c.BlockedIO.Count())
		}
	}
	compareStamps(t, d.Latency, d.wait)
	if slots != nil {
		compareRunqlat(t, d.Latency, slots)
	}
}

// apart is what n stamps that are so many ns apart come to, in percent of the sum: programs of
// one hook run one after the other.
func apart(ns, n, sum uint64) float64 { return 100 * float64(ns) * float64(n) / float64(sum) }

// startContainers starts what is judged by container: threads that compute and have a
// quota, one that writes through to the disk, two that switch as fast as they can, and
// processes that come and go.
func startContainers(t *testing.T) map[string]*cgroup {
	t.Helper()
	known := kerneltest.BuildProgram(t, "known")
	all := map[string]*cgroup{}
	for _, c := range []struct{ name, mode string }{
		{"quota", "busy"}, {"writes", "write"}, {"switches", "pingpong"}, {"births", "fork"},
	} {
		g := newCgroup(t, c.name)
		n := "1000000000"
		if c.mode == "busy" {
			g.quota(t, 20*time.Millisecond)
			n = "2"
		}
		l := startWorkload(t, known, lastCPU(t), c.mode, n)
		g.add(t, l)
		if c.mode != "busy" {
			if _, err := io.WriteString(l.in, "\n"); err != nil {
				t.Fatal(err)
			}
		}
		t.Cleanup(func() { l.cmd.Process.Kill() })
		all[c.name] = g
	}
	return all
}

// compareStamps holds the cumulative counts of the judge, from below and from above,
// from 10 us to 1 ms, against ours at the cuts next to each edge. Below 10 us it matters
// that its stamps are taken some hundred ns from ours, and below 100 us where the programs
// are emulated.
func compareStamps(t *testing.T, ours, stamps histogram.Snapshot) {
	t.Helper()
	p, least := histogram.Time(), uint64(10_000)
	if kerneltest.InVM() {
		least = 100_000
	}
	for _, edge := range p.Classic {
		if edge < least || edge > 1_000_000 {
			continue
		}
		cell, n := p.Cell(edge), above(t, stamps, edge)
		c := bounds{above(t, ours, p.Cuts[cell+1]), above(t, ours, p.Cuts[cell-1])}
		c.check(t, fmt.Sprintf("above %v: stamps", time.Duration(edge)), n)
		c = bounds{ours.Count() - c.most, ours.Count() - c.least}
		c.check(t, fmt.Sprintf("below %v: stamps", time.Duration(edge)), stamps.Count()-n)
	}
}

// bounds are our counts at two cuts that enclose an edge.
type bounds struct{ least, most uint64 }

// check holds the count of another at that edge against them, where it is large enough
// to tell, give or take 5 %.
func (b bounds) check(t *testing.T, what string, n uint64) bool {
	t.Helper()
	const enough, tolerance = 1000, 0.05
	if n < enough {
		return false
	}
	report := t.Logf
	if float64(n) < (1-tolerance)*float64(b.least) || float64(n) > (1+tolerance)*float64(b.most) {
		report = t.Errorf
	}
	report("%s %d, ours %d to %d", what, n, b.least, b.most)
	return true
}

// hurry gives this process the CPU when it wants it, so that what is compared is read at
// about one moment.
func hurry(t *testing.T) {
	t.Helper()
	for _, tid := range threads(t, os.Getpid()) {
		if err := unix.Setpriority(unix.PRIO_PROCESS, tid, -20); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, tid := range threads(t, os.Getpid()) {
			unix.Setpriority(unix.PRIO_PROCESS, tid, 0)
		}
	})
}

// booked sums the run_delay of schedstat over the threads of the load.
func booked(t *testing.T, l *workload) (sum uint64) {
	t.Helper()
	for _, tid := range threads(t, l.cmd.Process.Pid) {
		sum += readSchedstat(t, l.cmd.Process.Pid, tid).runDelay
	}
	return sum
}

// counted sums what the hook has counted for the threads of the load.
func counted(t *testing.T, s *Sched, l *workload) (sum uint64) {
	t.Helper()
	seats := seated(t, s)
	for _, tid := range threads(t, l.cmd.Process.Pid) {
		task, ok := seats[tid]
		if !ok {
			task, ok = stored(t, s, tid)
		}
		if !ok {
			t.Fatalf("nothing is known of thread %d", tid)
		}
		sum += task.RunDelayNs - task.KnownNs
	}
	return sum
}

type runqlat struct {
	cmd *exec.Cmd
	out *bufio.Reader
}

// startRunqlat starts runqlat for a number of seconds, and returns once it traces.
func startRunqlat(t *testing.T, seconds int) *runqlat {
	t.Helper()
	// Through a pipe it would keep its first line until the end.
	r := &runqlat{cmd: exec.Command("stdbuf", "-oL", "/usr/sbin/runqlat", strconv.Itoa(seconds), "1")}
	r.cmd.Stderr = os.Stderr
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatalf("start runqlat (package libbpf-tools): %v", err)
	}
	t.Cleanup(func() {
		r.cmd.Process.Kill()
		r.cmd.Wait()
	})
	r.out = bufio.NewReader(out)
	if line, err := r.out.ReadString('\n'); err != nil || !strings.HasPrefix(line, "Tracing") {
		t.Fatalf("start runqlat (package libbpf-tools): %q, %v", line, err)
	}
	return r
}

// wait returns, as soon as the time is over, the histogram: slot k holds the waits of
// 2^k us to less than 2^(k+1) us, slot 0 also those of less than 1 us.
func (r *runqlat) wait(t *testing.T) (slots []uint64) {
	t.Helper()
	b, err := io.ReadAll(r.out)
	if err != nil {
		t.Fatalf("read runqlat: %v", err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		var lo, hi, n uint64
		if _, err := fmt.Sscanf(line, "%d -> %d : %d", &lo, &hi, &n); err != nil {
			continue
		}
		if k := len(slots); hi != 2<<k-1 {
			t.Fatalf("read runqlat: %q is not slot %d", line, k)
		}
		slots = append(slots, n)
	}
	if len(slots) == 0 {
		t.Fatal("read runqlat: no histogram")
	}
	return slots
}

// compareRunqlat holds runqlat's cumulative counts, from below and from above, against
// ours at the two cuts that enclose its edge, at each edge of 1 ms and more. What is below
// is left to the time stamps: there runqlat measures its own cost too.
func compareRunqlat(t *testing.T, ours histogram.Snapshot, slots []uint64) {
	t.Helper()
	cuts := histogram.Time().Cuts
	var total, below uint64
	for _, n := range slots {
		total += n
	}
	edges := 0
	for k, n := range slots {
		below += n
		edge := uint64(2<<k) * 1000 // ns; the slot holds what is less
		cell := histogram.Time().Cell(edge - 1)
		if edge < 1_000_000 || cell == len(cuts) {
			continue
		}
		c := bounds{above(t, ours, cuts[cell]), above(t, ours, cuts[cell-1])}
		if c.check(t, fmt.Sprintf("above %v: runqlat", time.Duration(edge)), total-below) {
			edges++
		}
		c = bounds{ours.Count() - c.most, ours.Count() - c.least}
		c.check(t, fmt.Sprintf("below %v: runqlat", time.Duration(edge)), below)
	}
	if edges < 3 {
		t.Errorf("%d edges with waits enough above them: too little load to compare", edges)
	}
}
