// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

var allJobs = flag.Bool("all", false, "run all fio jobs of TestBlockPairwise, not a part of them")

// ioDimensions are what jobs differ in. Each value meets each value of the others in some
// job, where they go together.
var ioDimensions = [][]string{
	{"loop", "disk", "zram"},
	{"none", "mq-deadline", "kyber", "bfq"},
	{"read", "write", "randread", "randwrite", "randrw", "randtrim"},
	{"512", "4k", "16k", "128k", "1M"},
	{"1", "8", "64"},
	{"libaio", "psync", "buffered"},
}

// ioJob has a value of each dimension.
type ioJob struct{ device, scheduler, rw, size, depth, mode string }

func (j ioJob) possible() bool {
	switch {
	case j.mode != "libaio" && j.depth != "1":
		return false
	case j.rw == "randtrim" && (j.mode == "buffered" || j.size == "512"):
		return false
	case j.device == "zram": // has no scheduler, and pages for blocks
		return j.scheduler == "none" && j.size != "512"
	case j.device == "disk": // where it is a file, which has nothing to trim
		return j.rw != "randtrim"
	}
	return true
}

func (j ioJob) values() []string {
	return []string{j.device, j.scheduler, j.rw, j.size, j.depth, j.mode}
}

// args are fio's.
func (j ioJob) args() []string {
	args := []string{"--rw=" + j.rw, "--bs=" + j.size, "--size=64M", "--iodepth=" + j.depth, "--invalidate=0"}
	if *allJobs {
		args = append(args, "--number_ios=5000", "--runtime=2")
	} else {
		args = append(args, "--number_ios=2000")
	}
	if j.mode == "buffered" {
		return append(args, "--ioengine=psync", "--direct=0", "--fsync=64")
	}
	return append(args, "--ioengine="+j.mode, "--direct=1")
}

func (j ioJob) pairs() (list [][4]string) {
	v := j.values()
	for a := range v {
		for b := a + 1; b < len(v); b++ {
			list = append(list, [4]string{fmt.Sprint(a), v[a], fmt.Sprint(b), v[b]})
		}
	}
	return list
}

// pairwise are jobs that have each pair of values that is possible, chosen greedily.
func pairwise() (jobs []ioJob) {
	var all []ioJob
	var build func(v []string)
	build = func(v []string) {
		if len(v) < len(ioDimensions) {
			for _, next := range ioDimensions[len(v)] {
				build(append(slices.Clone(v), next))
			}
			return
		}
		if j := (ioJob{v[0], v[1], v[2], v[3], v[4], v[5]}); j.possible() {
			all = append(all, j)
		}
	}
	build(nil)
	left := map[[4]string]bool{}
	for _, j := range all {
		for _, p := range j.pairs() {
			left[p] = true
		}
	}
	for len(left) > 0 {
		best, most := ioJob{}, 0
		for _, j := range all {
			n := 0
			for _, p := range j.pairs() {
				if left[p] {
					n++
				}
			}
			if n > most {
				best, most = j, n
			}
		}
		for _, p := range best.pairs() {
			delete(left, p)
		}
		jobs = append(jobs, best)
	}
	return jobs
}

// Over jobs in which everything meets everything, on a loop device, the disk that this is
// on, and zram: counts, bytes and merges equal /proc/diskstats, and bytes what fio says; times
// agree with diskstats; nothing stays in flight. A part of them runs by default, the rest with
// -all (make test-block).
func TestBlockPairwise(t *testing.T) {
	kerneltest.RequireTool(t, "fio")
	jobs := pairwise()
	if len(jobs) > 40 {
		t.Errorf("%d jobs, want at most 40", len(jobs))
	}
	if !*allJobs {
		// Those that cover most come first.
		jobs = jobs[:8]
	}
	alone, id := ioCgroup(t, "hostflame-io-fio")
	b, judge := newJudgedBlock(t, BlockConfig{ContainerName: func(container uint64) string {
		if container == id {
			return "fio"
		}
		return "others"
	}})
	loop, _ := loopDevice(t)
	file := filepath.Join(t.TempDir(), "data")
	disk := "/dev/" + wholeDeviceOf(t, filepath.Dir(file))
	keepScheduler(t, disk)
	fio(t, file, "--rw=write", "--bs=1M", "--size=64M", "--direct=1", "--end_fsync=1")
	for _, j := range jobs {
		t.Run(strings.Join(j.values(), "-"), func(t *testing.T) {
			if j.device == "zram" {
				bioJob(t, j)
				return
			}
			device, target := loop, loop
			if j.device == "disk" {
				device, target = disk, file
			}
			setScheduler(t, device, j.scheduler)
			var report fioReport
			var own map[string]uint64
			counts, books, beyond := measureBeside(t, b, judge, device, func() {
				before := containerBytes(t, b, "fio")
				inCgroup(t, alone, func() { report = fio(t, target, j.args()...) })
				own = containerBytes(t, b, "fio")
				for operation, n := range before {
					own[operation] -= n
				}
			})
			for _, d := range counts.differences(books, beyond) {
				t.Error(d)
			}
			if beyond != nil {
				t.Logf("%d requests, ours %.2f ms; in the books %d, %.2f ms before and %.2f ms after ours", counts.requests(),
					counts.millis(), books[bookReadMillis]+books[bookWriteMillis]+books[bookDiscardMillis], beyond.before(), beyond.after())
			}
			awaitIdle(t, b, device)
			if j.device == "loop" && j.mode != "buffered" {
				for operation, n := range map[string]uint64{"read": report.Read.TotalIOs, "write": report.Write.TotalIOs, "discard": report.Trim.TotalIOs} {
					if c := counts[operation]; c.Total.Count()+c.Merges-c.Splits != n {
						t.Errorf("%s: %d requests, %d merges, %d splits, fio says %d", operation, c.Total.Count(), c.Merges, c.Splits, n)
					}
				}
			}
			if j.device != "disk" {
				report.check(t, j, func(operation string) uint64 { return counts[operation].Size.Sum })
			} else if chargesIO(t, alone) || b.OwnStart() {
				// The disk is not fio's alone: what others do there is told apart by their cgroups.
				// But its own code, where that was not in memory.
				if code := own["read"] - report.Read.Bytes; code <= 1<<20 {
					own["read"] = report.Read.Bytes
				}
				report.check(t, j, func(operation string) uint64 { return own[operation] })
			}
		})
	}
	t.Logf("%d jobs of %d", len(jobs), len(pairwise()))
}

