// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/histogram"
	"github.com/hostflame/hostflame/internal/kerneltest"
)

func newTestBlock(t *testing.T) *Block {
	t.Helper()
	return newTestBlockOf(t, BlockConfig{})
}

func newTestBlockOf(t *testing.T, config BlockConfig) *Block {
	t.Helper()
	kerneltest.Require(t)
	b, err := NewBlock(config)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { b.Close() })
	hiddenSince[b] = kerneltest.CountHiddenCompletions(t, "", "")
	return b
}

// hiddenSince counts, for each newTestBlock, the completions that the kernel hid from it.
var hiddenSince = map[*Block]kerneltest.TracepointCounter{}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

// loopDevice is a loop device over a file of its own, of 64 MiB. Its own I/O is direct,
// so that a truncated file is an error and not a page of zeros.
func loopDevice(t *testing.T) (device, file string) {
	t.Helper()
	kerneltest.Require(t)
	file = filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	device = attachLoop(t, file)
	t.Cleanup(func() { detachLoop(device) })
	return device, file
}

// quiesce waits until what was written by others to the device, such as the kernel's
// look for partitions, is through.
func quiesce(t *testing.T, device string) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
}

func diskstatsOf(t *testing.T, device string) diskstats {
	t.Helper()
	f, err := os.Open("/proc/diskstats")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	all, err := readDiskstats(f)
	if err != nil {
		t.Fatal(err)
	}
	return all[filepath.Base(device)]
}

// blockCounts are the counts of one device by operation.
type blockCounts struct {
	requests, bytes, errors map[string]uint64
	queueNanos, deviceNanos uint64
	totalNanos              uint64
}

func countsOf(t *testing.T, b *Block, device string) blockCounts {
	t.Helper()
	cells, err := b.Read()
	if err != nil {
		t.Fatal(err)
	}
	c := blockCounts{requests: map[string]uint64{}, bytes: map[string]uint64{}, errors: map[string]uint64{}}
	for _, s := range cells {
		if s.Device != filepath.Base(device) {
			continue
		}
		c.requests[s.Operation] = s.Total.Count()
		c.bytes[s.Operation] = s.Size.Sum
		for _, n := range s.Errors {
			c.errors[s.Operation] += n
		}
		c.queueNanos += s.Queue.Sum
		c.deviceNanos += s.DeviceTime.Sum
		c.totalNanos += s.Total.Sum
		if sizes, of := s.Size.Count(), s.Total.Count(); sizes > of {
			t.Errorf("%s %s: %d sizes of %d requests", s.Device, s.Operation, sizes, of)
		}
	}
	if len(c.requests) == 0 {
		t.Fatalf("%s has no series", device)
	}
	return c
}

// seriesOf are the series of one device, by operation; none if it has none.
func seriesOf(t *testing.T, b *Block, device string) map[string]BlockCells {
	t.Helper()
	cells, err := b.Read()
	if err != nil {
		t.Fatal(err)
	}
	series := map[string]BlockCells{}
	for _, c := range cells {
		if c.Device == device {
			series[c.Operation] = c
		}
	}
	return series
}

