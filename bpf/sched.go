// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"strconv"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/histogram"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type hf_sched_slot -type hf_runner -type hf_blocked -type hf_preemptor -type hf_task -type hf_accounting -type hf_slot -type hf_container -type hf_free_slots -type hf_sched_cpu sched sched.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -I. -I/usr/include/x86_64-linux-gnu

// ErrNoGroupScheduling is returned by NewSched where the run queue can not be reached from
// a task: CONFIG_FAIR_GROUP_SCHED is off.
var ErrNoGroupScheduling = errors.New("kernel has no group scheduling")

// SchedConfig configures the scheduler hooks.
type SchedConfig struct {
	// CgroupV1 says that the cpu controller is on a v1 hierarchy (see CPUControllerV1).
	// The counters of the host are the same either way.
	CgroupV1 bool
	// ContainerName names the container of the cgroup with this kernfs id, soon after its
	// first thread was switched in. Cgroups of one name are counted together. By default
	// the id in decimal is the name.
	ContainerName func(cgroup uint64) string
	// Sampling is what Waits takes samples by.
	Sampling WaitSampling

	// For tests:
	stampWakeups bool // although there is sched_info
	slots        int  // so many, if not 0
	seatBits     int  // 1 << seatBits seats for threads, if not 0
}

// Sched measures the run-queue latency of every switch-in of every thread, why it waited,
// and how long it was blocked before; the idle tasks are not threads. A wait begins when the
// thread is queued, by a wakeup, its birth or a switch-out that leaves it runnable, and ends
// when it is switched in; moves to other CPUs are part of it, and so is throttling by a CPU
// quota. A thread that waits when the hooks are attached counts with its whole wait, one
// that sleeps with what is left of its sleep.
//
// When a wait began is read from the kernel's sched_info; without that (CONFIG_SCHED_INFO)
// wakeups are stamped, which takes a hook more, and a thread that waits when the hooks are
// attached does not count.
//
// A switch-in that is not recorded is a drop: of a thread that was born before NewSched in
// a PID namespace that the caller does not see (DropNoStorage), one that emitted no
// sched_switch (DropSwitchUnseen), and one after a sleep that the kernel took for a wait,
// because it delayed the dequeue and moved the sleeper (DropDelayed, Linux 6.12).
//
// All methods may be called from several goroutines.
type Sched struct {
	object
	iter     *link.Iter
	stamps   bool // wakeups are stamped, there is no sched_info
	cgroupV1 bool
	seatBits int
	sampling WaitSampling
	cancel   context.CancelFunc
	tended   sync.WaitGroup

	mu      sync.Mutex // for what follows, and accounts
	links   []link.Link
	books   *schedBooks
	tendErr error
}

