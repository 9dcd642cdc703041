// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/hostflame/hostflame/internal/histogram"
)

// operationNames are the values of the label `operation`, by enum hf_operation.
var operationNames = [blockHfOperationHF_OPERATIONS]string{
	blockHfOperationHF_OPERATION_READ:         "read",
	blockHfOperationHF_OPERATION_WRITE:        "write",
	blockHfOperationHF_OPERATION_FLUSH:        "flush",
	blockHfOperationHF_OPERATION_DISCARD:      "discard",
	blockHfOperationHF_OPERATION_WRITE_ZEROES: "write-zeroes",
	blockHfOperationHF_OPERATION_OTHER:        "other",
}

// BlockOperations are the values of BlockIO.Operation and of the metric label `operation`.
func BlockOperations() []string { return slices.Clone(operationNames[:]) }

// BlockError is why a request or bio failed (enum hf_block_error).
type BlockError uint8

// BlockErrorIO is what most failures are.
const BlockErrorIO = BlockError(blockHfBlockErrorHF_BLOCK_ERROR_IO)

// BlockErrors is how many classes there are, from 0 on.
const BlockErrors = int(blockHfBlockErrorHF_BLOCK_ERRORS)

var blockErrorNames = [BlockErrors]string{
	blockHfBlockErrorHF_BLOCK_ERROR_IO:            "io",
	blockHfBlockErrorHF_BLOCK_ERROR_NOT_SUPPORTED: "not_supported",
	blockHfBlockErrorHF_BLOCK_ERROR_TIMEOUT:       "timeout",
	blockHfBlockErrorHF_BLOCK_ERROR_NO_SPACE:      "no_space",
	blockHfBlockErrorHF_BLOCK_ERROR_TRANSPORT:     "transport",
	blockHfBlockErrorHF_BLOCK_ERROR_TARGET:        "target",
	blockHfBlockErrorHF_BLOCK_ERROR_RESERVATION:   "reservation",
	blockHfBlockErrorHF_BLOCK_ERROR_MEDIUM:        "medium",
	blockHfBlockErrorHF_BLOCK_ERROR_PROTECTION:    "protection",
	blockHfBlockErrorHF_BLOCK_ERROR_OTHER:         "other",
}

// String is the value of the metric label `class`.
func (e BlockError) String() string { return blockErrorNames[e] }

// BlockCells are the requests of one device and operation, cumulative since NewBlock.
type BlockCells struct {
	Device       string // name of the whole device, as in /proc/diskstats
	Major, Minor uint32 // of the device that had the name last
	Operation    string // read, write, flush, discard, write-zeroes or other

	Total      histogram.Snapshot // ns, partition histogram.Time
	Queue      histogram.Snapshot // ns, partition histogram.Time
	DeviceTime histogram.Snapshot // ns, partition histogram.Time
	Size       histogram.Snapshot // bytes, partition histogram.Size
	// Depth is, for each request that was issued, how many its hardware queue had then, the
	// request included; partition histogram.Depth.
	Depth histogram.Snapshot

	Errors    [BlockErrors]uint64 // requests that failed, in whole or in part
	Sync      uint64              // requests that somebody waits for: reads, and writes flagged so
	Readahead uint64
	Metadata  uint64
	Merges    uint64 // bios and requests that went into a request that waited
	Requeues  uint64 // issues that the driver sent back
	Splits    uint64 // bios cut in two because the device takes no larger ones

	unbooked uint64 // requests that /proc/diskstats does not count
}

// Read returns the cells of all operations of each device, zeros included, by device
// name: of the devices that are there and have a size, and of those that had requests,
// also when they have left. A device that comes back under its name continues its series.
func (b *Block) Read() ([]BlockCells, error) {
	present, err := requestDevices(sysBlock)
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(present, func(_ string, d blockDevice) bool { return d.empty })
	return b.read(present)
}

// read returns the cells of the devices that had requests, and zeros for the others of
// present, which it takes over.
func (b *Block) read(present map[string]blockDevice) ([]BlockCells, error) {
	var cells []BlockCells
	var perCPU []blockHfBlockIo
	names := b.coll.Maps[blockMapHfBlockDev]
	for slot := range names.MaxEntries() {
		var d blockHfBlockDevice
		if err := names.Lookup(slot, &d); err != nil {
			return nil, fmt.Errorf("read block devices: %w", err)
		}
		if d.Ready == 0 {
			continue
		}
		name := cString(d.Name[:])
		delete(present, name)
		for op := range operationNames {
			c := BlockCells{Device: name, Major: d.Major, Minor: d.Minor, Operation: operationNames[op]}
			if err := c.read(b.coll.Maps[blockMapHfBlockCells], slot*uint32(len(operationNames))+uint32(op), &perCPU); err != nil {
				return nil, err
			}
			cells = append(cells, c)
		}
	}
	for name, n := range present {
		for _, op := range operationNames {
			c := BlockCells{Device: name, Major: n.major, Minor: n.minor, Operation: op}
			c.add(nil)
			cells = append(cells, c)
		}
	}
	slices.SortStableFunc(cells, func(a, b BlockCells) int { return cmp.Compare(a.Device, b.Device) })
	return cells, nil
}

func (c *BlockCells) read(m *ebpf.Map, i uint32, perCPU *[]blockHfBlockIo) error {
	if err := m.Lookup(i, perCPU); err != nil {
		return fmt.Errorf("read cells of %s: %w", c.Device, err)
	}
	c.add(*perCPU)
	return nil
}

// add sums the CPUs' cells into c, which has none yet.
func (c *BlockCells) add(perCPU []blockHfBlockIo) {
	times, sizes, depths := histogram.Time().Cells(), histogram.Size().Cells(), histogram.Depth().Cells()
	c.Total.Cells = make([]uint64, times)
	c.Queue.Cells = make([]uint64, times)
	c.DeviceTime.Cells = make([]uint64, times)
	c.Size.Cells = make([]uint64, sizes)
	c.Depth.Cells = make([]uint64, depths)
	for i := range perCPU {
		p := &perCPU[i]
		for j := range times {
			c.Total.Cells[j] += p.Times[j].Total
			c.Queue.Cells[j] += p.Times[j].Queue
			c.DeviceTime.Cells[j] += p.Times[j].Device
		}
		for j := range sizes {
			c.Size.Cells[j] += p.Sizes[j]
		}
		for j := range depths {
			c.Depth.Cells[j] += p.Depths[j]
		}
		for j := range c.Errors {
			c.Errors[j] += p.Errors[j]
		}
		c.Total.Sum += p.TotalNs
		c.Queue.Sum += p.QueueNs
		c.DeviceTime.Sum += p.DeviceNs
		c.Size.Sum += p.Bytes
		c.Depth.Sum += p.DepthSum
		c.Sync += p.Flagged[blockHfBlockFlagHF_BLOCK_SYNC]
		c.Readahead += p.Flagged[blockHfBlockFlagHF_BLOCK_READAHEAD]
		c.Metadata += p.Flagged[blockHfBlockFlagHF_BLOCK_METADATA]
		c.Merges += p.Merges
		c.Requeues += p.Requeues
		c.Splits += p.Splits
		c.unbooked += p.Unbooked
	}
}

func cString(b []int8) string {
	s := make([]byte, len(b))
	for i, c := range b {
		s[i] = byte(c)
	}
	s, _, _ = bytes.Cut(s, []byte{0})
	return string(s)
}