// alignedBuffer is fit for direct I/O.
func alignedBuffer(t *testing.T, size int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

func TestBlockEqualsDiskstats(t *testing.T) {
	device, _ := loopDevice(t)
	b := newTestBlock(t)
	quiesce(t, device)
	// A completion that the kernel hides from BPF is no fault of ours; another round then.
	hidden := kerneltest.CountHiddenCompletions(t, device, "")
	for range rounds {
		before := hidden.Read(t)
		differences := compareWithDiskstats(t, b, device)
		if hidden.Read(t) != before {
			t.Logf("a completion came while process 1 was current; %q", differences)
			continue
		}
		for _, d := range differences {
			t.Error(d)
		}
		return
	}
	t.Errorf("completions came while process 1 was current in each of %d rounds: no judgement", rounds)
}

// compareWithDiskstats makes a known load on device and returns where our counts differ from
// the kernel's books, or either from the load.
func compareWithDiskstats(t *testing.T, b *Block, device string) (differences []string) {
	t.Helper()
	differ := func(format string, args ...any) { differences = append(differences, fmt.Sprintf(format, args...)) }
	const reads, writes, syncs, discards = 1009, 211, 13, 17
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before, kernelBefore := countsOf(t, b, device), diskstatsOf(t, device)
	buf := alignedBuffer(t, 8192)
	for i := range writes {
		if _, err := f.WriteAt(buf, int64(i)*8192); err != nil {
			t.Fatal(err)
		}
	}
	for i := range reads {
		if _, err := f.ReadAt(buf[:4096], int64(i%4096)*4096); err != nil {
			t.Fatal(err)
		}
	}
	for range syncs {
		// A device's sync writes out its cache with an empty flush.
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	for i := range discards {
		span := [2]uint64{uint64(i) << 20, 1 << 16}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span))); errno != 0 {
			t.Fatalf("discard: %v", errno)
		}
	}
	after, kernelAfter := countsOf(t, b, device), diskstatsOf(t, device)

	grown := func(m func(blockCounts) map[string]uint64, op string) uint64 { return m(after)[op] - m(before)[op] }
	requests := func(c blockCounts) map[string]uint64 { return c.requests }
	bytes := func(c blockCounts) map[string]uint64 { return c.bytes }
	const sector = 512
	for _, c := range []struct {
		what            string
		counted, kernel uint64
	}{
		{"reads", grown(requests, "read"), kernelAfter.reads - kernelBefore.reads},
		{"read bytes", grown(bytes, "read"), (kernelAfter.readSectors - kernelBefore.readSectors) * sector},
		{"writes", grown(requests, "write"), kernelAfter.writes - kernelBefore.writes},
		{"written bytes", grown(bytes, "write"), (kernelAfter.writeSectors - kernelBefore.writeSectors) * sector},
		{"discards", grown(requests, "discard"), kernelAfter.discards - kernelBefore.discards},
		{"discarded bytes", grown(bytes, "discard"), (kernelAfter.discardSectors - kernelBefore.discardSectors) * sector},
		{"flushes", grown(requests, "flush"), kernelAfter.flushes - kernelBefore.flushes},
		// And the load is the one that was meant.
		{"reads of the load", grown(requests, "read"), reads},
		{"read bytes of the load", grown(bytes, "read"), reads * 4096},
		{"written bytes of the load", grown(bytes, "write"), writes * 8192},
		{"discards of the load", grown(requests, "discard"), discards},
		{"flushes of the load", grown(requests, "flush"), syncs},
		{"errors", after.errors["read"] + after.errors["write"], 0},
	} {
		if c.counted != c.kernel {
			differ("%s: %d, want %d", c.what, c.counted, c.kernel)
		}
	}
	if sum := after.queueNanos + after.deviceNanos; sum != after.totalNanos {
		differ("queue and device time are %d ns, total is %d ns", sum, after.totalNanos)
	}
	if after.deviceNanos == 0 || after.queueNanos == 0 {
		differ("queue time %d ns, device time %d ns", after.queueNanos, after.deviceNanos)
	}

	// Over all devices, and others' I/O: about equal.
	a, err := b.Accounting()
	near := func(ours, theirs, least uint64) bool {
		return theirs >= least && math.Abs(float64(ours)/float64(theirs)-1) < 0.05
	}
	if err != nil || !near(a.Requests, a.KernelRequests, reads) || !near(a.Bytes, a.KernelBytes, reads*4096) {
		differ("accounting: %+v, %v", a, err)
	}
	s, err := b.Stats()
	if err != nil {
		t.Fatal(err)
	}
	for _, reason := range []DropReason{DropNegative, DropNoSlot} {
		if n := s.Dropped[reason]; n != 0 {
			differ("%d requests lost: %v", n, reason)
		}
	}
	return differences
}

