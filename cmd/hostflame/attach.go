// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"log/slog"
	"strings"
	"sync"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/profiler"
)

// kernel is the attached kernel side. What could not be attached is nil, with the reason
// beside it.
type kernel struct {
	cpu                        *bpf.CPU
	sched                      *bpf.Sched
	waits                      *bpf.Waits // where cpu and sched work
	block                      *bpf.Block
	bio                        *bpf.BlockBio // nil where it does not work
	tables                     *bpf.Tables   // of all that take stacks; nil where there can be none
	mappings                   *bpf.Mappings // nil where there are none, or nobody to use them
	containers                 *profiler.Containers
	charged                    *profiler.Containers // of block I/O
	cpuErr, schedErr, blockErr error
	waitsErr                   error
}

var (
	errWaitsOff = errors.New("turned off by --sampling.wait-rate=0")
	errIOOff    = errors.New("turned off by --sampling.io-rate=0")
)

// attach loads and attaches each hook family on its own. What this kernel or these
// privileges do not allow is logged with what is lost; it is an error only when nothing
// is left. ioRate is bpf.BlockConfig's StackRate, or 0 for no stacks.
func attach(cfg bpf.CPUConfig, waits bpf.WaitSampling, ioRate int, log *slog.Logger) (*kernel, error) {
	k := &kernel{containers: profiler.NewContainers("cpu"), charged: profiler.NewContainers("blkio")}
	// Without them each part makes do or says itself what does not work.
	var tablesErr error
	k.tables, tablesErr = bpf.NewTables(cfg.TableMemory)
	cfg.Tables = k.tables
	// The verifier takes its time, so all at once.
	var loading sync.WaitGroup
	loading.Go(func() {
		k.sched, k.schedErr = bpf.NewSched(bpf.SchedConfig{CgroupV1: cfg.CgroupV1, ContainerName: k.containerName, Sampling: waits})
		if waits.Off() {
			k.waitsErr = errWaitsOff
		} else if k.waitsErr = cmp.Or(k.schedErr, tablesErr); k.waitsErr == nil {
			k.waits, k.waitsErr = bpf.NewWaits(k.sched, k.tables)
		}
	})
	loading.Go(func() {
		block := bpf.BlockConfig{Tables: k.tables, StackRate: ioRate, CgroupV1: cfg.CgroupV1, ContainerName: k.chargedName}
		if ioRate == 0 {
			block.Tables = nil
		}
		k.block, k.blockErr = bpf.NewBlock(block)
	})
	loading.Go(func() {
		var err error
		if k.bio, err = bpf.NewBlockBio(); err != nil {
			log.Warn("I/O of devices without requests is not measured", "err", withoutGuess(err), "lost", "hostflame_block_bio_*")
		}
	})
	loading.Go(func() {
		if k.cpu, k.cpuErr = bpf.NewCPU(cfg); k.cpuErr == nil {
			k.mappings = newMappings(log)
		}
	})
	loading.Wait()

	if k.cpuErr != nil && k.schedErr != nil && k.blockErr != nil {
		k.close()
		return nil, hintf(attachHint(k.cpuErr, cfg.Event), "attach to the kernel: %w", k.cpuErr)
	}
	for _, part := range []struct {
		err  error
		what string
		lost string
	}{
		{k.cpuErr, "CPU sampling", "the cpu profile and hostflame_cpu_seconds_total"},
		{k.schedErr, "run-queue latency", "the hostflame_runqueue_*, hostflame_offcpu_* and hostflame_container_* metrics of the scheduler"},
		{k.waitsErr, "sampling of waits and blocked time", "the profiles runqueue, culprit, offcpu and wall"},
		{k.blockErr, "block I/O latency", "the blockio profile and the hostflame_block_io_* histograms"},
	} {
		if part.err != nil && part.err != errWaitsOff {
			log.Warn(part.what+" does not work here", "err", withoutGuess(part.err), "lost", part.lost, "hint", attachHint(part.err, cfg.Event))
		}
	}
	return k, nil
}

// containerName names the container of a cgroup for a label.
func (k *kernel) containerName(cgroup uint64) string {
	return strings.ToValidUTF8(k.containers.Name(cgroup, 0), "\uFFFD")
}

// chargedName is that of a cgroup in the hierarchy of block I/O.
func (k *kernel) chargedName(cgroup uint64) string {
	return strings.ToValidUTF8(k.charged.Name(cgroup, 0), "\uFFFD")
}

// newMappings begins to listen to what processes map; nil where that does not work.
func newMappings(log *slog.Logger) *bpf.Mappings {
	m, err := bpf.NewMappings(bpf.MappingsConfig{})
	if err != nil {
		log.Warn("mapping events do not work here, /proc is read instead", "err", err,
			"lost", "names of processes that are gone before they are looked at")
		return nil
	}
	return m
}

// detach stops the sampling. What was sampled can still be drained, and the histograms
// still be read.
func (k *kernel) detach() error {
	var errs []error
	if k.cpu != nil {
		errs = append(errs, k.cpu.Detach())
	}
	if k.waits != nil {
		errs = append(errs, k.waits.Detach())
	}
	return errors.Join(errs...)
}

// close frees everything. It is idempotent.
func (k *kernel) close() error {
	var errs []error
	if k.waits != nil {
		errs = append(errs, k.waits.Close())
	}
	if k.cpu != nil {
		errs = append(errs, k.cpu.Close())
	}
	if k.sched != nil {
		errs = append(errs, k.sched.Close())
	}
	if k.block != nil {
		errs = append(errs, k.block.Close())
	}
	if k.bio != nil {
		errs = append(errs, k.bio.Close())
	}
	if k.mappings != nil {
		errs = append(errs, k.mappings.Close())
	}
	errs = append(errs, k.tables.Close())
	errs = append(errs, k.containers.Close(), k.charged.Close())
	return errors.Join(errs...)
}
