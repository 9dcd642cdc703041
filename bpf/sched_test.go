// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/histogram"
	"github.com/hostflame/hostflame/internal/kerneltest"
)

func newSched(t *testing.T) *Sched {
	t.Helper()
	s, err := NewSched(SchedConfig{CgroupV1: CPUControllerV1()})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// lastCPU is an online CPU that is not the first, where there is one: that is where the
// known threads run.
func lastCPU(t *testing.T) string {
	t.Helper()
	cpus, err := OnlineCPUs()
	if err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(cpus[len(cpus)-1])
}

// Every switch-in of a thread is recorded or a drop, and nothing else is: no idle task, no
// thread twice.
func TestSchedCountsEverySwitchIn(t *testing.T) { bothMethods(t, countsEverySwitchIn) }

func countsEverySwitchIn(t *testing.T, s *Sched) {
	known := kerneltest.BuildProgram(t, "known")
	j := newJudge(t)
	first := observe(t, s, j)
	for _, tt := range []struct {
		mode      string
		n         int
		switchIns uint64
	}{
		{"pingpong", 10_007, 2 * 10_007},
		{"sleep", 1_009, 1_009},
		{"fork", 211, 2 * 211},
	} {
		t.Run(tt.mode, func(t *testing.T) {
			l := startWorkload(t, known, lastCPU(t), tt.mode, strconv.Itoa(tt.n))
			before := observe(t, s, j)
			l.run(t)
			d := observe(t, s, j).since(before)
			t.Logf("%d recorded, %v dropped, by time stamps %d; process 1 switched in %d times",
				d.Latency.Count(), d.dropped, d.wait.Count()+d.unknown, d.hidden)
			if n := d.Latency.Count(); n < tt.switchIns {
				t.Errorf("%d switch-ins recorded, want at least %d", n, tt.switchIns)
			}
			if n := d.wait.Count() + d.unknown; n < d.seen[0] || n > d.seen[1] {
				t.Errorf("%d to %d switch-ins recorded or dropped, by time stamps %d", d.seen[0], d.seen[1], n)
			}
		})
	}
	// A switch-in unseen is known when the thread is next switched, so it can have been before the
	// first. Who ran when the hook came was switched in unseen, and is gone by then.
	o := observe(t, s, j)
	dropped := o.since(first).dropped
	// Process 1 can be among those whose switch-in the kernel does not book.
	hidden := o.hidden - arrivalsBefore[s] + o.unbooked
	t.Logf("%v dropped in all; process 1 switched in %d times, with %d that are not booked", dropped, hidden, o.unbooked)
	if n := dropped[DropNoStorage]; n > hidden {
		t.Errorf("%d switch-ins of unknown threads, but only %d were hidden", n, hidden)
	}
	if n := dropped[DropSwitchUnseen]; n > hidden {
		t.Errorf("%d switch-ins unseen, but only %d can have followed a hidden one", n, hidden)
	}
}

// A thread behind one of higher priority waits exactly as long as that runs, whether it
// was woken or preempted.
func TestSchedKnownWaits(t *testing.T) { bothMethods(t, knownWaits) }

func knownWaits(t *testing.T, s *Sched) {
	known := kerneltest.BuildProgram(t, "known")
	j := newJudge(t)
	before := observe(t, s, j)
	l := startWorkload(t, known, lastCPU(t), "wait", "23", "51")
	l.expect(t, "done")
	d := observe(t, s, j).since(before)
	ours := above(t, d.Latency, 50_000_000) - above(t, d.Latency, 100_000_000)
	stamps := above(t, d.wait, 50_000_000) - above(t, d.wait, 100_000_000)
	t.Logf("%d waits of 50 to 100 ms, by time stamps %d", ours, stamps)
	// A virtual machine that pauses makes some of them longer.
	if ours < min(23, stamps) || stamps < 15 {
		t.Errorf("%d waits of 50 to 100 ms, want the 23 of 51 ms", ours)
	}
	// Others on a busy machine wait as long, some of them right at a bound.
	if slack := max(1, stamps/20); ours > stamps+slack || ours+slack < stamps {
		t.Errorf("%d waits of 50 to 100 ms, by time stamps %d", ours, stamps)
	}
}

// A wakeup that preempts makes the switch skip the update of the run queue's clock. Where
// the switch comes late, because the kernel is not preemptible, the clock is late by as
// much, up to a tick: the waits must be right none the less.
func TestSchedLateClock(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	cpu := lastCPU(t)
	known := kerneltest.BuildProgram(t, "known")
	s, j := newSched(t), newJudge(t)
	l := startWorkload(t, known, cpu, "alarm", "307")
	before := observe(t, s, j)
	stop, stopped := make(chan struct{}), make(chan error)
	go func() { stopped <- occupy(j, cpu, 5*time.Millisecond, stop) }()
	l.run(t)
	close(stop)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	d := observe(t, s, j).since(before)
	edges, tolerance := []uint64{200_000, 500_000, 1_000_000, 2_000_000}, 0.02
	if kerneltest.InVM() {
		// Emulated, the programs take tens of us, and a CPU pauses for ms.
		edges, tolerance = edges[1:], 0.1
	}
	for _, edge := range edges {
		ours := above(t, d.Latency, edge) - above(t, d.Latency, 10_000_000)
		stamps := above(t, d.wait, edge) - above(t, d.wait, 10_000_000)
		t.Logf("%d waits of %v to 10 ms, by time stamps %d and up to %d", ours, time.Duration(edge), stamps, d.unknown)
		slack := tolerance*float64(stamps) + float64(d.unknown) + 1
		if stamps == 0 || math.Abs(float64(ours)-float64(stamps)) > slack {
			t.Errorf("%d waits of %v to 10 ms, by time stamps %d", ours, time.Duration(edge), stamps)
		}
	}
}

// occupy keeps a CPU in the kernel for d at a time, until stop is closed.
func occupy(j *judge, cpu string, d time.Duration, stop chan struct{}) error {
	// The thread is not unlocked: it ends with its affinity.
	runtime.LockOSThread()
	n, err := strconv.Atoi(cpu)
	if err != nil {
		return err
	}
	var set unix.CPUSet
	set.Set(n)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin to CPU %d: %w", n, err)
	}
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		if _, err := j.objs.JudgeOccupy.Run(&ebpf.RunOptions{Context: uint64(d)}); err != nil {
			return fmt.Errorf("occupy CPU %d: %w", n, err)
		}
	}
}

