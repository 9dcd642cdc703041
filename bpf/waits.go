// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type hf_waiting -type hf_counters waits waits.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -I. -I/usr/include/x86_64-linux-gnu

// State is what a thread was blocked for, as far as the kernel tells without its stack.
type State uint8

// The states.
const (
	StateOther     = State(cpuHfStateHF_STATE_OTHER)
	StateBlockIO   = State(cpuHfStateHF_STATE_BLOCK_IO)  // the kernel's iowait
	StateLock      = State(cpuHfStateHF_STATE_LOCK)      // in futex, for what looks like a lock
	StateCondition = State(cpuHfStateHF_STATE_CONDITION) // in futex, for something else
)

// WaitSampling says how densely waits and blocked time are sampled: a point in every mean
// time on average, at random, and the waits that points fall into are taken.
type WaitSampling struct {
	Wait    time.Duration // mean of run-queue waits; DefaultWaitMean if 0, none are taken if negative
	Blocked time.Duration // least mean of blocked time; DefaultBlockedMean if 0, none is taken if negative
	// PerSecond bounds the samples of each of the two on one CPU, on average: the means grow
	// until that holds. DefaultWalks if 0.
	PerSecond int
}

// The defaults of WaitSampling.
const (
	DefaultWaitMean    = 10 * time.Millisecond
	DefaultBlockedMean = time.Millisecond
	DefaultWalks       = 100
)

// Off tells whether nothing is sampled.
func (w WaitSampling) Off() bool { return w.Wait < 0 && w.Blocked < 0 }

func (w WaitSampling) wait() uint64    { return uint64(max(cmp.Or(w.Wait, DefaultWaitMean), 0)) }
func (w WaitSampling) blocked() uint64 { return uint64(max(cmp.Or(w.Blocked, DefaultBlockedMean), 0)) }

// variables are the load-time constants of draw.bpf.h.
func (w WaitSampling) variables() map[string]any {
	var fractions [512]uint32
	for i := range 257 {
		fractions[i] = uint32(math.Round(math.Log2(1+float64(i)/256) * (1 << 20)))
	}
	return map[string]any{
		waitsVarHfWaitMeanNs:    w.wait(),
		waitsVarHfBlockedMeanNs: w.blocked(),
		waitsVarHfDrawPerSecond: uint64(cmp.Or(w.PerSecond, DefaultWalks)),
		waitsVarHfLog2Fraction:  fractions,
	}
}

// Waits takes the stacks of threads that waited for a CPU (ProfileRunqueue) or were blocked
// (ProfileOffCPU), and with that of one that waited that of the thread that it waited for
// (ProfileCulprit), as it leaves the CPU to it: where that is of whom it waited the most for.
// Its value is what of the wait it ran, and its user stack has 64 frames at most. The weights
// of the samples of either times what was observed add up to the time that Sched counts,
// without bias. Drain and Wait are for one goroutine each.
type Waits struct {
	object
	rings *rings
	kicks kicks // none where a hook in schedule() is used
	iter  *link.Iter
	tail  *ebpf.Map // of s

	mu    sync.Mutex
	links []link.Link
}

// NewWaits takes the samples that s draws, by the unwind tables given, until Close; s and
// tables are to outlive it. It needs a way into the thread that was switched in: the tracepoint
// irq_work_entry (x86), sched_exit_tp (Linux 6.16), or a kprobe.
func NewWaits(s *Sched, tables *Tables) (*Waits, error) {
	hooks, err := waitHooks()
	if err != nil {
		return nil, err
	}
	for {
		w, err := openWaits(s, tables, hooks[0])
		if hooks = hooks[1:]; !errors.Is(err, errNotKicked) || len(hooks) == 0 {
			return w, err
		}
	}
}

// errNotKicked says that the CPU does not interrupt itself where that is traced.
var errNotKicked = errors.New("an interrupt that was asked for did not come")

