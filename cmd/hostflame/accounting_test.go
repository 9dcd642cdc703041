// SPDX-License-Identifier: Apache-2.0

package main

import (
	"log/slog"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/kerneltest"
)

func TestParseCPUTime(t *testing.T) {
	const stat = "cpu  100 20 3 5000 600 7 8 90 50 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
	// 100 + 20 + 3 + 7 + 8 ticks of 10 ms; no idle, iowait, steal or guest.
	if got, err := parseCPUTime(stat); err != nil || got != 1380*time.Millisecond {
		t.Errorf("%v, %v, want 1.38s", got, err)
	}
	for _, bad := range []string{"", "cpu", "cpu0 1 2 3 4 5 6 7 8 9 10", "cpu 1 2 x 4 5 6 7 8"} {
		if got, err := parseCPUTime(bad); err == nil {
			t.Errorf("%q: %v, want an error", bad, got)
		}
	}
}

// TestAccounting attaches everything, keeps the CPUs busy, and wants each of the ratios
// that has something to compare at 1.
func TestAccounting(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	cfg := bpf.CPUConfig{Frequency: 99, CgroupV1: bpf.CPUControllerV1()}
	k, err := attach(cfg, bpf.WaitSampling{}, bpf.DefaultStackRate, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer k.close()
	a := newAccounting(k, cfg, slog.New(slog.DiscardHandler))
	host := kerneltest.ReadHostCPU(t)
	a.check()
	if r, ok := a.ratios()["cpu"]; ok {
		t.Errorf("cpu ratio %v before there was something to compare", r)
	}
	var done atomic.Bool
	defer done.Store(true)
	for range 2 {
		go func() {
			for !done.Load() {
			}
		}()
	}
	// Threads that come and go, and some I/O.
	for end := time.Now().Add(leastCPUTime); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		f.Write(make([]byte, 256<<10))
		f.Sync()
		f.Close()
		if err := k.cpu.Drain(func(*bpf.Sample) {}); err != nil {
			t.Fatal(err)
		}
	}
	a.check()
	// The timer goes on in what is stolen, the kernel's account does not.
	stretch := map[string]float64{"cpu": kerneltest.ReadHostCPU(t).Since(host).Stretch()}
	// Ticks of /proc/stat are coarse, and its few requests are not read at the same moment
	// as ours. Over a minute the bounds are tighter: the tests of bpf hold those.
	for subsystem, within := range map[string]float64{"cpu": 0.05, "runqueue": 0.01, "block": 0.05, "block_bytes": 0.05} {
		r, ok := a.ratios()[subsystem]
		if !ok {
			t.Errorf("no ratio of %s", subsystem)
		} else if most := max(1, stretch[subsystem]); r < 1-within || r > most*(1+within) {
			t.Errorf("%s: ratio %v, want 1 to %v within %v", subsystem, r, most, within)
		}
	}
}
