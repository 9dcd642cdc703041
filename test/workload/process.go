// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"bytes"
	"io"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Build is Compile into a directory of the test, ending the test when it does not work.
func Build(t testing.TB, name string) string {
	t.Helper()
	path, err := Compile(t.TempDir(), name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Process is a running workload. Its methods are for one goroutine.
type Process struct {
	PID int

	t      testing.TB
	cmd    *exec.Cmd
	lines  *bufio.Reader
	output bytes.Buffer // what has been read of standard output
	stderr bytes.Buffer
	ended  func() error
}

// Start starts a program, and ends it with the test if it has not ended by itself.
func Start(t testing.TB, path string, args ...string) *Process {
	t.Helper()
	p := &Process{t: t, cmd: exec.Command(path, args...)}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatalf("start workload: %v", err)
	}
	p.lines = bufio.NewReader(io.TeeReader(out, &p.output))
	p.cmd.Stderr = &p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start workload: %v", err)
	}
	p.PID = p.cmd.Process.Pid
	p.ended = sync.OnceValue(func() error {
		io.Copy(io.Discard, p.lines)
		return p.cmd.Wait()
	})
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		p.ended()
	})
	return p
}

// Ready returns when the program has said that it is ready.
func (p *Process) Ready() {
	p.t.Helper()
	line, err := p.lines.ReadString('\n')
	if err != nil || strings.TrimSpace(line) != "ready" {
		p.t.Fatalf("%s: no ready line but %q, %v", p.cmd, line, err)
	}
}

// Wait waits until the program ends by itself, and returns its standard output.
func (p *Process) Wait() string {
	p.t.Helper()
	if err := p.ended(); err != nil {
		p.t.Fatalf("%s: %v\n%s", p.cmd, err, p.stderr.String())
	}
	return p.output.String()
}

// Stop asks the program to end, and returns its standard output. A program that does
// not catch SIGTERM just dies of it.
func (p *Process) Stop() string {
	p.t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(5*time.Second, func() { p.cmd.Process.Kill() })
	defer kill.Stop()
	p.ended()
	return p.output.String()
}