func TestBlockLatencyAgreesWithFio(t *testing.T) {
	kerneltest.RequireTool(t, "fio", "chrt")
	// fio has a cgroup of its own, because the disk serves others too, whose reads can be slow.
	group, id := ioCgroup(t, "hostflame-io-fio")
	b, err := NewBlock(BlockConfig{ContainerName: func(cgroup uint64) string {
		if cgroup == id {
			return "fio"
		}
		return fmt.Sprint("cgroup ", cgroup)
	}})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { b.Close() })
	reads := func() (total histogram.Snapshot) {
		t.Helper()
		list, err := b.Containers()
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range list {
			if c.Name == "fio" {
				total = c.Operations[0].Total
			}
		}
		return total
	}
	kerneltest.MeasureLock(t)
	dir, err := os.MkdirTemp("/var/tmp", "hostflame-fio")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "data")
	cpus, err := OnlineCPUs()
	if err != nil {
		t.Fatal(err)
	}
	// A virtual CPU that sleeps takes 10 us and more to be woken, which fio's latency has and
	// ours has not: so they are kept awake, by what gives way to everything.
	for _, cpu := range cpus {
		cmd := exec.Command("chrt", "--idle", "0", "taskset", "-c", strconv.Itoa(cpu), "sh", "-c", "while :; do :; done")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
	}
	round := 1
	fio := func(args ...string) []byte {
		// Before others, and on one CPU after the other, because fio's latency ends when its
		// thread runs again: at once on the CPU that takes the disk's interrupts.
		cpu := strconv.Itoa(cpus[round%len(cpus)])
		return []byte(output(t, "sh", append([]string{"-c", `echo $$ >"$0" && exec "$@"`, filepath.Join(group, "cgroup.procs"), "chrt", "--fifo", "50", "taskset", "-c", cpu, "fio",
			"--name=job", "--filename=" + file, "--size=64M", "--bs=4k", "--direct=1",
			"--ioengine=psync", "--iodepth=1", "--thread", "--output-format=json"}, args...)...))
	}
	fio("--rw=write", "--bs=1M", "--end_fsync=1") // so that reads find blocks on the disk

	// What fio reads besides, such as its own code, is few; a round in which it is more than a
	// hundredth says nothing, and is repeated.
	const rounds = 6
	for ; ; round++ {
		before := reads()
		raw := fio("--rw=randread", "--time_based", "--runtime=3")
		after := reads()
		var report struct {
			Jobs []struct {
				Read struct {
					TotalIOs uint64 `json:"total_ios"`
					Clat     struct {
						Mean float64 `json:"mean"`
					} `json:"clat_ns"`
				} `json:"read"`
			} `json:"jobs"`
		}
		if err := json.Unmarshal(raw[strings.IndexByte(string(raw), '{'):], &report); err != nil {
			t.Fatal(err)
		}
		read := report.Jobs[0].Read
		n := after.Count() - before.Count()
		if others := int64(n) - int64(read.TotalIOs); others > int64(n/100) || -others > int64(n/100) {
			if round == rounds {
				s, err := b.Stats()
				t.Fatalf("%d reads counted, fio made %d, in the last of %d rounds: no judgement; %+v %v", n, read.TotalIOs, rounds, s, err)
			}
			continue
		}
		ours := float64(after.Sum-before.Sum) / float64(n)
		most := max(10_000, read.Clat.Mean/10)
		d := read.Clat.Mean - ours
		t.Logf("round %d: %d reads; fio's mean completion latency %.0f ns, our mean total %.0f ns, difference %.0f ns (0 to %.0f)",
			round, n, read.Clat.Mean, ours, d, most)
		// What a hypervisor takes between the completion and fio's return is no I/O, and the few
		// reads of others can be slow ones.
		if (d > most || d < 0 && n != read.TotalIOs) && round < rounds {
			continue
		}
		if d < 0 || d > most {
			t.Errorf("fio's mean completion latency minus our mean total is %.0f ns, want 0 to %.0f", d, most)
		}
		return
	}
}