// A thread that waits already when the hooks come counts with its whole wait.
func TestSchedWaitingAtStart(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	known := kerneltest.BuildProgram(t, "known")
	// Loading takes long where the CPU is emulated: before the wait.
	s, err := openSched(SchedConfig{})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer s.Close()
	l := startWorkload(t, known, lastCPU(t), "wait", "1", "3001")
	time.Sleep(300 * time.Millisecond)
	if err := s.know(); err != nil {
		t.Fatal(err)
	}
	if err := s.attach(schedProgHfSchedSwitch); err != nil {
		t.Fatal(err)
	}
	l.expect(t, "done")
	c, containers, err := s.Read()
	if err != nil {
		t.Fatal(err)
	}
	// Who ran before the hooks came nobody knows.
	var unknown uint64
	for _, c := range containers {
		unknown += c.DelayNanos[CauseUnknown]
	}
	if unknown < 300_000_000 || unknown > 3_001_000_000 {
		t.Errorf("%v of the waits are of unknown cause, want at least 0.3 s", time.Duration(unknown))
	}
	if n := above(t, c.Latency, 2_000_000_000); n != 1 {
		t.Errorf("%d waits longer than 2 s, want the one of 3.001 s", n)
	}
	if c.RunDelayNanos < 3_001_000_000 {
		t.Errorf("run_delay grew by %d ns, want at least the wait of 3.001 s", c.RunDelayNanos)
	}
}

