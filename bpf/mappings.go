// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// MappingsConfig configures the mapping events. The zero value is what is meant to be used.
type MappingsConfig struct {
	// RingSize is the size of the ring of a CPU in bytes, rounded to a power of two of
	// pages; 512 KiB if zero, less on machines of more than 32 CPUs. Without CAP_IPC_LOCK
	// the kernel may grant less (kernel.perf_event_mlock_kb, 516 KiB a CPU and user).
	RingSize int
}

// MappingLoss says why mapping events are missing.
type MappingLoss string

// The reasons: values of a metric label.
const (
	MappingLossRingFull  = MappingLoss("ring_full")  // events
	MappingLossMalformed = MappingLoss("malformed")  // records, or rings with the rest of them
	MappingLossCPUOnline = MappingLoss("cpu_online") // CPUs that ran unobserved for a moment
)

// Mappings tells what the processes of the host map, execute, fork and leave: by a perf
// event on each online CPU that counts nothing (PERF_RECORD_MMAP2, COMM, FORK and EXIT).
// Drain and Wait are for one goroutine each; the other methods may be called from any.
type Mappings struct {
	attr   unix.PerfEventAttr
	size   int
	poller *poller

	mu      sync.Mutex
	rings   map[int]*perfRing // by CPU
	leaving []*perfRing       // of CPUs that went offline, to be drained once more
	started bool
	gaps    int // since the last drain
	closed  bool
	cursors []cursor     // of the drain under way
	event   MappingEvent // the one that is told

	counts    [mappingEventTypes]atomic.Uint64
	lost      atomic.Uint64
	malformed atomic.Uint64
	online    atomic.Uint64
}

// MappingsStats counts since NewMappings.
type MappingsStats struct {
	Events map[MappingEventType]uint64 // delivered; all types
	Lost   map[MappingLoss]uint64      // all reasons
	Memory uint64                      // bytes of the rings
}

// NewMappings opens the events on all online CPUs; they are told from then on. It needs
// CAP_PERFMON, and nothing else, and Linux 5.8 (that capability).
func NewMappings(cfg MappingsConfig) (_ *Mappings, err error) {
	online, err := OnlineCPUs()
	if err != nil {
		return nil, err
	}
	m := &Mappings{
		attr: unix.PerfEventAttr{
			Type:        unix.PERF_TYPE_SOFTWARE,
			Config:      unix.PERF_COUNT_SW_DUMMY,
			Size:        uint32(unix.PERF_ATTR_SIZE_VER5),
			Sample_type: unix.PERF_SAMPLE_TIME,
			Wakeup:      mappingWatermark,
			Bits: unix.PerfBitMmap | unix.PerfBitMmap2 | unix.PerfBitComm | unix.PerfBitCommExec | unix.PerfBitTask |
				unix.PerfBitSampleIDAll | unix.PerfBitUseClockID | unix.PerfBitWatermark | unix.PerfBitExcludeKernel,
			Clockid: unix.CLOCK_BOOTTIME,
		},
		size:  mappingRingSize(cfg.RingSize, len(online)),
		rings: map[int]*perfRing{},
	}
	if m.poller, err = newPoller("mapping events"); err != nil {
		return nil, err
	}
	if err := m.sync(); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// mappingWatermark is how many bytes of events on a CPU wake who waits: some threads that
// begin or end, or a program.
const mappingWatermark = 256

// mappingRingSize is a power of two of pages.
func mappingRingSize(want, cpus int) int {
	if want <= 0 {
		// 512 KiB hold the events of some 500 short programs. All together are bounded.
		want = min(512<<10, max(16<<20/cpus, 64<<10))
	}
	return 1 << (bits.Len(uint(max(want, os.Getpagesize()))) - 1)
}

// Follow keeps the events on the online CPUs until ctx ends, as CPU.Follow does.
func (m *Mappings) Follow(ctx context.Context, onError func(error)) { followCPUs(ctx, m, onError) }

func (m *Mappings) sync() error {
	online, err := OnlineCPUs()
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return os.ErrClosed
	}
	var errs []error
	want := make(map[int]bool, len(online))
	for _, cpu := range online {
		want[cpu] = true
		if m.rings[cpu] != nil {
			continue
		}
		// The CPU can leave between the list and the open.
		if err := m.attach(cpu); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, err)
		}
	}
	for cpu := range m.rings {
		if !want[cpu] {
			m.detach(cpu)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	m.started = true
	return nil
}

func (m *Mappings) attach(cpu int) error {
	r, err := openPerfRing(m.attr, cpu, m.size)
	if err != nil {
		return err
	}
	if err := m.poller.add(int(r.event.Fd())); err != nil {
		r.close()
		return fmt.Errorf("watch ring of CPU %d: %w", cpu, err)
	}
	m.rings[cpu] = r
	m.size = len(r.data)
	if m.started {
		m.gaps++
		m.online.Add(1)
	}
	return nil
}

func (m *Mappings) detach(cpu int) {
	r := m.rings[cpu]
	// What the next ring of the CPU gets is not to be told twice.
	r.disable()
	m.leaving = append(m.leaving, r)
	delete(m.rings, cpu)
}

func (m *Mappings) forget(cpu int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n := range m.rings {
		if n == cpu || cpu == -1 {
			m.detach(n)
		}
	}
}

// cursor is how far a drain is in a ring.
type cursor struct {
	ring   *perfRing
	head   uint64
	record []byte // the next one
	time   uint64
}

// Drain hands every event that happened before the call to fn, those of all CPUs in order
// of time, and returns the time up to which none is missing: an event comes after those that
// led to it, also when they were on other CPUs. The event is valid during the call only; fn
// must not call m's methods. The error is os.ErrClosed.
func (m *Mappings) Drain(fn func(*MappingEvent)) (until uint64, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return 0, os.ErrClosed
	}
	// What led to an event was in its ring before that one got its time. So if the rings
	// are looked at after the limit is taken, then everything that led to an event below
	// it is seen.
	until = bootClock()
	for ; m.gaps > 0; m.gaps-- {
		m.deliver(fn, &MappingEvent{Type: MappingLost, Time: until})
	}
	m.cursors = m.cursors[:0]
	for _, r := range m.rings {
		m.cursors = append(m.cursors, cursor{ring: r, head: r.head()})
	}
	for _, r := range m.leaving {
		m.cursors = append(m.cursors, cursor{ring: r, head: r.head()})
	}
	m.merge(fn, until)
	for _, r := range m.leaving {
		err = errors.Join(err, r.close())
	}
	clear(m.leaving)
	clear(m.cursors) // they refer to the rings
	m.leaving = m.leaving[:0]
	return until, err
}

