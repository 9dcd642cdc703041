// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// ioHierarchy is where the hierarchy of block I/O is mounted, and the cgroup of it that this
// process is in, as a path below that.
func ioHierarchy(t *testing.T) (mount, own string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	v1 := ControllerV1("blkio")
	for line := range strings.Lines(string(mounts)) {
		_, tail, _ := strings.Cut(line, " - ")
		kind := strings.Fields(tail)
		if v1 && kind[0] == "cgroup" && strings.Contains(","+kind[2]+",", ",blkio,") || !v1 && kind[0] == "cgroup2" {
			mount = strings.Fields(line)[4]
		}
	}
	for line := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if v1 && strings.Contains(","+f[1]+",", ",blkio,") || !v1 && f[0] == "0" {
			own = f[2]
		}
	}
	if mount == "" {
		t.Fatal("no hierarchy of block I/O is mounted")
	}
	return mount, own
}

// ioCgroup makes a cgroup in the hierarchy of block I/O, and returns its path and id.
func ioCgroup(t *testing.T, name string) (dir string, id uint64) {
	t.Helper()
	mount, _ := ioHierarchy(t)
	dir = filepath.Join(mount, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(dir) })
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	return dir, st.Ino
}

// writeIn writes n blocks of 16 KiB directly to a file, as a process of a cgroup.
func writeIn(t *testing.T, cgroup, file string, seek, n int) {
	t.Helper()
	writeWith(t, unix.O_DIRECT, cgroup, file, seek, n)
}

