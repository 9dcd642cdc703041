// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hostflame/hostflame/bpf"
)

// MappingEvents tells what processes map, execute, fork and leave. *bpf.Mappings is one.
type MappingEvents interface {
	// Drain hands every event that happened before the call to fn, in order, and returns
	// the time on the boot clock up to which none is missing. The event is valid during the
	// call only.
	Drain(fn func(*bpf.MappingEvent)) (until uint64, err error)
	// Wait returns when there are some events, after d, or, with its error, when ctx ends.
	Wait(ctx context.Context, d time.Duration) error
}

// eventMappings knows the mappings of all processes from events, of those that have ended
// as well. /proc is read once for each process that was there before the events, and where
// events were lost or do not tell everything. Its methods may be called from any goroutine.
type eventMappings struct {
	events    MappingEvents
	following context.Context // ends with the events, or with run
	interrupt context.CancelFunc

	mu      sync.Mutex
	procfs  *procfs
	lives   *lives
	initial []PID  // those that were there before, and were not read yet
	until   uint64 // boot clock: all events before are known
	broken  error  // why there are no more events
	reads   [readReasons]uint64
}

// readReason is why /proc was read.
type readReason int

const (
	readInitial = readReason(iota) // the process was there before the events
	readUnknown                    // it is not known: forgotten, or its events are lost
	readLost                       // events were lost, any of its own among them
	readMissing                    // a sample shows memory that no event told of
	readReasons
)

var readReasonNames = [readReasons]string{"initial", "unknown", "lost", "missing"}

const (
	// initialBudget bounds the time that is spent on the initial processes at once.
	initialBudget = 20 * time.Millisecond
	// eventPause is the least time between two looks at the events.
	eventPause = 100 * time.Millisecond
	// minReread and maxReread bound how often an image is read because of missing memory.
	minReread = uint64(200 * time.Millisecond)
	maxReread = uint64(30 * time.Second)
)

// newEventMappings learns the processes that are there, as far as that goes quickly; run
// goes on with it. The events must be told already. At most limit processes are known.
func newEventMappings(events MappingEvents, procfs *procfs, limit int) (*eventMappings, error) {
	m := &eventMappings{events: events, procfs: procfs}
	m.following, m.interrupt = context.WithCancel(context.Background())
	m.lives = newLives(limit, func(pid PID) (reading, error) { return procfs.readProcess(pid, 0) }, procfs.intern)
	var err error
	if m.initial, err = procfs.pids(); err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.learnInitial()
	m.drain()
	return m, m.broken
}

// run drains the events that can not wait for catchUp, telling stir each time, and learns
// what is left of the initial processes, until ctx ends or the events do.
func (m *eventMappings) run(ctx context.Context, stir func()) error {
	stop := context.AfterFunc(ctx, m.interrupt)
	defer stop()
	for {
		d := asLongAsItTakes
		m.mu.Lock()
		if len(m.initial) > 0 {
			d = initialBudget // the other half of the time
		}
		m.mu.Unlock()
		err := m.events.Wait(m.following, d)
		if ctx.Err() != nil {
			return nil
		}
		m.mu.Lock()
		m.drain()
		m.learnInitial()
		if err != nil && m.broken == nil {
			m.broken = err // nobody would see a ring fill up
		}
		err = m.broken
		m.mu.Unlock()
		if err != nil {
			return fmt.Errorf("follow mappings: %w", err)
		}
		if d == asLongAsItTakes {
			stir()
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(eventPause):
			}
		}
	}
}

// follows tells whether run will hear of what happens.
func (m *eventMappings) follows() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.broken == nil && len(m.initial) == 0
}

// catchUp takes in the events until now.
func (m *eventMappings) catchUp() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.drain()
}

// drain takes in the events until now.
func (m *eventMappings) drain() {
	if m.broken != nil {
		return
	}
	until, err := m.events.Drain(m.lives.apply)
	if err != nil {
		m.broken = err
		m.interrupt()
		return
	}
	m.until = until
	m.lives.prune(until - min(until, keepEnded))
}

// learnInitial reads some of the processes that were there before the events.
func (m *eventMappings) learnInitial() {
	for begin := bootTime(); len(m.initial) > 0 && bootTime()-begin < initialBudget; m.initial = m.initial[1:] {
		pid := m.initial[0]
		if l := m.lives.current(pid); l != nil && (l.readAt > 0 || l.image.complete) {
			continue
		}
		m.reads[readInitial]++
		at := uint64(bootTime())
		if r, err := m.procfs.readProcess(pid, 0); err == nil && (r.kernel || len(r.vmas) > 0) {
			m.lives.learn(pid, at, r)
		}
	}
}

