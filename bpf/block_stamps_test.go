// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/histogram"
	"github.com/hostflame/hostflame/internal/kerneltest"
)

// stampsOf is how many starts of the device in a row the kernel stamped as we did.
func stampsOf(t *testing.T, b *Block, device string) uint32 {
	t.Helper()
	places, err := mapped[blockHfBlockPlaces](b.coll.Maps[blockMapHfBlockQueue])
	if err != nil {
		t.Fatal(err)
	}
	for i := range places.len {
		var q blockHfBlockPlaces
		if err := places.read(i, &q); err != nil {
			t.Fatal(err)
		}
		if q.Queue == 0 || q.Device == 0 {
			continue
		}
		if name, err := b.deviceName(q.Device - 1); err != nil {
			t.Fatal(err)
		} else if name == filepath.Base(device) {
			return q.Stamped
		}
	}
	t.Fatalf("no queue of %s", device)
	return 0
}

// stampsBehindTracepoint tells whether the kernel is known to stamp a request right behind
// block_io_start. Older ones may do so before, or not tell whether a stamp is fresh.
func stampsBehindTracepoint(t *testing.T) bool {
	t.Helper()
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(uts.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major > 6 || major == 6 && minor >= 18
}

// Starts are the kernel's stamps where those are as good as ours, and ours as soon as they are
// not: when the device's queue/iostats is turned off, what was begun meanwhile is a counted loss.
func TestBlockStamps(t *testing.T) {
	device, _ := loopDevice(t)
	b := newTestBlock(t)
	name := filepath.Base(device)
	iostats := filepath.Join("/sys/block", name, "queue/iostats")
	setIostats := func(to string) {
		t.Helper()
		if err := os.WriteFile(iostats, []byte(to), 0); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := alignedBuffer(t, 4096)
	read := func(n int) {
		t.Helper()
		for i := range n {
			if _, err := f.ReadAt(buf, int64(i%4096)*4096); err != nil {
				t.Fatal(err)
			}
		}
	}
	hidden := kerneltest.CountHiddenCompletions(t, device, "")
	// What is lost of n reads, and what half of the others took at most, in ns.
	measure := func(what string, prepare func(), n int) (lost, median uint64) {
		t.Helper()
		losses := func() uint64 {
			t.Helper()
			dropped, err := b.Dropped()
			if err != nil {
				t.Fatal(err)
			}
			return dropped[DropNoStart] + dropped[DropNoEnd]
		}
		unseen := hidden.Read(t)
		counts, _ := countsDuring(t, b, device, func() {
			lost = losses()
			prepare()
			read(n)
			lost = losses() - lost
		})
		total := counts["read"].Total
		unseen = hidden.Read(t) - unseen
		var below uint64
		for i, cut := range histogram.Time().Cuts {
			if below += total.Cells[i]; 2*below >= total.Count() {
				median = cut
				break
			}
		}
		t.Logf("%s: %d reads, %d lost, %d hidden, half take up to %d ns", what, total.Count(), lost, unseen, median)
		// Losses are of all devices.
		if n := uint64(n); total.Count() > n || total.Count()+lost+unseen < n {
			t.Errorf("%s: %d reads counted and %d lost of %d, %d hidden", what, total.Count(), lost, n, unseen)
		}
		return lost, median
	}
	nothing := func() {}
	_, ours := measure("ours", nothing, 60)
	measure("turning to the kernel's", nothing, 1000)
	stamps := stampsOf(t, b, device)
	if want := uint32(64); stampsBehindTracepoint(t) && stamps != want {
		t.Errorf("%d starts were stamped as we did, want %d", stamps, want)
	} else if stamps != want {
		t.Logf("this kernel stamps requests before block_io_start, or not each: %d", stamps)
	}
	_, kernels := measure("the kernel's", nothing, 2000)
	if stamps != 0 && (kernels*4 < ours || kernels > ours*4) {
		t.Errorf("reads take %d ns by the kernel's stamps, %d ns by ours", kernels, ours)
	}
	t.Cleanup(func() { os.WriteFile(iostats, []byte("1"), 0) })
	if lost, _ := measure("without", func() { setIostats("0") }, 2000); lost > 3+hidden.Read(t) {
		t.Errorf("%d reads lost after iostats were turned off", lost)
	}
	if stamps := stampsOf(t, b, device); stamps != 0 {
		t.Errorf("without iostats %d starts were stamped", stamps)
	}
	if lost, _ := measure("with them again", func() { setIostats("1") }, 2000); lost > 3+hidden.Read(t) {
		t.Errorf("%d reads lost after iostats were turned on", lost)
	}
	if again := stampsOf(t, b, device); again != stamps {
		t.Errorf("%d starts were stamped, want %d again", again, stamps)
	}
}
