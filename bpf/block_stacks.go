// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
)

// BlockIO is what a sample of ProfileBlockIO says of its request.
type BlockIO struct {
	Device     string // name of the whole device
	Operation  string // as in BlockCells
	Bytes      uint64
	Queue      uint64 // ns of the latency that the request waited, 0 if that is not known
	DeviceTime uint64 // ns of the latency that the device had it, likewise
	// Cgroup is the kernfs id of the cgroup that the request is charged to, in the blkio
	// hierarchy on v1 and hybrid hosts: of who dirtied the pages, where the kernel writes
	// them back for another. 0 or RootCgroup where it is charged to nobody in particular.
	Cgroup uint64
}

// RootCgroup is the kernfs id of the root of any cgroup hierarchy.
const RootCgroup = 1

// DefaultStackRate is how many samples a second each CPU takes of the requests of one
// device and operation, before it leaves some out.
const DefaultStackRate = 50

// blockUnknown is HF_BLOCK_UNKNOWN.
const blockUnknown = ^uint64(0)

// aboutASecond is less than one: drains that are a second apart begin one each.
const aboutASecond = 900 * time.Millisecond

// maxPending bounds the samples whose requests have not ended, some 2 KB each.
const maxPending = 4096

// blockStacks pairs the samples that are taken at the start of requests with their ends.
// It is of the goroutine that drains, but for evicted.
type blockStacks struct {
	rings   *rings
	devices func(slot uint32) (string, error)
	second  *ebpf.Variable // of the kernel side: which second it is
	seconds uint32
	since   time.Time // when the second began

	pending map[uint64]*Sample // by key
	order   []uint64           // keys in the order in which their samples came; some have left
	// Ends without a sample: a ring is read before another that has the sample. What is not
	// paired at the next drain had none.
	early, late map[uint64]blockHfBlockEnd
	evicted     atomic.Uint64 // samples whose end did not come, as Sample.Due counts them
}

func newBlockStacks(r *rings, devices func(uint32) (string, error), second *ebpf.Variable) *blockStacks {
	return &blockStacks{
		rings: r, devices: devices, second: second,
		pending: map[uint64]*Sample{},
		early:   map[uint64]blockHfBlockEnd{}, late: map[uint64]blockHfBlockEnd{},
	}
}

// drain hands out the samples whose requests have ended. They are fn's to keep.
func (b *blockStacks) drain(fn func(*Sample)) error {
	var failed error
	b.late, b.early = b.early, b.late
	clear(b.early)
	if now := time.Now(); now.Sub(b.since) > aboutASecond {
		b.seconds, b.since = b.seconds+1, now
		if err := b.second.Set(b.seconds); err != nil {
			return fmt.Errorf("begin a second of samples: %w", err)
		}
	}
	err := b.rings.read(func(record []byte) error {
		if len(record) != int(unsafe.Sizeof(blockHfBlockEnd{})) {
			if err := b.rings.sample.decode(record); err != nil {
				return err
			}
			b.start(b.rings.sample.Clone(), fn, &failed)
			return nil
		}
		var end blockHfBlockEnd
		fill(&end, record)
		if s := b.pending[end.Key]; s != nil {
			delete(b.pending, end.Key)
			b.end(s, end, fn, &failed)
		} else {
			b.early[end.Key] = end
		}
		return nil
	})
	for len(b.pending) > maxPending {
		b.evict()
	}
	if len(b.order) > 2*maxPending {
		b.compact()
	}
	return errors.Join(err, failed)
}

func (b *blockStacks) start(s *Sample, fn func(*Sample), failed *error) {
	key := s.Value
	for _, ends := range []map[uint64]blockHfBlockEnd{b.early, b.late} {
		if end, ok := ends[key]; ok {
			delete(ends, key)
			b.end(s, end, fn, failed)
			return
		}
	}
	b.pending[key] = s
	b.order = append(b.order, key)
}

func (b *blockStacks) end(s *Sample, end blockHfBlockEnd, fn func(*Sample), failed *error) {
	if end.Absorbed != 0 {
		return // what it went into is the request
	}
	device, err := b.devices(end.Device)
	if err != nil {
		*failed = err
	}
	s.IO = BlockIO{
		Device: device, Operation: operationNames[end.Operation],
		Bytes: uint64(end.Bytes), Cgroup: end.CgroupId,
	}
	// The walk of the stack is no time of the request's, though the histograms can have it.
	s.Value = min(end.TotalNs, end.TimeNs-s.Time)
	if end.DeviceNs != blockUnknown {
		s.Value = max(s.Value, end.DeviceNs)
		s.IO.DeviceTime, s.IO.Queue = end.DeviceNs, s.Value-end.DeviceNs
	}
	fn(s)
}

// evict gives up the oldest pending sample.
func (b *blockStacks) evict() {
	for len(b.order) > 0 {
		key := b.order[0]
		b.order = b.order[1:]
		if s := b.pending[key]; s != nil {
			delete(b.pending, key)
			b.evicted.Add(s.Due())
			return
		}
	}
}

// compact drops the keys that have left from the order.
func (b *blockStacks) compact() {
	kept := make([]uint64, 0, len(b.pending))
	for _, key := range b.order {
		if b.pending[key] != nil {
			kept = append(kept, key)
		}
	}
	b.order = kept
}

// Drain hands every sample whose request has ended to fn; its Value is the request's
// latency. A request that is in flight comes with a later drain. It is for one goroutine.
func (b *Block) Drain(fn func(*Sample)) error {
	if b.stacks == nil {
		return errNoStacks
	}
	return b.stacks.drain(fn)
}

// Wait returns when a ring is half full, after d, or, with its error, when ctx ends.
func (b *Block) Wait(ctx context.Context, d time.Duration) error {
	if b.stacks == nil {
		return errNoStacks
	}
	return b.stacks.rings.wait(ctx, d)
}

var errNoStacks = errors.New("block I/O is not sampled")

// HasStacks tells whether requests are sampled: BlockConfig asked for it, and the kernel
// has block_io_start, or block_getrq, which is before it and does not see passthrough.
func (b *Block) HasStacks() bool { return b.stacks != nil }

// StackLosses is what is missing in the samples, as Sample.Due counts them: the requests that
// the lost ones stand for. It has an entry for each reason.
func (b *Block) StackLosses() (map[DropReason]uint64, error) {
	dropped, err := b.Dropped()
	if err != nil || b.stacks == nil {
		return nil, err
	}
	return map[DropReason]uint64{
		DropRingFull: dropped[DropRingFull],
		DropNoRing:   dropped[DropNoRing],
		DropNoEnd:    b.stacks.evicted.Load(),
	}, nil
}

// deviceName is the name of a device slot.
func (b *Block) deviceName(slot uint32) (string, error) {
	var d blockHfBlockDevice
	if err := b.coll.Maps[blockMapHfBlockDev].Lookup(slot, &d); err != nil {
		return "", fmt.Errorf("read block device: %w", err)
	}
	return cString(d.Name[:]), nil
}
