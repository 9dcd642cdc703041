// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/hostflame/hostflame/internal/histogram"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type judge_cells -type judge_books -type judge_cgroup judge testdata/judge.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -I. -I/usr/include/x86_64-linux-gnu

// judge measures run-queue latency by time stamps of wakeups and switches.
type judge struct {
	objs judgeObjects
	iter *link.Iter
}

func newJudge(t *testing.T) *judge {
	t.Helper()
	j := openJudge(t)
	j.attach(t)
	return j
}

// openJudge returns a judge that only stamps switches yet: programs run in the order in which
// they were attached, and so the hooks of a Sched can come between that and its attach.
func openJudge(t *testing.T) *judge {
	t.Helper()
	spec, err := loadJudge()
	if err != nil {
		t.Fatal(err)
	}
	index := histogram.NewIndex(histogram.Time())
	if err := setVariables(spec, map[string]any{
		"hf_time_first": index.First, "hf_time_cuts": index.Cuts, "hf_cgroup_v1": CPUControllerV1(),
	}); err != nil {
		t.Fatal(err)
	}
	j := new(judge)
	if err := spec.LoadAndAssign(&j.objs, nil); err != nil {
		t.Fatalf("load the judge: %+v", err)
	}
	t.Cleanup(func() {
		if j.iter != nil {
			j.iter.Close()
		}
		j.objs.Close()
	})
	if j.iter, err = link.AttachIter(link.IterOptions{Program: j.objs.JudgeAlive}); err != nil {
		t.Fatal(err)
	}
	attach(t, j.objs.JudgeSwitching)
	return j
}

func (j *judge) attach(t *testing.T) {
	t.Helper()
	attach(t, j.objs.JudgeWaking, j.objs.JudgeWakeup, j.objs.JudgeBirth, j.objs.JudgeSwitch)
}

// verdict is what the judge counted, and the kernel's own books beside it.
type verdict struct {
	wait     histogram.Snapshot
	unknown  uint64 // switch-ins without a stamp
	unbooked uint64 // switch-ins that the kernel does not book
	delay    uint64 // run_delay of all threads, those that died since the judge came included
	arrivals uint64 // switch-ins that the kernel booked, likewise
	cgroups  map[string]groupVerdict
}

// groupVerdict is what the judge counted of one cgroup.
type groupVerdict struct {
	judgeJudgeCgroup
	delay uint64 // as verdict's
}

func (v groupVerdict) since(b groupVerdict) groupVerdict {
	v.Waits -= b.Waits
	v.WaitNs -= b.WaitNs
	v.Sleeps -= b.Sleeps
	v.SleepNs -= b.SleepNs
	v.LeastSleepNs -= b.LeastSleepNs
	v.MostSleepNs -= b.MostSleepNs
	v.delay -= b.delay
	return v
}

func (j *judge) read(t *testing.T) verdict {
	t.Helper()
	var cells []judgeJudgeCells
	if err := j.objs.Cells.Lookup(uint32(0), &cells); err != nil {
		t.Fatal(err)
	}
	v := verdict{wait: histogram.Snapshot{Cells: make([]uint64, histogram.Time().Cells())}}
	for _, c := range cells {
		v.wait.Add(histogram.Snapshot{Cells: c.Wait[:len(v.wait.Cells)], Sum: c.WaitNs})
		v.unknown += c.Unknown
		v.unbooked += c.Unbooked
	}
	var alive judgeJudgeBooks
	if err := j.objs.Alive.Put(uint32(0), &alive); err != nil {
		t.Fatal(err)
	}
	v.cgroups = map[string]groupVerdict{}
	var id, delay uint64
	var living []uint64
	for it := j.objs.Living.Iterate(); it.Next(&id, &delay); {
		living = append(living, id)
	}
	for _, id := range living {
		if err := j.objs.Living.Delete(id); err != nil {
			t.Fatal(err)
		}
	}
	r, err := j.iter.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Fatal(err)
	}
	if err := j.objs.Alive.Lookup(uint32(0), &alive); err != nil {
		t.Fatal(err)
	}
	var dead []judgeJudgeBooks
	if err := j.objs.Dead.Lookup(uint32(0), &dead); err != nil {
		t.Fatal(err)
	}
	var group judgeJudgeCgroup
	for groups := j.objs.Cgroups.Iterate(); groups.Next(&id, &group); {
		// A cgroup without threads has no entry.
		delay = 0
		if err := j.objs.Living.Lookup(id, &delay); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Fatal(err)
		}
		v.cgroups[strconv.FormatUint(id, 10)] = groupVerdict{group, group.DeadNs + delay}
	}
	for _, b := range append(dead, alive) {
		v.delay += b.RunDelayNs
		v.arrivals += b.Arrivals
	}
	return v
}

// observation is all that is counted, read at about one moment; growth is the difference
// of two.
type observation struct {
	SchedCells
	containers [2]map[string]SchedContainer // before and after the judge was read
	dropped    map[DropReason]uint64
	hidden     uint64    // switch-ins of process 1, see hiddenArrivals
	seen       [2]uint64 // switch-ins recorded or dropped, before and after the judge was read
	waited     [2]uint64 // sum of waits, likewise
	verdict
}

