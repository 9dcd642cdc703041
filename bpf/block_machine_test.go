// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// requireFile skips where the kernel does not have what the file is of. The machines of
// test/kernels have it all.
func requireFile(t *testing.T, path string) {
	t.Helper()
	kerneltest.Require(t)
	_, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) && !kerneltest.InVM() {
		t.Skipf("this kernel has no %s", path)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0); err != nil {
		t.Fatal(err)
	}
}

// mapperTarget is a part of a device of the device mapper (struct dm_target_spec).
type mapperTarget struct {
	start, length uint64 // sectors
	kind, params  string
}

// mapper calls the device mapper (struct dm_ioctl of linux/dm-ioctl.h) for a device of that
// name, and returns the number of the device.
func mapper(t *testing.T, command uintptr, name string, flags uint32, targets ...mapperTarget) (minor uint64) {
	t.Helper()
	const header, spec = 312, 40
	request := make([]byte, header, 4096)
	for _, target := range targets {
		size := (spec + len(target.params) + 8) &^ 7
		b := make([]byte, size)
		*(*[2]uint64)(unsafe.Pointer(&b[0])) = [2]uint64{target.start, target.length}
		*(*uint32)(unsafe.Pointer(&b[20])) = uint32(size)
		copy(b[24:], target.kind)
		copy(b[spec:], target.params)
		request = append(request, b...)
	}
	request = request[:cap(request)]
	words := (*[10]uint32)(unsafe.Pointer(&request[0]))
	*words = [10]uint32{4, 0, 0, uint32(len(request)), header, uint32(len(targets)), 0, flags}
	copy(request[48:], name)
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	const readWrite = 3 << 30
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), readWrite|header<<16|0xfd<<8|command, uintptr(unsafe.Pointer(&request[0]))); errno != 0 {
		t.Fatalf("device mapper, command %d for %s: %v", command, name, errno)
	}
	dev := *(*uint64)(unsafe.Pointer(&request[40]))
	return dev&0xff | dev>>12&0xfff00
}

// mappedDevice makes a device of the device mapper, and returns its path.
func mappedDevice(t *testing.T, name string, targets ...mapperTarget) string {
	t.Helper()
	requireFile(t, "/dev/mapper/control")
	const create, remove, suspend, load = 3, 4, 6, 9
	minor := mapper(t, create, name, 0)
	t.Cleanup(func() { mapper(t, remove, name, 0) })
	mapper(t, load, name, 0, targets...)
	mapper(t, suspend, name, 0) // which without its flag resumes
	return fmt.Sprintf("/dev/dm-%d", minor)
}

// openBios is how many bios are taken to be in flight.
func openBios(t *testing.T, b *BlockBio) (n int) {
	t.Helper()
	var key uint64
	var state [16]byte
	for i := b.object.coll.Maps[blockBioMapHfBioState].Iterate(); i.Next(&key, &state); {
		n++
	}
	return n
}

