// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/histogram"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type hf_runqueue -type hf_task -type hf_accounting -type hf_slot -type hf_container -type hf_free_slots sched sched.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -I. -I/usr/include/x86_64-linux-gnu

// ErrNoSchedInfo is returned by NewSched where the kernel does not keep what run-queue
// latency is read from: CONFIG_SCHED_INFO or CONFIG_FAIR_GROUP_SCHED is off.
var ErrNoSchedInfo = errors.New("kernel keeps no sched_info")

// SchedConfig configures the scheduler hooks.
type SchedConfig struct {
	// CgroupV1 says that the cpu controller is on a v1 hierarchy (see CPUControllerV1).
	// The counters of the host are the same either way.
	CgroupV1 bool
}

// Sched measures the run-queue latency of every switch-in of every thread; the idle
// tasks are not threads. A wait begins when the thread is queued, by a wakeup, its birth
// or a switch-out that leaves it runnable, and ends when it is switched in; moves to
// other CPUs are part of it, and so is throttling by a CPU quota. A thread that waits
// when the hooks are attached counts with its whole wait.
//
// A switch-in that is not recorded is a drop: of a thread that was born before NewSched in
// a PID namespace that the caller does not see (DropNoStorage), one that emitted no
// sched_switch (DropSwitchUnseen), and one after a sleep that the kernel took for a wait,
// because it delayed the dequeue and moved the sleeper (DropDelayed, Linux 6.12).
//
// All methods may be called from several goroutines.
type Sched struct {
	object
	iter *link.Iter

	mu    sync.Mutex // for accounts and links
	links []link.Link
}

// SchedCells are the counters of the scheduler hooks, cumulative since NewSched.
type SchedCells struct {
	Latency histogram.Snapshot // wait of each switch-in in ns, partition histogram.Time
	// RunDelayNanos is the growth of the kernel's own run_delay, as the hook saw it. It holds
	// what DropDelayed keeps out of Latency, and each wait as late clocks show it.
	RunDelayNanos uint64
}

// NewSched loads the programs, attaches them, and measures from then on. It needs
// CAP_PERFMON and CAP_BPF, and Linux 6.1 with BTF; ErrNoSchedInfo says that the kernel is
// built without what it reads.
func NewSched(SchedConfig) (*Sched, error) {
	s, err := openSched()
	if err != nil {
		return nil, err
	}
	// The switches come last: then all threads are known.
	if err = s.know(); err == nil {
		err = s.attach(schedProgHfSchedSwitch)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// openSched loads the programs.
func openSched() (*Sched, error) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("load kernel BTF: %w", err)
	}
	if err := requireSchedInfo(kernel); err != nil {
		return nil, err
	}
	spec, err := loadSched()
	if err != nil {
		return nil, fmt.Errorf("parse sched object: %w", err)
	}
	index := histogram.NewIndex(histogram.Time())
	if err := setVariables(spec, map[string]any{
		schedVarHfTimeFirst: index.First,
		schedVarHfTimeCuts:  index.Cuts,
	}); err != nil {
		return nil, err
	}
	// In the order of hf_ran's argument.
	programs := []string{schedProgHfSchedSwitch, schedProgHfTaskNewtask, schedProgHfTaskIter, schedProgHfSchedMove}
	if !hasMember(kernel, "sched_entity", "sched_delayed") {
		delete(spec.Programs, schedProgHfSchedMove)
		programs = programs[:len(programs)-1]
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, fmt.Errorf("load sched object: %w", err)
	}
	s := &Sched{object: object{
		coll:     coll,
		programs: programs,
		reasons:  []DropReason{DropNoStorage, DropSwitchUnseen, DropNegative, DropNoStart, DropDelayed},
	}}
	if s.iter, err = link.AttachIter(link.IterOptions{Program: coll.Programs[schedProgHfTaskIter]}); err != nil {
		s.Close()
		return nil, fmt.Errorf("attach %s: %w", schedProgHfTaskIter, err)
	}
	return s, nil
}

