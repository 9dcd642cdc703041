// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// cgroup is one of the hierarchy that scheduling has its containers from.
type cgroup struct {
	dir  string
	name string // its id, as SchedConfig has it by default
}

// newCgroup makes a cgroup that is gone when the test ends, as its processes are.
func newCgroup(t *testing.T, name string) *cgroup {
	t.Helper()
	root := "/sys/fs/cgroup"
	if CPUControllerV1() {
		root = "/sys/fs/cgroup/cpu"
	} else if err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+cpu"), 0); err != nil {
		t.Fatal(err)
	}
	c := &cgroup{dir: filepath.Join(root, "hostflame-"+name)}
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Rmdir(c.dir) })
	info, err := os.Stat(c.dir)
	if err != nil {
		t.Fatal(err)
	}
	// The number of its inode is its id (kernfs, on 64 bits).
	c.name = strconv.FormatUint(info.Sys().(*syscall.Stat_t).Ino, 10)
	return c
}

func (c *cgroup) set(t *testing.T, file, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(c.dir, file), []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// heavy gives its threads the CPU before all that is outside of the test, but for the test
// itself (hurry).
func (c *cgroup) heavy(t *testing.T) *cgroup {
	t.Helper()
	if CPUControllerV1() {
		c.set(t, "cpu.shares", "65536")
	} else {
		c.set(t, "cpu.weight", "6400")
	}
	return c
}

// quota limits its threads to so much CPU in each 100 ms.
func (c *cgroup) quota(t *testing.T, d time.Duration) {
	t.Helper()
	us := strconv.FormatInt(d.Microseconds(), 10)
	if CPUControllerV1() {
		c.set(t, "cpu.cfs_period_us", "100000")
		c.set(t, "cpu.cfs_quota_us", us)
	} else {
		c.set(t, "cpu.max", us+" 100000")
	}
}

// throttled is for how long its CPUs were throttled.
func (c *cgroup) throttled(t *testing.T) time.Duration {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.dir, "cpu.stat"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var n int64
		if _, err := fmt.Sscanf(line, "throttled_time %d", &n); err == nil {
			return time.Duration(n)
		}
		if _, err := fmt.Sscanf(line, "throttled_usec %d", &n); err == nil {
			return time.Duration(n) * time.Microsecond
		}
	}
	t.Fatalf("no throttled time in %q", b)
	return 0
}

// add puts a workload into the cgroup.
func (c *cgroup) add(t *testing.T, l *workload) {
	t.Helper()
	c.set(t, "cgroup.procs", strconv.Itoa(l.cmd.Process.Pid))
}

// settled returns when the threads of workloads have been switched in a few times, by the
// kernel's books: an emulated CPU stands still for seconds now and then.
func settled(t *testing.T, loads ...*workload) {
	t.Helper()
	for _, l := range loads {
		arrivals := func() (n uint64) {
			for _, tid := range threads(t, l.cmd.Process.Pid) {
				n += readSchedstat(t, l.cmd.Process.Pid, tid).arrivals
			}
			return n
		}
		before := arrivals()
		for end := time.Now().Add(20 * time.Second); arrivals() < before+3; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("threads of %s were switched in %d times in 20 s", l.cmd, arrivals()-before)
			}
		}
	}
}

// growth returns what containers counted while something was done.
func growth(t *testing.T, s *Sched, what func(), names ...string) map[string]SchedContainer {
	t.Helper()
	read := func() map[string]SchedContainer {
		_, list, err := s.Read()
		if err != nil {
			t.Fatal(err)
		}
		return byName(list)
	}
	before := read()
	what()
	grown := map[string]SchedContainer{}
	for name, c := range read() {
		grown[name] = c.since(before[name])
	}
	for _, name := range names {
		c, ok := grown[name]
		if !ok {
			entries, err := s.books.slots.all()
			stats, serr := s.Stats()
			t.Fatalf("no container %s; known are %+v, %v; %+v, %v", name, entries, err, stats, serr)
		}
		t.Logf("%s: %d waits, %v, by cause %v, by container %v; preempted %v", name, c.Latency.Count(),
			time.Duration(c.Latency.Sum), durations(c.DelayNanos[:]), c.DelayedBy, c.Preempted)
	}
	return grown
}

func forAWhile() { time.Sleep(causesFor) }

// since is what was counted after b, which is the zero value where there was nothing.
func (c SchedContainer) since(b SchedContainer) SchedContainer {
	if b.Name == "" {
		return c
	}
	c.Latency = since(c.Latency, b.Latency)
	c.Blocked = since(c.Blocked, b.Blocked)
	c.BlockedIO = since(c.BlockedIO, b.BlockedIO)
	c.RunDelayNanos -= b.RunDelayNanos
	for i := range c.DelayNanos {
		c.DelayNanos[i] -= b.DelayNanos[i]
	}
	for i := range c.Preempted {
		c.Preempted[i] -= b.Preempted[i]
	}
	c.DelayedBy = maps.Clone(c.DelayedBy)
	for by := range c.DelayedBy {
		c.DelayedBy[by] -= b.DelayedBy[by]
	}
	return c
}

