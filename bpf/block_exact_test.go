// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// ioBooks are the fields of a line of /proc/diskstats
// (Documentation/admin-guide/iostats.rst), by the numbers that it gives them.
type ioBooks [21]uint64

const (
	bookReads, bookReadMerges, bookReadSectors, bookReadMillis               = 1, 2, 3, 4
	bookWrites, bookWriteMerges, bookWrittenSectors, bookWriteMillis         = 5, 6, 7, 8
	bookInFlight                                                             = 9
	bookDiscards, bookDiscardMerges, bookDiscardedSectors, bookDiscardMillis = 12, 13, 14, 15
	bookFlushes, bookFlushMillis                                             = 16, 17
)

func booksOf(t *testing.T, device string) (b ioBooks) {
	t.Helper()
	raw, err := os.ReadFile("/proc/diskstats")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		if len(f) < 4 || f[2] != filepath.Base(device) {
			continue
		}
		for i, s := range f[3:min(len(f), len(b)+2)] {
			if b[i+1], err = strconv.ParseUint(s, 10, 64); err != nil {
				t.Fatal(err)
			}
		}
	}
	return b
}

func (b ioBooks) since(before ioBooks) ioBooks {
	for i := range b {
		if i != bookInFlight {
			b[i] -= before[i]
		}
	}
	return b
}

// ioCounts is what the hooks counted of a device: by operation, and all told.
type ioCounts map[string]BlockCells

func (c ioCounts) since(before ioCounts) ioCounts {
	grown := ioCounts{}
	for op, s := range c {
		b := before[op]
		for i := range s.Total.Cells {
			s.Total.Cells[i] -= b.Total.Cells[i]
			s.DeviceTime.Cells[i] -= b.DeviceTime.Cells[i]
		}
		for i := range s.Depth.Cells {
			s.Depth.Cells[i] -= b.Depth.Cells[i]
		}
		s.Total.Sum -= b.Total.Sum
		s.Queue.Sum -= b.Queue.Sum
		s.DeviceTime.Sum -= b.DeviceTime.Sum
		s.Size.Sum -= b.Size.Sum
		s.Depth.Sum -= b.Depth.Sum
		for i := range s.Errors {
			s.Errors[i] -= b.Errors[i]
		}
		s.Sync -= b.Sync
		s.Merges -= b.Merges
		s.Requeues -= b.Requeues
		s.Splits -= b.Splits
		grown[op] = s
	}
	return grown
}

// requests is how many there are of all operations that the kernel books the time of as reads,
// writes or discards.
func (c ioCounts) requests() (n uint64) {
	for _, op := range []string{"read", "write", "write-zeroes", "discard"} {
		n += c[op].Total.Count()
	}
	return n
}

// millis is what they took.
func (c ioCounts) millis() (ms float64) {
	for _, op := range []string{"read", "write", "write-zeroes", "discard"} {
		ms += float64(c[op].Total.Sum) / 1e6
	}
	return ms
}

// differences says where c is not what the kernel's books say of the same time: counts,
// bytes and merges exactly, times within 1 % and the millisecond that each reading of the
// books cuts off, once what the books have beyond the hooks is added. Where the kernel does
// not say what that is (beyond is nil), times are only never above the books'. Not for drivers
// that end requests in batches (NVMe): their books have the time before a batch for all of it.
func (c ioCounts) differences(books ioBooks, beyond *outside) (list []string) {
	return append(c.countDifferences(books), c.timeDifferences(books, beyond)...)
}

func (c ioCounts) countDifferences(books ioBooks) (list []string) {
	writes, zeroes := c["write"], c["write-zeroes"]
	for _, x := range []struct {
		what         string
		ours, theirs uint64
	}{
		{"reads", c["read"].Total.Count(), books[bookReads]},
		{"read merges", c["read"].Merges, books[bookReadMerges]},
		{"read bytes", c["read"].Size.Sum, books[bookReadSectors] * 512},
		{"writes", writes.Total.Count() + zeroes.Total.Count(), books[bookWrites]},
		{"write merges", writes.Merges + zeroes.Merges, books[bookWriteMerges]},
		{"written bytes", writes.Size.Sum + zeroes.Size.Sum, books[bookWrittenSectors] * 512},
		{"discards", c["discard"].Total.Count(), books[bookDiscards]},
		{"discarded bytes", c["discard"].Size.Sum, books[bookDiscardedSectors] * 512},
		{"flushes", c["flush"].Total.Count(), books[bookFlushes]},
	} {
		if x.ours != x.theirs {
			list = append(list, fmt.Sprintf("%s: %d, in /proc/diskstats %d", x.what, x.ours, x.theirs))
		}
	}
	return list
}

