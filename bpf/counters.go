// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"
)

// DropReason says why something that was due was not delivered (enum hf_drop).
type DropReason uint8

// The reasons, in the order of the ABI.
const (
	DropRingFull     = DropReason(cpuHfDropHF_DROP_RING_FULL)
	DropNoRing       = DropReason(cpuHfDropHF_DROP_NO_RING)
	DropNoStorage    = DropReason(cpuHfDropHF_DROP_NO_STORAGE)
	DropSwitchUnseen = DropReason(cpuHfDropHF_DROP_SWITCH_UNSEEN)
	DropNegative     = DropReason(cpuHfDropHF_DROP_NEGATIVE)
	DropNoSlot       = DropReason(cpuHfDropHF_DROP_NO_SLOT)
	DropNoStart      = DropReason(cpuHfDropHF_DROP_NO_START)
	DropDelayed      = DropReason(cpuHfDropHF_DROP_DELAYED)
	DropNoEnd        = DropReason(cpuHfDropHF_DROP_NO_END)
	dropReasons      = int(cpuHfDropHF_DROP_REASONS)
)

var dropNames = [dropReasons]string{
	DropRingFull:     "ring_full",
	DropNoRing:       "no_ring",
	DropNoStorage:    "no_storage",
	DropSwitchUnseen: "switch_unseen",
	DropNegative:     "negative",
	DropNoSlot:       "no_slot",
	DropNoStart:      "no_start",
	DropDelayed:      "delayed_dequeue",
	DropNoEnd:        "no_end",
}

// String is the value of the metric label `reason`.
func (r DropReason) String() string {
	if int(r) < len(dropNames) {
		return dropNames[r]
	}
	return fmt.Sprintf("reason_%d", uint8(r))
}

// Stats is what an object's programs counted since they were loaded.
type Stats struct {
	Delivered uint64                // samples put into a ring, as Sample.Due counts them
	Dropped   map[DropReason]uint64 // likewise; one entry for each reason that the object can have, zeros included
	Programs  []ProgramStats
	Maps      []MapStats
}

// ProgramStats describes one loaded program. RunTime is zero unless BPF run-time
// statistics are enabled on the host (kernel.bpf_stats_enabled) or by EnableStats.
type ProgramStats struct {
	Name            string
	Runs            uint64        // from the program's own counter
	StatsRuns       uint64        // runs that the kernel's statistics cover
	RunTime         time.Duration // of StatsRuns runs
	RecursionMisses uint64
}

// MapStats is the memory that the kernel accounts to a map, in bytes.
type MapStats struct {
	ID     uint32 // the kernel's, by which one that two objects have is told; 0: several maps
	Name   string
	Memory uint64
}

// object is one loaded collection: what cpu, sched and block have in common.
type object struct {
	coll     *ebpf.Collection
	programs []string // in the order of hf_ran's argument
	reasons  []DropReason
}

// counted reads the object's own counters: the runs of its programs, and the rest.
func (o *object) counted() (runs []uint64, s Stats, err error) {
	m := o.coll.Maps[cpuMapHfCount]
	if m == nil {
		return nil, s, errors.New("read counters: no counter map")
	}
	var perCPU []cpuHfCounters
	if err := m.Lookup(uint32(0), &perCPU); err != nil {
		return nil, s, fmt.Errorf("read counters: %w", err)
	}
	s.Dropped = make(map[DropReason]uint64, len(o.reasons))
	for _, r := range o.reasons {
		s.Dropped[r] = 0
	}
	runs = make([]uint64, len(o.programs))
	for _, c := range perCPU {
		s.Delivered += c.Delivered
		for r, n := range c.Dropped {
			if n > 0 || slices.Contains(o.reasons, DropReason(r)) {
				s.Dropped[DropReason(r)] += n
			}
		}
		for i := range runs {
			runs[i] += c.Runs[i]
		}
	}
	return runs, s, nil
}

// Dropped is what the object lost, an entry for each reason that there is. It costs far less
// than all of the statistics.
func (o *object) Dropped() (map[DropReason]uint64, error) {
	_, s, err := o.counted()
	return s.Dropped, err
}

// Due is how many samples were due, delivered or not, as Sample.Due counts them. It costs as
// little.
func (o *object) Due() (n uint64, err error) {
	_, s, err := o.counted()
	n = s.Delivered
	for _, d := range s.Dropped {
		n += d
	}
	return n, err
}

func (o *object) stats() (Stats, error) {
	runs, s, err := o.counted()
	if err != nil {
		return s, err
	}
	for i, name := range o.programs {
		ps := ProgramStats{Name: name, Runs: runs[i]}
		if p := o.coll.Programs[name]; p != nil {
			// Reading run-time statistics needs no privilege beyond the descriptor.
			if ks, err := p.Stats(); err == nil {
				ps.StatsRuns, ps.RunTime, ps.RecursionMisses = ks.RunCount, ks.Runtime, ks.RecursionMisses
			}
		}
		s.Programs = append(s.Programs, ps)
	}
	names := make([]string, 0, len(o.coll.Maps))
	for name := range o.coll.Maps {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		ms := MapStats{Name: name}
		if info, err := o.coll.Maps[name].Info(); err == nil {
			ms.Memory, _ = info.Memlock()
			id, _ := info.ID()
			ms.ID = uint32(id)
		}
		s.Maps = append(s.Maps, ms)
	}
	return s, nil
}
