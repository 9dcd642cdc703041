// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// newSampledBlock takes stacks, each CPU rate a second of a device and operation, at
// block_io_start or, if early, at block_getrq.
func newSampledBlock(t *testing.T, rate int, early bool) *Block {
	t.Helper()
	kerneltest.Require(t)
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	hooks, err := findBlockHooks(kernel)
	if err != nil {
		t.Fatal(err)
	}
	if early {
		hooks.ownStart = false
	} else if !hooks.ownStart {
		t.Skip("this kernel has no block_io_start")
	}
	tables, err := NewTables(DefaultTableMemory)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Close() })
	b, err := newBlock(BlockConfig{Tables: tables, StackRate: rate, CgroupV1: CPUControllerV1()}, hooks)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { b.Close() })
	if !b.HasStacks() {
		t.Fatal("no stacks")
	}
	return b
}

// sampledIO is what the samples of one device add up to.
type sampledIO struct {
	samples                          int
	requests, bytes, latency, device uint64
}

// Below the rate every request is sampled, with what it was; above, the weights make up for
// those that are not.
func TestBlockStacks(t *testing.T) {
	t.Run("block_io_start", func(t *testing.T) { testBlockStacks(t, false) })
	t.Run("block_getrq", func(t *testing.T) { testBlockStacks(t, true) })
}

func testBlockStacks(t *testing.T, early bool) {
	device, _ := loopDevice(t)
	name := filepath.Base(device)
	b := newSampledBlock(t, 100, early)
	type measured = func(*testing.T, *Block, string, func()) (ioCounts, ioBooks)
	load := func(measure measured, n int) (counts ioCounts, sampled map[string]*sampledIO) {
		sampled = map[string]*sampledIO{"read": {}, "write": {}}
		take := func(s *Sample) {
			if s.IO.Device != name || sampled[s.IO.Operation] == nil {
				return
			}
			if s.Profile != ProfileBlockIO || s.PID != uint32(os.Getpid()) || len(s.Kernel) == 0 || len(s.User) == 0 {
				t.Errorf("a sample of another's: %+v", s)
			}
			if s.IO.Queue+s.IO.DeviceTime != s.Value || s.Value == 0 {
				t.Errorf("latency %d ns, queue %d, device %d", s.Value, s.IO.Queue, s.IO.DeviceTime)
			}
			w := sampled[s.IO.Operation]
			w.samples++
			w.requests += uint64(s.Weight)
			w.bytes += s.IO.Bytes * uint64(s.Weight)
			w.latency += s.Value * uint64(s.Weight)
			w.device += s.IO.DeviceTime * uint64(s.Weight)
		}
		counts, _ = measure(t, b, device, func() {
			for op := range sampled {
				sampled[op] = &sampledIO{}
			}
			if err := b.Drain(func(*Sample) {}); err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			buf := alignedBuffer(t, 8192)
			for i := range n {
				if _, err := f.ReadAt(buf[:4096], int64(i%4096)*4096); err != nil {
					t.Fatal(err)
				}
				if i%2 == 0 {
					if _, err := f.WriteAt(buf, int64(i%2048)*8192); err != nil {
						t.Fatal(err)
					}
				}
				if i%16 == 0 {
					// Is never issued itself.
					if err := f.Sync(); err != nil {
						t.Fatal(err)
					}
				}
				if i%64 == 0 {
					if err := b.Drain(take); err != nil {
						t.Fatal(err)
					}
				}
			}
		})
		if err := b.Drain(take); err != nil {
			t.Fatal(err)
		}
		lost, err := b.StackLosses()
		if err != nil {
			t.Fatal(err)
		}
		for reason, n := range lost {
			if n > 0 {
				t.Errorf("%d samples lost: %v", n, reason)
			}
		}
		return counts, sampled
	}

	counts, sampled := load(measureDevice, 80)
	for op, w := range sampled {
		c := counts[op]
		want := sampledIO{int(c.Total.Count()), c.Total.Count(), c.Size.Sum, w.latency, c.DeviceTime.Sum}
		// All but the walks of their stacks.
		if *w != want || w.latency > c.Total.Sum || w.latency < w.device {
			t.Errorf("%s: sampled %+v, counted %+v in %d ns", op, *w, want, c.Total.Sum)
		}
	}

	counts, sampled = load(countsDuring, 20_000)
	for op, w := range sampled {
		c := counts[op]
		if w.samples < 100 || w.samples > int(c.Total.Count())*3/4 {
			t.Errorf("%s: %d samples of %d requests, want a part", op, w.samples, c.Total.Count())
		}
		for _, x := range []struct {
			what          string
			sampled, true uint64
			within        float64
		}{
			// The requests of a run that was left are all that can be too many or missing.
			{"requests", w.requests, c.Total.Count(), 0.1},
			{"bytes", w.bytes, c.Size.Sum, 0.1},
			// A part of it can be of few requests.
			{"device time", w.device, c.DeviceTime.Sum, 0.4},
		} {
			ratio := float64(x.sampled) / float64(x.true)
			t.Logf("%s %s: %d samples say %d, counted %d: %.3f", op, x.what, w.samples, x.sampled, x.true, ratio)
			if ratio < 1-x.within || ratio > 1+x.within {
				t.Errorf("%s: samples say %d %s, counted %d", op, x.sampled, x.what, x.true)
			}
		}
	}
}