func newTestBio(t *testing.T) *BlockBio {
	t.Helper()
	b, err := NewBlockBio()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// A device that maps a part of a loop device, and has errors for the rest: its bios are its
// own, and the loop device's requests those that come through.
func TestBlockMapper(t *testing.T) {
	requireFile(t, "/dev/mapper/control")
	loop, _ := loopDevice(t)
	requests, bios := newTestBlock(t), newTestBio(t)
	const sectors = 16 << 20 / 512
	device := mappedDevice(t, "hostflame",
		mapperTarget{0, sectors, "linear", loop + " 2048"}, mapperTarget{sectors, sectors, "error", ""})
	before := bioCells(t, bios, device)
	const reads, writes, failing = 211, 101, 13
	booksBefore := booksOf(t, device)
	counts, books := measureDevice(t, requests, loop, func() {
		// Again where a completion was hidden.
		before, booksBefore = bioCells(t, bios, device), booksOf(t, device)
		f, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		buf := alignedBuffer(t, 8192)
		for i := range int64(writes) {
			if _, err := f.WriteAt(buf, i*8192); err != nil {
				t.Fatal(err)
			}
		}
		for i := range int64(reads) {
			if _, err := f.ReadAt(buf[:4096], i*4096); err != nil {
				t.Fatal(err)
			}
		}
		for i := range int64(failing) {
			if _, err := f.ReadAt(buf[:4096], sectors*512+i*4096); !errors.Is(err, unix.EIO) {
				t.Fatalf("read where there are errors: %v, want EIO", err)
			}
		}
	})
	after, bioBooks := bioCells(t, bios, device), booksOf(t, device).since(booksBefore)
	for _, x := range []struct {
		what             string
		ours, want, book uint64
	}{
		{"reads", after["read"].Total.Count() - before["read"].Total.Count(), reads + failing, bioBooks[bookReads]},
		{"read bytes", after["read"].Size.Sum - before["read"].Size.Sum, (reads + failing) * 4096, bioBooks[bookReadSectors] * 512},
		{"writes", after["write"].Total.Count() - before["write"].Total.Count(), writes, bioBooks[bookWrites]},
		{"written bytes", after["write"].Size.Sum - before["write"].Size.Sum, writes * 8192, bioBooks[bookWrittenSectors] * 512},
	} {
		// Some kernels book no bios that a target refuses.
		refused := map[string]uint64{"reads": failing, "read bytes": failing * 4096}[x.what]
		if x.ours != x.want || x.ours != x.book && x.ours != x.book+refused {
			t.Errorf("%s: %d, want %d, in /proc/diskstats %d", x.what, x.ours, x.want, x.book)
		}
	}
	for op, c := range after {
		want := [BlockErrors]uint64{}
		if op == "read" {
			want[BlockErrorIO] = failing
		}
		if got := errorsSince(c, before[op]); got != want {
			t.Errorf("%s: errors %v, want %v", op, got, want)
		}
	}
	for _, d := range counts.differences(books, nil) {
		t.Errorf("below: %s", d)
	}
	if r, w := counts["read"].Total.Count(), counts["write"].Total.Count(); r != reads || w != writes {
		t.Errorf("below: %d reads and %d writes, want %d and %d", r, w, reads, writes)
	}
	if s := seriesOf(t, requests, filepath.Base(device)); len(s) != 0 {
		t.Errorf("%s has no requests, and %d series of them", device, len(s))
	}
	if n := openBios(t, bios); n != 0 {
		t.Errorf("%d bios in flight, want none", n)
	}
	awaitIdle(t, requests, loop)
}

// errorsSince are the errors of c that before did not have, by class.
func errorsSince(c, before BlockBioCells) [BlockErrors]uint64 {
	for class := range c.Errors {
		c.Errors[class] -= before.Errors[class]
	}
	return c.Errors
}

// A bio that must not wait for a device that is suspended comes back at once, for another
// try: that is no error.
func TestBlockMapperNoWait(t *testing.T) {
	requireFile(t, "/dev/mapper/control")
	loop, _ := loopDevice(t)
	const name, suspend, suspended = "hostflame-nowait", 6, 2 // DM_DEV_SUSPEND, DM_SUSPEND_FLAG
	device := mappedDevice(t, name, mapperTarget{0, 16 << 20 / 512, "linear", loop + " 2048"})
	bios := newTestBio(t)
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := alignedBuffer(t, 4096)
	before := bioCells(t, bios, device)["read"]
	mapper(t, suspend, name, suspended)
	const refused, reads = 17, 23
	func() {
		defer mapper(t, suspend, name, 0)
		for i := range int64(refused) {
			if _, err := unix.Preadv2(int(f.Fd()), [][]byte{buf}, i*4096, unix.RWF_NOWAIT); !errors.Is(err, unix.EAGAIN) {
				t.Fatalf("read without waiting of a device that is suspended: %v, want EAGAIN", err)
			}
		}
	}()
	for i := range int64(reads) {
		if _, err := f.ReadAt(buf, i*4096); err != nil {
			t.Fatal(err)
		}
	}
	after := bioCells(t, bios, device)["read"]
	if n := after.Total.Count() - before.Total.Count(); n != refused+reads {
		t.Errorf("%d bios, want %d sent back and %d read", n, refused, reads)
	}
	if got := errorsSince(after, before); got != [BlockErrors]uint64{} {
		t.Errorf("errors %v, want none", got)
	}
	if n := openBios(t, bios); n != 0 {
		t.Errorf("%d bios in flight, want none", n)
	}
}

// mirrorOf makes a mirror of loop devices, and returns its path.
func mirrorOf(t *testing.T, loops ...string) string {
	t.Helper()
	requireFile(t, "/sys/module/md_mod/parameters/new_array")
	const name = "md_hostflame"
	writeFile(t, "/sys/module/md_mod/parameters/new_array", name)
	dir := filepath.Join("/sys/block", name, "md")
	t.Cleanup(func() { writeFile(t, filepath.Join(dir, "array_state"), "clear") })
	for _, x := range [][2]string{
		{"metadata_version", "none"}, {"level", "raid1"}, {"raid_disks", fmt.Sprint(len(loops))},
		{"component_size", fmt.Sprint(32 << 10)}, // KiB
		{"resync_start", "none"},
	} {
		writeFile(t, filepath.Join(dir, x[0]), x[1])
	}
	for i, loop := range loops {
		b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(loop), "dev"))
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, "new_dev"), strings.TrimSpace(string(b)))
		writeFile(t, filepath.Join(dir, "dev-"+filepath.Base(loop), "slot"), fmt.Sprint(i))
	}
	writeFile(t, filepath.Join(dir, "array_state"), "active")
	return "/dev/" + name
}

