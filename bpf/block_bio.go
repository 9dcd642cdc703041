// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/hostflame/hostflame/internal/histogram"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type hf_bio_io blockBio block_bio.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -I. -I/usr/include/x86_64-linux-gnu

// BlockBio measures the bios of block devices that have no requests of their own, such as
// zram, dm and md: from block_bio_queue to block_bio_complete. Most of them send their I/O
// on to other devices, where it is measured again: the two are never to be added.
//
// Its programs run for each bio on the host, so they are attached only while there is such
// a device: that is looked for at NewBlockBio and at each Read. Bios that were in flight then
// do not count. All methods may be called from several goroutines.
type BlockBio struct {
	mu     sync.Mutex
	object *object // nil until there was such a device
	links  []link.Link
	closed bool
}

// BlockBioCells are the bios of one device and operation, cumulative.
type BlockBioCells struct {
	Device    string              // name of the whole device, as in /proc/diskstats
	Operation string              // as in BlockCells
	Total     histogram.Snapshot  // ns, partition histogram.Time
	Size      histogram.Snapshot  // bytes, partition histogram.Size; of those that carry data
	Errors    [BlockErrors]uint64 // bios that failed; not those that only would have had to wait (BLK_STS_AGAIN)
}

// NewBlockBio attaches if there is something to measure. It needs what NewBlock does.
func NewBlockBio() (*BlockBio, error) {
	b := &BlockBio{}
	if _, err := b.Read(); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// bioDevices lists the devices in dir (/sys/block) that have a size and no requests.
func bioDevices(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	var names []string
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if _, err := os.Stat(filepath.Join(path, "mq")); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if readInt(filepath.Join(path, "size")) > 0 {
			names = append(names, strings.ReplaceAll(e.Name(), "!", "/"))
		}
	}
	return names, nil
}

// Read returns the cells of all operations of each device that has no requests: of those
// that are there, and of those that had I/O, also when they have left.
func (b *BlockBio) Read() ([]BlockBioCells, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	present, err := bioDevices(sysBlock)
	if err != nil || b.closed {
		return nil, err
	}
	if err := b.follow(len(present) > 0); err != nil {
		return nil, err
	}
	if b.object == nil {
		return nil, nil
	}
	var cells []BlockBioCells
	names := b.object.coll.Maps[blockBioMapHfBlockDev]
	for slot := range names.MaxEntries() {
		var d blockHfBlockDevice
		if err := names.Lookup(slot, &d); err != nil {
			return nil, fmt.Errorf("read block devices: %w", err)
		}
		if d.Ready == 0 {
			continue
		}
		name := cString(d.Name[:])
		present = slices.DeleteFunc(present, func(other string) bool { return other == name })
		for op, operation := range operationNames {
			var perCPU []blockBioHfBioIo
			if err := b.object.coll.Maps[blockBioMapHfBioCells].Lookup(slot*uint32(len(operationNames))+uint32(op), &perCPU); err != nil {
				return nil, fmt.Errorf("read cells of %s: %w", name, err)
			}
			cells = append(cells, newBioCells(name, operation, perCPU))
		}
	}
	for _, name := range present {
		for _, operation := range operationNames {
			cells = append(cells, newBioCells(name, operation, nil))
		}
	}
	slices.SortStableFunc(cells, func(a, b BlockBioCells) int { return cmp.Compare(a.Device, b.Device) })
	return cells, nil
}

func newBioCells(device, operation string, perCPU []blockBioHfBioIo) BlockBioCells {
	c := BlockBioCells{Device: device, Operation: operation}
	c.Total.Cells = make([]uint64, histogram.Time().Cells())
	c.Size.Cells = make([]uint64, histogram.Size().Cells())
	for i := range perCPU {
		p := &perCPU[i]
		for j := range c.Total.Cells {
			c.Total.Cells[j] += p.Times[j]
		}
		for j := range c.Size.Cells {
			c.Size.Cells[j] += p.Sizes[j]
		}
		c.Total.Sum += p.TotalNs
		c.Size.Sum += p.Bytes
		for j := range c.Errors {
			c.Errors[j] += p.Errors[j]
		}
	}
	return c
}

// follow attaches the programs while they are wanted.
func (b *BlockBio) follow(wanted bool) error {
	switch {
	case wanted == (len(b.links) > 0):
		return nil
	case !wanted:
		return b.detach()
	case b.object == nil:
		if err := b.load(); err != nil {
			return err
		}
	}
	// The end first, so that what begins is ended.
	for _, name := range slices.Backward(b.object.programs) {
		l, err := link.AttachTracing(link.TracingOptions{Program: b.object.coll.Programs[name]})
		if err != nil {
			return errors.Join(fmt.Errorf("attach %s: %w", name, err), b.detach())
		}
		b.links = append(b.links, l)
	}
	return nil
}

func (b *BlockBio) load() error {
	spec, err := loadBlockBio()
	if err != nil {
		return fmt.Errorf("parse bio object: %w", err)
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count CPUs: %w", err)
	}
	index := histogram.NewIndex(histogram.Time())
	if err := setVariables(spec, map[string]any{
		blockBioVarHfTimeFirst: index.First,
		blockBioVarHfTimeCuts:  index.Cuts,
	}); err != nil {
		return err
	}
	devices := sizeBlock(0, 0, maxDevices, cpus).devices
	spec.Maps[blockBioMapHfBlockDev].MaxEntries = uint32(devices)
	spec.Maps[blockBioMapHfBioCells].MaxEntries = uint32(devices * len(operationNames))
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return fmt.Errorf("load bio object: %w", err)
	}
	b.object = &object{
		coll:     coll,
		programs: []string{blockBioProgHfBioQueue, blockBioProgHfBioComplete}, // in the order of hf_ran's argument
		reasons:  []DropReason{DropNoSlot},
	}
	return nil
}

func (b *BlockBio) detach() error {
	var errs []error
	for _, l := range b.links {
		errs = append(errs, l.Close())
	}
	b.links = nil
	return errors.Join(errs...)
}

// Stats returns the counters of the object, none while there never was a device for it.
func (b *BlockBio) Stats() (Stats, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.object == nil {
		return Stats{Dropped: map[DropReason]uint64{DropNoSlot: 0}}, nil
	}
	return b.object.stats()
}

// Close detaches and frees everything. It is idempotent.
func (b *BlockBio) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	err := b.detach()
	if b.object != nil {
		b.object.coll.Close()
		b.object = nil
	}
	return err
}