func (c ioCounts) timeDifferences(books ioBooks, beyond *outside) (list []string) {
	writes, zeroes := c["write"], c["write-zeroes"]
	for _, x := range []struct {
		what         string
		group        booksBooksGroup
		ours, millis uint64
	}{
		{"read time", booksBooksGroupBOOKS_READ, c["read"].Total.Sum, books[bookReadMillis]},
		{"write time", booksBooksGroupBOOKS_WRITE, writes.Total.Sum + zeroes.Total.Sum, books[bookWriteMillis]},
		{"discard time", booksBooksGroupBOOKS_DISCARD, c["discard"].Total.Sum, books[bookDiscardMillis]},
	} {
		least, most, theirs := float64(x.ours)/1e6, math.Inf(1), float64(x.millis)
		if beyond != nil {
			most = least + float64(beyond[x.group].MostNs)/1e6
			least += float64(beyond[x.group].LeastNs) / 1e6
		}
		if slack := theirs/100 + 1; theirs < least-slack || theirs > most+slack {
			list = append(list, fmt.Sprintf("%s: %.2f to %.2f ms, in /proc/diskstats %.0f ms; beyond the hooks %+v", x.what, least, most, theirs, beyond))
		}
	}
	return list
}

// rounds is how often a load is measured until no completion is hidden meanwhile. Process 1 runs
// 1.6 times a second: with 0.2 s of I/O that is in less than one round of three, and in all of
// them once in 50,000 times.
const rounds = 10

// measureDevice runs load, repeated while a completion was hidden from BPF meanwhile, and
// returns what the hooks and the kernel counted.
func measureDevice(t *testing.T, b *Block, device string, load func()) (ioCounts, ioBooks) {
	t.Helper()
	counts, books, _ := measureBeside(t, b, nil, device, load)
	return counts, books
}

// measureBeside is measureDevice with what the judge measured.
func measureBeside(t *testing.T, b *Block, judge *booksJudge, device string, load func()) (ioCounts, ioBooks, *outside) {
	t.Helper()
	hidden := kerneltest.CountHiddenCompletions(t, device, "")
	for range rounds {
		seen := hidden.Read(t)
		counts, books, beyond := during(t, b, judge, device, load)
		if hidden.Read(t) == seen {
			return counts, books, beyond
		}
	}
	t.Fatalf("completions came while process 1 was current in each of %d rounds: no judgement", rounds)
	return nil, ioBooks{}, nil
}

// countsDuring returns what the hooks and the kernel counted during load.
func countsDuring(t *testing.T, b *Block, device string, load func()) (ioCounts, ioBooks) {
	t.Helper()
	counts, books, _ := during(t, b, nil, device, load)
	return counts, books
}

func during(t *testing.T, b *Block, judge *booksJudge, device string, load func()) (ioCounts, ioBooks, *outside) {
	t.Helper()
	if strings.HasPrefix(filepath.Base(device), "loop") {
		quiesce(t, device)
	}
	before, booksBefore, beyondBefore := readQuiet(t, b, judge, device)
	load()
	after, booksAfter, beyondAfter := readQuiet(t, b, judge, device)
	counts, books := after.since(before), booksAfter.since(booksBefore)
	if judge == nil {
		return counts, books, nil
	}
	beyond := beyondAfter.since(beyondBefore)
	return counts, books, &beyond
}

