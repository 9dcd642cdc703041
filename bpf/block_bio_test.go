// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// zramDisk makes a zram device of 64 MiB, and skips where the kernel has none.
func zramDisk(t *testing.T) (device string) {
	t.Helper()
	kerneltest.Require(t)
	const control = "/sys/class/zram-control"
	// A read makes the device.
	number, err := os.ReadFile(control + "/hot_add")
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("this kernel has no zram")
	}
	if err != nil {
		t.Fatal(err)
	}
	name := "zram" + strings.TrimSpace(string(number))
	t.Cleanup(func() {
		os.WriteFile("/sys/block/"+name+"/reset", []byte("1"), 0)
		if err := os.WriteFile(control+"/hot_remove", number, 0); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile("/sys/block/"+name+"/disksize", []byte("64M"), 0); err != nil {
		t.Fatal(err)
	}
	return "/dev/" + name
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
		return bioCells(t, b, device)
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
	left, links := of(), len(b.links)
	if left["read"].Total.Count() < reads {
		t.Errorf("%d reads after the device left", left["read"].Total.Count())
	}
	others, err := bioDevices(sysBlock)
	if err != nil {
		t.Fatal(err)
	}
	if links != 0 && len(others) == 0 {
		t.Errorf("%d programs attached after the device left", links)
	}
}