func durations(nanos []uint64) (list []time.Duration) {
	for _, n := range nanos {
		list = append(list, time.Duration(n).Round(time.Microsecond))
	}
	return list
}

// checkParts holds that the causes add up to the waits and the culprits to their cause,
// but for a switch or two that happened while they were read.
func checkParts(t *testing.T, c SchedContainer) {
	t.Helper()
	var by uint64
	for _, n := range c.DelayedBy {
		by += n
	}
	for _, p := range []struct {
		what       string
		parts, all uint64
	}{
		{"causes", sum(c.DelayNanos[:]), c.Latency.Sum},
		{"culprits", by, c.DelayNanos[CauseOther]},
	} {
		if off := math.Abs(float64(p.parts) - float64(p.all)); off > 0.01*float64(p.all) {
			t.Errorf("%s: %s add up to %v of %v", c.Name, p.what, time.Duration(p.parts), time.Duration(p.all))
		}
	}
}

// checkShare holds that a cause has at least a share of a container's waits.
func checkShare(t *testing.T, c SchedContainer, cause Cause, least float64) {
	t.Helper()
	if share := float64(c.DelayNanos[cause]) / float64(c.Latency.Sum); share < least || c.Latency.Sum == 0 {
		t.Errorf("%s: %.1f %% of the waits are %v, want at least %.0f %%", c.Name, 100*share, cause, 100*least)
	}
}

// switchOuts is how often the threads of a workload were switched out because they slept,
// and although they would have gone on.
func switchOuts(t *testing.T, l *workload) (voluntary, nonvoluntary uint64) {
	t.Helper()
	for _, tid := range threads(t, l.cmd.Process.Pid) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/status", l.cmd.Process.Pid, tid))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			var n uint64
			if _, err := fmt.Sscanf(line, "voluntary_ctxt_switches: %d", &n); err == nil {
				voluntary += n
			}
			if _, err := fmt.Sscanf(line, "nonvoluntary_ctxt_switches: %d", &n); err == nil {
				nonvoluntary += n
			}
		}
	}
	return voluntary, nonvoluntary
}

// bothMethods runs a test with the kernel's sched_info and with stamped wakeups.
func bothMethods(t *testing.T, test func(t *testing.T, s *Sched)) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	hurry(t)
	for _, stamps := range []bool{false, true} {
		t.Run(map[bool]string{false: "sched_info", true: "stamps"}[stamps], func(t *testing.T) {
			test(t, newRunningSched(t, SchedConfig{CgroupV1: CPUControllerV1(), stampWakeups: stamps}))
		})
	}
}

// newRunningSched returns a Sched whose hook has run on each CPU.
func newRunningSched(t *testing.T, cfg SchedConfig) *Sched {
	t.Helper()
	hidden := hiddenArrivals(t)
	s, err := NewSched(cfg)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { s.Close() })
	arrivalsBefore[s] = hidden
	awaitRunsEverywhere(t, s)
	return s
}

// awaitRunsEverywhere fails with all that is known unless the hook of switches runs on each CPU:
// on an emulated kernel it was attached and counted nothing, now and then.
func awaitRunsEverywhere(t *testing.T, s *Sched) {
	t.Helper()
	cpus, err := OnlineCPUs()
	if err != nil {
		t.Fatal(err)
	}
	switches := func(cpu int) uint64 {
		var perCPU []schedHfSchedCpu
		if err := s.coll.Maps[schedMapHfSchedCpus].Lookup(uint32(0), &perCPU); err != nil {
			t.Fatal(err)
		}
		return perCPU[cpu].Switches
	}
	for _, cpu := range cpus {
		stop, stopped := make(chan struct{}), make(chan error, 1)
		go func() { stopped <- switchOn(cpu, stop) }()
		before := switches(cpu)
		for end := time.Now().Add(5 * time.Second); switches(cpu) == before; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				stats, err := s.Stats()
				t.Errorf("%s ran %d times on CPU %d of %v, and no more: %+v, %v", s.programs[0], before, cpu, cpus, stats, err)
				for _, l := range s.links {
					info, err := l.Info()
					t.Logf("link %+v, %v", info, err)
				}
				break
			}
		}
		close(stop)
		if err := <-stopped; err != nil {
			t.Fatalf("switch on CPU %d: %v", cpu, err)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// switchOn switches on a CPU, to sleep and back, until stop is closed.
func switchOn(cpu int, stop chan struct{}) error {
	// The thread is not unlocked: it ends with its affinity.
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return err
	}
	for {
		select {
		case <-stop:
			return nil
		default:
			if err := unix.Nanosleep(&unix.Timespec{Nsec: 1_000_000}, nil); err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
		}
	}
}

