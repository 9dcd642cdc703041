// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"

	"github.com/hostflame/hostflame/internal/histogram"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type hf_operation -type hf_block_error -type hf_block_flag -type hf_block_io -type hf_block_device -type hf_block_request -type hf_block_places -type hf_block_end -type hf_slot_operation block block.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -I. -I/usr/include/x86_64-linux-gnu

// BlockConfig configures the block I/O hooks.
type BlockConfig struct {
	// Tables are the unwind tables that the stacks of submitters are walked by; they must
	// not end before the Block. nil: no stacks are taken.
	Tables *Tables
	// StackRate is how many samples a second each CPU takes of the requests of one device and
	// operation, before it leaves some out; DefaultStackRate if 0.
	StackRate int
	CgroupV1  bool // the cpu controller is on a v1 hierarchy (see CPUControllerV1)
	// ContainerName names the container of a cgroup, by its kernfs id in the hierarchy of
	// block I/O: blkio's where that is on v1 (ControllerV1), else the unified one. nil:
	// nothing is counted by container.
	ContainerName func(cgroup uint64) string
}

// Block measures the requests of all request-based block devices (those with a
// directory mq in /sys/block), by whole device and operation. Each request counts once,
// when its last byte completes:
//
//   - total is from the start (a bio became a request) to the last byte;
//   - device time is from the last issue to the driver to the last byte;
//   - queue time is the rest: plug, scheduler, waiting for a place in the device, for a
//     flush that has to come first or after, and issues that the driver sent back.
//
// The operations are those of the kernel's own books, so that counts and sizes are equal
// to the fields of /proc/diskstats:
//
//   - read; write, with zone append; write-zeroes, which diskstats has among the writes;
//     discard.
//   - flush is the command that makes the device write out its cache, as in fields 16
//     and 17: one serves all requests that wait for it at that moment. What fsync sends,
//     an empty request that only waits for such a command, is a write without a size and
//     without device time: the kernel books it as a write too. A write that wants a
//     flush before or after it (PREFLUSH, FUA) waits for it in its queue time.
//   - other is passthrough (SG_IO and the like), which is not in diskstats, and secure
//     erase and zone management, which diskstats has among the writes.
//
// Sizes are those of requests that carry data. A request with an error counts as any
// other, and once as error, of the class of the first part that failed, be it all of its
// bytes or some. One that was merged into another counts as a merge and not as a request,
// as in diskstats; the other keeps its own start, or begins with the earlier of both where
// its start is the kernel's stamp.
//
// A request that the driver sent back was issued more than once: its device time is from
// the last issue, what was before that is queue time.
//
// A request that was in flight when the hooks were attached has the kernel's start; if
// its issue was not seen either, only its total and size count.
//
// All methods may be called from several goroutines.
type Block struct {
	object
	ownStart bool
	stacks   *blockStacks // nil: none are taken
	stop     context.CancelFunc
	tended   sync.WaitGroup

	mu       sync.Mutex // for what follows
	links    []link.Link
	books    *blockBooks // nil: not by container
	tendErr  error
	accounts accounts
}

// NewBlock loads the programs, attaches them, and measures from then on. It needs
// CAP_PERFMON and CAP_BPF, and Linux 6.1 with BTF.
func NewBlock(cfg BlockConfig) (*Block, error) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("load kernel BTF: %w", err)
	}
	k, err := findBlockHooks(kernel)
	if err != nil {
		return nil, err
	}
	return newBlock(cfg, k)
}

// blockHooks is what the kernel has of what the hooks use.
type blockHooks struct {
	ownStart bool // block_io_start
	bioStart bool // block_getrq, at which stacks are taken where there is no block_io_start
	diskSeen bool // writeback_bdi_register; else each request is asked whether its disk is still the same
	flags    requestFlags
}

func findBlockHooks(kernel *btf.Spec) (k blockHooks, err error) {
	if k.ownStart, err = hasTracepoint(kernel, "block_io_start"); err != nil {
		return k, err
	}
	if k.bioStart, err = hasTracepoint(kernel, "block_getrq"); err != nil {
		return k, err
	}
	if k.diskSeen, err = hasTracepoint(kernel, "writeback_bdi_register"); err != nil {
		return k, err
	}
	k.flags, err = requestFlagsOf(kernel, kernelBTF)
	return k, err
}

func hasTracepoint(kernel *btf.Spec, name string) (bool, error) {
	var t *btf.Typedef
	err := kernel.TypeByName("btf_trace_"+name, &t)
	if err != nil && !errors.Is(err, btf.ErrNotFound) {
		return false, fmt.Errorf("look for %s: %w", name, err)
	}
	return err == nil, nil
}

