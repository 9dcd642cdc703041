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
	b, err := NewBlock(BlockConfig{ContainerName: func(id uint64) string {
		if name, ok := names[id]; ok {
			return name
		}
		return fmt.Sprint("cgroup ", id)
	}})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { b.Close() })
	if !chargesIO(t, one) && !b.OwnStart() {
		t.Skip("without the io controller the kernel charges the root, and who submits is not seen")
	}
	of := func() map[string]BlockContainer {
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
	hidden := countTracepoint(t, "block/block_rq_complete", true)
	writeIn(t, one, file, 0, 211)
	writeIn(t, two, file, 1024, 53)
	writeIn(t, one, file, 2048, 7)
	got := of()
	lost := hidden.read(t) * 16384
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

// Two cgroups write at known rates, directly and through the page cache, which the kernel
// writes back later: both are charged to who wrote, where it follows cgroups (v2 with the io
// and memory controllers).
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
	b, err := NewBlock(BlockConfig{ContainerName: func(id uint64) string {
		if name, ok := names[id]; ok {
			return name
		}
		return fmt.Sprint("cgroup ", id)
	}})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { b.Close() })
	written := func() map[string]uint64 {
		t.Helper()
		list, err := b.Containers()
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]uint64{}
		for _, c := range list {
			for _, o := range c.Operations {
				if o.Operation == "write" {
					m[c.Name] = o.Size.Sum
				}
			}
		}
		return m
	}
	const rounds, block = 6, 16 << 10
	shares := map[string]int{one: 96, two: 16} // blocks of each round
	for _, how := range []struct {
		name string
		flag int
	}{{"direct", unix.O_DIRECT}, {"buffered", 0}} {
		before := written()
		for round := range rounds {
			for group, blocks := range shares {
				writeWith(t, how.flag, group, filepath.Join(dir, how.name+filepath.Base(group)), round*blocks, blocks)
			}
		}
		unix.Sync()
		after := written()
		for group, blocks := range shares {
			name := names[map[string]uint64{one: oneID, two: twoID}[group]]
			n, want := after[name]-before[name], uint64(rounds*blocks*block)
			t.Logf("%s, %s: %d bytes, wrote %d", how.name, name, n, want)
			if d := int64(n) - int64(want); max(d, -d) > int64(want/50) {
				t.Errorf("%s, %s: %d bytes, wrote %d: more than 2 %% apart", how.name, name, n, want)
			}
		}
	}
}
