// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"

	"github.com/hostflame/hostflame/internal/beat"
	"github.com/hostflame/hostflame/internal/histogram"
)

// BlockContainer are the requests of one container, over all devices, cumulative since it
// began to count. Flush commands are nobody's and in none.
type BlockContainer struct {
	Name       string    // OtherContainers for those that there is no slot for
	Since      time.Time // when it began to count
	Operations []BlockContainerCells
	// Charged are the requests whose cgroup is that of the bio; the container of the others is
	// that of who submitted them.
	Charged, Requests uint64
}

// BlockContainerCells are those of one operation: read, write (with write-zeroes), or other.
type BlockContainerCells struct {
	Operation string

	Total      histogram.Snapshot // ns, partition histogram.Time
	Queue      histogram.Snapshot // likewise
	DeviceTime histogram.Snapshot // likewise
	Size       histogram.Snapshot // bytes, partition histogram.Size
}

var slotOperationNames = [slotOperations]string{
	blockHfSlotOperationHF_SLOT_READ:  "read",
	blockHfSlotOperationHF_SLOT_WRITE: "write",
	blockHfSlotOperationHF_SLOT_REST:  "other",
}

const slotOperations = int(blockHfSlotOperationHF_SLOT_OPERATIONS)

// blockSlots is the number of slots for so many CPUs.
func blockSlots(cpus int) int {
	n := maxSlotMemory / (cpus * slotOperations * int(unsafe.Sizeof(blockHfBlockIo{})))
	return min(max(n, minSlots), maxSlots)
}

// blockBooks are what the slots have counted, by container. The kernel's cells only grow,
// whosever they are: last is what of them is in here.
type blockBooks struct {
	cells      *ebpf.Map
	slots      *containerSlots
	last       [][slotOperations]blockHfBlockIo // by slot
	containers map[string]*BlockContainer
}

func newBlockBooks(coll *ebpf.Collection, name func(uint64) string) (*blockBooks, error) {
	b := &blockBooks{cells: coll.Maps[blockMapHfSlotCells], containers: map[string]*BlockContainer{}}
	n := int(b.cells.MaxEntries()) / slotOperations
	b.last = make([][slotOperations]blockHfBlockIo, n)
	b.containers[OtherContainers] = newBlockContainer(OtherContainers)
	var err error
	if b.slots, err = newContainerSlots(coll, n, name); err != nil {
		return nil, err
	}
	b.slots.flush = b.flush
	b.slots.used = b.used
	return b, nil
}

func newBlockContainer(name string) *BlockContainer {
	c := &BlockContainer{Name: name, Since: time.Now()}
	for _, op := range slotOperationNames {
		var zero BlockCells
		zero.add(nil)
		c.Operations = append(c.Operations, BlockContainerCells{op, zero.Total, zero.Queue, zero.DeviceTime, zero.Size})
	}
	return c
}

// used is how many requests a slot has counted, as of the last flush.
func (b *blockBooks) used(slot int) (n uint64) {
	for op := range b.last[slot] {
		for _, t := range b.last[slot][op].Times {
			n += t.Total
		}
	}
	return n
}

// words is the struct as what it is made of.
func (io *blockHfBlockIo) words() []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(io)), int(unsafe.Sizeof(*io)/unsafe.Sizeof(uint64(0))))
}

// flush credits what the slots have counted since the last time to their containers.
func (b *blockBooks) flush() error {
	// Else what a cgroup has counted in a slot that it has got just now would be nobody's.
	if _, err := b.slots.look(time.Now()); err != nil {
		return err
	}
	var perCPU []blockHfBlockIo
	for slot := range b.last {
		owner := b.slots.owner(slot)
		if owner == "" {
			continue
		}
		c := b.containers[owner]
		if c == nil {
			c = newBlockContainer(owner)
			b.containers[owner] = c
		}
		for op := range slotOperations {
			if err := b.cells.Lookup(uint32(slot*slotOperations+op), &perCPU); err != nil {
				return fmt.Errorf("read block cells of slot %d: %w", slot, err)
			}
			var now blockHfBlockIo
			for cpu := range perCPU {
				for i, n := range perCPU[cpu].words() {
					now.words()[i] += n
				}
			}
			grown := now
			for i, n := range b.last[slot][op].words() {
				grown.words()[i] -= n
			}
			b.last[slot][op] = now
			c.add(op, &grown)
		}
	}
	return nil
}

func (c *BlockContainer) add(op int, io *blockHfBlockIo) {
	var cells BlockCells
	cells.add([]blockHfBlockIo{*io})
	o := &c.Operations[op]
	o.Total.Add(cells.Total)
	o.Queue.Add(cells.Queue)
	o.DeviceTime.Add(cells.DeviceTime)
	o.Size.Add(cells.Size)
	c.Requests += cells.Total.Count()
	c.Charged += io.Flagged[blockHfBlockFlagHF_BLOCK_CHARGED]
}

// read returns copies of the books, by name, and lets those go that have no slot any more.
func (b *blockBooks) read() ([]BlockContainer, error) {
	if err := b.flush(); err != nil {
		return nil, err
	}
	b.slots.wasRead()
	var list []BlockContainer
	for _, c := range b.containers {
		copied := *c
		copied.Operations = slices.Clone(c.Operations)
		for i := range copied.Operations {
			for _, s := range []*histogram.Snapshot{
				&copied.Operations[i].Total, &copied.Operations[i].Queue,
				&copied.Operations[i].DeviceTime, &copied.Operations[i].Size,
			} {
				s.Cells = slices.Clone(s.Cells)
			}
		}
		list = append(list, copied)
	}
	slices.SortFunc(list, func(x, y BlockContainer) int { return strings.Compare(x.Name, y.Name) })
	there := b.slots.owners()
	maps.DeleteFunc(b.containers, func(name string, _ *BlockContainer) bool { return !there[name] })
	return list, nil
}

// tend names the containers that come until ctx ends.
func (b *Block) tend(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-time.After(beat.Until(time.Second)):
			b.mu.Lock()
			b.tendErr = b.books.slots.tend(now)
			b.mu.Unlock()
		}
	}
}

// Containers returns the requests by container, by name; none without BlockConfig's
// ContainerName. What it returns is the caller's to keep. A container that is gone is
// returned once more, and starts from zero should it come back.
func (b *Block) Containers() ([]BlockContainer, error) {
	if b.books == nil {
		return nil, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.tendErr != nil {
		return nil, b.tendErr
	}
	return b.books.read()
}