// Switch-ins between the walk over the threads and the first switch that the hook sees
// are neither losses, nor is what they waited counted later.
func TestSchedStartUnderLoad(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	waiters := kerneltest.BuildProgram(t, "waiters")
	j := newJudge(t)
	s, err := openSched(SchedConfig{})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer s.Close()
	startWorkload(t, waiters)
	if err := s.know(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	delay, hidden := j.read(t).delay, hiddenArrivals(t)
	if err := s.attach(schedProgHfSchedSwitch); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	o := observe(t, s, j)
	t.Logf("run_delay grew by %v, in the kernel's books by %v; %v dropped",
		time.Duration(o.RunDelayNanos), time.Duration(o.delay-delay), o.dropped)
	if n := o.dropped[DropSwitchUnseen]; n > o.hidden-hidden {
		t.Errorf("%d switch-ins unseen, but only %d were hidden", n, o.hidden-hidden)
	}
	if o.RunDelayNanos == 0 || o.RunDelayNanos > o.delay-delay {
		t.Errorf("run_delay grew by %v, in the kernel's books by %v", time.Duration(o.RunDelayNanos), time.Duration(o.delay-delay))
	}
}

// Waits add up under load, also where the kernel preempts threads on their way to sleep
// (preempt=full), of which sched_info knows nothing.
func TestSchedUnderLoad(t *testing.T) {
	bothMethods(t, func(t *testing.T, s *Sched) {
		j := newJudge(t)
		startWorkload(t, kerneltest.BuildProgram(t, "waiters"))
		before := observe(t, s, j)
		time.Sleep(4 * time.Second)
		d := observe(t, s, j).since(before)
		t.Logf("%d waits, %v; by time stamps %d, %v; %d of them the kernel does not book; %v dropped", d.Latency.Count(),
			time.Duration(d.Latency.Sum), d.wait.Count(), time.Duration(d.wait.Sum), d.unbooked, d.dropped)
		if n := d.wait.Count() + d.unknown; n < d.seen[0] || n > d.seen[1] {
			t.Errorf("%d to %d switch-ins recorded or dropped, by time stamps %d", d.seen[0], d.seen[1], n)
		}
		// Where a wakeup was hidden the stamps do not have the wait, the kernel's books do.
		least, most := d.wait.Sum, d.wait.Sum
		if d.unknown > 0 {
			most = max(most, d.delay)
		}
		t.Logf("waits of %v to %v, judges %v and %v: %+.2f and %+.2f %%", time.Duration(d.waited[0]), time.Duration(d.waited[1]),
			time.Duration(least), time.Duration(most), 100*(float64(d.waited[1])/float64(least)-1), 100*(float64(d.waited[0])/float64(most)-1))
		const tolerance = 0.03
		if float64(d.waited[1]) < (1-tolerance)*float64(least) || float64(d.waited[0]) > (1+tolerance)*float64(most) {
			t.Errorf("waits of %v to %v, judges %v and %v", time.Duration(d.waited[0]), time.Duration(d.waited[1]),
				time.Duration(least), time.Duration(most))
		}
	})
}

// A sleeper that is moved while its dequeue is delayed gets its sleep into run_delay, but
// not into the histogram.
func TestSchedDelayedDequeue(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	if !hasMember(kernel, "sched_entity", "sched_delayed") {
		t.Skip("this kernel does not delay dequeues (before 6.12)")
	}
	if cpu := lastCPU(t); cpu == "0" {
		t.Skip("needs two CPUs to move a thread")
	}
	known := kerneltest.BuildProgram(t, "known")
	s, j := newSched(t), newJudge(t)
	// The kernel delays the dequeue of those only that have run more than their share: on a
	// machine that is busy otherwise it can be none.
	const rounds = 5
	for round := 1; ; round++ {
		l := startWorkload(t, known, lastCPU(t), "delayed", "13")
		before := observe(t, s, j)
		l.run(t)
		d := observe(t, s, j).since(before)
		ours, stamps := above(t, d.Latency, 100_000_000), above(t, d.wait, 100_000_000)
		t.Logf("%v dropped, run_delay grew by %v, %d waits longer than 0.1 s, by time stamps %d",
			d.dropped, time.Duration(d.RunDelayNanos), ours, stamps)
		if ours > stamps+d.unknown {
			t.Errorf("%d waits longer than 0.1 s, by time stamps %d and up to %d", ours, stamps, d.unknown)
		}
		if d.dropped[DropDelayed] > 0 {
			return
		}
		if round == rounds {
			t.Fatalf("no wait of a delayed sleeper was dropped in %d rounds", rounds)
		}
	}
}

func TestSchedAccounting(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	l := startWorkload(t, kerneltest.BuildProgram(t, "waiters"))
	s := newSched(t)
	time.Sleep(2 * time.Second)
	start := time.Now()
	counted, kernel, err := s.Accounting()
	took := time.Since(start)
	if err != nil {
		t.Fatal(err)
	}
	ratio := float64(counted) / float64(kernel)
	t.Logf("counted %v, kernel %v: %.4f; took %v", time.Duration(counted), time.Duration(kernel), ratio, took)
	if kernel < uint64(time.Second) {
		t.Errorf("kernel booked %v for the threads of %d, want more", time.Duration(kernel), l.cmd.Process.Pid)
	}
	if ratio < 0.99 || ratio > 1.01 {
		t.Errorf("ratio %.4f, want 1 within 1 %%", ratio)
	}
	// The hook off, the kernel's books go on, and the ratio must tell.
	for _, l := range s.links {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(time.Second)
	if counted, kernel, err = s.Accounting(); err != nil {
		t.Fatal(err)
	}
	if ratio := float64(counted) / float64(kernel); ratio > 0.9 {
		t.Errorf("ratio %.4f with the hooks detached, want it to fall", ratio)
	}
}

// A CPU goes and comes back while threads switch on and on, and their waits are sampled: series
// exist from the first read and never fall, each switch-in is counted or a drop, waits are what
// the kernel booked, and the samples add up to them.
func TestSchedHotplug(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	cpu := lastCPU(t)
	if cpu == "0" {
		t.Skip("needs two CPUs to take one away")
	}
	hurry(t)
	rounds, sleeps := 5, 307
	if testing.Short() {
		rounds, sleeps = 2, 101
	}
	online := "/sys/devices/system/cpu/cpu" + cpu + "/online"
	known := kerneltest.BuildProgram(t, "known")
	s, w := newWaits(t, WaitSampling{Wait: time.Millisecond, PerSecond: 1000})
	j := newJudge(t)
	busy := newCgroup(t, "hotplug")
	load := startWorkload(t, kerneltest.BuildProgram(t, "threads"), "12", "3", "1000")
	t.Cleanup(func() { load.cmd.Process.Kill() }) // it does not end by itself
	busy.add(t, load)
	settled(t, load)
	var last SchedCells
	read := func() map[string]SchedContainer {
		t.Helper()
		c, containers, err := s.Read()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := len(c.Latency.Cells), histogram.Time().Cells(); got != want {
			t.Fatalf("%d cells, want %d", got, want)
		}
		for i, n := range last.Latency.Cells {
			if c.Latency.Cells[i] < n {
				t.Errorf("cell %d fell from %d to %d", i, n, c.Latency.Cells[i])
			}
		}
		if c.Latency.Sum < last.Latency.Sum || c.RunDelayNanos < last.RunDelayNanos {
			t.Errorf("sums fell from %d, %d to %d, %d", last.Latency.Sum, last.RunDelayNanos, c.Latency.Sum, c.RunDelayNanos)
		}
		last = c
		return byName(containers)
	}
	set := func(value string) {
		t.Helper()
		if err := os.WriteFile(online, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
		read()
	}
	t.Cleanup(func() { os.WriteFile(online, []byte("1"), 0) })
	// One that sleeps has each of its waits counted.
	sleeper := 0
	sleep := func(cpu string) {
		t.Helper()
		g := newCgroup(t, "hotplug"+strconv.Itoa(sleeper)).heavy(t)
		sleeper++
		l := startWorkload(t, known, cpu, "sleep", strconv.Itoa(sleeps))
		// The kernel's count is of a little less and of a little more than ours.
		arrivals := func() uint64 { return readSchedstat(t, l.cmd.Process.Pid, l.cmd.Process.Pid).arrivals }
		dropped, most := missed(t, s), arrivals()
		g.add(t, l)
		least := arrivals()
		l.run(t)
		least = arrivals() - least
		n := read()[g.name].Latency.Count()
		most = arrivals() - most
		dropped = missed(t, s) - dropped
		t.Logf("%d waits on CPU %s, the kernel has %d to %d; %d switch-ins dropped", n, cpu, least, most, dropped)
		if least < uint64(sleeps)/2 || n+dropped+2 < least || n > most+2 {
			t.Errorf("%d waits on CPU %s, the kernel has %d to %d; %d switch-ins dropped", n, cpu, least, most, dropped)
		}
	}
	// While the load stands still what is drained, counted and booked is the same.
	halt(t, load)
	w.drainFor(t, 0, func(*Sample) {})
	countedBefore, bookedBefore, containerBefore := counted(t, s, load), booked(t, load), read()[busy.name]
	before := observe(t, s, j)
	var waits sampled
	take := func(x *Sample) {
		if x.Profile == ProfileRunqueue && strconv.FormatUint(x.Cgroup, 10) == busy.name {
			waits.add(x)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	drained := make(chan error)
	go func() {
		for ctx.Err() == nil {
			if err := w.Drain(take); err != nil {
				drained <- err
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		drained <- nil
	}()
	if err := load.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	sleep(cpu)
	for range rounds {
		set("0")
		sleep("0")
		set("1")
		sleep(cpu)
	}
	halt(t, load)
	cancel()
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
	w.drainFor(t, 0, take)
	d := observe(t, s, j).since(before)
	counted, booked := counted(t, s, load)-countedBefore, booked(t, load)-bookedBefore
	grown := read()[busy.name].since(containerBefore)
	t.Logf("%d recorded, %v dropped, by time stamps %d; run_delay of the load %v, schedstat %v; samples dropped: %v",
		d.Latency.Count(), d.dropped, d.wait.Count()+d.unknown, time.Duration(counted), time.Duration(booked), waitStats(t, w).Dropped)
	if n := d.wait.Count() + d.unknown; n < d.seen[0] || n > d.seen[1] {
		t.Errorf("%d to %d switch-ins recorded or dropped, by time stamps %d", d.seen[0], d.seen[1], n)
	}
	if off := float64(counted)/float64(booked) - 1; booked == 0 || math.Abs(off) > 0.01 {
		t.Errorf("run_delay of the load %v, schedstat %v", time.Duration(counted), time.Duration(booked))
	}
	checkParts(t, grown)
	waits.check(t, "waits of the load", exactly(grown.Latency.Sum), 0.03)
}

// halt returns when all threads of a workload have stopped, which takes a turn on a CPU each.
func halt(t *testing.T, l *workload) {
	t.Helper()
	pid := l.cmd.Process.Pid
	if err := l.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	halted := func() bool {
		for _, tid := range threads(t, pid) {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stat", pid, tid))
			if err != nil {
				t.Fatal(err)
			}
			if _, state, ok := strings.Cut(string(b), ") "); !ok || state[0] != 'T' {
				return false
			}
		}
		return true
	}
	for end := time.Now().Add(20 * time.Second); !halted(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("threads of %s still run 20 s after they were stopped", l.cmd)
		}
	}
	time.Sleep(50 * time.Millisecond) // they are marked before they are switched out
}

// missed is how many switch-ins were dropped.
func missed(t *testing.T, s *Sched) (sum uint64) {
	t.Helper()
	stats, err := s.Stats()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range stats.Dropped {
		sum += n
	}
	return sum
}

func TestSchedCloseIsIdempotent(t *testing.T) {
	kerneltest.Require(t)
	s, err := NewSched(SchedConfig{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, _, err := s.Read(); err == nil {
		t.Error("read after close: no error")
	}
	if _, _, err := s.Accounting(); err == nil {
		t.Error("accounting after close: no error")
	}
}

func TestSchedMethod(t *testing.T) {
	member := func(names ...string) (m []btf.Member) {
		for i, name := range names {
			m = append(m, btf.Member{Name: name, Type: &btf.Int{Name: "u64", Size: 8}, Offset: btf.Bits(64 * i)})
		}
		return m
	}
	for _, tt := range []struct {
		name     string
		without  string
		members  []btf.Member
		require  error
		hasInfos bool
	}{
		{"all", "", nil, nil, true},
		{"no CONFIG_SCHED_INFO", "sched_info", nil, nil, false},
		{"no CONFIG_FAIR_GROUP_SCHED", "sched_entity", member("vruntime"), ErrNoGroupScheduling, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			structs := map[string][]btf.Member{
				"sched_info":   member("pcount", "run_delay", "last_queued"),
				"sched_entity": member("vruntime", "cfs_rq"),
				"cfs_rq":       member("load", "rq"),
			}
			if tt.without != "" {
				structs[tt.without] = tt.members
			}
			b, err := btf.NewBuilder(nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			for name, members := range structs {
				if _, err := b.Add(&btf.Struct{Name: name, Size: uint32(8 * len(members)), Members: members}); err != nil {
					t.Fatal(err)
				}
			}
			spec, err := b.Spec()
			if err != nil {
				t.Fatal(err)
			}
			if err := requireGroupScheduling(spec); !errors.Is(err, tt.require) {
				t.Errorf("%v, want %v", err, tt.require)
			}
			if got := hasSchedInfo(spec); got != tt.hasInfos {
				t.Errorf("sched_info found: %v, want %v", got, tt.hasInfos)
			}
		})
	}
}