// What is written to a mirror is written once there, as bios, and once to each of its disks, as
// requests.
func TestBlockMirror(t *testing.T) {
	requireFile(t, "/sys/module/md_mod/parameters/new_array")
	one, _ := loopDevice(t)
	two, _ := loopDevice(t)
	requests, bios := newTestBlock(t), newTestBio(t)
	device := mirrorOf(t, one, two)
	readBlocks(t, device, 1) // with the first that opens it, the kernel looks for partitions
	const reads, writes = 103, 211
	var before, after map[string]BlockBioCells
	var bioBooks ioBooks
	counts := map[string]ioCounts{}
	books := map[string]ioBooks{}
	load := func() {
		before = bioCells(t, bios, device)
		booksBefore := booksOf(t, device)
		f, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		buf := alignedBuffer(t, 8192)
		for i := range int64(writes) {
			if _, err := f.WriteAt(buf, i*8192); err != nil {
				t.Fatal(err)
			}
		}
		for i := range int64(reads) {
			if _, err := f.ReadAt(buf[:4096], i*4096); err != nil {
				t.Fatal(err)
			}
		}
		after, bioBooks = bioCells(t, bios, device), booksOf(t, device).since(booksBefore)
	}
	counts[one], books[one] = measureDevice(t, requests, one, func() {
		counts[two], books[two] = countsDuring(t, requests, two, load)
	})
	for _, x := range []struct {
		what             string
		ours, want, book uint64
	}{
		{"reads", after["read"].Total.Count() - before["read"].Total.Count(), reads, bioBooks[bookReads]},
		{"writes", after["write"].Total.Count() - before["write"].Total.Count(), writes, bioBooks[bookWrites]},
		{"written bytes", after["write"].Size.Sum - before["write"].Size.Sum, writes * 8192, bioBooks[bookWrittenSectors] * 512},
	} {
		if x.ours != x.want || x.ours != x.book {
			t.Errorf("%s: %d, want %d, in /proc/diskstats %d", x.what, x.ours, x.want, x.book)
		}
	}
	var readBytes uint64
	for _, loop := range []string{one, two} {
		for _, d := range counts[loop].differences(books[loop], nil) {
			t.Errorf("%s: %s", loop, d)
		}
		if n := counts[loop]["write"].Size.Sum; n != writes*8192 {
			t.Errorf("%s: %d bytes written, want all %d", loop, n, writes*8192)
		}
		readBytes += counts[loop]["read"].Size.Sum
		awaitIdle(t, requests, loop)
	}
	if readBytes != reads*4096 {
		t.Errorf("%d bytes read from both disks, want %d", readBytes, reads*4096)
	}
	if n := openBios(t, bios); n != 0 {
		t.Errorf("%d bios in flight, want none", n)
	}
}

const nvme = "/dev/nvme0n1"

