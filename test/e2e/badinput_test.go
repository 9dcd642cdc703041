// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/test/workload"
)

// testCorruptELF profiles processes that run code from files that no ELF reader can read,
// and a burner whose symbol tables are garbage.
func (s *stack) testCorruptELF(t *testing.T) {
	var pids []string
	for _, kind := range []string{"garbage", "header", "loop", "short"} {
		p := workload.Start(t, s.programs[workload.BadELF], kind, filepath.Join(t.TempDir(), kind+".so"), "30")
		p.Ready()
		pids = append(pids, fmt.Sprintf("pid=%d", p.PID))
	}
	for _, name := range []string{workload.Burn, workload.BurnGo} {
		path, err := workload.Corrupt(t.TempDir(), s.programs[name])
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, fmt.Sprintf("pid=%d", workload.Start(t, path, "1", "30").PID))
	}
	status, body, err := s.agent.Get("/pprof/cpu?seconds=8&format=folded&" + strings.Join(pids, "&"))
	if err != nil || status != http.StatusOK {
		t.Fatalf("status %d, %v: %s", status, err, body)
	}
	// Their samples are there, named by the file where there is no function.
	for _, comm := range []string{"badelf", "burn-corrupt", "burngo-corrupt"} {
		if !regexp.MustCompile(`(?m)^` + comm + `;`).Match(body) {
			t.Errorf("no stack of %s in\n%s", comm, body)
		}
	}
	for _, kind := range []string{"garbage", "header", "loop", "short"} {
		if !strings.Contains(string(body), kind+".so") {
			t.Errorf("no stack names %s.so in\n%s", kind, body)
		}
	}
	checkServes(t, s.agent)
}

// testStorm floods the host with processes that are gone before anyone can look at them.
// Their samples are delivered all the same.
func (s *stack) testStorm(t *testing.T) {
	fds, err := fileDescriptors(s.agent.PID)
	if err != nil {
		t.Fatal(err)
	}
	storm := workload.Start(t, s.programs[workload.Storm], "4", "1000000")
	time.Sleep(500 * time.Millisecond)
	begin, hostBegin := childrenCPU(t, storm.PID), kerneltest.ReadHostCPU(t)
	status, body, err := s.agent.Get("/pprof/cpu?seconds=15&format=folded&sample_index=cpu")
	if err != nil || status != http.StatusOK {
		t.Fatalf("status %d, %v: %s", status, err, body)
	}
	used, host := childrenCPU(t, storm.PID)-begin, kerneltest.ReadHostCPU(t).Since(hostBegin)
	storm.Stop()
	var sampled time.Duration
	processes := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^(storm-[0-9]+|storm)[; ].* ([0-9]+)$`).FindAllSubmatch(body, -1) {
		n, err := strconv.ParseInt(string(m[2]), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		sampled += time.Duration(n)
		processes[string(m[1])] = true
	}
	ratio := sampled.Seconds() / used.Seconds()
	t.Logf("samples of %d processes, for %v of %v of CPU (ratio %.2f); %v stolen", len(processes), sampled, used, ratio, host.Stolen)
	// The parent's forks are in the samples and not in its children's CPU time, and the
	// time after the capture is only in the latter. Chance: some hundred samples or more.
	if ratio < 0.75 || ratio > 1.6*host.Stretch() {
		t.Errorf("samples of the storm stand for %.2f of its CPU time", ratio)
	}
	// What was kept for the storm is let go.
	eventually(t, time.Minute, func() error {
		n, err := fileDescriptors(s.agent.PID)
		if err == nil && n > fds+150 {
			err = fmt.Errorf("%d file descriptors, %d before the storm", n, fds)
		}
		return err
	})
	checkServes(t, s.agent)
}

// childrenCPU is the CPU time of the children that a process has waited for (cutime and
// cstime, proc_pid_stat(5)).
func childrenCPU(t *testing.T, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	user, err1 := strconv.Atoi(fields[13])
	system, err2 := strconv.Atoi(fields[14])
	if err1 != nil || err2 != nil {
		t.Fatalf("/proc/%d/stat: %v, %v", pid, err1, err2)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

// testStartErrors starts agents that can not start: each says why and what to do.
func (s *stack) testStartErrors(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	busy := "--web.listen-address=" + l.Addr().String()
	for _, test := range []struct {
		name string
		args []string
		uid  uint32
		want string
	}{
		{"busy port", []string{"serve", busy}, 0, "address already in use"},
		{"no such flag", []string{"serve", "--nothing"}, 0, "--nothing"},
		{"bad frequency", []string{"serve", "--sampling.frequency=0"}, 0, "frequency"},
		{"bad endpoint", []string{"serve", "--otlp.endpoint=ftp://127.0.0.1"}, 0, "ftp"},
		{"no privileges", []string{"serve", "--web.listen-address=127.0.0.1:0"}, 65534, "permi"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := s.binary
			if test.uid != 0 {
				path = publicCopy(t, path)
			}
			cmd := exec.Command(path, test.args...)
			cmd.Dir = "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: test.uid, Gid: test.uid}}
			kill := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
			defer kill.Stop()
			out, err := cmd.CombinedOutput()
			if err == nil {
				t.Errorf("it exited 0:\n%s", out)
			}
			for _, want := range []string{"hostflame: error: ", test.want, "hostflame: hint: "} {
				if !strings.Contains(string(out), want) {
					t.Errorf("no %q in\n%s", want, out)
				}
			}
		})
	}
}

// testStillFine looks at the agent after all that.
func (s *stack) testStillFine(t *testing.T) {
	if s.agent.Ended() {
		t.Fatal("the agent has ended")
	}
	checkServes(t, s.agent)
	families, _ := scrape(t, s.agent)
	for _, m := range families["hostflame_scrape_collector_success"].GetMetric() {
		if m.GetGauge().GetValue() != 1 {
			t.Errorf("collector %v does not work", m.Label)
		}
	}
	for _, m := range families["hostflame_samples_lost_total"].GetMetric() {
		if n := m.GetCounter().GetValue(); n > 0 {
			t.Logf("samples lost: %v", m)
		}
	}
	stretch := kerneltest.ReadHostCPU(t).Since(s.atStart).Stretch()
	t.Logf("with what was stolen, CPUs seem %.2f times as busy as they were", stretch)
	for _, m := range families["hostflame_accounting_ratio"].GetMetric() {
		t.Logf("accounting: %v", m)
		// Sampling by a timer counts what is stolen; the kernel's account does not.
		high := 1.05
		if m.GetLabel()[0].GetValue() == "cpu" {
			high *= stretch
		}
		if r := m.GetGauge().GetValue(); r < 0.95 || r > high {
			t.Errorf("the agent does not agree with the kernel: %v", m)
		}
	}
	if _, n := value(families, "hostflame_accounting_ratio", nil); n == 0 {
		t.Error("nothing was compared with the kernel's accounting")
	}
	// What was kept for the bad input is let go.
	eventually(t, time.Minute, func() error {
		memory, err := residentBytes(s.agent.PID)
		t.Logf("%d MB resident, %d before the bad input", memory>>20, s.resident>>20)
		if err == nil && memory > s.resident+64<<20 {
			err = fmt.Errorf("%d MB resident, %d before the bad input", memory>>20, s.resident>>20)
		}
		return err
	})
}