// mappings returns the executable mappings of the program image that s was taken in, as
// they were then. It is cheap where nothing has to be read. The caller does not change them.
func (m *eventMappings) mappings(s *bpf.Sample) ([]vma, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s.Time >= m.until {
		m.drain()
	}
	if m.broken != nil {
		return m.procfs.mappings(s)
	}
	l := m.lives.find(PID(s.PID), s.Start)
	if l == nil {
		return m.adopt(s)
	}
	l.ticks = s.Start / nanosPerTick
	i := l.at(s.Time)
	if i == nil {
		return nil, errReplaced
	}
	if s.Time < l.readAt && i.since == 0 && i.comm != s.Comm {
		return nil, errReplaced
	}
	known := i.hand(s.Time)
	reason := readMissing
	switch {
	case i.epoch != m.lives.epoch:
		reason = readLost
	case i.complete && !misses(known, s):
		i.backoff = 0
		return known, nil
	}
	if i == l.image && l.died == 0 {
		if err := m.reread(l, s, reason); err != nil && !errors.Is(err, errExited) {
			return nil, err
		}
		if i == l.image {
			known = i.hand(s.Time)
		}
	}
	if len(known) == 0 || i.epoch != m.lives.epoch && i.comm != s.Comm {
		return nil, errExited
	}
	return known, nil
}

// adopt reads a process that no event has told of.
func (m *eventMappings) adopt(s *bpf.Sample) ([]vma, error) {
	m.reads[readUnknown]++
	at := uint64(bootTime())
	vmas, err := m.procfs.mappings(s)
	if err != nil {
		return nil, err
	}
	l := m.lives.learn(PID(s.PID), at, reading{
		procStat: procStat{comm: s.Comm, start: s.Start / nanosPerTick},
		vmas:     vmas,
	})
	return l.image.hand(s.Time), nil
}

// reread renews what is known of the newest image of l, which s was taken in, from /proc.
// Where that does not show what s does, it is not asked again for a while.
func (m *eventMappings) reread(l *life, s *bpf.Sample, reason readReason) error {
	now := uint64(bootTime())
	if now < l.image.next {
		return nil
	}
	m.reads[reason]++
	i := l.image
	i.backoff = min(max(2*i.backoff, minReread), maxReread)
	i.next = now + i.backoff
	r, err := m.procfs.readProcess(l.pid, TID(s.TID))
	if err != nil {
		return err
	}
	if r.start != l.ticks || len(r.vmas) == 0 {
		return errExited
	}
	// What happened up to here: another program, or the end.
	m.drain()
	if l.image != i || l.died != 0 {
		return nil
	}
	l.readAt = now
	m.lives.renew(l, r)
	return nil
}

// open opens the file of a mapping: as procfs does, by another process that has the same
// file mapped, or, of a process that is gone, in the root directory of its ancestors.
func (m *eventMappings) open(pid PID, v vma) (*os.File, error) {
	f, err := m.procfs.open(pid, v)
	if err == nil || v.inode == 0 {
		return f, err
	}
	m.mu.Lock()
	h, held := m.lives.holders[fileKey{v.major, v.minor, v.inode}]
	held = held && m.lives.holds(h)
	ancestors := m.lives.ancestors(pid)
	m.mu.Unlock()
	if held {
		if f, err := m.procfs.openMapped(h.pid, h.start, h.end, v); err == nil {
			return f, nil
		}
	}
	if !strings.HasPrefix(v.path, "/") {
		return nil, err
	}
	for _, a := range ancestors {
		if f, err := openIn(m.procfs.rootOf(a), v); err == nil {
			return f, nil
		}
	}
	return nil, err
}

// MappingStats describe what is known of the processes.
type MappingStats struct {
	Processes  int               // that live
	Ended      int               // that are kept for samples that come late
	Forgotten  uint64            // for want of room
	Overflowed uint64            // mappings of processes that have too many
	Reads      map[string]uint64 // of /proc/PID/maps, by reason
}

func (m *eventMappings) stats() MappingStats {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := MappingStats{
		Processes:  m.lives.living.Len(),
		Ended:      m.lives.ended.Len(),
		Forgotten:  m.lives.evicted,
		Overflowed: m.lives.overflow,
		Reads:      map[string]uint64{"parent": m.lives.parents},
	}
	for r, name := range readReasonNames {
		s.Reads[name] = m.reads[r]
	}
	return s
}

// dump writes what is known of the processes.
func (m *eventMappings) dump(w io.Writer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lives.dump(w)
}
