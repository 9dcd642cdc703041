// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"math"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/histogram"
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
	weight                           uint64 // the greatest
	devices                          []weighed
}

// weighed is the device time of a request, and for how many it stands.
type weighed struct{ ns, weight uint64 }

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
			w.weight = max(w.weight, uint64(s.Weight))
			if s.IO.DeviceTime > 0 { // else it is an empty flush, which is never issued
				w.devices = append(w.devices, weighed{s.IO.DeviceTime, uint64(s.Weight)})
			}
		}
		counts, _ = measure(t, b, device, func() {
			time.Sleep(1100 * time.Millisecond) // what is left out is by the requests of a second
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
		got := *w
		got.devices = nil
		want := sampledIO{samples: int(c.Total.Count()), requests: c.Total.Count(), bytes: c.Size.Sum,
			latency: w.latency, device: c.DeviceTime.Sum, weight: 1}
		// All but the walks of their stacks.
		if !reflect.DeepEqual(got, want) || w.latency > c.Total.Sum || w.latency < w.device {
			t.Errorf("%s: sampled %+v, counted %+v in %d ns", op, got, want, c.Total.Sum)
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
		} {
			ratio := float64(x.sampled) / float64(x.true)
			t.Logf("%s %s: %d samples say %d, counted %d: %.3f", op, x.what, w.samples, x.sampled, x.true, ratio)
			if ratio < 1-x.within || ratio > 1+x.within {
				t.Errorf("%s: samples say %d %s, counted %d", op, x.sampled, x.what, x.true)
			}
		}
		holdDeviceTime(t, op, w, c.DeviceTime)
	}
}

// holdDeviceTime compares the device time that the samples say with what was counted. One
// request of 30 ms can be half of all the time and be sampled or not, so it is the time of
// the 99 % that are shortest, within five standard deviations; of the others the samples say
// no more than if all were taken.
func holdDeviceTime(t *testing.T, op string, w *sampledIO, counted histogram.Snapshot) {
	t.Helper()
	cuts := histogram.Time().Cuts
	var below, last, squares uint64
	var least, most float64
	for cell := 0; cell < len(cuts) && below*100 < counted.Count()*99; cell++ {
		n := counted.Cells[cell]
		below += n
		least += float64(n * last)
		last = cuts[cell]
		most += float64(n * last)
		squares += n * last * last
	}
	if last == 0 || below*100 < counted.Count()*99 {
		t.Fatalf("%s: %d of %d device times have a cell", op, below, counted.Count())
	}
	var requests, said, beyond uint64
	for _, d := range w.devices {
		if d.ns > last {
			beyond += d.ns * d.weight
			continue
		}
		requests += d.weight
		said += d.ns * d.weight
	}
	// Of each run of requests one was drawn.
	slack := 5 * math.Sqrt(float64(w.weight)*float64(squares))
	t.Logf("%s: %d requests of up to %d ns, samples say %d; they took %.0f to %.0f ns, samples say %d (+-%.0f); the others: %d",
		op, below, last, requests, least, most, said, slack, beyond)
	if ratio := float64(requests) / float64(below); ratio < 0.9 || ratio > 1.1 {
		t.Errorf("%s: samples say %d requests of up to %d ns, counted %d", op, requests, last, below)
	}
	if float64(said) < least-slack || float64(said) > most+slack {
		t.Errorf("%s: samples say %d ns on the device, counted %.0f to %.0f (+-%.0f)", op, said, least, most, slack)
	}
	if rest := float64(counted.Sum) - least; float64(beyond) > float64(w.weight)*rest {
		t.Errorf("%s: samples say %d ns of the longest, counted at most %.0f", op, beyond, rest)
	}
}