// know makes all threads known: those that are born from here on by their birth, those of
// before by the walk.
func (s *Sched) know() error {
	if err := s.attach(schedProgHfTaskNewtask); err != nil {
		return err
	}
	if s.coll.Programs[schedProgHfSchedMove] != nil {
		if err := s.attach(schedProgHfSchedMove); err != nil {
			return err
		}
	}
	return s.walk()
}

// requireSchedInfo returns ErrNoSchedInfo where a field that the hook reads is absent.
func requireSchedInfo(kernel *btf.Spec) error {
	for _, f := range []struct{ typ, member string }{
		{"sched_info", "pcount"},
		{"sched_info", "run_delay"},
		{"sched_info", "last_queued"},
		{"sched_entity", "cfs_rq"},
		{"cfs_rq", "rq"},
	} {
		if !hasMember(kernel, f.typ, f.member) {
			return fmt.Errorf("%w: struct %s has no %s", ErrNoSchedInfo, f.typ, f.member)
		}
	}
	return nil
}

func hasMember(spec *btf.Spec, typ, member string) bool {
	var s *btf.Struct
	if spec.TypeByName(typ, &s) != nil {
		return false
	}
	for _, m := range s.Members {
		if m.Name == member {
			return true
		}
	}
	return false
}

func (s *Sched) attach(program string) error {
	l, err := link.AttachTracing(link.TracingOptions{Program: s.coll.Programs[program]})
	if err != nil {
		return fmt.Errorf("attach %s: %w", program, err)
	}
	s.links = append(s.links, l)
	return nil
}

// walk runs the task iterator over all threads.
func (s *Sched) walk() error {
	r, err := s.iter.Open()
	if err != nil {
		return fmt.Errorf("walk tasks: %w", err)
	}
	defer r.Close()
	for {
		_, err := io.Copy(io.Discard, r)
		if err == nil {
			return nil
		}
		// A read ends so after a million threads (MAX_ITER_OBJECTS); the next goes on.
		if !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("walk tasks: %w", err)
		}
	}
}

// Read returns the counters, summed over the possible CPUs: they keep what was measured
// on a CPU that has left. The cells are the caller's to keep.
func (s *Sched) Read() (SchedCells, error) {
	var perCPU []schedHfRunqueue
	if err := s.coll.Maps[schedMapHfRunqueues].Lookup(uint32(0), &perCPU); err != nil {
		return SchedCells{}, fmt.Errorf("read run-queue latency: %w", err)
	}
	c := SchedCells{Latency: histogram.Snapshot{Cells: make([]uint64, histogram.Time().Cells())}}
	for i := range perCPU {
		p := &perCPU[i]
		c.RunDelayNanos += p.RunDelayNs
		c.Latency.Sum += p.Wait.SumNs
		for cell := range c.Latency.Cells {
			c.Latency.Cells[cell] += p.Wait.Cells[cell]
		}
	}
	return c, nil
}

// Accounting compares the hook with the kernel's own books, over the threads now alive:
// counted is what the hook has added to RunDelayNanos for them, kernel what their
// sched_info grew by, both since the hook knows the thread and in ns. It walks all
// threads, and makes known those whose birth was missed.
func (s *Sched) Accounting() (counted, kernel uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.coll.Maps[schedMapHfAccounts]
	var sum schedHfAccounting
	if err := m.Put(uint32(0), &sum); err != nil {
		return 0, 0, fmt.Errorf("reset run-queue accounts: %w", err)
	}
	if err := s.walk(); err != nil {
		return 0, 0, err
	}
	if err := m.Lookup(uint32(0), &sum); err != nil {
		return 0, 0, fmt.Errorf("read run-queue accounts: %w", err)
	}
	return sum.CountedNs, sum.KernelNs, nil
}

// Stats returns the counters of the object.
func (s *Sched) Stats() (Stats, error) { return s.stats() }

// Close detaches and frees everything. It is idempotent.
func (s *Sched) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, l := range s.links {
		errs = append(errs, l.Close())
	}
	s.links = nil
	if s.iter != nil {
		errs = append(errs, s.iter.Close())
		s.iter = nil
	}
	s.coll.Close()
	return errors.Join(errs...)
}
