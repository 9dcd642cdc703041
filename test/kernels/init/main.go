// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Command init is the first and only process of the virtual machines of test/kernels,
// but for those that it starts: it mounts, loads modules, runs the test binaries of its
// plan, says how they ended, and powers the machine off.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/test/kernels/guest"
)

func main() {
	if err := run(); err != nil {
		fmt.Println(guest.Mark + err.Error())
	}
	unix.Sync()
	// The end of process 1 panics the kernel, which ends the machine, too.
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	var plan guest.Plan
	b, err := os.ReadFile(guest.PlanFile)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &plan); err != nil {
		return fmt.Errorf("read %s: %w", guest.PlanFile, err)
	}
	for _, v := range plan.Env {
		name, value, _ := strings.Cut(v, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	for _, m := range plan.Modules {
		if err := load(m); err != nil {
			return fmt.Errorf("load module %s: %w", m, err)
		}
	}
	if err := mountAll(plan.CgroupV1); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	log, err := openLog()
	if err != nil {
		return err
	}
	for _, c := range plan.Commands {
		start := time.Now()
		cmd := exec.Command(c.Args[0], c.Args[1:]...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = c.Dir, os.Stdout, os.Stdout
		v := guest.Verdict{Name: c.Name}
		if err := cmd.Run(); err != nil {
			v.Error = err.Error()
		}
		v.Seconds = time.Since(start).Seconds()
		v.Kernel = log.complaints()
		b, err := json.Marshal(v)
		if err != nil {
			return err
		}
		fmt.Println(guest.Mark + string(b))
	}
	return nil
}

func mountAll(v1 []string) error {
	type mount struct{ kind, target, data string }
	// A disk of its own, because tests of block I/O need one that is no memory.
	const disk = "/dev/vda"
	mounts := []mount{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"tmpfs", "/tmp", ""},
		{"ext4", "/var/tmp", ""},
		{"tmpfs", "/run", ""},
		{"bpf", "/sys/fs/bpf", ""},
		{"tracefs", "/sys/kernel/tracing", ""},
		{"securityfs", "/sys/kernel/security", ""},
	}
	v2 := "/sys/fs/cgroup"
	if len(v1) > 0 {
		mounts = append(mounts, mount{"tmpfs", "/sys/fs/cgroup", ""})
		for _, c := range v1 {
			mounts = append(mounts, mount{"cgroup", "/sys/fs/cgroup/" + c, c})
		}
		v2 = "/sys/fs/cgroup/unified"
	}
	for _, m := range append(mounts, mount{"cgroup2", v2, ""}) {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		source := m.kind
		if source == "ext4" {
			source = disk
		}
		if err := unix.Mount(source, m.target, m.kind, 0, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.target, err)
		}
	}
	return nil
}

// loopbackUp lets tests use the addresses of this machine.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("set up lo: %w", err)
	}
	return nil
}

func load(module string) error {
	f, err := os.Open(module)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

// kernelLog is the kernel's log from a moment on.
type kernelLog struct{ fd int }

func openLog() (kernelLog, error) {
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return kernelLog{}, fmt.Errorf("open /dev/kmsg: %w", err)
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		return kernelLog{}, fmt.Errorf("seek in /dev/kmsg: %w", err)
	}
	return kernelLog{fd}, nil
}

// complaints returns what the kernel has said of itself since the last call, or since the
// log was opened: its warnings and oopses, and what follows them.
func (l kernelLog) complaints() (lines []string) {
	record := make([]byte, 8192)
	const context = 60
	more := 0
	for {
		n, err := unix.Read(l.fd, record)
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EINTR) {
			continue // what was overwritten is lost
		}
		if err != nil || n <= 0 {
			return lines
		}
		_, text, _ := strings.Cut(string(record[:n]), ";")
		text, _, _ = strings.Cut(text, "\n")
		for _, start := range []string{"WARNING: ", "BUG: ", "Oops", "kernel BUG at", "Kernel panic", "Internal error", "general protection fault"} {
			if strings.HasPrefix(text, start) {
				more = context
			}
		}
		if more > 0 {
			lines = append(lines, text)
			more--
		}
	}
}
