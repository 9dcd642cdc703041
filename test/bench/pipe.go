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

// pipeRound runs `perf bench sched pipe` on one CPU and returns microseconds an
// operation (two writes, two reads, two switches or so).
func (b *bench) pipeRound() (float64, error) {
	cmd := exec.Command("taskset", "-c", strconv.Itoa(b.cpu),
		"perf", "bench", "-f", "simple", "sched", "pipe", "-l", strconv.Itoa(b.loops))
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", cmd, err)
	}
	seconds, err := strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
	if err != nil {
		return 0, fmt.Errorf("%s printed %q, not seconds", cmd, out)
	}
	return seconds * 1e6 / float64(b.loops), nil
}

// pipe prints what the tools add to the benchmark that does nothing but switch.
func (b *bench) pipe(w io.Writer) error {
	tools := []tool{b.nothing(), b.emptyProgram("sched_switch"), peer("runqlat"), b.agent()}
	micros := make([][]float64, len(tools))
	for round := range b.rounds {
		progress("perf bench sched pipe: round %d of %d", round+1, b.rounds)
		for i := range tools {
			i := (i + round) % len(tools) // none is always first
			stop, err := tools[i].start()
			if err != nil {
				return err
			}
			time.Sleep(b.settle)
			us, err := b.pipeRound()
			if err := stop(); err != nil {
				return fmt.Errorf("stop %s: %w", tools[i].name, err)
			}
			if err != nil {
				return err
			}
			micros[i] = append(micros[i], us)
		}
	}
	fmt.Fprintf(w, "\n## `taskset -c %d perf bench sched pipe -l %d`, us an operation\n\n"+
		"%d interleaved rounds. What is added is the median of the rounds' ratios to \"nothing\" in the same round.\n\n",
		b.cpu, b.loops, b.rounds)
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
	return nil
}
