// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/pprof/profile"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hostflame/hostflame/test/agent"
	"github.com/hostflame/hostflame/test/workload"
)

// otelProfiler names the variable with the path of a built OpenTelemetry eBPF profiler.
const otelProfiler = "HOSTFLAME_BENCH_OTEL_PROFILER"

// A stackLoad is a program whose stacks are walked, one copy of it on each CPU.
type stackLoad struct {
	title   string
	command []string
}

func (b *bench) stackLoads() (loads []stackLoad, err error) {
	for _, l := range []struct{ title, program string }{
		{"C++ without frame pointers, 25 to 45 calls", "deep"},
		{"fft, shallow", "fft"},
		{"CPython: json, re, hashlib, zlib", "python"},
	} {
		p := workload.KnownNamed(l.program)
		if missing := p.Missing(); missing != nil {
			progress("%s is left out: no %s", l.title, strings.Join(missing, ", "))
			continue
		}
		command, err := p.Command(b.dir, 3600)
		if err != nil {
			return nil, err
		}
		loads = append(loads, stackLoad{l.title, command})
	}
	// Few user frames and some kernel frames: what those cost.
	return append(loads, stackLoad{"dd, in the kernel", []string{"dd", "if=/dev/zero", "of=/dev/null", "bs=1M", "status=none"}}), nil
}

// start starts a copy for each CPU.
func (l *stackLoad) start() (stop func() error, err error) {
	var stops []func() error
	stop = onStop(func() error {
		var errs []error
		for _, s := range stops {
			errs = append(errs, s())
		}
		return errors.Join(errs...)
	})
	for range runtime.NumCPU() {
		s, err := startLoad(l.command[0], l.command[1:]...)
		if err != nil {
			return nil, errors.Join(err, stop())
		}
		stops = append(stops, s)
	}
	return stop, nil
}

// stackTools take the stacks of the CPUs 99 times a second.
func (b *bench) stackTools() []tool {
	tools := []tool{{"bpftrace kstack, ustack", startBpftrace}}
	if path := os.Getenv(otelProfiler); path != "" {
		tools = append(tools, tool{"OpenTelemetry profiler", func() (func() error, error) { return startOTel(path) }})
	}
	return append(tools, b.agent())
}

// startBpftrace starts what follows frame pointers in the kernel, and nothing more: the
// floor, but for the frames that it does not find.
func startBpftrace() (func() error, error) {
	cmd := exec.Command("stdbuf", "-oL", "bpftrace", "-e", "profile:hz:99 { @[kstack, ustack] = count(); }")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start bpftrace: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start bpftrace: %w", err)
	}
	stop := onStop(func() error {
		cmd.Process.Kill() // it would print all stacks
		io.Copy(io.Discard, out)
		cmd.Wait()
		return nil
	})
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return nil, fmt.Errorf("start bpftrace: %w", errors.Join(err, stop()))
		}
		if strings.HasPrefix(line, "Attaching") {
			return stop, nil
		}
	}
}

// startOTel starts the OpenTelemetry profiler, with somebody to send its profiles to.
func startOTel(path string) (func() error, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for profiles: %w", err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(64<<20), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		var message emptypb.Empty
		if err := s.RecvMsg(&message); err != nil {
			return err
		}
		return s.SendMsg(new(emptypb.Empty))
	}))
	go server.Serve(listener) // returns at Stop
	cmd := exec.Command(path, "-collection-agent="+listener.Addr().String(), "-disable-tls", "-samples-per-second=99")
	if err := cmd.Start(); err != nil {
		server.Stop()
		return nil, fmt.Errorf("start the OpenTelemetry profiler: %w", err)
	}
	return onStop(func() error {
		cmd.Process.Signal(os.Interrupt)
		kill := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
		defer kill.Stop()
		cmd.Wait()
		server.Stop()
		return nil
	}), nil
}

// stacks prints what a CPU sample costs with its stacks.
func (b *bench) stacks(w io.Writer) error {
	loads, err := b.stackLoads()
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "\n## CPU samples with their stacks, 99 a second and CPU\n\n"+
		"Time in the kernel by `bpf_stats`; caches are cold at this rate. Medians and quartiles of %d interleaved rounds\n"+
		"of %v. bpftrace follows frame pointers, and finds as many frames as hold by chance. Frames are means of all the\n"+
		"agent's samples of the load.\n\n", b.windows, b.stackWindow)
	tools := b.stackTools()
	costs := table{header: []string{"load", "tool", "ns a sample", "quartiles"}}
	own := table{header: []string{"load", "user frames", "kernel frames", "whole", "agent's CPU", "start-up, once", "RSS", "kernel maps"}}
	for _, l := range loads {
		if err := b.stackCosts(&costs, l, tools); err != nil {
			return err
		}
		if err := b.stackAgent(&own, l); err != nil {
			return err
		}
	}
	costs.print(w)
	fmt.Fprintf(w, "\nThe agent's process while it takes them, with all profiles on, over %v; that is once all that it does from time to\n"+
		"time. BPF programs that take samples of others are not in it; those that run in its own threads are. Before that is the\n"+
		"start-up: programs loaded, the tables and indexes of what runs read or made; the column has its CPU time.\n\n", b.agentWindow)
	own.print(w)
	return b.startUp(w, loads[0])
}

