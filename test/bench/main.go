// SPDX-License-Identifier: Apache-2.0

// Bench measures what the agent costs on this machine, beside what the usual tools cost,
// in one run, and prints Markdown tables. Nothing in it passes or fails by a time.
//
//	go run ./test/bench          40 minutes, as root, on a quiet machine
//	go run ./test/bench -short   a few seconds: proves that it runs, measures nothing
//	go run ./test/bench -only=stacks
//
// The agent is the real binary, built for the run. Compare figures of one run only:
// machines and moments differ by more than tools do.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/test/agent"
	"github.com/hostflame/hostflame/test/workload"
)

// config is how much of everything is measured.
type config struct {
	windows int           // rounds of the programs' cost
	window  time.Duration // how long a tool is watched in each
	settle  time.Duration // from the start of a tool to its measurement
	rounds  int           // rounds of the switching benchmarks and of fio
	loops   int           // operations in each run
	tries   int           // runs of each in a round: the least of two is often a disturbed one
	busy    time.Duration // the busy minute
	// How long a sampler is watched in each round, at 99 samples a second and CPU.
	stackWindow time.Duration
	agentWindow time.Duration // and the agent's process
	// Addresses that Go's debug/dwarf, which is slow, is asked for.
	dwarfAddresses int
	vmlinux        string // a kernel with debug information; empty: symbols are left out
	cpu            int    // the CPU that switching loads are pinned to
	only           string // the section to run; all if empty
}

var (
	full  = config{windows: 5, window: 2 * time.Second, settle: 500 * time.Millisecond, rounds: 15, loops: 20_000, tries: 6, busy: time.Minute, stackWindow: 4 * time.Second, agentWindow: time.Minute, dwarfAddresses: 100}
	short = config{windows: 1, window: 300 * time.Millisecond, rounds: 1, loops: 2_000, tries: 1, busy: 2 * time.Second, stackWindow: 300 * time.Millisecond, agentWindow: time.Second, dwarfAddresses: 1}
)

func main() {
	cfg := full
	shortRun := flag.Bool("short", false, "run once through everything, in seconds, to see that it works")
	rounds := flag.Int("rounds", full.rounds, "interleaved `rounds` of the switching and fio benchmarks")
	busy := flag.Duration("busy", full.busy, "how long the busy minute is")
	only := flag.String("only", "", "one `section`: stacks, programs, pipe, fio, busy or symbols")
	vmlinux := flag.String("vmlinux", "", "`path` of a kernel with debug information, for symbols")
	child := flag.String("debug-dwarf", "", "")
	hostflame := flag.String("agent", "", "`path` of the agent binary; built when not given")
	flag.Parse()
	if *child != "" {
		if err := debugDwarf(*child); err != nil {
			fmt.Fprintf(os.Stderr, "bench: %v\n", err)
			os.Exit(1)
		}
		return
	}
	cfg.rounds, cfg.busy = *rounds, *busy
	if *shortRun {
		cfg = short
	}
	cfg.only, cfg.vmlinux = *only, *vmlinux
	cfg.cpu = runtime.NumCPU() - 1
	// Children are in our process group: the terminal's Ctrl-C reaches them too, and
	// each of them ends with it. Ours only has to survive long enough to clean up.
	interrupt := make(chan os.Signal, 1)
	signal.Notify(interrupt, os.Interrupt, syscall.SIGTERM)
	done := make(chan error, 1)
	go func() { done <- run(os.Stdout, cfg, *hostflame) }()
	var err error
	select {
	case err = <-done:
	case s := <-interrupt:
		stopAll()
		err = fmt.Errorf("interrupted by %v", s)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// run measures everything and writes the report to w.
func run(w io.Writer, cfg config, hostflame string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("loading BPF programs needs root\nhint: run it with sudo")
	}
	if err := requirePeers(); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "hostflame-bench-")
	if err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	defer os.RemoveAll(dir)
	defer stopAll()
	progress("building")
	if hostflame == "" {
		if hostflame, err = agent.Build(dir); err != nil {
			return err
		}
	}
	loads := map[string]string{}
	for _, name := range []string{workload.Burn, workload.BurnGo, workload.PingPong, workload.Threads, workload.Storm} {
		if loads[name], err = workload.Compile(dir, name); err != nil {
			return err
		}
	}
	b := &bench{config: cfg, dir: dir, hostflame: hostflame, loads: loads}
	heading(w)
	for _, section := range []struct {
		name string
		run  func(io.Writer) error
	}{{"stacks", b.stacks}, {"programs", b.programCosts}, {"pipe", b.pipe}, {"fio", b.fio}, {"busy", b.busyMinute}, {"symbols", b.symbols}} {
		if cfg.only != "" && cfg.only != section.name || section.name == "symbols" && cfg.vmlinux == "" {
			continue
		}
		begin, err := readTicks()
		if err != nil {
			return err
		}
		if err := section.run(w); err != nil {
			return err
		}
		end, err := readTicks()
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "\nMeanwhile the hypervisor took %.1f %% of the CPU time that was asked for.\n", end.since(begin).stolenShare())
	}
	return nil
}

// bench is one run.
type bench struct {
	config
	dir       string            // for the run's files, on a real file system
	hostflame string            // path of the agent
	loads     map[string]string // paths of the workloads
}

func heading(w io.Writer) {
	var u unix.Utsname
	kernel := "unknown"
	if unix.Uname(&u) == nil {
		kernel = unix.ByteSliceToString(u.Release[:])
	}
	fmt.Fprintf(w, "# hostflame bench, %s\n\n%d CPUs (%s), kernel %s, load average %.2f before the run\n",
		time.Now().UTC().Format("2006-01-02 15:04 MST"), runtime.NumCPU(), cpuModel(), kernel, loadAverage())
	if loadAverage() > 1 {
		progress("the machine is not quiet: comparisons of times will mean little")
	}
}

// loadAverage is that of the last minute.
func loadAverage() (load float64) {
	b, _ := os.ReadFile("/proc/loadavg")
	fmt.Sscan(string(b), &load)
	return load
}

func cpuModel() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

// progress tells on standard error what is being done, the report being on standard output.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
}