// writeWith is writeIn with other flags of open than O_DIRECT.
func writeWith(t *testing.T, flag int, cgroup, file string, seek, n int) {
	t.Helper()
	// An inode is whose who made it dirty first, its creator.
	inCgroup(t, cgroup, func() {
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|flag, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		buf := alignedBuffer(t, 16<<10)
		for i := range n {
			if _, err := f.WriteAt(buf, int64(seek+i)*16<<10); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// inCgroup runs fn while this process, and so what it starts, is in a cgroup of the hierarchy
// of block I/O.
func inCgroup(t *testing.T, cgroup string, fn func()) {
	t.Helper()
	mount, own := ioHierarchy(t)
	move := func(dir string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
			t.Fatal(err)
		}
	}
	move(cgroup)
	defer move(filepath.Join(mount, own))
	fn()
}

// chargesIO tells whether the kernel charges block I/O to a cgroup.
func chargesIO(t *testing.T, dir string) bool {
	t.Helper()
	if ControllerV1("blkio") {
		return true
	}
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.Contains(strings.Fields(string(b)), "io")
}

// newContainerBlock counts by the names of containers, by cgroup.
func newContainerBlock(t *testing.T, names map[uint64]string, cfg BlockConfig) *Block {
	t.Helper()
	cfg.ContainerName = func(id uint64) string {
		if name, ok := names[id]; ok {
			return name
		}
		return fmt.Sprint("cgroup ", id)
	}
	b, err := NewBlock(cfg)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// sampledConfig has so many stacks taken that the requests of these tests, less than that in
// all, are all sampled unless others write a lot.
func sampledConfig(t *testing.T) BlockConfig {
	t.Helper()
	tables, err := NewTables(DefaultTableMemory)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Close() })
	return BlockConfig{Tables: tables, StackRate: 5000, CgroupV1: CPUControllerV1()}
}

// containersByName are those that b has counted.
func containersByName(t *testing.T, b *Block) map[string]BlockContainer {
	t.Helper()
	list, err := b.Containers()
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]BlockContainer{}
	for _, c := range list {
		m[c.Name] = c
	}
	return m
}

// writtenBytes is what containers have written, by name.
func writtenBytes(t *testing.T, b *Block) map[string]uint64 {
	t.Helper()
	m := map[string]uint64{}
	for name, c := range containersByName(t, b) {
		for _, o := range c.Operations {
			if o.Operation == "write" {
				m[name] = o.Size.Sum
			}
		}
	}
	return m
}

// writers are the bytes of sampled writes, by the cgroup that they count for, of this process
// and of the kernel's workers.
type writers struct{ own, workers map[uint64]uint64 }

// sampledWrites drains the samples.
func sampledWrites(t *testing.T, b *Block) writers {
	t.Helper()
	w := writers{map[uint64]uint64{}, map[uint64]uint64{}}
	if err := b.Drain(func(s *Sample) {
		if s.IO.Operation != "write" {
			return
		}
		cgroup := s.IO.Cgroup
		if cgroup <= RootCgroup { // as the profiler does
			cgroup = s.Cgroup
		}
		switch worker := strings.HasPrefix(s.Comm.String(), "kworker/"); {
		case s.PID == uint32(os.Getpid()):
			if len(s.Kernel) == 0 || len(s.User) == 0 {
				t.Errorf("a write of our own with %d kernel frames and %d of the user", len(s.Kernel), len(s.User))
			}
			w.own[cgroup] += s.IO.Bytes * uint64(s.Weight)
		case worker:
			if len(s.Kernel) == 0 || len(s.User) > 0 || s.UserOutcome != OutcomeNone {
				t.Errorf("a write of %s with %d kernel frames and %d of the user", s.Comm, len(s.Kernel), len(s.User))
			}
			w.workers[cgroup] += s.IO.Bytes * uint64(s.Weight)
		}
	}); err != nil {
		t.Fatal(err)
	}
	return w
}

// Two cgroups that write differently much are told apart, by their bytes, exactly.
func TestBlockByContainer(t *testing.T) {
	kerneltest.Require(t)
	// Not a loop device: what it reads and writes itself would be charged to them as well.
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, make([]byte, 40<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	unix.Sync()
	one, oneID := ioCgroup(t, "hostflame-io-one")
	two, twoID := ioCgroup(t, "hostflame-io-two")
	names := map[uint64]string{oneID: "one", twoID: "two", RootCgroup: "/"}
	b := newContainerBlock(t, names, BlockConfig{})
	if !chargesIO(t, one) && !b.OwnStart() {
		t.Skip("without the io controller the kernel charges the root, and who submits is not seen")
	}
	hidden := kerneltest.CountHiddenCompletions(t, "", "")
	writeIn(t, one, file, 0, 211)
	writeIn(t, two, file, 1024, 53)
	writeIn(t, one, file, 2048, 7)
	got := containersByName(t, b)
	lost := hidden.Read(t) * 16384
	for name, blocks := range map[string]uint64{"one": 218, "two": 53} {
		c := got[name]
		if len(c.Operations) == 0 {
			t.Errorf("no container %s: %v", name, slices.Collect(maps.Keys(got)))
			continue
		}
		w := c.Operations[1]
		if w.Operation != "write" || w.Size.Sum > blocks*16384 || w.Size.Sum+lost < blocks*16384 {
			t.Errorf("%s: %d bytes of %s, want %d", name, w.Size.Sum, w.Operation, blocks*16384)
		}
		if w.Total.Count() != w.Size.Count() || w.Queue.Sum+w.DeviceTime.Sum != w.Total.Sum || w.Total.Sum == 0 {
			t.Errorf("%s: %d requests, %d sizes; %d ns, %d of them queued, %d on the device", name,
				w.Total.Count(), w.Size.Count(), w.Total.Sum, w.Queue.Sum, w.DeviceTime.Sum)
		}
		// Where the controller is off, the kernel charges the root.
		if on := chargesIO(t, one); on && c.Charged < w.Total.Count() || !on && c.Charged != 0 || c.Charged > c.Requests {
			t.Errorf("%s: %d of %d requests charged by their bios (controller on: %v)", name, c.Charged, c.Requests, on)
		}
	}
	if len(got[OtherContainers].Operations) != slotOperations {
		t.Errorf("no %s: %v", OtherContainers, slices.Collect(maps.Keys(got)))
	}
}

// Where the kernel does not follow who dirtied the pages (v1, or v2 without the io controller),
// what its workers write back is the root's, whoever dirtied it and whoever waits for it; what a
// process writes back itself is its cgroup's, like direct writes.
func TestBlockByContainerOfSubmitter(t *testing.T) {
	kerneltest.Require(t)
	dirtier, dirtierID := ioCgroup(t, "hostflame-io-dirtier")
	syncer, syncerID := ioCgroup(t, "hostflame-io-syncer")
	if !ControllerV1("blkio") && chargesIO(t, dirtier) {
		t.Skip("the kernel follows who dirtied the pages")
	}
	b := newContainerBlock(t, map[uint64]string{dirtierID: "dirtier", syncerID: "syncer", RootCgroup: "/"}, sampledConfig(t))
	if !ControllerV1("blkio") && !b.OwnStart() {
		t.Skip("without the io controller the kernel charges the root, and who submits is not seen")
	}
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Blocks that do not touch, so that each is a request.
	const blocks, block = 211, 16 << 10
	const want = blocks * block
	dirty := func(after func(i int)) {
		inCgroup(t, dirtier, func() {
			buf := make([]byte, block)
			for i := range blocks {
				if _, err := f.WriteAt(buf, int64(i)*2*block); err != nil {
					t.Fatal(err)
				}
				after(i)
			}
		})
	}
	sync := func(what func(int) error) {
		t.Helper()
		if err := what(int(f.Fd())); err != nil {
			t.Fatal(err)
		}
	}
	hidden := kerneltest.CountHiddenCompletions(t, "", "")
	for _, how := range []struct {
		name   string
		write  func()
		by     string // whose it is
		worker bool   // who writes it back
		least  uint64
	}{
		// Should others sync meanwhile, workers write what it has dirtied since the last fsync.
		{"fsync", func() {
			dirty(func(i int) {
				if i%8 == 7 || i == blocks-1 {
					sync(unix.Fsync)
				}
			})
		}, "dirtier", false, want * 3 / 4},
		// syncfs(2) has workers write the pages, and waits.
		{"syncfs", func() {
			dirty(func(int) {})
			inCgroup(t, syncer, func() { sync(unix.Syncfs) })
		}, "/", true, want},
	} {
		unix.Sync()
		before, lost := writtenBytes(t, b), hidden.Read(t)
		sampledWrites(t, b)
		how.write()
		after, sampled := writtenBytes(t, b), sampledWrites(t, b)
		lost = block * (hidden.Read(t) - lost)
		of := map[string]uint64{}
		for name := range after {
			of[name] = after[name] - before[name]
		}
		t.Logf("%s: %d bytes of the dirtier, %d of the syncer, %d of the root; samples: %v; at most %d hidden, wrote %d",
			how.name, of["dirtier"], of["syncer"], of["/"], sampled, lost, want)
		by := map[string]map[bool]uint64{
			"dirtier": {false: sampled.own[dirtierID], true: sampled.workers[dirtierID]},
			"syncer":  {false: sampled.own[syncerID], true: sampled.workers[syncerID]},
			"/":       {false: sampled.own[RootCgroup], true: sampled.workers[RootCgroup]},
		}
		// The root has the writes of others as well. A file system without a journal has the
		// metadata written by who calls fsync.
		if of[how.by]+lost < how.least || how.by != "/" && of[how.by] > want*5/4 {
			t.Errorf("%s: %d bytes of %s, wrote %d", how.name, of[how.by], how.by, want)
		}
		// Above the rate of samples the draw is what is not exact.
		if n := by[how.by][how.worker]; n+lost < want/2 {
			t.Errorf("%s: samples say %d bytes of %s (by a worker: %v), wrote %d", how.name, n, how.by, how.worker, want)
		}
		if how.worker && (of["dirtier"] > 0 || sampled.own[dirtierID] > 0) {
			t.Errorf("%s: %d bytes of the dirtier, whose pages a worker wrote; samples: %v", how.name, of["dirtier"], sampled)
		}
		// Metadata that others have made dirty may be its, but not the pages.
		if of["syncer"] > want/4 {
			t.Errorf("%s: %d bytes of who waited", how.name, of["syncer"])
		}
		if n := by["dirtier"][true] + by["syncer"][true]; n > 0 {
			t.Errorf("%s: samples say that workers wrote %d bytes of cgroups", how.name, n)
		}
	}
	// v1 charges the bio to who submits it.
	if c := containersByName(t, b)["dirtier"]; ControllerV1("blkio") && c.Charged != c.Requests || !ControllerV1("blkio") && c.Charged > 0 {
		t.Errorf("%d of the dirtier's %d requests are charged by their bios", c.Charged, c.Requests)
	}
}

// Two cgroups write at known rates, directly and through the page cache, which the kernel
// writes back later: both are charged to who wrote, where it follows cgroups (v2 with the io
// and memory controllers), in the counts and in the samples, whose stacks are the workers'.
func TestBlockByContainerWriteback(t *testing.T) {
	kerneltest.Require(t)
	mount, _ := ioHierarchy(t)
	if err := os.WriteFile(filepath.Join(mount, "cgroup.subtree_control"), []byte("+io +memory"), 0); err != nil {
		if kerneltest.InVM() && !ControllerV1("blkio") {
			t.Fatal(err)
		}
		t.Skipf("no io and memory controllers: %v", err)
	}
	one, oneID := ioCgroup(t, "hostflame-back-one")
	two, twoID := ioCgroup(t, "hostflame-back-two")
	dir := t.TempDir()
	names := map[uint64]string{oneID: "one", twoID: "two"}
	b := newContainerBlock(t, names, sampledConfig(t))
	const rounds, block = 6, 16 << 10
	// Blocks of each round. They are many because the file system's metadata, some 40 KiB, are of
	// the cgroup that made them dirty, likewise.
	shares := map[string]int{one: 384, two: 64}
	for _, how := range []struct {
		name string
		flag int
	}{{"direct", unix.O_DIRECT}, {"buffered", 0}} {
		before := writtenBytes(t, b)
		sampledWrites(t, b)
		for round := range rounds {
			for group, blocks := range shares {
				writeWith(t, how.flag, group, filepath.Join(dir, how.name+filepath.Base(group)), round*blocks, blocks)
			}
		}
		unix.Sync()
		after, sampled := writtenBytes(t, b), sampledWrites(t, b)
		by, others := sampled.own, sampled.workers
		if how.flag == 0 { // sync(2) has the workers write the pages
			by, others = others, by
		}
		for group, blocks := range shares {
			id := map[string]uint64{one: oneID, two: twoID}[group]
			name := names[id]
			n, want := after[name]-before[name], uint64(rounds*blocks*block)
			t.Logf("%s, %s: %d bytes, wrote %d", how.name, name, n, want)
			if d := int64(n) - int64(want); max(d, -d) > int64(want/50) {
				t.Errorf("%s, %s: %d bytes, wrote %d: more than 2 %% apart", how.name, name, n, want)
			}
			t.Logf("%s, %s: samples say %d bytes", how.name, name, by[id])
			if by[id] < want*3/4 || by[id] > want*5/4 || others[id] > want/50 {
				t.Errorf("%s, %s: samples say that %d bytes were written by this process and %d by kernel workers, wrote %d",
					how.name, name, sampled.own[id], sampled.workers[id], want)
			}
		}
	}
}
