// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"

	"github.com/hostflame/hostflame/internal/beat"
	"github.com/hostflame/hostflame/internal/histogram"
)

// SchedCells are the counters of the scheduler hooks, cumulative since NewSched.
type SchedCells struct {
	Latency histogram.Snapshot // wait of each switch-in in ns, partition histogram.Time
	// Time in which a thread neither ran nor was runnable, likewise, one value for each
	// switch-in after a sleep: for block I/O (the kernel's iowait), and the rest.
	BlockedIO, Blocked histogram.Snapshot
	// RunDelayNanos is the growth of the kernel's own run_delay, as the hook saw it. It holds
	// what DropDelayed keeps out of Latency, and each wait as late clocks show it.
	RunDelayNanos uint64
	// Preempted counts the switch-outs of threads that would have gone on, by whose thread
	// the next one was.
	Preempted [Preemptors]uint64
}

// SchedContainer are the counters of the threads of one container. They add up to those of
// the host, except for what containers counted that are there no more.
type SchedContainer struct {
	Name  string    // OtherContainers for those that there is no slot for
	Since time.Time // when it began to count
	SchedCells
	// DelayNanos are the parts of Latency, and add up to its sum.
	DelayNanos [Causes]uint64
	// DelayedBy divides DelayNanos[CauseOther] by the container that ran meanwhile: by the
	// 32 that were waited for the most in the last minute or so, and OtherContainers for
	// what was no series of its own when it was waited. No series falls; one that is not
	// among the 32 any more is left out, and goes on where it was should it come back.
	DelayedBy map[string]uint64
}

// Cause is why a thread did not run although it was runnable.
type Cause uint8

// The causes.
const (
	CauseQuota   Cause = iota // its container had used up its CPU quota
	CauseOwn                  // its own container ran
	CauseOther                // another container ran
	CauseKernel               // a kernel thread ran
	CauseIdle                 // nobody ran: the CPU was on its way out of idling
	CauseStolen               // interrupts, or what the hypervisor gave to others
	CauseUnknown              // who ran is not known any more
	Causes                    // how many there are
)

// String is the value of the metric label `cause`.
func (c Cause) String() string {
	return [Causes]string{"quota", "own", "other", "kernel", "idle", "stolen", "unknown"}[c]
}

// Preemptor is whose thread took the CPU of one that would have gone on.
type Preemptor uint8

// The preemptors.
const (
	PreemptorOwn    = Preemptor(schedHfPreemptorHF_PREEMPTOR_OWN)
	PreemptorOther  = Preemptor(schedHfPreemptorHF_PREEMPTOR_OTHER)
	PreemptorKernel = Preemptor(schedHfPreemptorHF_PREEMPTOR_KERNEL)
	Preemptors      = int(schedHfPreemptorHF_PREEMPTORS)
)

// String is the value of the metric label `by`.
func (p Preemptor) String() string {
	return [Preemptors]string{"own", "other", "kernel"}[p]
}

const (
	// maxSlotMemory bounds the cells of all slots and CPUs, in bytes.
	maxSlotMemory = 32 << 20
	minSlots      = 16
)

// schedSlots is the number of slots for so many CPUs.
func schedSlots(cpus int) int {
	n := maxSlotMemory / (cpus * int(unsafe.Sizeof(schedHfSchedSlot{})))
	return min(max(n, minSlots), maxSlots)
}

// schedBooks are what the slots have counted, by container. The kernel's cells only grow,
// whosever they are: last is what of them is in here.
type schedBooks struct {
	cells      *ebpf.Map
	slots      *containerSlots
	last       []schedHfSchedSlot
	host       SchedCells
	containers map[string]*bookedContainer
	wasRead    time.Time
}

// bookedContainer is a container whose DelayedBy is in the making.
type bookedContainer struct {
	SchedContainer
	culprits culprits
}

func newSchedBooks(coll *ebpf.Collection, name func(uint64) string) (*schedBooks, error) {
	b := &schedBooks{cells: coll.Maps[schedMapHfSchedCells], host: newSchedCells(), containers: map[string]*bookedContainer{}, wasRead: time.Now()}
	n := int(b.cells.MaxEntries())
	b.last = make([]schedHfSchedSlot, n)
	b.containers[OtherContainers] = newBookedContainer(OtherContainers)
	var err error
	if b.slots, err = newContainerSlots(coll, n, name); err != nil {
		return nil, err
	}
	b.slots.flush = b.flush
	b.slots.used = func(slot int) uint64 { return sum(b.last[slot].Wait[:]) }
	return b, nil
}

func newSchedCells() SchedCells {
	n := histogram.Time().Cells()
	s := func() histogram.Snapshot { return histogram.Snapshot{Cells: make([]uint64, n)} }
	return SchedCells{Latency: s(), BlockedIO: s(), Blocked: s()}
}

func newBookedContainer(name string) *bookedContainer {
	return &bookedContainer{SchedContainer{Name: name, Since: time.Now(), SchedCells: newSchedCells()}, newCulprits()}
}

// words is the struct as what it is made of.
func (s *schedHfSchedSlot) words() []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(s)), int(unsafe.Sizeof(*s)/unsafe.Sizeof(uint64(0))))
}