// wholeDeviceOf is the disk that a file is on.
func wholeDeviceOf(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	link, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(link, "partition")); err == nil {
		link = filepath.Dir(link)
	}
	return filepath.Base(link)
}

func TestBlockCountsErrors(t *testing.T) {
	device, file := loopDevice(t)
	b := newTestBlock(t)
	quiesce(t, device)
	if err := os.Truncate(file, 1<<20); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before := countsOf(t, b, device)
	buf := alignedBuffer(t, 4096)
	const failing = 7
	for i := range failing {
		if _, err := f.ReadAt(buf, 32<<20+int64(i)*4096); !errors.Is(err, unix.EIO) {
			t.Fatalf("read beyond the end of the backing file: %v, want EIO", err)
		}
	}
	after := countsOf(t, b, device)
	if n := after.errors["read"] - before.errors["read"]; n != failing {
		t.Errorf("%d errors, want %d", n, failing)
	}
	if io := seriesOf(t, b, filepath.Base(device))["read"].Errors[BlockErrorIO]; io != after.errors["read"] {
		t.Errorf("%d errors of class %v, want all %d", io, BlockErrorIO, after.errors["read"])
	}
	if n := after.requests["read"] - before.requests["read"]; n != failing {
		t.Errorf("%d requests, want %d", n, failing)
	}
}

func TestBlockDevicesComeAndGo(t *testing.T) {
	b := newTestBlock(t)
	device, _ := loopDevice(t)
	quiesce(t, device)
	readBlocks(t, device, 23)
	first := countsOf(t, b, device)
	if first.requests["read"] < 23 {
		t.Errorf("%d reads of a device that came later, want at least 23", first.requests["read"])
	}
	if err := detachLoop(device); err != nil {
		t.Fatal(err)
	}
	gone := countsOf(t, b, device)
	if gone.requests["read"] < first.requests["read"] {
		t.Errorf("reads went from %d to %d when the device left", first.requests["read"], gone.requests["read"])
	}
	file := filepath.Join(t.TempDir(), "again")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := configureLoop(device, file); err != nil {
		t.Fatal(err)
	}
	quiesce(t, device)
	readBlocks(t, device, 29)
	if n := countsOf(t, b, device).requests["read"]; n < gone.requests["read"]+29 {
		t.Errorf("%d reads after the device came back, want at least %d", n, gone.requests["read"]+29)
	}
}

func TestBlockSeriesFromTheStart(t *testing.T) {
	device, _ := loopDevice(t)
	b := newTestBlock(t)
	cells, err := b.Read()
	if err != nil {
		t.Fatal(err)
	}
	operations := map[string]bool{}
	for _, c := range cells {
		if c.Device == filepath.Base(device) {
			operations[c.Operation] = true
		}
	}
	for _, op := range operationNames {
		if !operations[op] {
			t.Errorf("no series %s of %s before its first request", op, device)
		}
	}
}

// numberedLoop makes the loop device of that number, without a file, and returns what removes
// it; both are no-ops where it is done.
func numberedLoop(t *testing.T, number int) (name string, remove func()) {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetInt(int(control.Fd()), unix.LOOP_CTL_ADD, number); err != nil && !errors.Is(err, unix.EEXIST) {
		t.Fatalf("make loop device %d: %v", number, err)
	}
	remove = sync.OnceFunc(func() {
		unix.IoctlSetInt(int(control.Fd()), unix.LOOP_CTL_REMOVE, number)
		control.Close()
	})
	t.Cleanup(remove)
	return fmt.Sprintf("loop%d", number), remove
}

