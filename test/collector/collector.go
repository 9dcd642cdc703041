// SPDX-License-Identifier: Apache-2.0

package collector

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	startWait = 20 * time.Second
	stopWait  = 10 * time.Second
	ready     = "Everything is ready."
)

// Config returns the path of deploy/otel-collector.yaml.
func Config(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, "deploy", "otel-collector.yaml")
		}
	}
	t.Fatal("not in the repository: no go.mod above the working directory")
	return ""
}

// Collector is a running Collector.
type Collector struct {
	Endpoint     string // host:port of OTLP/gRPC, on loopback, plain text
	MetricsFile  string // JSON lines, written within a second of arrival
	ProfilesFile string

	cmd  *exec.Cmd
	log  *buffer
	done chan struct{} // closed when the process has ended
}

// Start runs a Collector with config, which reads OTLP_LISTEN_ADDRESS,
// OTLP_METRICS_FILE and OTLP_PROFILES_FILE, until the test ends. It returns when the
// Collector takes data.
func Start(t testing.TB, config string) *Collector {
	t.Helper()
	dir := t.TempDir()
	c := &Collector{
		Endpoint:     freeAddress(t),
		MetricsFile:  filepath.Join(dir, "metrics.jsonl"),
		ProfilesFile: filepath.Join(dir, "profiles.jsonl"),
		log:          &buffer{arrived: make(chan struct{}, 1)},
		done:         make(chan struct{}),
	}
	c.cmd = exec.Command(Build(t), "--config", config, "--feature-gates=+service.profilesSupport")
	c.cmd.Env = append(os.Environ(),
		"OTLP_LISTEN_ADDRESS="+c.Endpoint, "OTLP_METRICS_FILE="+c.MetricsFile, "OTLP_PROFILES_FILE="+c.ProfilesFile)
	c.cmd.Stderr = c.log
	c.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := c.cmd.Start(); err != nil {
		t.Fatalf("start the OpenTelemetry Collector: %v", err)
	}
	go func() {
		defer close(c.done)
		_ = c.cmd.Wait() // what it had to say is in the log
	}()
	t.Cleanup(func() {
		c.Stop(t)
		if t.Failed() {
			t.Logf("log of the OpenTelemetry Collector:\n%s", c.log)
		}
	})
	deadline := time.After(startWait)
	for !strings.Contains(c.log.String(), ready) {
		select {
		case <-c.log.arrived:
		case <-c.done:
			t.Fatal("the OpenTelemetry Collector ended at its start")
		case <-deadline:
			t.Fatalf("the OpenTelemetry Collector is not ready after %v", startWait)
		}
	}
	return c
}

// Stop ends the Collector, which writes what it has received, and waits for it. Calling
// it again does nothing.
func (c *Collector) Stop(t testing.TB) {
	t.Helper()
	_ = c.cmd.Process.Signal(unix.SIGTERM) // an error means that it has ended
	select {
	case <-c.done:
	case <-time.After(stopWait):
		t.Errorf("the OpenTelemetry Collector did not end within %v", stopWait)
		_ = c.cmd.Process.Kill()
		<-c.done
	}
}

// freeAddress returns a loopback address that was free a moment ago.
func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// buffer is a log that is written and read at the same time.
type buffer struct {
	arrived chan struct{}

	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case b.arrived <- struct{}{}:
	default:
	}
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
