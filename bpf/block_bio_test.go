// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// zramDisk makes a zram device of 64 MiB, and skips where the kernel has none.
func zramDisk(t *testing.T) (device string) {
	t.Helper()
	kerneltest.Require(t)
	for _, dir := range []string{"/sys/block/zram0", "/sys/block/zram1"} {
		// One that has a size is somebody's.
		if b, err := os.ReadFile(dir + "/disksize"); err != nil || string(b) != "0\n" {
			continue
		}
		if err := os.WriteFile(dir+"/disksize", []byte("64M"), 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.WriteFile(dir+"/reset", []byte("1"), 0) })
		return "/dev/" + filepath.Base(dir)
	}
	t.Skip("no zram device is free")
	return ""
}

// A device without requests has its bios counted, as in /proc/diskstats, and none is counted
// among the requests.
func TestBlockBioEqualsDiskstats(t *testing.T) {
	kerneltest.Require(t)
	b, err := NewBlockBio()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { b.Close() })
	requests := newTestBlock(t)
	device := zramDisk(t)
	name := filepath.Base(device)
	of := func() map[string]BlockBioCells {
		t.Helper()
		cells, err := b.Read()
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]BlockBioCells{}
		for _, c := range cells {
			if c.Device == name {
				m[c.Operation] = c
			}
		}
		return m
	}
	before := of()
	if len(before) != len(operationNames) {
		t.Fatalf("%d series of a device that has come, want %d", len(before), len(operationNames))
	}
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before, booksBefore := of(), booksOf(t, device)
	const reads, writes = 1009, 211
	buf := alignedBuffer(t, 64<<10)
	for i := range writes {
		if _, err := f.WriteAt(buf, int64(i)*(64<<10)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range reads {
		if _, err := f.ReadAt(buf[:4096], int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	after, books := of(), booksOf(t, device).since(booksBefore)
	for _, x := range []struct {
		op           string
		count, bytes uint64
		kernel       uint64
		sectors      uint64
	}{
		{"read", reads, reads * 4096, books[bookReads], books[bookReadSectors]},
		{"write", writes, writes * (64 << 10), books[bookWrites], books[bookWrittenSectors]},
	} {
		n := after[x.op].Total.Count() - before[x.op].Total.Count()
		bytes := after[x.op].Size.Sum - before[x.op].Size.Sum
		if n != x.count || n != x.kernel || bytes != x.bytes || bytes != x.sectors*512 || after[x.op].Total.Sum == 0 {
			t.Errorf("%s: %d bios of %d bytes, made %d of %d, in /proc/diskstats %d of %d", x.op, n, bytes, x.count, x.bytes, x.kernel, x.sectors*512)
		}
	}
	if series := seriesOf(t, requests, name); len(series) != 0 {
		t.Errorf("requests of a device that has none: %v", slices.Collect(maps.Keys(series)))
	}
	s, err := b.Stats()
	if err != nil || s.Dropped[DropNoSlot] != 0 {
		t.Errorf("lost %v, %v", s.Dropped, err)
	}
	// The programs go with the device, what was counted stays.
	f.Close()
	if err := os.WriteFile("/sys/block/"+name+"/reset", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	if left := of(); left["read"].Total.Count() < reads || len(b.links) != 0 {
		t.Errorf("%d reads and %d programs attached after the device left", left["read"].Total.Count(), len(b.links))
	}
}
