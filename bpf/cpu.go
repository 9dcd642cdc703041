// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Event is the perf event that takes CPU samples.
type Event string

// The events. EventCPUClock is a timer and works everywhere; what runs with interrupts
// off shows at the instruction that turns them on again. EventCycles is an NMI and needs
// a PMU.
const (
	EventCPUClock = Event("cpu-clock")
	EventCycles   = Event("cycles")
)

// CPUConfig configures on-CPU sampling.
type CPUConfig struct {
	Event     Event // EventCPUClock if empty
	Frequency int   // Hz a CPU, 1 to 10,000
	CgroupV1  bool  // the cpu controller is on a v1 hierarchy (see CPUControllerV1)
	// Tables are the unwind tables to use, which other objects may use as well; they must not
	// end before the CPU. nil: tables of its own, of at most TableMemory bytes,
	// DefaultTableMemory if 0.
	Tables      *Tables
	TableMemory uint64
	// CopyStacks makes every user stack come with Stop, the leaf then, and Stack. For tests.
	CopyStacks bool
}

// CPU samples on-CPU stacks: a perf event on each online CPU, the idle task excluded.
// A sample's weight is the number of periods of the event that it stands for, one unless the
// tick was late by whole periods; time that the hypervisor took is nobody's CPU time. So the
// weights, delivered and dropped, times the period add up to the CPU time that the kernel
// accounts to tasks. Drain and Wait are for one goroutine each; Follow, Stats and Close may be called from others.
type CPU struct {
	object
	rings  *rings
	prog   *ebpf.Program
	attr   unix.PerfEventAttr
	tables *Tables
	own    *Tables // the same, where they end with the CPU

	mu     sync.Mutex
	links  map[int]*perfLink // by CPU
	closed bool
}

type perfLink struct {
	event *os.File
	link  *link.RawLink
}

func (l *perfLink) close() error {
	return errors.Join(l.link.Close(), l.event.Close())
}

// NewCPU loads the program, attaches it to all online CPUs, and samples from then on.
// It needs CAP_PERFMON and CAP_BPF, and Linux 5.15 (perf event links).
func NewCPU(cfg CPUConfig) (_ *CPU, err error) {
	if cfg.Frequency < 1 || cfg.Frequency > 10_000 {
		return nil, fmt.Errorf("sample CPU: frequency %d Hz is not between 1 and 10000", cfg.Frequency)
	}
	period := uint64(time.Second) / uint64(cfg.Frequency)
	attr := unix.PerfEventAttr{
		Size: uint32(unix.PERF_ATTR_SIZE_VER5),
		Bits: unix.PerfBitExcludeIdle,
	}
	switch cfg.Event {
	case EventCPUClock, "":
		attr.Type, attr.Config = unix.PERF_TYPE_SOFTWARE, unix.PERF_COUNT_SW_CPU_CLOCK
		// A fixed period: the frequency mode adapts the period and skews the count.
		attr.Sample = period
	case EventCycles:
		attr.Type, attr.Config = unix.PERF_TYPE_HARDWARE, unix.PERF_COUNT_HW_CPU_CYCLES
		attr.Sample = uint64(cfg.Frequency)
		attr.Bits |= unix.PerfBitFreq
	default:
		return nil, fmt.Errorf("sample CPU: unknown event %q, want %s or %s", cfg.Event, EventCPUClock, EventCycles)
	}
	spec, err := loadCpu()
	if err != nil {
		return nil, fmt.Errorf("parse cpu object: %w", err)
	}
	size := ringSize(cfg.Frequency)
	if err := setVariables(spec, map[string]any{
		cpuVarHfPeriodNs:    period,
		cpuVarHfTimer:       attr.Type == unix.PERF_TYPE_SOFTWARE,
		cpuVarHfCgroupV1:    cfg.CgroupV1,
		cpuVarHfRingHalf:    uint64(size / 2),
		cpuVarHfMaxFrames:   maxFrames(),
		cpuVarHfCopyStacks:  cfg.CopyStacks,
		cpuVarHfAddressMask: AddressMask(),
	}); err != nil {
		return nil, err
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("count CPUs: %w", err)
	}
	spec.Maps[cpuMapHfRings].MaxEntries = uint32(cpus)
	tables, own := cfg.Tables, (*Tables)(nil)
	if tables == nil {
		if own, err = NewTables(cmp.Or(cfg.TableMemory, DefaultTableMemory)); err != nil {
			return nil, err
		}
		tables = own
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: tables.replace(spec)})
	if err != nil {
		own.Close()
		return nil, fmt.Errorf("load cpu object: %w", err)
	}
	c := &CPU{
		object: object{
			coll:     coll,
			programs: []string{cpuProgHfCpu},
			reasons:  []DropReason{DropRingFull, DropNoRing},
		},
		prog:   coll.Programs[cpuProgHfCpu],
		attr:   attr,
		tables: tables,
		own:    own,
		links:  map[int]*perfLink{},
	}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	if c.rings, err = newRings(coll.Maps[cpuMapHfRings], size); err != nil {
		return nil, err
	}
	if err := c.sync(); err != nil {
		return nil, err
	}
	return c, nil
}

