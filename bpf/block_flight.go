// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"fmt"
	"maps"
	"unsafe"

	"github.com/cilium/ebpf"
)

// InFlight returns how many requests each device has now, by name: those whose start or
// issue was seen and whose end was not. The devices are those of Read. It is counted in the
// requests' own places, and costs the hooks nothing.
func (b *Block) InFlight() (map[string]int, error) {
	present, err := requestDevices(sysBlock)
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(present, func(_ string, d blockDevice) bool { return d.empty })
	counts := make(map[string]int, len(present))
	for name := range present {
		counts[name] = 0
	}
	bySlot, err := b.inFlight()
	if err != nil {
		return nil, err
	}
	names := b.coll.Maps[blockMapHfBlockDev]
	for slot := range names.MaxEntries() {
		var d blockHfBlockDevice
		if err := names.Lookup(slot, &d); err != nil {
			return nil, fmt.Errorf("read block devices: %w", err)
		}
		if d.Ready != 0 {
			counts[cString(d.Name[:])] += bySlot[slot+1]
		}
	}
	return counts, nil
}

// inFlight counts by device slot + 1. A device has one queue, and one that came later under
// its name another, whose places are counted as well.
func (b *Block) inFlight() (map[uint32]int, error) {
	places, err := mapped[blockHfBlockPlaces](b.coll.Maps[blockMapHfBlockQueue])
	if err != nil {
		return nil, err
	}
	states, err := mapped[blockHfBlockRequest](b.coll.Maps[blockMapHfBlockState])
	if err != nil {
		return nil, err
	}
	counts := map[uint32]int{}
	var q blockHfBlockPlaces
	var s blockHfBlockRequest
	for i := range places.len {
		if err := places.read(i, &q); err != nil {
			return nil, err
		}
		if q.Queue == 0 || q.Places == 0 {
			continue
		}
		for j := q.Base; j < q.Base+q.Places; j++ {
			if err := states.read(j, &s); err != nil {
				return nil, err
			}
			if s.Rq != 0 {
				counts[q.Device]++
			}
		}
	}
	return counts, nil
}

// mapping is an array map in memory, of values T.
type mapping[T any] struct {
	memory *ebpf.Memory
	len    uint32
}

func mapped[T any](m *ebpf.Map) (mapping[T], error) {
	memory, err := m.Memory()
	if err != nil {
		return mapping[T]{}, fmt.Errorf("map %s: %w", m, err)
	}
	return mapping[T]{memory, m.MaxEntries()}, nil
}

func (m mapping[T]) read(i uint32, v *T) error {
	b := unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
	if _, err := m.memory.ReadAt(b, int64(i)*int64(unsafe.Sizeof(*v))); err != nil {
		return fmt.Errorf("read mapped array: %w", err)
	}
	return nil
}
