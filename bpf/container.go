// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"
)

// OtherContainers is the name of the containers, together, that there is no slot for.
const OtherContainers = "~other"

const (
	maxSlots  = int(schedHfSlotHF_SLOTS)
	otherSlot = int(schedHfSlotHF_SLOT_OTHER)

	// slotGrace is longer than a program runs that has looked at a slot's cgroup before.
	slotGrace = time.Second
	// A slot of a removed cgroup is kept until it was read, or for so long.
	slotUnread = 5 * time.Minute
	// slotRivalry is how often cgroups without a slot are compared with those that have one.
	slotRivalry = 10 * time.Second
)

// containerSlots gives the cgroups that an object's events belong to their places in
// arrays: the user side of container.bpf.h. What is counted in a slot belongs to owner
// until flush is called, and after that to nobody or to another. Not for several
// goroutines at once.
type containerSlots struct {
	entries, free *ebpf.Map
	taken, epoch  *ebpf.Variable
	name          func(cgroup uint64) string
	// flush credits what the slots have counted to their owners.
	flush func() error
	// used tells how many events a slot has counted, as of the last flush.
	used func(slot int) uint64

	cgroups map[uint64]*slotCgroup // by id
	slots   [maxSlots]slot
	queue   schedHfFreeSlots
	rivalry time.Time

	ids    []uint64 // room for all
	values []schedHfContainer
}

type slot struct {
	owner string    // "" when it is free
	left  time.Time // when its cgroup lost it, else zero
	heir  uint64    // id of the cgroup that it is for then, else 0
	used  uint64    // at the last rivalry
}

type slotCgroup struct {
	name    string
	slot    int
	without uint64    // at the last rivalry
	gone    time.Time // when it was found to be removed
	read    bool      // since then
}

// newContainerSlots makes all but the shared one of n slots free. It must be called before
// the programs are attached.
func newContainerSlots(coll *ebpf.Collection, n int, name func(cgroup uint64) string) (*containerSlots, error) {
	s := &containerSlots{
		entries: coll.Maps[schedMapHfContainers],
		free:    coll.Maps[schedMapHfSlotsFree],
		taken:   coll.Variables[schedVarHfSlotsTaken],
		epoch:   coll.Variables[schedVarHfSlotEpoch],
		name:    name,
		cgroups: map[uint64]*slotCgroup{},
		rivalry: time.Now(),
	}
	s.slots[otherSlot].owner = OtherContainers
	for i := 1; i < min(n, maxSlots); i++ {
		s.append(i)
	}
	return s, s.give()
}

// owner is the container that a slot counts for, "" for none.
func (s *containerSlots) owner(slot int) string { return s.slots[slot].owner }

// owners is the set of the containers that have a slot.
func (s *containerSlots) owners() map[string]bool {
	all := map[string]bool{}
	for i := range s.slots {
		if s.slots[i].owner != "" {
			all[s.slots[i].owner] = true
		}
	}
	return all
}

// wasRead says that what was counted until the last flush has been told to somebody.
func (s *containerSlots) wasRead() {
	for _, c := range s.cgroups {
		c.read = c.read || !c.gone.IsZero()
	}
}

// look names the cgroups that have come, and must run soon after that, as a removed one has
// no name any more. It notes those that are gone.
func (s *containerSlots) look(now time.Time) (map[uint64]schedHfContainer, error) {
	entries, err := s.all()
	if err != nil {
		return nil, err
	}
	for id, e := range entries {
		c := s.cgroups[id]
		if c == nil {
			c = &slotCgroup{name: s.name(id)}
			s.cgroups[id] = c
		}
		if c.slot == otherSlot && int(e.Slot) != otherSlot {
			c.slot = int(e.Slot)
			s.slots[c.slot] = slot{owner: c.name, used: s.used(c.slot)}
		}
		if e.Gone != 0 && c.gone.IsZero() {
			c.gone = now
		}
	}
	return entries, nil
}

// tend looks, and moves slots to where they are wanted. To be called once a second or so.
func (s *containerSlots) tend(now time.Time) error {
	entries, err := s.look(now)
	if err != nil {
		return err
	}
	if err := s.reuse(now); err != nil {
		return err
	}
	moved := false
	for id, c := range s.cgroups {
		if c.gone.IsZero() || c.slot != otherSlot && !c.read && now.Sub(c.gone) < slotUnread {
			continue
		}
		if err := s.forget(id); err != nil {
			return err
		}
		if c.slot != otherSlot {
			s.slots[c.slot].left = now
			moved = true
		}
	}
	var taken uint32
	if err := s.taken.Get(&taken); err != nil {
		return fmt.Errorf("read count of slots: %w", err)
	}
	vacant := int(s.queue.Given - taken)
	if vacant > 0 || now.Sub(s.rivalry) >= slotRivalry {
		s.rivalry = now
		evicted, err := s.rival(entries, vacant, now)
		if err != nil {
			return err
		}
		moved = moved || evicted
	}
	if !moved {
		return nil
	}
	var epoch uint32
	if err := s.epoch.Get(&epoch); err != nil {
		return fmt.Errorf("read epoch of slots: %w", err)
	}
	if err := s.epoch.Set(epoch + 1); err != nil {
		return fmt.Errorf("end epoch of slots: %w", err)
	}
	return nil
}

