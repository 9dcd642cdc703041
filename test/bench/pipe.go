// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// switching is a benchmark that does nothing but switch.
type switching struct {
	name    string // in the title
	command []string
	ops     int    // operations, and what one is called
	unit    string // in words
}

func (b *bench) switchings() []switching {
	messages := b.loops / 250
	return []switching{{
		// Two writes, two reads, two switches or so.
		name: "pipe", ops: b.loops, unit: "us an operation",
		command: []string{"taskset", "-c", strconv.Itoa(b.cpu), "perf", "bench", "-f", "simple", "sched", "pipe", "-l", strconv.Itoa(b.loops)},
	}, {
		// hackbench: four groups of 20 senders and 20 receivers, on all CPUs.
		name: "messaging", ops: 4 * 20 * 20 * messages, unit: "us a message",
		command: []string{"perf", "bench", "-f", "simple", "sched", "messaging", "-g", "4", "-l", strconv.Itoa(messages)},
	}}
}

// run returns microseconds an operation.
func (s switching) run() (float64, error) {
	cmd := exec.Command(s.command[0], s.command[1:]...)
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", cmd, err)
	}
	seconds, err := strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
	if err != nil {
		return 0, fmt.Errorf("%s printed %q, not seconds", cmd, out)
	}
	return seconds * 1e6 / float64(s.ops), nil
}

// pipe prints what the tools add to the benchmarks that do nothing but switch.
func (b *bench) pipe(w io.Writer) error {
	tools := []tool{b.nothing(), b.emptyProgram("sched_switch"), peer("runqlat"), peer("offcputime"),
		b.agentWith("hostflame, no stacks of waits", "--sampling.wait-rate=0"), b.agent()}
	benchmarks := b.switchings()
	micros := make([][][]float64, len(benchmarks))
	for i := range micros {
		micros[i] = make([][]float64, len(tools))
	}
	for round := range b.rounds {
		progress("perf bench sched: round %d of %d", round+1, b.rounds)
		for i := range tools {
			i := (i + round) % len(tools) // none is always first
			stop, err := tools[i].start()
			if err != nil {
				return err
			}
			time.Sleep(b.settle)
			for n, s := range benchmarks {
				var us float64
				if us, err = s.run(); err != nil {
					break
				}
				micros[n][i] = append(micros[n][i], us)
			}
			if err := stop(); err != nil {
				return fmt.Errorf("stop %s: %w", tools[i].name, err)
			}
			if err != nil {
				return err
			}
		}
	}
	for n, s := range benchmarks {
		fmt.Fprintf(w, "\n## %s: `%s`, %s\n\n"+
			"%d interleaved rounds. What is added is the median of the rounds' ratios to \"nothing\" in the same round.\n\n",
			s.name, strings.Join(s.command, " "), s.unit, b.rounds)
		b.printAdded(w, tools, micros[n])
	}
	return nil
}

func (b *bench) printAdded(w io.Writer, tools []tool, micros [][]float64) {
	out := table{header: []string{"with", "median", "min", "quartiles", "max", "added", "quartiles"}}
	for i, t := range tools {
		added := make([]float64, b.rounds)
		for round := range added {
			added[round] = 100 * (micros[i][round]/micros[0][round] - 1)
		}
		s, a := spreadOf(micros[i]), spreadOf(added)
		row := []string{t.name, fmt.Sprintf("%.2f", s.median), fmt.Sprintf("%.2f", s.min),
			fmt.Sprintf("%.2f-%.2f", s.q1, s.q3), fmt.Sprintf("%.2f", s.max), "", ""}
		if i > 0 {
			row[5], row[6] = fmt.Sprintf("%+.1f %%", a.median), fmt.Sprintf("%+.1f to %+.1f %%", a.q1, a.q3)
		}
		out.add(row...)
	}
	out.print(w)
}