// readQuiet reads both sides in a moment in which the device does nothing.
func readQuiet(t *testing.T, b *Block, judge *booksJudge, device string) (counts ioCounts, books ioBooks, beyond outside) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		books = booksOf(t, device)
		counts, beyond = ioCounts(seriesOf(t, b, filepath.Base(device))), judge.of(t, device)
		if books[bookInFlight] == 0 && booksOf(t, device) == books {
			return counts, books, beyond
		}
	}
	t.Fatalf("%s is never without I/O", device)
	return counts, books, beyond
}

// quiesceReads waits until the device has nothing in flight, by the kernel's books.
func quiesceReads(t *testing.T, device string) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); booksOf(t, device)[bookInFlight] != 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s still has I/O in flight", device)
		}
	}
}

// awaitIdle fails unless the gauge of the device comes to 0, as the kernel's is; but for those
// whose completion was hidden.
func awaitIdle(t *testing.T, b *Block, device string) {
	t.Helper()
	quiesceReads(t, device)
	n, err := b.InFlight()
	if err != nil {
		t.Fatal(err)
	}
	if n, hidden := n[filepath.Base(device)], hiddenSince[b].Read(t); n < 0 || uint64(n) > hidden {
		t.Errorf("%d requests of %s in flight, the kernel has none, and %d completions were hidden", n, device, hidden)
	}
}

// setScheduler selects an I/O scheduler, and skips where the kernel does not have it.
func setScheduler(t *testing.T, device, scheduler string) {
	t.Helper()
	path := filepath.Join("/sys/block", filepath.Base(device), "queue/scheduler")
	err := os.WriteFile(path, []byte(scheduler), 0)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		t.Skipf("this kernel has no scheduler %s: %v", scheduler, err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// fio runs a job on device and returns its report of reads and writes.
func fio(t *testing.T, device string, args ...string) (report fioReport) {
	t.Helper()
	raw := output(t, "fio", append([]string{"--name=job", "--filename=" + device, "--output-format=json", "--allow_mounted_write=0"}, args...)...)
	var r struct {
		Jobs []fioReport `json:"jobs"`
	}
	if err := json.Unmarshal([]byte(raw[strings.IndexByte(raw, '{'):]), &r); err != nil {
		t.Fatal(err)
	}
	return r.Jobs[0]
}

type fioReport struct {
	Read, Write, Trim struct {
		Bytes    uint64 `json:"io_bytes"`
		TotalIOs uint64 `json:"total_ios"`
		Clat     struct {
			Mean float64 `json:"mean"`
		} `json:"clat_ns"`
	}
}

// Small writes that follow each other, in batches, are merged: bios into requests in the
// plug, and requests into each other in the scheduler. What was absorbed is no request, and
// is not in flight.
func TestBlockMerges(t *testing.T) {
	kerneltest.RequireTool(t, "fio")
	for _, scheduler := range []string{"none", "mq-deadline", "kyber", "bfq"} {
		t.Run(scheduler, func(t *testing.T) {
			device, _ := loopDevice(t)
			setScheduler(t, device, scheduler)
			b, judge := newJudgedBlock(t, BlockConfig{})
			counts, books, beyond := measureBeside(t, b, judge, device, func() {
				for _, rw := range []string{"write", "read", "randwrite"} {
					fio(t, device, "--rw="+rw, "--bs=4k", "--size=4M", "--direct=1", "--ioengine=libaio",
						"--iodepth=32", "--iodepth_batch=16", "--invalidate=0")
				}
			})
			for _, d := range counts.differences(books, beyond) {
				t.Error(d)
			}
			if books[bookWriteMerges] == 0 {
				t.Errorf("no merges: %v", books)
			}
			awaitIdle(t, b, device)
			depth := counts["write"].Depth
			if n := depth.Count(); n != counts["write"].Total.Count() || depth.Sum < n || depth.Sum == n {
				t.Errorf("queue depths of %d requests, sum %d; %d requests were issued, several at once", n, depth.Sum, counts["write"].Total.Count())
			}
		})
	}
}

// Zeroes that the device writes by itself are an operation of their own.
func TestBlockWriteZeroes(t *testing.T) {
	device, _ := loopDevice(t)
	b, judge := newJudgedBlock(t, BlockConfig{})
	const ranges, length = 19, 64 << 10
	counts, books, beyond := measureBeside(t, b, judge, device, func() {
		f, err := os.OpenFile(device, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for i := range ranges {
			span := [2]uint64{uint64(i) << 20, length}
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&span))); errno != 0 {
				t.Fatalf("write zeroes: %v", errno)
			}
		}
	})
	if z := counts["write-zeroes"]; z.Total.Count() != ranges || z.Size.Sum != ranges*length {
		t.Errorf("%d requests of %d bytes, want %d of %d", z.Total.Count(), z.Size.Sum, ranges, ranges*length)
	}
	for _, d := range counts.differences(books, beyond) {
		t.Error(d)
	}
}