// readBlocks reads n blocks of a device, past the cache.
func readBlocks(t *testing.T, device string, n int) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := alignedBuffer(t, 4096)
	for i := range n {
		if _, err := f.ReadAt(buf, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
}

// A loop device without a file is of no interest until it gets one; what it had stays.
func TestBlockEmptyDevices(t *testing.T) {
	b := newTestBlock(t)
	name, _ := numberedLoop(t, 997) // nobody else's
	device := "/dev/" + name
	if n := len(seriesOf(t, b, name)); n != 0 {
		t.Errorf("%d series of a device without a size", n)
	}
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := configureLoop(device, file); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { detachLoop(device) })
	if n := len(seriesOf(t, b, name)); n != len(operationNames) {
		t.Errorf("%d series of a device with a size, want %d", n, len(operationNames))
	}
	readBlocks(t, device, 1)
	if err := detachLoop(device); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile("/sys/block/" + name + "/size"); err != nil || string(b) != "0\n" {
		t.Fatalf("size %q after the detach, %v: no judgement", b, err)
	}
	if n := seriesOf(t, b, name)["read"].Total.Count(); n == 0 {
		t.Error("the reads are gone with the file")
	}
}

// Disks come and go, and new ones get the memory and the queue id of old ones. Their requests
// are theirs, with the kernel's word of new disks and without.
func TestBlockDisksAtOldAddresses(t *testing.T) {
	kerneltest.Require(t)
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	hooks, err := findBlockHooks(kernel)
	if err != nil {
		t.Fatal(err)
	}
	for _, told := range []bool{hooks.diskSeen, false} {
		hooks.diskSeen = told
		b, err := newBlock(BlockConfig{}, hooks)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		hidden := kerneltest.CountHiddenCompletions(t, "", "")
		for i := range 8 {
			name, remove := numberedLoop(t, 980+i)
			if err := configureLoop("/dev/"+name, file); err != nil {
				t.Fatal(err)
			}
			reads := 23 + i
			readBlocks(t, "/dev/"+name, reads)
			if err := detachLoop("/dev/" + name); err != nil {
				t.Fatal(err)
			}
			remove()
			// The kernel looks for partitions, too.
			n := seriesOf(t, b, name)["read"].Total.Count() + hidden.Read(t)
			if n < uint64(reads) || n > uint64(reads)+50 {
				t.Errorf("%d reads of %s, made %d (told of new disks: %v)", n, name, reads, told)
			}
		}
	}
}

func TestRequestDevices(t *testing.T) {
	dir := t.TempDir()
	for path, content := range map[string]string{
		"vda/mq/0/nr_tags": "128\n", "vda/size": "2048\n", "vda/dev": "254:0\n",
		"loop0/mq/0/nr_tags": "128\n", "loop0/size": "0\n", "loop0/dev": "7:0\n",
		"cciss!c0d0/mq/0/nr_tags": "128\n", "cciss!c0d0/size": "8\n", "cciss!c0d0/dev": "104:0\n",
		"nvme0c0n1/mq/0/nr_tags": "128\n", "nvme0c0n1/size": "8\n", // hidden
		"dm-0/size": "8\n", "dm-0/dev": "253:0\n", // bios only
	} {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := requestDevices(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]blockDevice{
		"vda": {254, 0, false}, "loop0": {7, 0, true}, "cciss/c0d0": {104, 0, false}, "nvme0c0n1": {0, 0, false},
	}
	if !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestReadDiskstats(t *testing.T) {
	const text = ` 254       0 vda 100 1 800 50 200 2 1600 60 0 70 110 5 0 40 3 9 8
   7       0 loop0 1 0 8 0 0 0 0 0 0 0 0
`
	all, err := readDiskstats(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	want := diskstats{reads: 100, readSectors: 800, writes: 200, writeSectors: 1600, discards: 5, discardSectors: 40, flushes: 9}
	if got := all["vda"]; got != want {
		t.Errorf("vda: %+v, want %+v", got, want)
	}
	// Before 4.18 there are no discards, before 5.5 no flushes.
	if got, want := all["loop0"], (diskstats{reads: 1, readSectors: 8}); got != want {
		t.Errorf("loop0: %+v, want %+v", got, want)
	}
	if _, err := readDiskstats(strings.NewReader("254 0 vda x\n")); err == nil {
		t.Error("no error for a field that is no number")
	}
}