// arrivalsBefore has hiddenArrivals from before each Sched of newRunningSched.
var arrivalsBefore = map[*Sched]uint64{}

const causesFor = 2 * time.Second

// A busy thread with a quota of 20 % waits for its quota.
func TestSchedCauseQuota(t *testing.T) {
	bothMethods(t, func(t *testing.T, s *Sched) {
		g := newCgroup(t, "quota").heavy(t)
		g.quota(t, 20*time.Millisecond)
		l := startWorkload(t, kerneltest.BuildProgram(t, "known"), lastCPU(t), "busy", "1")
		g.add(t, l)
		settled(t, l)
		throttled := g.throttled(t)
		c := growth(t, s, forAWhile, g.name)[g.name]
		throttled = g.throttled(t) - throttled
		checkParts(t, c)
		checkShare(t, c, CauseQuota, 0.9)
		if kerneltest.InVM() {
			return // which pauses for longer than that
		}
		// Periods that are cut at the ends.
		if off := time.Duration(c.DelayNanos[CauseQuota]) - throttled; off.Abs() > 150*time.Millisecond {
			t.Errorf("%v for lack of quota, the kernel says %v", time.Duration(c.DelayNanos[CauseQuota]), throttled)
		}
	})
}

// Threads of one container on one CPU wait for each other, also where they share a quota.
func TestSchedCauseOwn(t *testing.T) {
	bothMethods(t, func(t *testing.T, s *Sched) {
		g := newCgroup(t, "own").heavy(t)
		l := startWorkload(t, kerneltest.BuildProgram(t, "known"), lastCPU(t), "busy", "2")
		g.add(t, l)
		settled(t, l)
		c := growth(t, s, forAWhile, g.name)[g.name]
		checkParts(t, c)
		checkShare(t, c, CauseOwn, 0.9)
		if n := c.DelayNanos[CauseQuota]; n != 0 {
			t.Errorf("%v for lack of quota, which it has no limit of", time.Duration(n))
		}
	})
}

// A real-time thread that has used up the time that its class may have waits for its quota.
func TestSchedCauseRealTime(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.SkipInVM(t, "has one of the emulated CPUs to itself")
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	if !CPUControllerV1() || !hasMember(kernel, "sched_rt_entity", "rt_rq") {
		t.Skip("no groups of real-time tasks here (CONFIG_RT_GROUP_SCHED, a v1 hierarchy)")
	}
	bothMethods(t, func(t *testing.T, s *Sched) {
		g := newCgroup(t, "realtime")
		g.set(t, "cpu.rt_runtime_us", "200000") // of each second
		l := startWorkload(t, kerneltest.BuildProgram(t, "known"), lastCPU(t), "busy", "1")
		g.add(t, l)
		schedule := func(attr unix.SchedAttr) {
			for _, tid := range threads(t, l.cmd.Process.Pid) {
				attr.Size = unix.SizeofSchedAttr
				if err := unix.SchedSetAttr(tid, &attr, 0); err != nil {
					t.Fatal(err)
				}
			}
		}
		schedule(unix.SchedAttr{Policy: unix.SCHED_FIFO, Priority: 1})
		// One that dies while it is throttled can stay so for ever.
		defer schedule(unix.SchedAttr{Policy: unix.SCHED_NORMAL})
		c := growth(t, s, func() { time.Sleep(2 * causesFor) }, g.name)[g.name]
		checkParts(t, c)
		checkShare(t, c, CauseQuota, 0.9)
		// One of four periods or so is cut at the end.
		if n := time.Duration(c.Latency.Sum); n < causesFor {
			t.Errorf("it waited for %v of %v, want 80 %%", n, 2*causesFor)
		}
	})
}