// sync attaches to the CPUs that came online and lets go of those that went offline.
func (c *CPU) sync() error {
	online, err := OnlineCPUs()
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return os.ErrClosed
	}
	var errs []error
	want := make(map[int]bool, len(online))
	for _, cpu := range online {
		want[cpu] = true
		if c.links[cpu] != nil {
			continue
		}
		l, err := c.attach(cpu)
		// The CPU can leave between the list and the open.
		if err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, err)
		}
		if err == nil {
			c.links[cpu] = l
		}
	}
	for cpu, l := range c.links {
		if !want[cpu] {
			errs = append(errs, l.close())
			delete(c.links, cpu)
		}
	}
	return errors.Join(errs...)
}

// forget closes the event of a CPU, or of all of them for -1; sync opens it again.
func (c *CPU) forget(cpu int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n, l := range c.links {
		if n == cpu || cpu == -1 {
			l.close()
			delete(c.links, n)
		}
	}
}

func (c *CPU) attach(cpu int) (*perfLink, error) {
	attr := c.attr
	fd, err := unix.PerfEventOpen(&attr, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open perf event on CPU %d: %w", cpu, err)
	}
	event := os.NewFile(uintptr(fd), "perf event")
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: fd, Program: c.prog, Attach: ebpf.AttachPerfEvent})
	if err != nil {
		event.Close()
		return nil, fmt.Errorf("attach to perf event of CPU %d: %w", cpu, err)
	}
	return &perfLink{event: event, link: l}, nil
}

// Drain hands every sample that the kernel has taken to fn. The sample is valid during
// the call only: its memory is used again.
func (c *CPU) Drain(fn func(*Sample)) error { return c.rings.drain(fn) }

// Wait returns when a ring is half full, after d, or, with its error, when ctx ends.
func (c *CPU) Wait(ctx context.Context, d time.Duration) error { return c.rings.wait(ctx, d) }

// Stats returns the counters of the object.
func (c *CPU) Stats() (Stats, error) {
	s, err := c.stats()
	if err != nil {
		return s, err
	}
	var ring uint64
	for _, m := range c.rings.inner {
		if info, err := m.Info(); err == nil {
			b, _ := info.Memlock()
			ring += b
		}
	}
	s.Maps = append(s.Maps, MapStats{Name: "hf_ring", Memory: ring}, MapStats{Name: "hf_chunk", Memory: c.tables.chunkMemory()})
	return s, nil
}

// Detach stops sampling. What is in the rings can still be drained.
func (c *CPU) Detach() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	var errs []error
	for cpu, l := range c.links {
		errs = append(errs, l.close())
		delete(c.links, cpu)
	}
	return errors.Join(errs...)
}

// Close detaches and frees everything. It is idempotent.
func (c *CPU) Close() error {
	errs := []error{c.Detach()}
	if c.rings != nil {
		errs = append(errs, c.rings.close())
		c.rings = nil
	}
	c.coll.Close()
	return errors.Join(append(errs, c.own.Close())...)
}

// Tables are the unwind tables by which the stacks are walked, empty at first. Unless they
// came with the configuration they end with the CPU.
func (c *CPU) Tables() *Tables { return c.tables }

// maxFrames is where the kernel's stack walkers stop.
func maxFrames() uint32 {
	b, err := os.ReadFile("/proc/sys/kernel/perf_event_max_stack")
	if err != nil {
		return MaxKernelFrames
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32)
	if err != nil || n < 1 || n > MaxKernelFrames {
		return MaxKernelFrames
	}
	return uint32(n)
}

// AddressMask has the bits that user addresses use; pointer authentication takes those
// above. The stack lies at the end of the address space.
func AddressMask() uint64 {
	n := 48
	maps, _ := os.ReadFile("/proc/self/maps") // without it, what is usual
	for line := range strings.Lines(string(maps)) {
		area, _, _ := strings.Cut(line, " ")
		_, end, _ := strings.Cut(area, "-")
		if limit, err := strconv.ParseUint(end, 16, 64); err == nil && strings.HasSuffix(line, "[stack]\n") {
			n = bits.Len64(limit - 1)
		}
	}
	return 1<<n - 1
}

// setVariables sets load-time constants. A name that the object lacks is a defect here.
func setVariables(spec *ebpf.CollectionSpec, values map[string]any) error {
	for name, value := range values {
		v := spec.Variables[name]
		if v == nil {
			return fmt.Errorf("set %s: no such variable in the object", name)
		}
		if err := v.Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// CPUControllerV1 tells whether the cpu controller is on a cgroup v1 hierarchy (v1 and
// hybrid hosts): then scheduling takes its containers from there.
func CPUControllerV1() bool { return ControllerV1("cpu") }

// ControllerV1 tells whether a cgroup controller is on a v1 hierarchy.
func ControllerV1(name string) bool {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return false
	}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.SplitN(line, ":", 3)
		if len(f) != 3 || f[0] == "0" {
			continue
		}
		for _, controller := range strings.Split(f[1], ",") {
			if controller == name {
				return true
			}
		}
	}
	return false
}