// awaitSteady returns when the agent has done what it does once for the programs that run: it
// makes no index and uses less than 1 % of a CPU for some seconds; or after a minute.
func (b *bench) awaitSteady(a *agent.Agent) error {
	if b.settle == 0 { // nothing is measured
		return nil
	}
	const enough = 3
	last, err := processCPU(a.PID)
	for quiet, end := 0, time.Now().Add(time.Minute); err == nil && quiet < enough && time.Now().Before(end); quiet++ {
		time.Sleep(2 * b.settle)
		var now time.Duration
		if now, err = processCPU(a.PID); err != nil {
			break
		}
		if now-last > b.settle/50 {
			quiet = -1
		}
		code, metrics, err := a.Get("/metrics")
		if err != nil || code != http.StatusOK {
			return fmt.Errorf("scrape: status %d: %w", code, err)
		}
		if !bytes.Contains(metrics, []byte("\nhostflame_symbols_indexes_waiting 0\n")) {
			quiet = -1
		}
		if last, err = processCPU(a.PID); err != nil {
			break
		}
	}
	return err
}

func (b *bench) stackCosts(out *table, l stackLoad, tools []tool) error {
	nanos := make([][]float64, len(tools))
	for round := range b.windows {
		progress("stacks of %s: round %d of %d", l.title, round+1, b.windows)
		for i := range tools {
			i := (i + round) % len(tools) // none is always first
			ns, err := b.stackRound(l, tools[i])
			if err != nil {
				return err
			}
			nanos[i] = append(nanos[i], ns)
		}
	}
	for i, t := range tools {
		s := spreadOf(nanos[i])
		out.add(l.title, t.name, fmt.Sprintf("%.0f", s.median), fmt.Sprintf("%.0f-%.0f", s.q1, s.q3))
	}
	return nil
}

// stackRound returns the ns a sample of a tool's perf event programs.
func (b *bench) stackRound(l stackLoad, t tool) (float64, error) {
	before, err := programs()
	if err != nil {
		return 0, err
	}
	stopLoad, err := l.start()
	if err != nil {
		return 0, err
	}
	defer stopLoad()
	stop, err := t.start()
	if err != nil {
		return 0, err
	}
	defer stop()
	sampling := func() (runs, nanos uint64, err error) {
		all, err := programs()
		for id, p := range all {
			if _, old := before[id]; !old && p.kind == ebpf.PerfEvent {
				runs += p.runs
				nanos += p.nanos
			}
		}
		return runs, nanos, err
	}
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return 0, fmt.Errorf("enable BPF statistics: %w", err)
	}
	defer stats.Close()
	// From its first samples on, and the settling, in which it may learn what it needs.
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		runs, _, err := sampling()
		if err != nil {
			return 0, err
		}
		if runs > 0 {
			break
		}
		if time.Now().After(deadline) {
			return 0, fmt.Errorf("%s takes no samples", t.name)
		}
	}
	time.Sleep(b.settle)
	runs0, nanos0, err := sampling()
	if err != nil {
		return 0, err
	}
	time.Sleep(b.stackWindow)
	runs1, nanos1, err := sampling()
	if err != nil {
		return 0, err
	}
	if runs1 == runs0 {
		return 0, fmt.Errorf("%s took no samples in %v", t.name, b.stackWindow)
	}
	if err := stop(); err != nil {
		return 0, fmt.Errorf("stop %s: %w", t.name, err)
	}
	return float64(nanos1-nanos0) / float64(runs1-runs0), nil
}

