// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/kerneltest"
)

const (
	testID  = "0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9"
	otherID = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210"
)

func TestContainerName(t *testing.T) {
	const short, other = "0a1b2c3d4e5f", "fedcba987654"
	for _, test := range []struct{ path, want string }{
		{"/", "/"},
		{"", "/"},
		// Docker: cgroupfs and systemd drivers, in a parent of the user's.
		{"/docker/" + testID, short},
		{"/system.slice/docker-" + testID + ".scope", short},
		{"/my-parent/" + testID, short},
		{"/docker/" + testID + "/system.slice/nginx.service", short},
		// Docker in Docker, kind: the innermost is the one whose process it is.
		{"/docker/" + testID + "/docker/" + otherID, other},
		{"/docker/" + testID + "/kubelet/kubepods/burstable/pod1/" + otherID, other},
		{"/docker/" + testID + "/init.scope", short},
		// Kubernetes with containerd and CRI-O, both drivers.
		{"/kubepods/besteffort/pod0f4bf7d2-9f5b-4a3c-8ea0-5f6a4f1b2c3d/" + testID, short},
		{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f4bf7d2_9f5b_4a3c_8ea0_5f6a4f1b2c3d.slice/cri-containerd-" + testID + ".scope", short},
		{"/kubepods.slice/kubepods-pod0f4bf7d2.slice/crio-" + testID + ".scope", short},
		{"/kubepods.slice/kubepods-pod0f4bf7d2.slice/crio-" + testID + ".scope/container", short},
		{"/kubepods.slice/kubepods-pod0f4bf7d2.slice/crio-conmon-" + testID + ".scope", short},
		{"/system.slice/containerd.service/kubepods-burstable-pod0f4b.slice:cri-containerd:" + testID, short},
		{"/kubepods/burstable/pod0f4b/crio-" + testID, short},
		// Containerd alone, Podman with and without root, ECS, Fargate.
		{"/default/" + testID, short},
		{"/machine.slice/libpod-" + testID + ".scope", short},
		{"/machine.slice/libpod-" + testID + ".scope/container", short},
		{"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + testID + ".scope", short},
		{"/libpod_parent/libpod-" + testID, short},
		{"/ecs/task-id/" + testID, short},
		{"/ecs/0a1b2c3d4e5f60718293a4b5c6d7e8f9-1234567890", short},
		// Units.
		{"/system.slice/nginx.service", "nginx.service"},
		{"/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service"},
		{"/system.slice/nginx.service/worker", "nginx.service"},
		{"/user.slice/user-1000.slice/session-3.scope", "session-3.scope"},
		{"/user.slice/user-1000.slice/user@1000.service/app.slice/app-firefox.service", "user@1000.service"},
		{"/system.slice/docker.socket", "docker.socket"},
		{"/system.slice/_cpu.service", "cpu.service"},
		{"/init.scope", "init.scope"},
		// Neither.
		{"/user.slice", "/user.slice"},
		{"/kubepods.slice/kubepods-burstable.slice", "/kubepods.slice/kubepods-burstable.slice"},
		{"/lxc/web", "/lxc/web"},
		{"/lxc.payload.web/system.slice/nginx.service", "nginx.service"},
		{"/a/.service", "/a/.service"},
		{"/docker/" + testID[:63], "/docker/" + testID[:63]},
		{"/docker/" + testID + "0", "/docker/" + testID + "0"},
		{"/docker/" + strings.ToUpper(testID), "/docker/" + strings.ToUpper(testID)},
		{"/docker/x" + testID, "/docker/x" + testID},
		{"/a/7c16421ca7a242377f7c5ac225900379", "/a/7c16421ca7a242377f7c5ac225900379"},
		{"/a/7c16421ca7a242377f7c5ac225900379-", "/a/7c16421ca7a242377f7c5ac225900379-"},
		// Seen from another cgroup namespace.
		{"/../docker/" + testID, short},
		{"/a//b/", "/a/b"},
	} {
		if got := ContainerName(test.path); got != test.want {
			t.Errorf("%s: %q, want %q", test.path, got, test.want)
		}
	}
}

func FuzzContainerName(f *testing.F) {
	f.Add("/system.slice/docker-" + testID + ".scope")
	f.Add("/ecs/0a1b2c3d4e5f60718293a4b5c6d7e8f9-1234567890")
	f.Fuzz(func(t *testing.T, path string) {
		name := ContainerName(path)
		if name == "" || len(name) > len(path)+1 {
			t.Errorf("%q: %q", path, name)
		}
	})
}

func TestParseMountinfo(t *testing.T) {
	for _, test := range []struct {
		line        string
		v1          string
		mount, root string
		ok          bool
	}{
		{"32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu", "cpu", "/sys/fs/cgroup/cpu", "/", true},
		{"32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct", "cpu", "/sys/fs/cgroup/cpu,cpuacct", "/", true},
		{"32 31 0:29 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset", "cpu", "", "", false},
		{"32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu", "", "", "", false},
		{"41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw", "", "/sys/fs/cgroup/unified", "/", true},
		{"41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw", "cpu", "", "", false},
		{`41 31 0:38 /docker/abc /my\040cgroups rw - cgroup2 none rw,nsdelegate`, "", "/my cgroups", "/docker/abc", true},
		{"41 31 0:38 / /sys rw - sysfs sysfs rw", "", "", "", false},
		{"41 31", "", "", "", false},
		{"", "cpu", "", "", false},
	} {
		mount, root, ok := parseMountinfo(test.line, test.v1)
		if ok != test.ok || ok && (mount != test.mount || root != test.root) {
			t.Errorf("%q: %q %q %v, want %q %q %v", test.line, mount, root, ok, test.mount, test.root, test.ok)
		}
	}
}

func TestParseCgroup(t *testing.T) {
	const hybrid = "12:cpuset:/a\n2:cpuacct,cpu:/b/c:d\n1:name=systemd:/e\n0::/f\n"
	for _, test := range []struct {
		file string
		v1   string
		want string
		ok   bool
	}{
		{hybrid, "cpu", "/b/c:d", true},
		{hybrid, "cpuset", "/a", true},
		{hybrid, "blkio", "", false},
		{hybrid, "", "/f", true},
		{"0::/f (deleted)\n", "", "/f", true},
		{"0::/f\n", "cpu", "", false},
		{"4:cpuset:/a", "cpu", "", false},
		{"x", "", "", false},
		{"", "", "", false},
	} {
		if got, ok := parseCgroup(test.file, test.v1); got != test.want || ok != test.ok {
			t.Errorf("%q: %q %v, want %q %v", test.file, got, ok, test.want, test.ok)
		}
	}
}

// Without the mount names come from the process, if it is still in that cgroup.
func TestContainersByProcess(t *testing.T) {
	proc := t.TempDir()
	write(t, filepath.Join(proc, "self/mountinfo"), "32 31 0:29 / /nowhere rw,relatime - cgroup cgroup rw,cpu\n")
	write(t, filepath.Join(proc, "42/cgroup"), "2:cpu:/docker/"+testID+"\n0::/other\n")
	c := newContainers(proc, "cpu")
	defer c.Close()
	if got := c.Name(1, 43); got != unknownName {
		t.Errorf("process that is gone: %q, want %q", got, unknownName)
	}
	if got := c.Name(1, 42); got != testID[:12] {
		t.Errorf("%q, want %q", got, testID[:12])
	}
	if err := os.RemoveAll(filepath.Join(proc, "42")); err != nil {
		t.Fatal(err)
	}
	if got := c.Name(1, 42); got != testID[:12] {
		t.Errorf("cached: %q, want %q", got, testID[:12])
	}
}

func TestContainersCacheIsBounded(t *testing.T) {
	proc := t.TempDir()
	write(t, filepath.Join(proc, "42/cgroup"), "2:cpu:/a\n")
	c := newContainers(proc, "cpu")
	for id := range uint64(3 * maxCachedNames) {
		c.Name(id, 42)
	}
	if n := len(c.young) + len(c.old); n > 2*maxCachedNames {
		t.Errorf("%d names are kept", n)
	}
}

// The kernel's ids, resolved by the cgroup file systems of both versions.
func TestContainersByHandle(t *testing.T) {
	kerneltest.Require(t)
	for _, v1 := range []string{"cpu", "blkio", ""} {
		t.Run(cmp.Or(v1, "v2"), func(t *testing.T) {
			c := newContainers("/proc", v1)
			defer c.Close()
			if c.fd < 0 {
				if v1 == "" && !bpf.CPUControllerV1() || v1 != "" && bpf.ControllerV1(v1) {
					t.Fatal("the hierarchy that samples come from is not mounted")
				}
				t.Skip("not mounted")
			}
			testByHandle(t, c)
		})
	}
}

func testByHandle(t *testing.T, c *Containers) {
	dir := filepath.Join(c.mount, "hostflame-test", testID)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	remove := func() { os.Remove(dir); os.Remove(filepath.Dir(dir)) }
	t.Cleanup(remove)
	id := inode(t, dir)
	if got := c.Name(id, 1); got != testID[:12] {
		t.Errorf("%q, want %q", got, testID[:12])
	}
	if got := c.Name(inode(t, c.mount), 1); got != rootName {
		t.Errorf("root: %q", got)
	}
	parent := inode(t, filepath.Dir(dir))
	remove()
	if got := c.Name(parent, 1); got != unknownName {
		t.Errorf("removed before it was seen: %q, want %q", got, unknownName)
	}
	if got := c.Name(id, 1); got != testID[:12] {
		t.Errorf("removed after it was seen: %q, want %q", got, testID[:12])
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// inCgroup starts a command inside a cgroup of the hierarchy that samples come from.
func inCgroup(t *testing.T, name string, command ...string) *exec.Cmd {
	t.Helper()
	c := NewContainers("cpu")
	defer c.Close()
	dir := filepath.Join(c.mount, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(dir) })
	sh := append([]string{"-c", `echo $$ > "$0/cgroup.procs" && exec "$@"`, dir}, command...)
	cmd := exec.Command("/bin/sh", sh...)
	startCommand(t, cmd)
	return cmd
}
