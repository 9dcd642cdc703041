// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/test/workload"
)

// cgroup is one of the hierarchy that samples have their cgroup from, so that the samples
// of processes that come and go can be told from all others.
type cgroup struct {
	name  string // in the hierarchy
	id    uint64 // as samples have it
	procs string // the file that takes process ids
}

// newCgroup makes a cgroup that is gone when the test ends, as its processes are.
func newCgroup(t *testing.T, name string) *cgroup {
	t.Helper()
	root := "/sys/fs/cgroup"
	if bpf.CPUControllerV1() {
		root = "/sys/fs/cgroup/cpu"
	}
	dir := filepath.Join(root, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(dir) })
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	// The number of its inode is its id (kernfs, on 64 bits).
	return &cgroup{"/" + name, info.Sys().(*syscall.Stat_t).Ino, filepath.Join(dir, "cgroup.procs")}
}

// start starts a program in the cgroup.
func (c *cgroup) start(t *testing.T, command []string) *workload.Process {
	t.Helper()
	return workload.Start(t, "/bin/sh", append([]string{"-c", `echo $$ >"$0" && exec "$@"`, c.procs}, command...)...)
}
