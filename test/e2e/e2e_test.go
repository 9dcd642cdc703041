// SPDX-License-Identifier: Apache-2.0

// Package e2e runs the real agent under real load, with the real programs that take what
// it gives: go tool pprof, Prometheus, the OpenTelemetry Collector. It needs root.
package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/test/agent"
	"github.com/hostflame/hostflame/test/collector"
	"github.com/hostflame/hostflame/test/workload"
)

// loadSeconds bounds the load; the tests end it when they are done with it.
const loadSeconds = "200"

// stack is what runs: one load, one agent, and those who read from it.
type stack struct {
	dir       string // on a real file system
	binary    string // of the agent
	programs  map[string]string
	agent     *agent.Agent
	atStart   kerneltest.HostCPU // when the agent started
	resident  int64              // memory of the agent before the bad input
	classic   *prometheus        // takes classic histograms
	native    *prometheus        // takes native ones
	collector *collector.Collector
	burn      *workload.Process // C++
	burnGo    *workload.Process
	pingpong  *workload.Process
	fio       *fio
	zram      bool // there is I/O of a device without requests
}

// TestEndToEnd holds one load, one agent and its readers against each other in many ways.
// The groups run one after the other, what is in a group at the same time.
func TestEndToEnd(t *testing.T) {
	kerneltest.Require(t)
	s := &stack{dir: t.TempDir()}
	s.build(t)
	kerneltest.MeasureLock(t)
	s.start(t)
	t.Run("Scrape", s.testFirstScrape) // before anything has happened
	s.startLoad(t)
	t.Run("BlockIOProfile", s.testBlockIOProfile) // while fio runs
	t.Run("Load", func(t *testing.T) {
		t.Run("Pprof", parallel(s.testPprof))
		t.Run("Capture", parallel(s.testCapture))
		t.Run("Wall", parallel(s.testWall))
		t.Run("SecondAgent", parallel(s.testSecondAgent))
		t.Run("Prometheus", parallel(s.testPrometheus))
		t.Run("Collector", parallel(s.testCollector))
	})
	t.Run("Culprit", s.testCulprit)
	t.Run("BlockIO", s.testBlockIO) // fio has ended then
	t.Run("Dashboard", s.testDashboard)
	var err error
	if s.resident, err = residentBytes(s.agent.PID); err != nil {
		t.Fatal(err)
	}
	t.Run("BadInput", func(t *testing.T) {
		t.Run("CorruptELF", parallel(s.testCorruptELF))
		t.Run("Storm", parallel(s.testStorm))
		t.Run("Start", parallel(s.testStartErrors))
	})
	t.Run("Endpoint", func(t *testing.T) { // they end in time: not beside the storm
		t.Run("Down", parallel(s.testEndpointDown))
		t.Run("Hangs", parallel(s.testEndpointHangs))
	})
	t.Run("StillFine", s.testStillFine)
	t.Run("Stop", s.testStop)
}

func parallel(test func(*testing.T)) func(*testing.T) {
	return func(t *testing.T) {
		t.Parallel()
		test(t)
	}
}

// build builds everything at once: most of it is waiting for compilers.
func (s *stack) build(t *testing.T) {
	s.programs = map[string]string{}
	var wg sync.WaitGroup
	var mu sync.Mutex
	build := func(name string, f func() (string, error)) {
		wg.Go(func() {
			path, err := f()
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			s.programs[name] = path
		})
	}
	// Two minutes the first time on a machine; then it is in the user's cache.
	wg.Go(func() { collector.Build(t) })
	build("hostflame", func() (string, error) { return agent.Build(s.dir) })
	build("pprof", func() (string, error) {
		// The go command builds it once and caches it.
		return "", exec.Command("go", "tool", "-n", "pprof").Run()
	})
	for _, name := range workload.Names() {
		build(name, func() (string, error) { return workload.Compile(s.dir, name) })
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	s.binary = s.programs["hostflame"]
}

// start starts the readers and the agent, which is scraped from its first moment.
func (s *stack) start(t *testing.T) {
	s.collector = collector.Start(t, collector.Config(t))
	s.atStart = kerneltest.ReadHostCPU(t)
	a, err := agent.Start(agent.Config{
		Path: s.binary,
		// Three times the default rate: what chance does to shares in some seconds is less.
		Args: []string{"--otlp.endpoint=http://" + s.collector.Endpoint, "--profile.interval=5s", "--sampling.frequency=299"},
		Env:  []string{"OTEL_METRIC_EXPORT_INTERVAL=10000", "OTEL_SERVICE_NAME=hostflame-e2e"},
	})
	if err != nil {
		t.Fatal(err)
	}
	s.agent = a
	t.Cleanup(func() {
		a.Kill()
		if t.Failed() {
			t.Logf("the agent's log:\n%s", a.Log())
		}
	})
	s.classic = startPrometheus(t, a.URL)
	s.native = startPrometheus(t, a.URL, "--enable-feature=native-histograms")
}

// startLoad starts what the whole test looks at.
func (s *stack) startLoad(t *testing.T) {
	s.startZram(t)
	s.burn = workload.Start(t, s.programs[workload.Burn], "1", loadSeconds)
	s.burnGo = workload.Start(t, s.programs[workload.BurnGo], "1", loadSeconds)
	s.pingpong = workload.Start(t, s.programs[workload.PingPong], "1", "0")
	contain(t, s.pingpong)
	s.fio = startFio(t, s, 40*time.Second)
}

// contain puts a process into a container of its own, so that there are two that wait for
// each other.
func contain(t *testing.T, p *workload.Process) {
	t.Helper()
	dir := "/sys/fs/cgroup/cpu"
	if _, err := os.Stat(dir); err != nil {
		dir = "/sys/fs/cgroup"
	}
	dir = filepath.Join(dir, "hostflame-e2e.service")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Stop()
		os.Remove(dir)
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(p.PID)), 0); err != nil {
		t.Fatal(err)
	}
}

// eventually asks until the answer is nil, or d has passed; then the last answer is the
// test's failure.
func eventually(t *testing.T, d time.Duration, ask func() error) {
	t.Helper()
	deadline := time.Now().Add(d)
	for {
		err := ask()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("after %v still: %v", d, err)
			return
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// fileDescriptors counts what a process has open.
func fileDescriptors(pid int) (int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(entries), err
}

// residentBytes is a process's VmRSS.
func residentBytes(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kb); n == 1 {
			return kb * 1024, nil
		}
	}
	return 0, fmt.Errorf("no VmRSS of process %d", pid)
}

// repository is the module's root, as the tests run in their own directory.
func repository(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// publicCopy copies an executable to where another user can run it.
func publicCopy(t *testing.T, path string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hostflame-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, filepath.Base(path))
	if err := os.WriteFile(out, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return out
}
