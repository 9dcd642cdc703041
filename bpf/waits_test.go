// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"math"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

func newWaits(t *testing.T, sampling WaitSampling) (*Sched, *Waits) {
	t.Helper()
	kerneltest.Require(t)
	s, err := NewSched(SchedConfig{CgroupV1: CPUControllerV1(), Sampling: sampling})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { s.Close() })
	tables, err := NewTables(DefaultTableMemory)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Close() })
	w, err := NewWaits(s, tables)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { w.Close() })
	return s, w
}

// sampled is what the samples of one profile stand for.
type sampled struct {
	n     int
	nanos float64
	means float64 // the mean that each was drawn by times what it stands for
}

func (s *sampled) add(x *Sample) {
	d, v := float64(x.Duration), float64(x.Value)
	s.n++
	s.nanos += v
	// From v = d/p and p = 1 - exp(-d/T), T. Where v is d as far as a whole number tells it is
	// less than this.
	s.means += v * d / math.Log(v/max(v-d, 0.5))
}

// deviation is the standard deviation of the sum of such samples of so much time: a time of d
// that is drawn with p = 1 - exp(-d/T) and counts as d/p has a variance of less than d T. Not
// that of the samples which came: where there are few, it is small whenever the sum is.
func (s *sampled) deviation(exact uint64) float64 {
	return math.Sqrt(float64(exact) * s.means / max(s.nanos, 1))
}

// check compares with the exact sum, of which that is read shortly before and shortly after the
// last drain: the larger of share of it and four standard errors.
func (s *sampled) check(t *testing.T, what string, exact [2]uint64, share float64) {
	t.Helper()
	least, most := float64(exact[0]), float64(exact[1])
	allowed := max(share*most, 4*s.deviation(exact[1]))
	t.Logf("%s: %d samples stand for %.3f s of %.3f to %.3f s, %+.2f to %+.2f %% (allowed %.2f %%)", what, s.n, s.nanos/1e9, least/1e9, most/1e9,
		100*(s.nanos-least)/least, 100*(s.nanos-most)/most, 100*allowed/most)
	if s.n == 0 || s.nanos < least-allowed || s.nanos > most+allowed {
		t.Errorf("%s: the samples do not add up", what)
	}
}

// exactly are the bounds of a sum that is known.
func exactly(sum uint64) [2]uint64 { return [2]uint64{sum, sum} }

// drainFor drains as the agent does, while d goes by.
func (w *Waits) drainFor(t *testing.T, d time.Duration, fn func(*Sample)) {
	t.Helper()
	for end := time.Now().Add(d); ; {
		if err := w.Drain(fn); err != nil {
			t.Fatal(err)
		}
		left := time.Until(end)
		if left <= 0 {
			return
		}
		time.Sleep(min(left, 250*time.Millisecond))
	}
}