// containerBytes are the bytes of a container's requests by operation.
func containerBytes(t *testing.T, b *Block, name string) map[string]uint64 {
	t.Helper()
	list, err := b.Containers()
	if err != nil {
		t.Fatal(err)
	}
	bytes := map[string]uint64{}
	for _, c := range list {
		for _, cells := range c.Operations {
			if c.Name == name {
				bytes[cells.Operation] += cells.Size.Sum
			}
		}
	}
	return bytes
}

// check holds the bytes that were counted by operation against those that fio says. What the
// cache makes of a buffered job is not fio's to say.
func (r fioReport) check(t *testing.T, j ioJob, bytes func(operation string) uint64) {
	t.Helper()
	if r.Read.Bytes+r.Write.Bytes+r.Trim.Bytes == 0 {
		t.Error("fio did nothing: no judgement")
	}
	if j.mode == "buffered" {
		return
	}
	for _, x := range []struct {
		operation string
		fio       uint64
	}{{"read", r.Read.Bytes}, {"write", r.Write.Bytes}, {"discard", r.Trim.Bytes}} {
		if n := bytes(x.operation); n != x.fio {
			t.Errorf("%s: %d bytes, fio says %d", x.operation, n, x.fio)
		}
	}
}

// keepScheduler gives the disk its scheduler back at the end.
func keepScheduler(t *testing.T, disk string) {
	t.Helper()
	path := filepath.Join("/sys/block", filepath.Base(disk), "queue/scheduler")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "[")
	now, _, ok := strings.Cut(rest, "]")
	if !ok {
		t.Fatalf("%s has %q, and no scheduler in use", path, b)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(path, []byte(now), 0); err != nil {
			t.Error(err)
		}
	})
}

// bioJob runs a job on zram. The kernel books its times in whole ticks, and its discards not
// at all.
func bioJob(t *testing.T, j ioJob) {
	t.Helper()
	b, err := NewBlockBio()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { b.Close() })
	device := zramDisk(t)
	before, booksBefore := bioCells(t, b, device), booksOf(t, device)
	report := fio(t, device, j.args()...)
	after, books := bioCells(t, b, device), booksOf(t, device).since(booksBefore)
	count := func(operation string) uint64 { return after[operation].Total.Count() - before[operation].Total.Count() }
	bytes := func(operation string) uint64 { return after[operation].Size.Sum - before[operation].Size.Sum }
	for _, x := range []struct {
		what         string
		ours, theirs uint64
	}{
		{"reads", count("read"), books[bookReads]},
		{"read bytes", bytes("read"), books[bookReadSectors] * 512},
		{"writes", count("write"), books[bookWrites]},
		{"written bytes", bytes("write"), books[bookWrittenSectors] * 512},
	} {
		if x.ours != x.theirs {
			t.Errorf("%s: %d, in /proc/diskstats %d", x.what, x.ours, x.theirs)
		}
	}
	report.check(t, j, bytes)
}

// bioCells are the series of a device without requests, by operation.
func bioCells(t *testing.T, b *BlockBio, device string) map[string]BlockBioCells {
	t.Helper()
	cells, err := b.Read()
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]BlockBioCells{}
	for _, c := range cells {
		if c.Device == filepath.Base(device) {
			m[c.Operation] = c
		}
	}
	return m
}