func openWaits(s *Sched, tables *Tables, hook string) (_ *Waits, err error) {
	spec, err := loadWaits()
	if err != nil {
		return nil, fmt.Errorf("parse waits object: %w", err)
	}
	size := ringSize(3 * cmp.Or(s.sampling.PerSecond, DefaultWalks))
	variables := s.sampling.variables()
	variables[waitsVarHfCgroupV1] = s.cgroupV1
	variables[waitsVarHfSeatBits] = uint32(s.seatBits)
	variables[waitsVarHfRingHalf] = uint64(size / 2)
	variables[waitsVarHfMaxFrames] = maxFrames()
	variables[waitsVarHfAddressMask] = AddressMask()
	for _, name := range []string{waitsProgHfWaitKick, waitsProgHfWaitExit, waitsProgHfWaitFinish} {
		if name != hook {
			delete(spec.Programs, name)
		}
	}
	symbol := ""
	switch hook {
	case waitsProgHfWaitExit:
		variables[waitsVarHfSkipFrames] = uint32(2) // this program, and what calls the programs of tracepoints
	case waitsProgHfWaitFinish:
		if symbol, err = switchEnd(); err != nil {
			return nil, err
		}
	}
	if err := setVariables(spec, variables); err != nil {
		return nil, err
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("count CPUs: %w", err)
	}
	spec.Maps[waitsMapHfRings].MaxEntries = uint32(cpus)
	spec.Maps[waitsMapHfSeats].MaxEntries = s.coll.Maps[schedMapHfSeats].MaxEntries()
	spec.Maps[waitsMapHfKicks].MaxEntries = uint32(cpus)
	replace := tables.replace(spec)
	replace[waitsMapHfSeats] = s.coll.Maps[schedMapHfSeats]
	replace[".data.origin"] = s.coll.Maps[".data.origin"]
	replace[waitsMapHfTasks] = s.coll.Maps[schedMapHfTasks]
	replace[waitsMapHfWaitings] = s.coll.Maps[schedMapHfWaitings]
	replace[waitsMapHfKicks] = s.coll.Maps[schedMapHfKicks]
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replace})
	if err != nil {
		return nil, fmt.Errorf("load waits object: %w", err)
	}
	w := &Waits{tail: s.coll.Maps[schedMapHfSchedTail], object: object{
		coll:     coll,
		programs: []string{hook, waitsProgHfBlockedIter, waitsProgHfWaitCulprit},
		reasons:  []DropReason{DropRingFull, DropNoRing, DropSwitchUnseen},
	}}
	defer func() {
		if err != nil {
			// s goes on drawing.
			w.kicks.uninstall(s.coll.Maps[schedMapHfKicks])
			w.Close()
		}
	}()
	if w.rings, err = newRings(coll.Maps[waitsMapHfRings], size); err != nil {
		return nil, err
	}
	if w.iter, err = link.AttachIter(link.IterOptions{Program: coll.Programs[waitsProgHfBlockedIter]}); err != nil {
		return nil, fmt.Errorf("prepare the walk over threads: %w", err)
	}
	// Without that address, which takes CAP_SYSLOG, stacks begin with how the hook is called.
	_, _ = coll.Programs[waitsProgHfFindSchedule].Run(&ebpf.RunOptions{})
	// What was drawn before can not be taken.
	forget := func() error { return coll.Maps[waitsMapHfWaitings].Put(uint32(0), make([]waitsHfWaiting, cpus)) }
	if err = forget(); err != nil {
		return nil, fmt.Errorf("begin to take drawn waits: %w", err)
	}
	var l link.Link
	if hook == waitsProgHfWaitFinish {
		l, err = link.Kprobe(symbol, coll.Programs[hook], nil)
	} else {
		l, err = link.AttachTracing(link.TracingOptions{Program: coll.Programs[hook]})
	}
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", hook, err)
	}
	w.links = append(w.links, l)
	if hook == waitsProgHfWaitKick {
		if w.kicks, err = newKicks(cpus, cmp.Or(s.sampling.PerSecond, DefaultWalks)); err != nil {
			return nil, err
		}
		if err = w.kicks.install(s.coll.Maps[schedMapHfKicks]); err != nil {
			return nil, fmt.Errorf("install kicks: %w", err)
		}
		if err = w.tryKick(); err != nil {
			return nil, err
		}
	}
	// Nor is it a loss.
	if err = forget(); err != nil {
		return nil, fmt.Errorf("begin to count drawn waits: %w", err)
	}
	if err = coll.Maps[waitsMapHfCount].Put(uint32(0), make([]waitsHfCounters, cpus)); err != nil {
		return nil, fmt.Errorf("begin to count: %w", err)
	}
	if err = w.tail.Put(uint32(0), coll.Programs[waitsProgHfWaitCulprit]); err != nil {
		return nil, fmt.Errorf("attach to the end of hf_sched_switch: %w", err)
	}
	return w, nil
}

