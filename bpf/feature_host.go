// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// capability is one that the agent asks for, and what for.
type capability struct {
	name       string
	bit        int
	lost, hint string
}

var capabilities = []capability{
	{"CAP_BPF", unix.CAP_BPF, "all BPF programs", "run as root or grant it"},
	{"CAP_PERFMON", unix.CAP_PERFMON, "all BPF programs: tracing and perf events", "run as root or grant it"},
	{"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE, "mappings and files of other users' processes: their frames show as [unknown mapping]", "grant it"},
	{"CAP_SYSLOG", unix.CAP_SYSLOG, "names of kernel functions where kernel.kptr_restrict is 1", "grant it"},
	{"CAP_DAC_READ_SEARCH", unix.CAP_DAC_READ_SEARCH, "symbols of binaries that only their owner may read", "grant it"},
	{"CAP_CHECKPOINT_RESTORE", unix.CAP_CHECKPOINT_RESTORE, "/proc/PID/map_files: symbols of deleted files and of other mount namespaces", "grant it (Linux 5.9)"},
	{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN, "the run time of BPF programs (bpf-stats), nothing else", "leave it away: it is worth more than what it brings"},
}

func (c capability) try() (string, error) {
	have, err := haveCapability(c.bit)
	if err != nil {
		return "", err
	}
	if !have {
		return "", errors.New("not in the effective set")
	}
	return "", nil
}

// haveCapability tells whether bit is in the effective set of this process.
func haveCapability(bit int) (bool, error) {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return false, fmt.Errorf("capget: %w", err)
	}
	return data[bit/32].Effective&(1<<(bit%32)) != 0, nil
}

func lockdown() (string, error) {
	const path = "/sys/kernel/security/lockdown"
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return "unknown: no " + path, nil
	}
	if err != nil {
		return "", err
	}
	mode := selectedWord(string(b))
	if mode != "none" {
		return "", fmt.Errorf("in force: %s", mode)
	}
	return mode, nil
}

// selectedWord is the one in brackets, as the kernel marks the choice in force:
// "none [integrity] confidentiality".
func selectedWord(s string) string {
	_, s, _ = strings.Cut(s, "[")
	s, _, _ = strings.Cut(s, "]")
	return s
}

// tryKallsyms reads the first symbols: the kernel shows their addresses as zero to those
// who may not know them.
func tryKallsyms() (string, error) {
	detail := ""
	if b, err := os.ReadFile("/proc/sys/kernel/kptr_restrict"); err == nil {
		detail = "kernel.kptr_restrict=" + strings.TrimSpace(string(b))
	}
	f, err := os.Open("/proc/kallsyms")
	if err != nil {
		return "", err
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	// On amd64 the first symbols are per-CPU and really at 0 on older kernels.
	for n := 0; sc.Scan() && n < 100_000; n++ {
		addr, rest, _ := strings.Cut(sc.Text(), " ")
		if strings.Trim(addr, "0") != "" && rest != "" {
			return detail, nil
		}
	}
	if err := sc.Err(); err != nil {
		return "", fmt.Errorf("read kallsyms: %w", err)
	}
	return "", errors.New("all addresses are zero; " + detail)
}

// tryMapFiles opens the file of one mapping of another process, the parent, through
// map_files.
func tryMapFiles() (string, error) {
	dir := fmt.Sprintf("/proc/%d/map_files", os.Getppid())
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	if len(entries) == 0 {
		return "", errors.New(dir + " is empty")
	}
	// Opening what the link names is what needs the capability, not listing it.
	f, err := os.Open(filepath.Join(dir, entries[0].Name()))
	if err != nil {
		return "", err
	}
	f.Close()
	detail := ""
	if _, err := os.ReadDir("/proc/1/map_files"); err != nil {
		detail = "but those of PID 1 are closed: " + err.Error()
	}
	return detail, nil
}

// cgroupLayout names the layout that decides where containers are found.
func cgroupLayout() (string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	layout := cgroupLayoutOf(string(b))
	if _, err := os.Stat("/sys/fs/cgroup"); err != nil {
		return "", err
	}
	if CPUControllerV1() {
		layout += ", cpu controller on v1"
	}
	return layout, nil
}

// cgroupLayoutOf reads the lines of /proc/PID/cgroup, hierarchy:controllers:path.
func cgroupLayoutOf(cgroup string) string {
	var v1, v2 bool
	for line := range strings.Lines(cgroup) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(f) < 3:
		case f[0] == "0" && f[1] == "":
			v2 = true
		case !strings.HasPrefix(f[1], "name="):
			v1 = true
		}
	}
	switch {
	case v1 && v2:
		return "hybrid"
	case v1:
		return "v1"
	}
	return "v2"
}
