// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/hostflame/hostflame/test/agent"
)

// A tool is something whose cost is measured while it runs. start returns when its
// programs are attached, with what ends it.
type tool struct {
	name  string
	start func() (stop func() error, err error)
}

func (b *bench) nothing() tool {
	return tool{"nothing", func() (func() error, error) { return func() error { return nil }, nil }}
}

func (b *bench) agent() tool { return b.agentWith("hostflame") }

// agentWith is the agent with flags, when it has read what it reads once.
func (b *bench) agentWith(name string, flags ...string) tool {
	return tool{name, func() (func() error, error) {
		a, err := agent.Start(agent.Config{Path: b.hostflame, Args: flags})
		if err != nil {
			return nil, err
		}
		stop := onStop(func() error {
			_, err := a.Stop()
			return err
		})
		if err := awaitIdle(a.PID); err != nil {
			return nil, errors.Join(err, stop())
		}
		return stop, nil
	}}
}

// awaitIdle returns when a process has used less than 2 % of a CPU for a while, or after 10 s.
func awaitIdle(pid int) error {
	const while = 300 * time.Millisecond
	last, err := processCPU(pid)
	for end := time.Now().Add(10 * time.Second); err == nil && time.Now().Before(end); {
		time.Sleep(while)
		var now time.Duration
		if now, err = processCPU(pid); now-last < while/50 {
			break
		}
		last = now
	}
	return err
}

// emptyProgram is the least that any hook on the tracepoint costs.
func (b *bench) emptyProgram(tracepoint string) tool {
	return least("an empty program on "+tracepoint, asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}, tracepoint)
}

// clocks is the least that stamps cost which are taken on each of the tracepoints.
func (b *bench) clocks(tracepoints ...string) tool {
	return least(fmt.Sprintf("%d programs that read the clock", len(tracepoints)),
		asm.Instructions{asm.FnKtimeGetNs.Call(), asm.Mov.Imm(asm.R0, 0), asm.Return()}, tracepoints...)
}

// least is a program on each of the tracepoints that has no more than these instructions.
func least(name string, instructions asm.Instructions, tracepoints ...string) tool {
	return tool{name, func() (func() error, error) {
		var open []io.Closer
		end := func() error {
			var errs []error
			for _, c := range open {
				errs = append(errs, c.Close())
			}
			return errors.Join(errs...)
		}
		for _, tracepoint := range tracepoints {
			prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
				Name:         "least",
				Type:         ebpf.Tracing,
				AttachType:   ebpf.AttachTraceRawTp,
				AttachTo:     tracepoint,
				Instructions: instructions,
				License:      "Dual BSD/GPL",
			})
			if err != nil {
				return nil, errors.Join(fmt.Errorf("load a program for %s: %w", tracepoint, err), end())
			}
			open = append(open, prog)
			l, err := link.AttachTracing(link.TracingOptions{Program: prog})
			if err != nil {
				return nil, errors.Join(fmt.Errorf("attach a program to %s: %w", tracepoint, err), end())
			}
			open = append(open, l)
		}
		return onStop(end), nil
	}}
}

// peers are the programs of other projects that the bench starts, and their packages.
var peers = map[string]string{
	"runqlat": "libbpf-tools", "biolatency": "libbpf-tools", "offcputime": "libbpf-tools", "perf": "linux-perf",
	"fio": "fio", "stdbuf": "coreutils", "bpftrace": "bpftrace", "taskset": "util-linux", "stress-ng": "stress-ng",
}

func requirePeers() error {
	var missing, packages []string
	for command, pkg := range peers {
		if _, err := exec.LookPath(command); err != nil {
			missing, packages = append(missing, command), append(packages, pkg)
		}
	}
	if missing == nil {
		return nil
	}
	return fmt.Errorf("not found: %s\nhint: apt-get install %s", strings.Join(missing, ", "), strings.Join(packages, " "))
}

// peer is a tool of libbpf-tools, which says on its first line that it traces. offcputime
// says nothing until it ends.
func peer(command string, args ...string) tool {
	return tool{strings.Join(append([]string{command}, args...), " "), func() (func() error, error) {
		before, err := programs()
		if err != nil {
			return nil, err
		}
		// Its standard output is buffered whole where it is not a terminal.
		cmd := exec.Command("stdbuf", append([]string{"-oL", command}, args...)...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", command, err)
		}
		if err := cmd.Start(); err != nil {
			return nil, fmt.Errorf("start %s: %w", command, err)
		}
		stop := onStop(func() error {
			cmd.Process.Signal(os.Interrupt)
			io.Copy(io.Discard, out)
			return cmd.Wait()
		})
		if command == "offcputime" { // which does not say when it is ready
			err := awaitPrograms(before)
			if err != nil {
				err = fmt.Errorf("start %s: %w", command, errors.Join(err, stop()))
			}
			return stop, err
		}
		lines := bufio.NewReader(out)
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				return nil, fmt.Errorf("start %s: %w", command, errors.Join(err, stop()))
			}
			if strings.HasPrefix(line, "Tracing") {
				return stop, nil
			}
		}
	}}
}

// awaitPrograms returns once a tool has its programs loaded, and had a moment to attach
// them: there are more than before.
func awaitPrograms(before map[ebpf.ProgramID]programRun) error {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		now, err := programs()
		if err != nil {
			return err
		}
		for id := range now {
			if _, old := before[id]; !old {
				time.Sleep(300 * time.Millisecond)
				return nil
			}
		}
	}
	return errors.New("it loads no programs")
}

// startLoad starts a program that makes load; what it prints is of no interest.
func startLoad(name string, args ...string) (stop func() error, err error) {
	cmd := exec.Command(name, args...)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start load %s: %w", name, err)
	}
	return onStop(func() error {
		cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(5*time.Second, func() { cmd.Process.Kill() })
		defer kill.Stop()
		cmd.Wait() // how it dies of a signal is its own affair
		return nil
	}), nil
}

// What has been started and not yet stopped, so that an interrupt leaves nothing behind.
var (
	running   = map[int]func() error{}
	runningMu sync.Mutex
	runningID int
)

// onStop registers stop with stopAll, and makes it safe to call again.
func onStop(stop func() error) func() error {
	runningMu.Lock()
	defer runningMu.Unlock()
	id := runningID
	runningID++
	once := sync.OnceValue(func() error {
		err := stop()
		runningMu.Lock()
		defer runningMu.Unlock()
		delete(running, id)
		return err
	})
	running[id] = once
	return once
}

func stopAll() {
	runningMu.Lock()
	var all []func() error
	for _, stop := range running {
		all = append(all, stop)
	}
	runningMu.Unlock()
	for _, stop := range all {
		stop()
	}
}