// flush credits what the slots have counted since the last time to their containers.
func (b *schedBooks) flush() error {
	// Else what a cgroup has counted in a slot that it has got just now would be nobody's.
	if _, err := b.slots.look(time.Now()); err != nil {
		return err
	}
	var perCPU []schedHfSchedSlot
	for slot := range b.last {
		owner := b.slots.owner(slot)
		if owner == "" {
			continue
		}
		if err := b.cells.Lookup(uint32(slot), &perCPU); err != nil {
			return fmt.Errorf("read scheduler cells of slot %d: %w", slot, err)
		}
		var now schedHfSchedSlot
		for cpu := range perCPU {
			for i, n := range perCPU[cpu].words() {
				now.words()[i] += n
			}
		}
		grown := now
		for i, n := range b.last[slot].words() {
			grown.words()[i] -= n
		}
		b.last[slot] = now
		c := b.containers[owner]
		if c == nil {
			c = newBookedContainer(owner)
			b.containers[owner] = c
		}
		b.host.add(&grown)
		c.add(&grown)
		b.blame(c, slot, &grown)
	}
	return nil
}

func (c *SchedCells) add(s *schedHfSchedSlot) {
	n := len(c.Latency.Cells)
	c.Latency.Add(histogram.Snapshot{Cells: s.Wait[:n], Sum: s.WaitNs})
	c.BlockedIO.Add(histogram.Snapshot{Cells: s.Blocked[schedHfBlockedHF_BLOCKED_IO][:n], Sum: s.BlockedNs[schedHfBlockedHF_BLOCKED_IO]})
	c.Blocked.Add(histogram.Snapshot{Cells: s.Blocked[schedHfBlockedHF_BLOCKED_OTHER][:n], Sum: s.BlockedNs[schedHfBlockedHF_BLOCKED_OTHER]})
	c.RunDelayNanos += s.RunDelayNs
	for p, n := range s.Preempted {
		c.Preempted[p] += n
	}
}

// blame divides the waits of one slot up by who ran.
func (b *schedBooks) blame(c *bookedContainer, slot int, s *schedHfSchedSlot) {
	for runner, ns := range s.WaitedFor {
		if ns == 0 {
			continue
		}
		cause := CauseOther
		switch schedHfRunner(runner) {
		case schedHfRunnerHF_RUNNER_QUOTA:
			cause = CauseQuota
		case schedHfRunnerHF_RUNNER_KERNEL:
			cause = CauseKernel
		case schedHfRunnerHF_RUNNER_NOBODY:
			cause = CauseIdle
		case schedHfRunnerHF_RUNNER_STOLEN:
			cause = CauseStolen
		case schedHfRunnerHF_RUNNER_UNKNOWN:
			cause = CauseUnknown
		default:
			by := b.slots.owner(runner)
			if by == c.Name {
				cause = CauseOwn
				break
			}
			c.culprits.add(by, ns)
		}
		c.DelayNanos[cause] += ns
	}
}

// read returns copies of the books, the containers by name, and lets those go that have no
// slot any more.
func (b *schedBooks) read() (SchedCells, []SchedContainer, error) {
	if err := b.flush(); err != nil {
		return SchedCells{}, nil, err
	}
	b.slots.wasRead()
	b.wasRead = time.Now()
	var list []SchedContainer
	for _, c := range b.containers {
		copied := c.SchedContainer
		copied.SchedCells = c.SchedCells.clone()
		copied.DelayedBy = c.culprits.series()
		list = append(list, copied)
	}
	slices.SortFunc(list, func(x, y SchedContainer) int { return cmp.Compare(x.Name, y.Name) })
	b.forget()
	return b.host.clone(), list, nil
}

// forget drops the containers that have no slot any more.
func (b *schedBooks) forget() {
	there := b.slots.owners()
	gone := func(name string) bool { return !there[name] }
	maps.DeleteFunc(b.containers, func(name string, _ *bookedContainer) bool { return gone(name) })
	for _, c := range b.containers {
		c.culprits.forget(gone)
	}
}

// tend looks after the slots and the culprits. To be called once a second or so.
func (b *schedBooks) tend(now time.Time) error {
	err := b.slots.tend(now)
	for _, c := range b.containers {
		c.culprits.rival(now)
	}
	if now.Sub(b.wasRead) >= slotUnread {
		b.forget() // nobody reads
	}
	return err
}

func (c SchedCells) clone() SchedCells {
	c.Latency.Cells = slices.Clone(c.Latency.Cells)
	c.BlockedIO.Cells = slices.Clone(c.BlockedIO.Cells)
	c.Blocked.Cells = slices.Clone(c.Blocked.Cells)
	return c
}

func sum(cells []uint64) (n uint64) {
	for _, c := range cells {
		n += c
	}
	return n
}

// tend names the containers that come until ctx ends.
func (s *Sched) tend(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-time.After(beat.Until(time.Second)):
			s.mu.Lock()
			s.tendErr = s.books.tend(now)
			s.mu.Unlock()
		}
	}
}

// Read returns the counters of the host, summed over the possible CPUs: they keep what was
// measured on a CPU that has left. It returns those of the containers beside, by name; what
// it returns is the caller's to keep. A container that is gone is returned once more, and
// starts from zero should it come back.
func (s *Sched) Read() (SchedCells, []SchedContainer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tendErr != nil {
		return SchedCells{}, nil, s.tendErr
	}
	return s.books.read()
}
