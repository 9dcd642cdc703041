// SPDX-License-Identifier: Apache-2.0

// Package agent builds and runs the real hostflame for tests and benchmarks.
package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// Build builds the command into dir as it is shipped, static, and returns its path. A
// binary that HOSTFLAME_BINARY names is taken instead, a released one for example.
func Build(dir string) (string, error) {
	if path := os.Getenv("HOSTFLAME_BINARY"); path != "" {
		return filepath.Abs(path)
	}
	_, file, _, _ := runtime.Caller(0)
	out := filepath.Join(dir, "hostflame")
	cmd := exec.Command("go", "build", "-trimpath", "-o", out, "./cmd/hostflame")
	cmd.Dir = filepath.Join(filepath.Dir(file), "../..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the agent: %w\n%s", err, bytes.TrimSpace(text))
	}
	return out, nil
}

// Agent is a running `hostflame serve`. Its methods may be called concurrently.
type Agent struct {
	URL string // http://127.0.0.1:PORT
	PID int

	cmd   *exec.Cmd
	log   syncBuffer
	ended chan struct{} // closed once err is set
	err   error
}

// Config is how an agent is started.
type Config struct {
	Path string   // of the binary
	Args []string // of serve, besides the listen address
	Env  []string // KEY=VALUE, added to this process's environment
}

// Start starts `hostflame serve` on a free port of the loopback, and returns when it says
// that it is ready, or an error with what it logged.
func Start(cfg Config) (*Agent, error) {
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	address := fmt.Sprintf("127.0.0.1:%d", port)
	a := &Agent{URL: "http://" + address, ended: make(chan struct{})}
	a.cmd = exec.Command(cfg.Path, append([]string{"serve", "--web.listen-address=" + address}, cfg.Args...)...)
	a.cmd.Env = append(os.Environ(), cfg.Env...)
	a.cmd.Stdout, a.cmd.Stderr = &a.log, &a.log
	if err := a.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the agent: %w", err)
	}
	a.PID = a.cmd.Process.Pid
	go func() {
		a.err = a.cmd.Wait()
		close(a.ended)
	}()
	for deadline := time.Now().Add(20 * time.Second); ; {
		if status, _, err := a.Get("/-/ready"); err == nil && status == http.StatusOK {
			return a, nil
		}
		select {
		case <-a.ended:
			return nil, fmt.Errorf("the agent ended before it was ready: %w\n%s", a.err, a.Log())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			a.Kill()
			return nil, fmt.Errorf("the agent is not ready after 20 s\n%s", a.Log())
		}
	}
}

// FreePort returns a port of the loopback that was free a moment ago.
func FreePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// Get fetches a path from the agent.
func (a *Agent) Get(path string) (status int, body []byte, err error) {
	return a.GetHeader(path, nil)
}

// GetHeader is Get with request headers.
func (a *Agent) GetHeader(path string, header http.Header) (status int, body []byte, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.URL+path, nil)
	if err != nil {
		return 0, nil, fmt.Errorf("get %s: %w", path, err)
	}
	if header != nil {
		req.Header = header
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, fmt.Errorf("get %s: %w", path, err)
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	if err != nil {
		return resp.StatusCode, body, fmt.Errorf("get %s: %w", path, err)
	}
	return resp.StatusCode, body, nil
}

// Log returns what the agent has written to standard error and output.
func (a *Agent) Log() string { return a.log.String() }

// Ended reports whether the process has ended.
func (a *Agent) Ended() bool {
	select {
	case <-a.ended:
		return true
	default:
		return false
	}
}

// Stop sends SIGTERM and returns how long the agent took to exit, and an error if it
// exited with another status than 0 or not within 10 s.
func (a *Agent) Stop() (time.Duration, error) {
	begin := time.Now()
	if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		<-a.ended
		return 0, fmt.Errorf("stop the agent: %w", errors.Join(err, a.err))
	}
	select {
	case <-a.ended:
		return time.Since(begin), a.err
	case <-time.After(10 * time.Second):
		a.Kill()
		return time.Since(begin), errors.New("the agent did not exit within 10 s of SIGTERM")
	}
}

// Kill ends the process at once, if it still runs.
func (a *Agent) Kill() {
	a.cmd.Process.Kill()
	<-a.ended
}

// syncBuffer is a buffer that one goroutine may read while another writes.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