// stackAgent adds the row of what the agent is and finds while it samples a load.
func (b *bench) stackAgent(out *table, l stackLoad) error {
	progress("the agent with %s: %v", l.title, b.agentWindow)
	oldMaps, err := mapMemory()
	if err != nil {
		return err
	}
	stopLoad, err := l.start()
	if err != nil {
		return err
	}
	defer stopLoad()
	a, err := agent.Start(agent.Config{Path: b.hostflame})
	if err != nil {
		return err
	}
	stop := onStop(func() error { _, err := a.Stop(); return err })
	defer stop()
	if err := b.awaitSteady(a); err != nil {
		return err
	}
	begin, err := processCPU(a.PID)
	if err != nil {
		return err
	}
	at := time.Now()
	time.Sleep(b.agentWindow) // the capture below takes CPU itself
	took := time.Since(at)
	end, err := processCPU(a.PID)
	if err != nil {
		return err
	}
	frames, err := captureFrames(a, int(math.Ceil(b.stackWindow.Seconds())), comm(l.command))
	if err != nil {
		return err
	}
	mem, err := status(a.PID)
	if err != nil {
		return err
	}
	maps, err := mapMemory()
	if err != nil {
		return err
	}
	var kernel uint64
	for id, n := range maps {
		if _, old := oldMaps[id]; !old {
			kernel += n
		}
	}
	out.add(l.title, fmt.Sprintf("%.1f", frames.user), fmt.Sprintf("%.1f", frames.kernel), fmt.Sprintf("%.1f %%", 100*frames.whole),
		fmt.Sprintf("%.2f %% of a core", 100*(end-begin).Seconds()/took.Seconds()), fmt.Sprintf("%.2f s", begin.Seconds()),
		fmt.Sprintf("%.1f MB", float64(mem["VmRSS"])/1e6), fmt.Sprintf("%.1f MB", float64(kernel)/1e6))
	return stop()
}

// comm is what the kernel calls the process of a command.
func comm(command []string) string {
	name := command[0][strings.LastIndexByte(command[0], '/')+1:]
	return name[:min(len(name), 15)]
}

// means are what the samples of a load have on average.
type means struct{ user, kernel, whole float64 }

// captureFrames asks the agent for a profile and counts the frames of a program.
func captureFrames(a *agent.Agent, seconds int, comm string) (m means, err error) {
	code, body, err := a.Get(fmt.Sprintf("/pprof/cpu?seconds=%d&comm=%s", seconds, comm))
	if err != nil || code != http.StatusOK {
		return m, fmt.Errorf("capture: status %d: %w", code, err)
	}
	p, err := profile.Parse(bytes.NewReader(body))
	if err != nil {
		return m, fmt.Errorf("capture: %w", err)
	}
	var samples float64
	for _, s := range p.Sample {
		n := float64(s.Value[0])
		samples += n
		for i, loc := range s.Location {
			switch {
			case loc.Mapping != nil && strings.HasPrefix(loc.Mapping.File, "[kernel"):
				m.kernel += n
			case len(loc.Line) == 1 && strings.HasPrefix(loc.Line[0].Function.Name, "["):
				continue // it says what is missing
			default:
				m.user += n
				if i == len(s.Location)-1 {
					m.whole += n
				}
			}
		}
	}
	if samples == 0 {
		return m, fmt.Errorf("capture: no sample of %s", comm)
	}
	return means{m.user / samples, m.kernel / samples, m.whole / samples}, nil
}

// startUp prints how long the agent takes from its start to its first sample.
func (b *bench) startUp(w io.Writer, l stackLoad) error {
	stopLoad, err := l.start()
	if err != nil {
		return err
	}
	defer stopLoad()
	var took []float64
	for round := range b.windows {
		progress("start-up: round %d of %d", round+1, b.windows)
		begin := time.Now()
		a, err := agent.Start(agent.Config{Path: b.hostflame})
		if err != nil {
			return err
		}
		stop := onStop(func() error { _, err := a.Stop(); return err })
		for {
			code, body, err := a.Get("/metrics")
			if err != nil || code != http.StatusOK {
				stop()
				return fmt.Errorf("scrape: status %d: %w", code, err)
			}
			if hasSamples(body) {
				break
			}
			if time.Since(begin) > time.Minute {
				stop()
				return errors.New("the agent took no sample in a minute")
			}
			time.Sleep(5 * time.Millisecond)
		}
		took = append(took, time.Since(begin).Seconds())
		if err := stop(); err != nil {
			return err
		}
	}
	s := spreadOf(took)
	fmt.Fprintf(w, "\nFrom the start of the agent to a sample in its metrics, with both CPUs busy: %.2f s (%.2f-%.2f), the first time %.2f s.\n",
		s.median, s.q1, s.q3, took[0])
	return nil
}

func hasSamples(metrics []byte) bool {
	for line := range bytes.Lines(metrics) {
		if rest, ok := bytes.CutPrefix(line, []byte(`hostflame_samples_total{profile="cpu"} `)); ok {
			return string(bytes.TrimSpace(rest)) != "0"
		}
	}
	return false
}