// hammer reads and writes blocks of device directly, from threads of their own on every CPU,
// until stop is closed or all of them fail, and returns how often that went well and not.
func hammer(t *testing.T, device string, perThread int, stop chan struct{}) (well, failed uint64) {
	t.Helper()
	cpus, err := OnlineCPUs()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var threads sync.WaitGroup
	var good, bad atomic.Uint64
	for i := range 4 * len(cpus) {
		buf := alignedBuffer(t, 4096)
		threads.Go(func() {
			runtime.LockOSThread() // not unlocked: it keeps its CPU, and so ends with the goroutine
			var set unix.CPUSet
			set.Set(cpus[i%len(cpus)])
			if err := unix.SchedSetaffinity(0, &set); err != nil {
				t.Error(err)
				return
			}
			for n := range perThread {
				select {
				case <-stop:
					return
				default:
				}
				// The system call itself: what it transfers to is not the runtime's to move.
				call := unix.Pread
				if n%3 == 0 {
					call = unix.Pwrite
				}
				if n, _ := call(int(f.Fd()), buf, int64(i*perThread+n)%4096*4096); n == len(buf) {
					good.Add(1)
				} else {
					bad.Add(1)
				}
			}
		})
	}
	threads.Wait()
	return good.Load(), bad.Load()
}

// A disk with a queue for each CPU: all are counted, and each request is found in its own.
func TestBlockManyQueues(t *testing.T) {
	requireFile(t, nvme)
	queues, err := filepath.Glob("/sys/block/nvme0n1/mq/*")
	if err != nil || len(queues) < 2 {
		t.Fatalf("%d queues of %s, %v: no judgement", len(queues), nvme, err)
	}
	b := newTestBlock(t)
	const perThread = 101
	var made uint64
	counts, books := measureDevice(t, b, nvme, func() { made, _ = hammer(t, nvme, perThread, nil) })
	for _, d := range counts.countDifferences(books) {
		t.Error(d)
	}
	if n := counts.requests(); n != made || made == 0 {
		t.Errorf("%d requests, made %d", n, made)
	}
	awaitIdle(t, b, nvme)
}

// A disk that is taken away under its I/O: each request that it had ends, most with an error,
// and nothing stays in flight. When it comes back its series go on.
func TestBlockDetach(t *testing.T) {
	requireFile(t, nvme)
	pci, err := filepath.EvalSymlinks("/sys/block/nvme0n1/device/device")
	if err != nil {
		t.Fatal(err)
	}
	b := newTestBlock(t)
	name := filepath.Base(nvme)
	before := ioCounts(seriesOf(t, b, name))
	removed := make(chan error, 1)
	stop := make(chan struct{})
	go func() {
		time.Sleep(300 * time.Millisecond)
		removed <- os.WriteFile(filepath.Join(pci, "remove"), []byte("1"), 0)
		close(stop)
	}()
	well, failed := hammer(t, nvme, 1<<30, stop)
	if err := <-removed; err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/sys/block/" + name); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("%s is still there, %v: no judgement", name, err)
	}
	counts := ioCounts(seriesOf(t, b, name)).since(before)
	// What failed had a request or not.
	if n := counts.requests(); n < well || n > well+failed || well == 0 {
		t.Errorf("%d requests, of %d that went well and %d that failed", n, well, failed)
	}
	n, err := b.InFlight()
	if err != nil {
		t.Fatal(err)
	}
	if n := n[name]; n != 0 {
		t.Errorf("%d requests of a disk that is gone in flight", n)
	}
	s, err := b.Stats()
	if err != nil {
		t.Fatal(err)
	}
	for reason, n := range s.Dropped {
		if n != 0 {
			t.Errorf("%d requests lost: %v", n, reason)
		}
	}
	var errorsSeen uint64
	for _, op := range []string{"read", "write"} {
		for _, n := range counts[op].Errors {
			errorsSeen += n
		}
	}
	if errorsSeen != counts.requests()-well {
		t.Errorf("%d errors, of %d requests of which %d went well", errorsSeen, counts.requests(), well)
	}
	t.Logf("%d requests, %d went well, %d failed, errors %v %v", counts.requests(), well, failed, counts["read"].Errors, counts["write"].Errors)

	gone := seriesOf(t, b, name)["read"].Total.Count()
	writeFile(t, "/sys/bus/pci/rescan", "1")
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(nvme); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%s does not come back", nvme)
		}
	}
	readBlocks(t, nvme, 29)
	if n := seriesOf(t, b, name)["read"].Total.Count(); n < gone+29 {
		t.Errorf("%d reads after the disk came back, %d before, made 29", n, gone)
	}
	awaitIdle(t, b, nvme)
}
