// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
)

const (
	accountingFirst    = 10 * time.Second // after the start
	accountingInterval = time.Minute
	// The kernel times our programs for this long, once an interval: it costs some 20 ns
	// for each run of every BPF program on the host.
	timedFor = time.Second
	// Below this, the 10 ms clock of /proc/stat says little.
	leastCPUTime = 10 * time.Second
)

// accounting checks, once a minute, what the agent counted against the kernel's own
// books. It is apart from the scrape because the books are long: a file a thread.
type accounting struct {
	kernel *kernel
	log    *slog.Logger
	// period is the CPU time that a sample stands for, 0 when the event counts cycles.
	period  time.Duration
	cpuTime time.Duration // kernel CPU time when samples was read first
	samples uint64

	mu    sync.Mutex
	ratio map[string]float64
}

// newAccounting takes the starting point; call it right after attach.
func newAccounting(k *kernel, cfg bpf.CPUConfig, log *slog.Logger) *accounting {
	a := &accounting{kernel: k, log: log, ratio: map[string]float64{}}
	if k.cpu == nil || cfg.Event == bpf.EventCycles {
		return a
	}
	// An error here comes back with each check, which logs it.
	a.cpuTime, _ = kernelCPUTime()
	a.samples, _ = k.cpu.Due()
	a.period = time.Second / time.Duration(cfg.Frequency)
	return a
}

// ratios returns counted / kernel by subsystem, for those where there is something to
// compare.
func (a *accounting) ratios() map[string]float64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.ratio)
}

// run checks until ctx ends.
func (a *accounting) run(ctx context.Context) {
	next := time.NewTimer(accountingFirst)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		}
		a.check()
		a.timePrograms(ctx)
		next.Reset(accountingInterval)
	}
}

func (a *accounting) check() {
	block := sync.OnceValues(func() (bpf.BlockAccounts, error) { return a.kernel.block.Accounting() })
	for _, s := range []struct {
		name string
		on   bool
		read func() (counted, kernel uint64, err error)
	}{
		{"cpu", a.period > 0, a.cpu},
		{"runqueue", a.kernel.sched != nil, func() (uint64, uint64, error) { return a.kernel.sched.Accounting() }},
		{"block", a.kernel.block != nil, func() (uint64, uint64, error) {
			b, err := block()
			return b.Requests, b.KernelRequests, err
		}},
		{"block_bytes", a.kernel.block != nil, func() (uint64, uint64, error) {
			b, err := block()
			return b.Bytes, b.KernelBytes, err
		}},
	} {
		if !s.on {
			continue
		}
		counted, kernel, err := s.read()
		a.mu.Lock()
		if err != nil || kernel == 0 {
			delete(a.ratio, s.name)
		} else {
			a.ratio[s.name] = float64(counted) / float64(kernel)
		}
		a.mu.Unlock()
		if err != nil {
			a.log.Warn("compare with the kernel's accounting", "subsystem", s.name, "err", err)
			continue
		}
		a.log.Debug("compared with the kernel's accounting", "subsystem", s.name, "counted", counted, "kernel", kernel)
	}
}

// cpu compares the samples due with /proc/stat, both since attach, in ns.
func (a *accounting) cpu() (counted, kernel uint64, err error) {
	t, err := kernelCPUTime()
	if err != nil {
		return 0, 0, err
	}
	n, err := a.kernel.cpu.Due()
	if err != nil {
		return 0, 0, err
	}
	if t-a.cpuTime < leastCPUTime {
		return 0, 0, nil
	}
	return (n - a.samples) * uint64(a.period), uint64(t - a.cpuTime), nil
}

// timePrograms has the kernel time the BPF programs for a moment, where it lets us.
func (a *accounting) timePrograms(ctx context.Context) {
	var stats io.Closer
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		a.log.Debug("BPF programs are not timed", "err", err)
		return
	}
	select {
	case <-ctx.Done():
	case <-time.After(timedFor):
	}
	if err := stats.Close(); err != nil {
		a.log.Warn("stop timing BPF programs", "err", err)
	}
}

// kernelCPUTime is the time that all CPUs were not idle, from /proc/stat (proc_stat(5)).
func kernelCPUTime() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	return parseCPUTime(string(b))
}

// userHz is the unit of /proc/stat, the same on every Linux (include/asm-generic/param.h).
const userHz = 100

// parseCPUTime adds user, nice, system, irq and softirq; user has the guests' time
// already. Steal is not in it, and samples leave it out too. The kernel counts these by
// whole ticks: over a short or idle time the ratio says little.
func parseCPUTime(stat string) (time.Duration, error) {
	line, _, _ := strings.Cut(stat, "\n")
	f := strings.Fields(line)
	if len(f) < 8 || f[0] != "cpu" {
		return 0, errors.New("parse /proc/stat: no line of all CPUs")
	}
	var ticks uint64
	for _, i := range []int{1, 2, 3, 6, 7} {
		n, err := strconv.ParseUint(f[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("parse /proc/stat: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / userHz), nil
}