// reuse hands slots on that nobody can be counting in any more.
func (s *containerSlots) reuse(now time.Time) error {
	flushed, freed := false, false
	for i := range s.slots {
		p := &s.slots[i]
		if p.left.IsZero() || now.Sub(p.left) < slotGrace {
			continue
		}
		if !flushed {
			if err := s.flush(); err != nil {
				return err
			}
			flushed = true
		}
		id := p.heir
		heir := s.cgroups[id]
		if heir == nil || heir.slot != otherSlot {
			*p = slot{}
			s.append(i)
			freed = true
			continue
		}
		*p = slot{owner: heir.name, used: s.used(i)}
		heir.slot = i
		if err := s.place(id, i); err != nil {
			return err
		}
	}
	if !freed {
		return nil
	}
	return s.give()
}

// rival gives slots to the cgroups without one that have had the most events: those that are
// vacant, which the next event takes, and then those of cgroups with less than half as many
// events. It forgets idle ones where there is no room for others to be known.
func (s *containerSlots) rival(entries map[uint64]schedHfContainer, vacant int, now time.Time) (moved bool, err error) {
	type contender struct {
		id     uint64
		cgroup *slotCgroup
		events uint64
	}
	var with, without []contender
	for id, c := range s.cgroups {
		if c.slot != otherSlot {
			with = append(with, contender{id: id, cgroup: c})
			continue
		}
		n := entries[id].Without
		without = append(without, contender{id, c, n - c.without})
		c.without = n
	}
	if len(without) == 0 {
		return false, nil
	}
	if err := s.flush(); err != nil {
		return false, err
	}
	for i := range with {
		p := &s.slots[with[i].cgroup.slot]
		n := s.used(with[i].cgroup.slot)
		with[i].events = n - p.used
		p.used = n
	}
	slices.SortFunc(with, func(a, b contender) int { return cmp.Compare(a.events, b.events) })
	slices.SortFunc(without, func(a, b contender) int { return cmp.Compare(b.events, a.events) })
	for _, w := range without {
		idle := w.events == 0 && 2*len(entries) > int(s.entries.MaxEntries())
		switch {
		case w.events > 0 && vacant == 0 && len(with) > 0 && with[0].events < w.events/2:
			loser := with[0]
			with = with[1:]
			if err := s.place(loser.id, otherSlot); err != nil {
				return moved, err
			}
			p := &s.slots[loser.cgroup.slot]
			p.left, p.heir = now, w.id
			loser.cgroup.slot = otherSlot
			moved = true
		case w.events > 0 && vacant > 0 || idle:
			vacant = max(vacant-1, 0)
			if err := s.forget(w.id); err != nil {
				return moved, err
			}
		}
	}
	return moved, nil
}

// place tells the kernel side which slot a cgroup has from now on.
func (s *containerSlots) place(id uint64, slot int) error {
	var e schedHfContainer
	err := s.entries.Lookup(id, &e)
	if err == nil {
		e.Slot = uint32(slot)
		err = s.entries.Update(id, &e, ebpf.UpdateExist)
	}
	if err != nil {
		return fmt.Errorf("move cgroup %d to slot %d: %w", id, slot, err)
	}
	return nil
}

// forget makes a cgroup unknown: it comes anew with its next event.
func (s *containerSlots) forget(id uint64) error {
	if err := s.entries.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget cgroup %d: %w", id, err)
	}
	delete(s.cgroups, id)
	return nil
}

func (s *containerSlots) append(slot int) {
	s.queue.Slots[s.queue.Given%uint32(maxSlots)] = uint32(slot)
	s.queue.Given++
}

// give publishes the queue of free slots: first the slots, then that they are there.
func (s *containerSlots) give() error {
	var before schedHfFreeSlots
	err := s.free.Lookup(uint32(0), &before)
	if err == nil {
		before.Slots = s.queue.Slots
		err = s.free.Put(uint32(0), &before)
	}
	if err == nil {
		err = s.free.Put(uint32(0), &s.queue)
	}
	if err != nil {
		return fmt.Errorf("give free slots: %w", err)
	}
	return nil
}

// all reads the known cgroups, by id.
func (s *containerSlots) all() (map[uint64]schedHfContainer, error) {
	if s.ids == nil {
		n := s.entries.MaxEntries()
		s.ids, s.values = make([]uint64, n), make([]schedHfContainer, n)
	}
	var cursor ebpf.MapBatchCursor
	all := map[uint64]schedHfContainer{}
	for {
		got, err := s.entries.BatchLookup(&cursor, s.ids, s.values, nil)
		for i := range got {
			all[s.ids[i]] = s.values[i]
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read cgroups: %w", err)
		}
	}
}