// NewSched loads the programs, attaches them, and measures from then on. It needs
// CAP_PERFMON and CAP_BPF, and Linux 6.1 with BTF; ErrNoGroupScheduling says that the kernel
// is built without what it reads.
func NewSched(cfg SchedConfig) (*Sched, error) {
	s, err := openSched(cfg)
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
func openSched(cfg SchedConfig) (*Sched, error) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("load kernel BTF: %w", err)
	}
	if err := requireGroupScheduling(kernel); err != nil {
		return nil, err
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("count CPUs: %w", err)
	}
	spec, err := loadSched()
	if err != nil {
		return nil, fmt.Errorf("parse sched object: %w", err)
	}
	stamps := cfg.stampWakeups || !hasSchedInfo(kernel)
	index := histogram.NewIndex(histogram.Time())
	variables := cfg.Sampling.variables()
	variables[schedVarHfTimeFirst] = index.First
	variables[schedVarHfTimeCuts] = index.Cuts
	variables[schedVarHfCgroupV1] = cfg.CgroupV1
	variables[schedVarHfStampWakeups] = stamps
	seatBits := cmp.Or(cfg.seatBits, seatBits(cpus))
	variables[schedVarHfSeatBits] = uint32(seatBits)
	if err := setVariables(spec, variables); err != nil {
		return nil, err
	}
	spec.Maps[schedMapHfSchedCells].MaxEntries = uint32(cmp.Or(cfg.slots, schedSlots(cpus)))
	spec.Maps[schedMapHfSeats].MaxEntries = uint32(1<<seatBits + 2*cpus)
	spec.Maps[schedMapHfKicks].MaxEntries = uint32(cpus)
	// In the order of hf_ran's argument.
	programs := []string{schedProgHfSchedSwitch, schedProgHfTaskNewtask, schedProgHfTaskIter, schedProgHfSchedMove}
	reasons := []DropReason{DropNoStorage, DropSwitchUnseen, DropNegative, DropNoStart}
	if wakeups := []string{schedProgHfSchedWakeup, schedProgHfSchedWakenew}; stamps {
		programs = append(programs, wakeups...)
	} else {
		reasons = append(reasons, DropDelayed)
		for _, name := range wakeups {
			delete(spec.Programs, name)
		}
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, fmt.Errorf("load sched object: %w", err)
	}
	s := &Sched{stamps: stamps, cgroupV1: cfg.CgroupV1, seatBits: seatBits, sampling: cfg.Sampling, object: object{coll: coll, programs: programs, reasons: reasons}}
	name := cfg.ContainerName
	if name == nil {
		name = func(cgroup uint64) string { return strconv.FormatUint(cgroup, 10) }
	}
	s.books, err = newSchedBooks(coll, name)
	if err == nil {
		s.iter, err = link.AttachIter(link.IterOptions{Program: coll.Programs[schedProgHfTaskIter]})
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("prepare sched object: %w", err)
	}
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(context.Background())
	s.tended.Go(func() { s.tend(ctx) })
	return s, nil
}

// know makes all threads known: those that are born from here on by their birth, those of
// before by the walk.
func (s *Sched) know() error {
	programs := []string{schedProgHfCgroupRmdir, schedProgHfTaskNewtask, schedProgHfSchedMove}
	if s.stamps {
		programs = append(programs, schedProgHfSchedWakeup, schedProgHfSchedWakenew)
	}
	for _, name := range programs {
		if err := s.attach(name); err != nil {
			return err
		}
	}
	return s.walk()
}

// seatBits is the logarithm of how many threads can have a seat (task.bpf.h), of 128 bytes. More
// are counted as exactly, only slower.
func seatBits(cpus int) int { return min(max(12+bits.Len(uint(cpus-1)), 13), 16) }

// requireGroupScheduling returns ErrNoGroupScheduling where a field that the hook reads is
// absent.
func requireGroupScheduling(kernel *btf.Spec) error {
	if !hasMember(kernel, "sched_entity", "cfs_rq") || !hasMember(kernel, "cfs_rq", "rq") {
		return ErrNoGroupScheduling
	}
	return nil
}

func hasSchedInfo(kernel *btf.Spec) bool {
	return hasMember(kernel, "sched_info", "pcount") && hasMember(kernel, "sched_info", "run_delay") && hasMember(kernel, "sched_info", "last_queued")
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
	s.mu.Lock()
	s.links = append(s.links, l)
	s.mu.Unlock()
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

// Accounting compares the hook with the kernel's own books, over the threads now alive:
// counted is what the hook has added to RunDelayNanos for them, kernel what their
// sched_info grew by, both since the hook knows the thread and in ns. It walks all
// threads, and makes known those whose birth was missed. Without sched_info there are no
// such books, and both are 0.
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
func (s *Sched) Stats() (Stats, error) {
	stats, err := s.stats()
	if err != nil {
		return Stats{}, err
	}
	var cpus []schedHfSchedCpu
	if err := s.coll.Maps[schedMapHfSchedCpus].Lookup(uint32(0), &cpus); err != nil {
		return Stats{}, fmt.Errorf("read counters of switches: %w", err)
	}
	for i := range cpus {
		stats.Programs[0].Runs += cpus[i].Switches
	}
	return stats, nil
}

// Close detaches and frees everything. It is idempotent.
func (s *Sched) Close() error {
	if s.cancel != nil {
		s.cancel()
		s.tended.Wait()
	}
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