// Four threads that share a quota of 30 % of one CPU: each wait is of both kinds.
func TestSchedCauseSharedQuota(t *testing.T) {
	bothMethods(t, func(t *testing.T, s *Sched) {
		g := newCgroup(t, "shared").heavy(t)
		g.quota(t, 30*time.Millisecond)
		l := startWorkload(t, kerneltest.BuildProgram(t, "known"), lastCPU(t), "busy", "4")
		g.add(t, l)
		settled(t, l)
		throttled := g.throttled(t)
		c := growth(t, s, func() { time.Sleep(2 * causesFor) }, g.name)[g.name]
		throttled = g.throttled(t) - throttled
		checkParts(t, c)
		if kerneltest.InVM() {
			return // which pauses in between
		}
		// All four wait while the quota is used up, three while one runs.
		quota, own := time.Duration(c.DelayNanos[CauseQuota]), time.Duration(c.DelayNanos[CauseOwn])
		t.Logf("throttled for %v; quota %v, own %v", throttled, quota, own)
		if off := float64(quota)/float64(4*throttled) - 1; math.Abs(off) > 0.15 {
			t.Errorf("%v for lack of quota, want about four times the %v that it lasted", quota, throttled)
		}
		if ran := 2*causesFor - throttled; own < ran*3*8/10 || own > ran*3*11/10 {
			t.Errorf("%v because of each other, want about three times the %v that they ran", own, ran)
		}
	})
}

// Two containers on one CPU wait for each other, and each is the other's culprit.
func TestSchedCauseOther(t *testing.T) {
	bothMethods(t, func(t *testing.T, s *Sched) {
		known := kerneltest.BuildProgram(t, "known")
		var groups [2]*cgroup
		var loads [2]*workload
		for i := range groups {
			groups[i] = newCgroup(t, fmt.Sprintf("other%d", i)).heavy(t)
			loads[i] = startWorkload(t, known, lastCPU(t), "busy", "1")
			groups[i].add(t, loads[i])
		}
		settled(t, loads[:]...)
		preempted := func() (kernel [2]uint64) {
			for i, l := range loads {
				_, kernel[i] = switchOuts(t, l)
			}
			return kernel
		}
		// The kernel's count is of a little less and of a little more than ours: emulated, to read
		// takes its time.
		var inside [2][2]uint64
		before := preempted()
		all := growth(t, s, func() {
			inside[0] = preempted()
			forAWhile()
			inside[1] = preempted()
		}, groups[0].name, groups[1].name)
		after := preempted()
		for i, g := range groups {
			c, culprit := all[g.name], groups[1-i].name
			checkParts(t, c)
			checkShare(t, c, CauseOther, 0.9)
			if share := float64(c.DelayedBy[culprit]) / float64(c.DelayNanos[CauseOther]); share < 0.9 {
				t.Errorf("%s: %.1f %% because of %s, want at least 90 %%", g.name, 100*share, culprit)
			}
			ours, least, most := sum(c.Preempted[:]), inside[1][i]-inside[0][i], after[i]-before[i]
			t.Logf("%s: %d preemptions, the kernel counted %d to %d", g.name, ours, least, most)
			if slack := 2 + 0.05*float64(most); float64(ours) < float64(least)-slack || float64(ours) > float64(most)+slack {
				t.Errorf("%s: %d preemptions, the kernel counted %d to %d", g.name, ours, least, most)
			}
			if n := c.Preempted[PreemptorOther]; n < ours/2 {
				t.Errorf("%s: %d of %d preemptions are by others, want most", g.name, n, ours)
			}
		}
	})
}

// What is slept for is known: 1 ms 1,009 times, and no wait counts as sleep. A sleep can be
// over before its thread was switched out, on an emulated CPU many are: how often it was
// is in the kernel's books.
func TestSchedBlocked(t *testing.T) { testSleeps(t, "sleep") }

// The same in the deadline class.
func TestSchedDeadline(t *testing.T) { testSleeps(t, "deadline") }

func testSleeps(t *testing.T, mode string) {
	bothMethods(t, func(t *testing.T, s *Sched) {
		g := newCgroup(t, "blocked").heavy(t)
		l := startWorkload(t, kerneltest.BuildProgram(t, "known"), lastCPU(t), mode, "1009")
		g.add(t, l)
		dropped := missed(t, s)
		var took time.Duration
		var times uint64
		c := growth(t, s, func() {
			before, _ := switchOuts(t, l)
			start := time.Now()
			l.run(t)
			took = time.Since(start)
			times, _ = switchOuts(t, l)
			times -= before
		}, g.name)[g.name]
		dropped = missed(t, s) - dropped
		n, slept := c.Blocked.Count(), time.Duration(c.Blocked.Sum)
		t.Logf("slept %d times, %v, waited %v, of %v; switched out for it %d times, %d switch-ins dropped",
			n, slept, time.Duration(c.Latency.Sum), took, times, dropped)
		if times < 500 || n+dropped+2 < times || n > times+2 {
			t.Errorf("%d sleeps, the kernel has %d", n, times)
		}
		// Before, it sleeps until its line comes.
		if slept < time.Duration(n-5)*time.Millisecond || slept > took+500*time.Millisecond {
			t.Errorf("slept %v, want at least 1 ms each and %v at most", slept, took)
		}
		if n := c.BlockedIO.Count(); n != 0 {
			t.Errorf("%d times blocked by block I/O, want none", n)
		}
	})
}