func newBlock(cfg BlockConfig, k blockHooks) (_ *Block, err error) {
	spec, err := loadBlock()
	if err != nil {
		return nil, fmt.Errorf("parse block object: %w", err)
	}
	sizes, err := blockSizesOfHost(sysBlock)
	if err != nil {
		return nil, err
	}
	rate := 0
	if cfg.Tables != nil && (k.ownStart || k.bioStart) {
		rate = cmp.Or(cfg.StackRate, DefaultStackRate)
	}
	// What a burst brings until the rate is held down, on some devices at once.
	ringBytes := ringSize(8 * rate)
	index := histogram.NewIndex(histogram.Time())
	if err := setVariables(spec, map[string]any{
		blockVarHfTimeFirst:   index.First,
		blockVarHfTimeCuts:    index.Cuts,
		blockVarHfStates:      uint64(sizes.states),
		blockVarHfKernelStart: !k.ownStart,
		blockVarHfBioStart:    !k.ownStart && k.bioStart,
		blockVarHfDiskSeen:    k.diskSeen,
		blockVarHfFlushSeq:    k.flags.flushSeq,
		blockVarHfIoStat:      k.flags.ioStat,
		blockVarHfStackRate:   uint32(rate),
		blockVarHfByContainer: cfg.ContainerName != nil,
		blockVarHfBlkioV1:     ControllerV1("blkio"),
		blockVarHfCgroupV1:    cfg.CgroupV1,
		blockVarHfRingHalf:    uint64(ringBytes / 2),
		blockVarHfMaxFrames:   maxFrames(),
		blockVarHfAddressMask: AddressMask(),
	}); err != nil {
		return nil, err
	}
	spec.Maps[blockMapHfBlockState].MaxEntries = uint32(sizes.states)
	spec.Maps[blockMapHfBlockQueue].MaxEntries = uint32(sizes.queues)
	spec.Maps[blockMapHfBlockDev].MaxEntries = uint32(sizes.devices)
	spec.Maps[blockMapHfBlockCells].MaxEntries = uint32(sizes.devices * len(operationNames))
	spec.Maps[blockMapHfBlockRates].MaxEntries = spec.Maps[blockMapHfBlockCells].MaxEntries
	if k.ownStart || !k.bioStart {
		spec.Maps[blockMapHfBlockDrawn].MaxEntries = 1
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("count CPUs: %w", err)
	}
	spec.Maps[blockMapHfRings].MaxEntries = uint32(cpus)
	if cfg.ContainerName != nil {
		spec.Maps[blockMapHfSlotCells].MaxEntries = uint32(blockSlots(cpus) * slotOperations)
	} else {
		delete(spec.Programs, blockProgHfCgroupRmdir)
	}
	var shared map[string]*ebpf.Map
	if rate > 0 {
		shared = cfg.Tables.replace(spec)
	}
	if !k.ownStart {
		delete(spec.Programs, blockProgHfBlockStart)
	}
	if k.ownStart || rate == 0 {
		delete(spec.Programs, blockProgHfBlockBio)
	}
	if !k.diskSeen {
		delete(spec.Programs, blockProgHfBlockDisk)
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	if err != nil {
		return nil, fmt.Errorf("load block object: %w", err)
	}
	b := &Block{
		object: object{
			coll: coll,
			// In the order of hf_ran's argument.
			programs: []string{
				blockProgHfBlockStart, blockProgHfBlockIssue, blockProgHfBlockDone, blockProgHfBlockDisk,
				blockProgHfBlockRequeue, blockProgHfBlockAbsorb, blockProgHfBlockBack, blockProgHfBlockFront, blockProgHfBlockSplit,
				blockProgHfBlockBio,
			},
			reasons: []DropReason{DropNegative, DropNoSlot, DropNoStart, DropNoEnd},
		},
		ownStart: k.ownStart,
		stop:     func() {},
	}
	defer func() {
		if err != nil {
			b.Close()
		}
	}()
	if cfg.ContainerName != nil {
		if b.books, err = newBlockBooks(coll, cfg.ContainerName); err != nil {
			return nil, err
		}
	}
	if rate > 0 {
		r, err := newRings(coll.Maps[blockMapHfRings], ringBytes)
		if err != nil {
			return nil, err
		}
		b.stacks = newBlockStacks(r, b.deviceName, coll.Variables[blockVarHfStackSecond])
	}
	// Backwards: what tells of new disks comes before what relies on it.
	for _, name := range slices.Backward(append(slices.Clone(b.programs), blockProgHfCgroupRmdir)) {
		if coll.Programs[name] == nil {
			continue
		}
		l, err := link.AttachTracing(link.TracingOptions{Program: coll.Programs[name]})
		if err != nil {
			return nil, fmt.Errorf("attach %s: %w", name, err)
		}
		b.links = append(b.links, l)
	}
	if b.books != nil {
		var ctx context.Context
		ctx, b.stop = context.WithCancel(context.Background())
		b.tended.Go(func() { b.tend(ctx) })
	}
	// The books begin here.
	if _, err := b.Accounting(); err != nil {
		return nil, err
	}
	return b, nil
}

// OwnStart tells whether the start of a request is stamped by the hooks, at
// block_io_start, which Linux 6.5 and newer have, or by the kernel right behind. Else it is the kernel's stamp, which
// is of the allocation of the request, perhaps as one of a batch; and where the device's
// queue/iostats is off there is none: then the total is the device time.
func (b *Block) OwnStart() bool { return b.ownStart }

// Stats returns the counters of the object. What is missing in the samples is not among the
// drops: that is StackLosses.
func (b *Block) Stats() (Stats, error) {
	s, err := b.stats()
	if err != nil {
		return s, err
	}
	delete(s.Dropped, DropRingFull)
	delete(s.Dropped, DropNoRing)
	return s, nil
}

// Close detaches and frees everything. It is idempotent.
func (b *Block) Close() error {
	b.stop()
	b.tended.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	var errs []error
	for _, l := range b.links {
		errs = append(errs, l.Close())
	}
	b.links = nil
	if b.stacks != nil {
		errs = append(errs, b.stacks.rings.close())
	}
	b.coll.Close()
	return errors.Join(errs...)
}
