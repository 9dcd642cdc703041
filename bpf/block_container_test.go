// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// ioCgroup makes a cgroup in the hierarchy of block I/O, and returns its path and id.
func ioCgroup(t *testing.T, name string) (dir string, id uint64) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		_, tail, _ := strings.Cut(line, " - ")
		kind := strings.Fields(tail)
		if v1 := ControllerV1("blkio"); v1 && kind[0] == "cgroup" && strings.Contains(","+kind[2]+",", ",blkio,") || !v1 && kind[0] == "cgroup2" {
			dir = filepath.Join(f[4], name)
		}
	}
	if dir == "" {
		t.Fatal("no hierarchy of block I/O is mounted")
	}
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

// writeIn writes n blocks of 16 KiB directly to a file, from a process in a cgroup.
func writeIn(t *testing.T, cgroup, file string, seek, n int) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", `echo $$ > "$0/cgroup.procs" && exec dd if=/dev/zero "of=$1" bs=16k "seek=$2" "count=$3" oflag=direct status=none conv=notrunc`,
		cgroup, file, strconv.Itoa(seek), strconv.Itoa(n))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("write: %v\n%s", err, out)
	}
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
			t.Errorf("no container %s: %v", name, got)
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
		if c.Charged < w.Total.Count() || c.Charged > c.Requests {
			t.Errorf("%s: %d of %d requests charged by their bios, want all %d writes at least", name, c.Charged, c.Requests, w.Total.Count())
		}
	}
	if len(got[OtherContainers].Operations) != slotOperations {
		t.Errorf("no %s: %v", OtherContainers, got)
	}
}