func observe(t *testing.T, s *Sched, j *judge) (o observation) {
	t.Helper()
	for i := range o.seen {
		c, containers, err := s.Read()
		if err != nil {
			t.Fatal(err)
		}
		stats, err := s.Stats()
		if err != nil {
			t.Fatal(err)
		}
		o.seen[i], o.waited[i], o.containers[i] = c.Latency.Count(), c.Latency.Sum, byName(containers)
		for reason, n := range stats.Dropped {
			if reason != DropSwitchUnseen {
				o.seen[i] += n
			}
		}
		if i == 0 {
			o.SchedCells, o.dropped = c, stats.Dropped
			o.verdict = j.read(t)
		}
	}
	o.hidden = hiddenArrivals(t) // the last, so that what was dropped is of no more
	return o
}

func byName(list []SchedContainer) map[string]SchedContainer {
	all := map[string]SchedContainer{}
	for _, c := range list {
		all[c.Name] = c
	}
	return all
}

func (o observation) since(p observation) observation {
	d := observation{
		SchedCells: SchedCells{
			Latency:       since(o.Latency, p.Latency),
			RunDelayNanos: o.RunDelayNanos - p.RunDelayNanos,
		},
		dropped: map[DropReason]uint64{},
		hidden:  o.hidden - p.hidden,
		seen:    [2]uint64{o.seen[0] - p.seen[1], o.seen[1] - p.seen[0]},
		waited:  [2]uint64{o.waited[0] - p.waited[1], o.waited[1] - p.waited[0]},
		verdict: verdict{
			wait:     since(o.wait, p.wait),
			unknown:  o.unknown - p.unknown,
			unbooked: o.unbooked - p.unbooked,
			delay:    o.delay - p.delay,
			arrivals: o.arrivals - p.arrivals,
		},
	}
	for reason, n := range o.dropped {
		d.dropped[reason] = n - p.dropped[reason]
	}
	return d
}

func since(a, b histogram.Snapshot) histogram.Snapshot {
	d := histogram.Snapshot{Cells: make([]uint64, len(a.Cells)), Sum: a.Sum - b.Sum}
	for i := range a.Cells {
		d.Cells[i] = a.Cells[i] - b.Cells[i]
	}
	return d
}

// above counts the values larger than ns, which must be a cut.
func above(t *testing.T, s histogram.Snapshot, ns uint64) (n uint64) {
	t.Helper()
	p := histogram.Time()
	cell := p.Cell(ns)
	if p.Cuts[cell] != ns {
		t.Fatalf("%d ns is not a cut", ns)
	}
	for _, c := range s.Cells[cell+1:] {
		n += c
	}
	return n
}

// schedstat is what the kernel booked for a thread.
type schedstat struct{ runDelay, arrivals uint64 }

func readSchedstat(t *testing.T, pid, tid int) (s schedstat) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/schedstat", pid, tid))
	if err != nil {
		t.Fatal(err)
	}
	var ran uint64
	if _, err := fmt.Sscan(string(b), &ran, &s.runDelay, &s.arrivals); err != nil {
		t.Fatalf("read schedstat of thread %d: %q: %v", tid, b, err)
	}
	return s
}

// hiddenArrivals is the number of switch-ins of process 1. Some sandboxes hide that from
// BPF: no iterator shows its threads, and no program runs in them. The hook then counts
// their switch-ins as drops, and so each switch-in of another thread that follows one.
func hiddenArrivals(t *testing.T) (n uint64) {
	t.Helper()
	for _, tid := range threads(t, 1) {
		n += readSchedstat(t, 1, tid).arrivals
	}
	return n
}

func threads(t *testing.T, pid int) (tids []int) {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		var tid int
		if _, err := fmt.Sscan(e.Name(), &tid); err != nil {
			t.Fatal(err)
		}
		tids = append(tids, tid)
	}
	return tids
}

// workload is a running program of testdata. It ends when its standard input closes.
type workload struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// startWorkload starts a program and waits until it says that it is ready.
func startWorkload(t *testing.T, bin string, args ...string) *workload {
	t.Helper()
	l := &workload{cmd: exec.Command(bin, args...)}
	l.cmd.Stderr = os.Stderr
	var err error
	if l.in, err = l.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	l.out = bufio.NewReader(out)
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.in.Close()
		l.cmd.Wait()
	})
	l.expect(t, "ready")
	return l
}

func (l *workload) expect(t *testing.T, what string) {
	t.Helper()
	if line, err := l.out.ReadString('\n'); err != nil || line != what+"\n" {
		t.Fatalf("%s said %q, %v, want %q", l.cmd.Path, line, err, what)
	}
}

// run lets a program do what it is for, and returns when it is done.
func (l *workload) run(t *testing.T) {
	t.Helper()
	if _, err := io.WriteString(l.in, "\n"); err != nil {
		t.Fatal(err)
	}
	l.expect(t, "done")
}