// merge delivers what lies before the heads of the cursors, the oldest first, up to a time.
func (m *Mappings) merge(fn func(*MappingEvent), until uint64) {
	heap := m.cursors[:0]
	for _, c := range m.cursors {
		if m.advance(&c, fn) && c.time <= until {
			heap = append(heap, c)
		}
	}
	for i := len(heap)/2 - 1; i >= 0; i-- {
		sift(heap, i)
	}
	for len(heap) > 0 {
		c := &heap[0]
		known, ok := m.event.decode(c.record)
		switch {
		case !ok:
			m.malformed.Add(1)
			m.deliver(fn, &MappingEvent{Type: MappingLost, Time: c.time, Lost: 1})
		case known:
			if m.event.Type == MappingLost {
				m.lost.Add(m.event.Lost)
			}
			m.deliver(fn, &m.event)
		}
		c.ring.free(c.ring.tail + uint64(len(c.record)))
		if !m.advance(c, fn) || c.time > until {
			heap[0] = heap[len(heap)-1]
			heap = heap[:len(heap)-1]
		}
		sift(heap, 0)
	}
}

// advance takes the next record; false if there is none.
func (m *Mappings) advance(c *cursor, fn func(*MappingEvent)) bool {
	record, err := c.ring.next(c.head)
	if err == nil && record != nil && len(record) < recordHeader+recordTime {
		err = errBadRing
	}
	if err != nil {
		// Where the next record begins is not known.
		m.malformed.Add(1)
		m.deliver(fn, &MappingEvent{Type: MappingLost, Time: c.time})
		c.ring.free(c.head)
		return false
	}
	if record == nil {
		return false
	}
	c.record = record
	c.time = binary.NativeEndian.Uint64(record[len(record)-recordTime:])
	return true
}

// sift moves heap[i] down to where it belongs, the oldest on top.
func sift(heap []cursor, i int) {
	for {
		child := 2*i + 1
		if child >= len(heap) {
			return
		}
		if child+1 < len(heap) && heap[child+1].time < heap[child].time {
			child++
		}
		if heap[i].time <= heap[child].time {
			return
		}
		heap[i], heap[child] = heap[child], heap[i]
		i = child
	}
}

func (m *Mappings) deliver(fn func(*MappingEvent), e *MappingEvent) {
	m.counts[e.Type].Add(1)
	fn(e)
}

// Wait returns when a ring has some events, after d, or, with its error, when ctx ends. Less
// than a program makes when it begins can go unnoticed; and it can return for nothing.
func (m *Mappings) Wait(ctx context.Context, d time.Duration) error {
	if m.filled() {
		return ctx.Err()
	}
	return m.poller.wait(ctx, d)
}

func (m *Mappings) filled() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.rings {
		if r.head()-r.tail >= mappingWatermark {
			return true
		}
	}
	return false
}

// Stats returns the counters.
func (m *Mappings) Stats() MappingsStats {
	s := MappingsStats{
		Events: map[MappingEventType]uint64{},
		Lost: map[MappingLoss]uint64{
			MappingLossRingFull:  m.lost.Load(),
			MappingLossMalformed: m.malformed.Load(),
			MappingLossCPUOnline: m.online.Load(),
		},
	}
	for t := range mappingEventTypes {
		s.Events[t] = m.counts[t].Load()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.rings {
		s.Memory += uint64(len(r.memory))
	}
	return s
}

// Close frees everything. It is idempotent.
func (m *Mappings) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil
	}
	m.closed = true
	var errs []error
	for cpu := range m.rings {
		m.detach(cpu)
	}
	for _, r := range m.leaving {
		errs = append(errs, r.close())
	}
	m.leaving = nil
	return errors.Join(append(errs, m.poller.close())...)
}

// bootClock is the boot clock, which stamps samples and events.
func bootClock() uint64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) // fails for no clock that exists
	return uint64(ts.Nano())
}