// runThreads starts the workload threads and ends it with the test.
func runThreads(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(kerneltest.BuildProgram(t, "threads"), args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd
}

// The samples add up to what the hook counts, for the host and for a container.
func TestWaitsAddUp(t *testing.T) {
	d := 60 * time.Second
	if testing.Short() {
		d = 5 * time.Second
	}
	kerneltest.MeasureLock(t) // before: nobody drains while it is waited for
	// So many that chance makes 4 % or so in a minute, and few enough for the means to follow the load.
	s, w := newWaits(t, WaitSampling{PerSecond: 500})
	c := newCgroup(t, "waits")
	load := runThreads(t, "20", "3", strconv.Itoa(int(d.Seconds())+10))
	c.set(t, "cgroup.procs", strconv.Itoa(load.Process.Pid))
	id, err := strconv.ParseUint(c.name, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	// What ends while it is read and drained, a long sleep as well, is in one of two readings.
	type reading struct{ host, container SchedCells }
	readAround := func(drain func()) (around [2]reading) {
		for i := range around {
			host, containers, err := s.Read()
			if err != nil {
				t.Fatal(err)
			}
			around[i] = reading{host, byName(containers)[c.name].SchedCells}
			if i == 0 {
				drain()
			}
		}
		return around
	}
	time.Sleep(time.Second)
	before := readAround(func() { w.drainFor(t, 0, func(*Sample) {}) })
	dropped := waitStats(t, w).Dropped
	var hostWait, hostBlocked, wait, blocked sampled
	take := func(x *Sample) {
		if x.Due() != 1 {
			t.Errorf("a sample counts as %d, a loss is one", x.Due())
		}
		inside := x.Cgroup == id
		switch x.Profile {
		case ProfileRunqueue:
			hostWait.add(x)
			if inside {
				wait.add(x)
			}
		case ProfileOffCPU:
			hostBlocked.add(x)
			if inside {
				blocked.add(x)
			}
		}
	}
	w.drainFor(t, d, take)
	after := readAround(func() { w.drainFor(t, 0, take) })
	grown := func(sum func(reading) uint64) [2]uint64 {
		return [2]uint64{sum(after[0]) - sum(before[1]), sum(after[1]) - sum(before[0])}
	}
	slept := func(c SchedCells) uint64 { return c.Blocked.Sum + c.BlockedIO.Sum }
	hostWait.check(t, "waits of the host", grown(func(r reading) uint64 { return r.host.Latency.Sum }), 0.03)
	hostBlocked.check(t, "blocked time of the host", grown(func(r reading) uint64 { return slept(r.host) }), 0.03)
	wait.check(t, "waits of the container", grown(func(r reading) uint64 { return r.container.Latency.Sum }), 0.03)
	blocked.check(t, "blocked time of the container", grown(func(r reading) uint64 { return slept(r.container) }), 0.03)
	var lost uint64
	for reason, n := range waitStats(t, w).Dropped {
		lost += n - dropped[reason]
	}
	if n := hostWait.n + hostBlocked.n; lost > uint64(n)/100 {
		t.Errorf("%d samples, %d lost", n, lost)
	}
}

// With a mean that is far below every wait each of them is a sample of its own.
func TestWaitsAllTaken(t *testing.T) {
	s, w := newWaits(t, WaitSampling{Wait: time.Nanosecond, Blocked: time.Nanosecond, PerSecond: 100_000})
	c := newCgroup(t, "all-waits")
	load := runThreads(t, "3", "1", "20")
	c.set(t, "cgroup.procs", strconv.Itoa(load.Process.Pid))
	time.Sleep(500 * time.Millisecond)
	// While its threads stand still what is drained and what is read are the same.
	signal := func(sig syscall.Signal) {
		if err := load.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
	}
	signal(syscall.SIGSTOP)
	w.drainFor(t, 0, func(*Sample) {})
	_, before, err := s.Read()
	if err != nil {
		t.Fatal(err)
	}
	var wait, blocked sampled
	take := func(x *Sample) {
		switch id := strconv.FormatUint(x.Cgroup, 10); {
		case id != c.name:
		case x.Weight != 1:
			t.Errorf("weight %d of %d ns", x.Weight, x.Duration)
		case x.Profile == ProfileRunqueue:
			wait.add(x)
		case x.Profile == ProfileOffCPU:
			blocked.add(x)
		}
	}
	signal(syscall.SIGCONT)
	w.drainFor(t, 5*time.Second, take)
	signal(syscall.SIGSTOP)
	w.drainFor(t, 0, take)
	_, after, err := s.Read()
	if err != nil {
		t.Fatal(err)
	}
	grown := byName(after)[c.name].since(byName(before)[c.name])
	const share = 0.01
	wait.means, blocked.means = 0, 0 // no chance in it
	wait.check(t, "waits", exactly(grown.Latency.Sum), share)
	blocked.check(t, "blocked time", exactly(grown.Blocked.Sum+grown.BlockedIO.Sum), share)
	if n := grown.Latency.Count(); math.Abs(float64(n)-float64(wait.n)) > share*float64(n) {
		t.Errorf("%d samples of %d waits", wait.n, n)
	}
}

// Two processes take turns on a CPU: what each waits is time of the other, whose stack is
// that of where it was when its turn ended.
func TestWaitsCulprit(t *testing.T) {
	kerneltest.MeasureLock(t)
	s, w := newWaits(t, WaitSampling{Wait: time.Nanosecond, Blocked: -1, PerSecond: 100_000})
	known := kerneltest.BuildProgram(t, "known")
	var groups [2]*cgroup
	var pids [2]uint32
	// While they stand still what is drained and what is read are the same.
	signal := func(sig syscall.Signal) {
		for _, pid := range pids {
			if err := syscall.Kill(int(pid), sig); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(200 * time.Millisecond)
	}
	for i := range groups {
		groups[i] = newCgroup(t, "culprit"+strconv.Itoa(i)).heavy(t)
		l := startWorkload(t, known, lastCPU(t), "busy", "1")
		groups[i].add(t, l)
		pids[i] = uint32(l.cmd.Process.Pid)
	}
	t.Cleanup(func() { signal(syscall.SIGCONT) }) // before they are told to end
	time.Sleep(300 * time.Millisecond)
	signal(syscall.SIGSTOP)
	w.drainFor(t, 0, func(*Sample) {})
	var nanos [2]uint64 // by victim
	grown := growth(t, s, func() {
		take := func(x *Sample) {
			victim := slices.Index(pids[:], x.ByPID)
			if x.Profile != ProfileCulprit || victim < 0 || x.PID != pids[1-victim] {
				return
			}
			nanos[victim] += x.Value
			if strconv.FormatUint(x.Cgroup, 10) != groups[1-victim].name || x.By.String() != "known" || x.Cause != CauseOther {
				t.Errorf("%v of cgroup %d, waited for by %v because of %v", x.Comm, x.Cgroup, x.By, x.Cause)
			}
			if len(x.Kernel) == 0 || len(x.User) == 0 || len(x.User) > 64 || len(x.Areas) == 0 {
				t.Fatalf("%d kernel and %d user frames, %v, in %d areas", len(x.Kernel), len(x.User), x.UserOutcome, len(x.Areas))
			}
			if a, leaf := x.Areas[0], x.User[0]&^ExactAddr; leaf < a.Start || leaf >= a.End {
				t.Errorf("leaf %#x, in an area from %#x to %#x", leaf, a.Start, a.End)
			}
		}
		signal(syscall.SIGCONT)
		w.drainFor(t, causesFor, take)
		signal(syscall.SIGSTOP)
		w.drainFor(t, 0, take)
	}, groups[0].name, groups[1].name)
	// A kernel thread can run between the two turns, and in a virtual machine the test itself.
	least := 0.8
	if kerneltest.InVM() {
		least = 0.5
	}
	for i, g := range groups {
		exact := grown[g.name].DelayedBy[groups[1-i].name]
		t.Logf("%s: %v of %v", g.name, time.Duration(nanos[i]), time.Duration(exact))
		if share := float64(nanos[i]) / float64(exact); exact == 0 || share < least || share > 1.05 {
			t.Errorf("%s: samples of whom it waited for stand for %v of %v", g.name, time.Duration(nanos[i]), time.Duration(exact))
		}
	}
}

// Where many threads sleep for short times the mean grows, and no more stacks are walked than
// was asked for.
func TestWaitsKeepTheRate(t *testing.T) {
	const perSecond = 50
	_, w := newWaits(t, WaitSampling{Wait: time.Microsecond, Blocked: time.Microsecond, PerSecond: perSecond})
	runThreads(t, "100", "2", "30")
	w.drainFor(t, 3*time.Second, func(*Sample) {})
	n := map[Profile]int{}
	start := time.Now()
	w.drainFor(t, 5*time.Second, func(x *Sample) { n[x.Profile]++ })
	cpus, err := OnlineCPUs()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []Profile{ProfileRunqueue, ProfileOffCPU} {
		rate := float64(n[p]) / time.Since(start).Seconds() / float64(len(cpus))
		t.Logf("profile %d: %.0f samples a second and CPU", p, rate)
		if rate > 1.5*perSecond || rate < perSecond/4 {
			t.Errorf("profile %d: %.0f samples a second and CPU, want about %d", p, rate, perSecond)
		}
	}
}

// A process with one thread has its stacks beside one with many: more than by its share of
// the time.
func TestWaitsAreShared(t *testing.T) {
	_, w := newWaits(t, WaitSampling{PerSecond: 40})
	kerneltest.MeasureLock(t)
	many := runThreads(t, "60", "0", "30").Process.Pid
	one := many
	for one%16 == many%16 { // else they share
		one = runThreads(t, "1", "0", "30").Process.Pid
	}
	w.drainFor(t, 3*time.Second, func(*Sample) {})
	var all, its sampled
	w.drainFor(t, 5*time.Second, func(x *Sample) {
		if x.Profile != ProfileOffCPU || x.PID != uint32(many) && x.PID != uint32(one) {
			return
		}
		all.add(x)
		if x.PID == uint32(one) {
			its.add(x)
		}
	})
	samples, share := 100*float64(its.n)/float64(all.n), 100*its.nanos/all.nanos
	t.Logf("%d of %d samples, %.1f %%, for %.1f %% of the time", its.n, all.n, samples, share)
	if its.n == 0 || samples < 3*share {
		t.Errorf("%.1f %% of the samples are for %.1f %% of the time, want more than three times as many", samples, share)
	}
}

// A thread that stays blocked is sampled while it is, from when that was last asked for.
func TestWaitsObserveTheBlocked(t *testing.T) {
	_, w := newWaits(t, WaitSampling{PerSecond: 2000}) // of all that are idle on this host
	cmd := runThreads(t, "0", "0", "1000")             // the main thread sleeps
	time.Sleep(200 * time.Millisecond)
	var got sampled
	var lasted uint64
	observe := func() {
		if err := w.Observe(); err != nil {
			t.Fatal(err)
		}
		w.drainFor(t, 0, func(x *Sample) {
			if x.PID != uint32(cmd.Process.Pid) || x.Profile != ProfileOffCPU {
				return
			}
			got.add(x)
			if x.Lasted < x.Duration || x.Lasted < lasted+x.Duration {
				t.Errorf("blocked for %d ns by now, of which %d are new; %d before", x.Lasted, x.Duration, lasted)
			}
			lasted = x.Lasted
			if len(x.Kernel) == 0 || x.UserOutcome != OutcomeNoTable || len(x.Stack) == 0 {
				t.Errorf("%d kernel frames, %v, %d bytes of user stack", len(x.Kernel), x.UserOutcome, len(x.Stack))
			}
		})
	}
	// What was observed ends somewhere in a walk: the sum is known to half of both.
	around := func() (middle time.Time, half time.Duration) {
		before := time.Now()
		observe()
		half = time.Since(before) / 2
		return before.Add(half), half
	}
	from, one := around()
	got = sampled{}
	for range 19 {
		time.Sleep(100 * time.Millisecond)
		observe()
	}
	time.Sleep(100 * time.Millisecond)
	until, other := around()
	exact := until.Sub(from)
	got.check(t, "a sleep", exactly(uint64(exact)), 0.03+float64(one+other)/float64(exact))
}

// Each way into the thread that is switched in that there is here.
func TestWaitsHook(t *testing.T) {
	kerneltest.Require(t)
	hooks, err := waitHooks()
	if err != nil {
		t.Fatal(err)
	}
	for _, hook := range hooks {
		t.Run(hook, func(t *testing.T) { testWaitsHook(t, hook) })
	}
}

// kernelSymbol is the address of a function of the kernel, 0 where that is a secret.
func kernelSymbol(t *testing.T, name string) (address uint64) {
	t.Helper()
	b, err := os.ReadFile("/proc/kallsyms")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[2] == name {
			if address, err = strconv.ParseUint(f[0], 16, 64); err != nil {
				t.Fatal(err)
			}
			return address
		}
	}
	t.Fatalf("the kernel has no %s", name)
	return 0
}

func testWaitsHook(t *testing.T, hook string) {
	s, err := NewSched(SchedConfig{CgroupV1: CPUControllerV1()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	tables, err := NewTables(DefaultTableMemory)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Close() })
	w, err := openWaits(s, tables, hook)
	if errors.Is(err, errNotKicked) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { w.Close() })
	threads := runThreads(t, "5", "2", "10")
	schedule := kernelSymbol(t, "__schedule")
	user, kernel, above := 0, 0, 0
	w.drainFor(t, 2*time.Second, func(x *Sample) {
		if len(x.User) > 0 && x.Profile == ProfileRunqueue {
			user++
		}
		if len(x.Kernel) > 0 && x.PID == uint32(threads.Process.Pid) {
			kernel++
			if x.Kernel[0]-schedule >= 8192 {
				above++
			}
		}
		if len(x.Kernel) == 0 && x.KernelOutcome == OutcomeComplete {
			t.Error("complete, and no kernel frames")
		}
	})
	if user == 0 {
		t.Error("no user stacks of waits")
	}
	// How the hook is called is not part of the stack, but for a kprobe. New threads have not
	// come from schedule().
	t.Logf("%d of %d kernel stacks begin above schedule()", above, kernel)
	if schedule != 0 && hook != waitsProgHfWaitFinish && (kernel == 0 || above*10 > kernel) {
		t.Errorf("%d of %d kernel stacks do not begin in schedule()", above, kernel)
	}
}