// tryKick returns errNotKicked where hf_wait_kick does not run when it is asked for.
func (w *Waits) tryKick() error {
	for range 10 {
		if _, err := w.coll.Programs[waitsProgHfTryKick].Run(&ebpf.RunOptions{}); err != nil {
			return fmt.Errorf("try the interrupt that takes stacks of waits: %w", err)
		}
		runs, _, err := w.counted()
		if err != nil {
			return err
		}
		if runs[0] > 0 {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return errNotKicked
}

// waitHooks are the programs that can sample the threads that were drawn, the best first. An
// interrupt for each of them costs less than a hook in every switch. With PREEMPT_RT a thread
// does its work, and until it has, there is no other.
func waitHooks() ([]string, error) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("load kernel BTF: %w", err)
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("ask for the kernel's version: %w", err)
	}
	hooks := []string{waitsProgHfWaitFinish}
	if exit, err := hasTracepoint(kernel, "sched_exit_tp"); err != nil {
		return nil, err
	} else if exit {
		hooks[0] = waitsProgHfWaitExit
	}
	if kick, err := hasTracepoint(kernel, "irq_work_entry"); err != nil {
		return nil, err
	} else if kick && !strings.Contains(unix.ByteSliceToString(uts.Version[:]), "PREEMPT_RT") {
		hooks = append([]string{waitsProgHfWaitKick}, hooks...)
	}
	return hooks, nil
}

// switchEnd is the kernel's name of finish_task_switch: compilers append to it.
func switchEnd() (string, error) {
	b, err := os.ReadFile("/proc/kallsyms")
	if err != nil {
		return "", fmt.Errorf("look for finish_task_switch: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && (f[2] == "finish_task_switch" || strings.HasPrefix(f[2], "finish_task_switch.")) {
			return f[2], nil
		}
	}
	return "", errors.New("look for finish_task_switch: no such kernel function")
}

// Drain hands every sample that the kernel has taken to fn. The sample is valid during
// the call only: its memory is used again.
func (w *Waits) Drain(fn func(*Sample)) error {
	w.kicks.empty()
	return w.rings.drain(fn)
}

// Wait returns when a ring is half full, after d, or, with its error, when ctx ends.
func (w *Waits) Wait(ctx context.Context, d time.Duration) error { return w.rings.wait(ctx, d) }

// Observe samples threads that are blocked now from the time since they were, or since the
// last Observe: what ends later counts from here on.
func (w *Waits) Observe() error {
	r, err := w.iter.Open()
	if err != nil {
		return fmt.Errorf("walk blocked threads: %w", err)
	}
	defer r.Close()
	for {
		_, err := io.Copy(io.Discard, r)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("walk blocked threads: %w", err)
		}
	}
}

// Stats returns the counters of the object.
func (w *Waits) Stats() (Stats, error) { return w.stats() }

// Detach stops sampling. What is in the rings can still be drained.
func (w *Waits) Detach() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
	for _, l := range w.links {
		errs = append(errs, l.Close())
	}
	w.links = nil
	if err := w.tail.Delete(uint32(0)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		errs = append(errs, fmt.Errorf("detach from the end of hf_sched_switch: %w", err))
	}
	return errors.Join(errs...)
}

// Close detaches and frees everything. It is idempotent.
func (w *Waits) Close() error {
	errs := []error{w.Detach()}
	if w.iter != nil {
		errs = append(errs, w.iter.Close())
		w.iter = nil
	}
	if w.rings != nil {
		errs = append(errs, w.rings.close())
		w.rings = nil
	}
	errs = append(errs, w.kicks.close())
	w.kicks = nil
	w.coll.Close()
	return errors.Join(errs...)
}
