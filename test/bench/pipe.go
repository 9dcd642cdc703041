// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// switching is a program that does nothing but switch.
type switching struct {
	name    string // in the title
	command []string
	what    string // is measured, in ns
	// nanos is that of a run, by what it printed and used.
	nanos func(out []byte, p *os.ProcessState) (float64, error)
}

// saidMicros is what perf bench prints.
var saidMicros = regexp.MustCompile(`([0-9.]+) usecs/op`)

func (b *bench) switchings() []switching {
	// To start stress-ng takes as long as 13,000 of its operations, and is no switching.
	ops := 5 * b.loops
	return []switching{{
		// Two writes, two reads, two switches or so.
		name: "pipe", what: "Time of an operation, by the program's own clock,",
		command: []string{"taskset", "-c", strconv.Itoa(b.cpu), "perf", "bench", "sched", "pipe", "-l", strconv.Itoa(b.loops)},
		nanos: func(out []byte, _ *os.ProcessState) (float64, error) {
			m := saidMicros.FindSubmatch(out)
			if m == nil {
				return 0, fmt.Errorf("it printed %q", out)
			}
			micros, err := strconv.ParseFloat(string(m[1]), 64)
			return micros * 1e3, err
		},
	}, {
		// Eight processes. On several CPUs it matters more who wakes up where.
		name: "switch", what: "CPU time of an operation",
		command: []string{"taskset", "-c", strconv.Itoa(b.cpu), "stress-ng", "--switch", "4", "--switch-ops", strconv.Itoa(ops)},
		nanos: func(_ []byte, p *os.ProcessState) (float64, error) {
			return float64(p.UserTime()+p.SystemTime()) / float64(ops), nil
		},
	}}
}

func (s switching) run() (nanos float64, err error) {
	cmd := exec.Command(s.command[0], s.command[1:]...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("%s: %w: %s", cmd, err, out)
	}
	if nanos, err = s.nanos(out, cmd.ProcessState); err != nil {
		return 0, fmt.Errorf("%s: %w", cmd, err)
	}
	return nanos, nil
}

// A contestant is a tool with what it may cost.
type contestant struct {
	tool
	budget string // of what runqlat adds
	nanos  string // of bpf_stats, a switch
}

// visits are what was measured with a tool in each round, in ns: the time of an operation,
// and what of it was not there right before and right after.
type visits struct{ took, added []float64 }

// pipe prints what the tools add to the programs that do nothing but switch. A machine
// drifts by more than a tool adds: so each run with a tool stands between two without, and
// the differences are what counts.
func (b *bench) pipe(w io.Writer) error {
	contestants := []contestant{
		{tool: b.emptyProgram("sched_switch")},
		{tool: peer("runqlat")},
		{tool: peer("offcputime")},
		{b.agentWith("hostflame, histograms only", "--sampling.wait-rate=0", "--sampling.frequency=1"), "33 %", "230"},
		{tool: b.agent(), budget: "50 %"},
	}
	const judge = 1
	loads := b.switchings()
	nothing := make([]visits, len(loads))
	with := make([][]visits, len(loads))
	for n := range with {
		with[n] = make([]visits, len(contestants))
	}
	nanos := make([][]float64, len(contestants))
	for round := range b.rounds {
		progress("switches: round %d of %d", round+1, b.rounds)
		before, err := b.least(loads)
		if err != nil {
			return err
		}
		for i := range contestants {
			i := (i + round) % len(contestants) // none is always first
			during, ns, err := b.visit(contestants[i].tool, loads)
			if err != nil {
				return err
			}
			after, err := b.least(loads)
			if err != nil {
				return err
			}
			nanos[i] = append(nanos[i], ns)
			for n := range loads {
				v := &with[n][i]
				nothing[n].took = append(nothing[n].took, after[n])
				v.took = append(v.took, during[n])
				v.added = append(v.added, during[n]-(before[n]+after[n])/2)
			}
			before = after
		}
	}
	for n, l := range loads {
		fmt.Fprintf(w, "\n## %s: `%s`\n\n%s in ns; %d interleaved rounds of %d runs, of which the shortest counts. What is added is the\n"+
			"median of the differences to the runs right before and after without a tool, with the interval that has it with 95 %% certainty.\n"+
			"The tools' own processes are on the same CPU.\n\n",
			l.name, strings.Join(l.command, " "), l.what, b.rounds, b.tries)
		out := table{header: []string{"with", "median", "quartiles", "added", "95 %", "of runqlat's", "95 %", "budget"}}
		for i, v := range append([]visits{nothing[n]}, with[n]...) {
			s := spreadOf(v.took)
			row := []string{"nothing", fmt.Sprintf("%.0f", s.median), fmt.Sprintf("%.0f-%.0f", s.q1, s.q3), "", "", "", "", ""}
			if i > 0 {
				c := contestants[i-1]
				row[0], row[7] = c.name, c.budget
				row[3], row[4] = medianInterval(v.added, "%+.0f")
				if i-1 != judge {
					row[5], row[6] = medianInterval(shares(v.added, with[n][judge].added), "%.0f %%")
				}
			}
			out.add(row...)
		}
		out.print(w)
	}
	fmt.Fprintf(w, "\nBPF programs on the first of them, by `bpf_stats`\n\n")
	out := table{header: []string{"with", "ns a switch", "quartiles", "budget"}}
	for i, c := range contestants {
		s := spreadOf(nanos[i])
		out.add(c.name, fmt.Sprintf("%.0f", s.median), fmt.Sprintf("%.0f-%.0f", s.q1, s.q3), c.nanos)
	}
	out.print(w)
	return nil
}