// Reads are synchronous; so are writes that somebody waits for, and writeback is not.
func TestBlockFlags(t *testing.T) {
	kerneltest.RequireTool(t, "fio")
	device, _ := loopDevice(t)
	b := newTestBlock(t)
	counts, _ := measureDevice(t, b, device, func() {
		fio(t, device, "--rw=randread", "--bs=4k", "--size=1M", "--direct=1", "--invalidate=0")
	})
	if r := counts["read"]; r.Sync != r.Total.Count() || r.Sync != 256 || r.Metadata != 0 {
		t.Errorf("direct reads: %d of %d synchronous, %d metadata; want all 256, none", r.Sync, r.Total.Count(), r.Metadata)
	}
	counts, _ = measureDevice(t, b, device, func() {
		fio(t, device, "--rw=randwrite", "--bs=4k", "--size=1M", "--direct=1", "--invalidate=0")
	})
	if w := counts["write"]; w.Sync != 256 {
		t.Errorf("direct writes: %d of %d synchronous, want 256", w.Sync, w.Total.Count())
	}
	counts, _ = measureDevice(t, b, device, func() {
		fio(t, device, "--rw=read", "--bs=4k", "--size=8M", "--direct=0", "--fadvise_hint=sequential", "--invalidate=1")
	})
	if r := counts["read"]; r.Readahead == 0 || r.Readahead > r.Total.Count() || r.Size.Sum < 8<<20 {
		t.Errorf("a file that is read through: %d of %d reads are ahead, %d bytes", r.Readahead, r.Total.Count(), r.Size.Sum)
	}
}

// A loop device over a file that shrinks under it gives partial completions, requeues and
// EIO. Each request still counts once, with its whole size, and none stays open.
func TestBlockErrorsLeaveNothingOpen(t *testing.T) {
	kerneltest.RequireTool(t, "fio")
	device, file := loopDevice(t)
	setScheduler(t, device, "mq-deadline")
	b := newTestBlock(t)
	// Each block once.
	read := func() {
		fio(t, device, "--rw=randread", "--bs=64k", "--size=64M", "--direct=1", "--ioengine=libaio", "--iodepth=16",
			"--continue_on_error=all", "--invalidate=0")
	}
	counts, books := measureDevice(t, b, device, func() {
		if err := os.Truncate(file, 64<<20); err != nil {
			t.Fatal(err)
		}
		whole := booksOf(t, device)[bookReads]
		done := make(chan struct{})
		go func() {
			defer close(done)
			read()
		}()
		for started := false; !started; {
			select {
			case <-done:
				started = true
			case <-time.After(time.Millisecond):
				started = booksOf(t, device)[bookReads] > whole+100
			}
		}
		// Within a block, so that one is served in part.
		if err := os.Truncate(file, 20<<20+4096); err != nil {
			t.Error(err)
		}
		<-done
		read()
	})
	failed := counts["read"].Errors
	if failed[BlockErrorIO] == 0 || failed[BlockErrorIO] == counts["read"].Total.Count() {
		t.Errorf("errors %v of %d reads, want some of class %v", failed, counts["read"].Total.Count(), BlockErrorIO)
	}
	for _, d := range counts.countDifferences(books) {
		t.Error(d)
	}
	if counts["read"].Requeues == 0 {
		t.Error("no requeues")
	}
	awaitIdle(t, b, device)
	s, err := b.Stats()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d reads, errors %v, %d requeues; lost %v", counts["read"].Total.Count(), failed, counts["read"].Requeues, s.Dropped)
}