// least runs each load a few times and returns the least that it took: what disturbs a run
// makes it longer.
func (b *bench) least(loads []switching) ([]float64, error) {
	list := make([]float64, len(loads))
	for i, l := range loads {
		list[i] = math.Inf(1)
		for range b.tries {
			nanos, err := l.run()
			if err != nil {
				return nil, err
			}
			list[i] = min(list[i], nanos)
		}
	}
	return list, nil
}

// visit runs the loads with a tool, and the first of them once more to see what the tool's
// programs take of a switch, in ns.
func (b *bench) visit(t tool, loads []switching) (list []float64, nanos float64, err error) {
	old, err := programs()
	if err != nil {
		return nil, 0, err
	}
	stop, err := b.startBeside(t)
	if err != nil {
		return nil, 0, err
	}
	defer stop()
	time.Sleep(b.settle)
	if list, err = b.least(loads); err != nil {
		return nil, 0, err
	}
	var switches uint64
	ran, err := runs(old, func() error {
		first, err := contextSwitches()
		if err != nil {
			return err
		}
		if _, err = loads[0].run(); err != nil {
			return err
		}
		last, err := contextSwitches()
		switches = last - first
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	for name, p := range ran {
		if name != "hf_cpu" { // which ticks
			nanos += float64(p.nanos) / float64(switches)
		}
	}
	if err := stop(); err != nil {
		return nil, 0, fmt.Errorf("stop %s: %w", t.name, err)
	}
	return list, nanos, nil
}

// startBeside starts a tool on the CPU of the load. In a virtual machine a CPU that is woken makes
// the others slow, whoever wakes it: a process that is on the other CPU for 0.1 ms ten times a
// second adds 100 to 180 ns to an operation of stress-ng here, and nothing if it is on the same.
func (b *bench) startBeside(t tool) (stop func() error, err error) {
	runtime.LockOSThread() // of which the tool's process has the CPUs
	defer runtime.UnlockOSThread()
	var before, cpu unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return nil, fmt.Errorf("get CPU affinity: %w", err)
	}
	cpu.Set(b.cpu)
	if err := unix.SchedSetaffinity(0, &cpu); err != nil {
		return nil, fmt.Errorf("set CPU affinity: %w", err)
	}
	if stop, err = t.start(); err != nil {
		return nil, errors.Join(err, unix.SchedSetaffinity(0, &before))
	}
	if err := unix.SchedSetaffinity(0, &before); err != nil {
		return nil, errors.Join(fmt.Errorf("set CPU affinity: %w", err), stop())
	}
	return stop, nil
}

// shares are what each of parts is of its whole, in percent.
func shares(parts, wholes []float64) []float64 {
	list := make([]float64, len(parts))
	for i := range list {
		list[i] = 100 * parts[i] / wholes[i]
	}
	return list
}
