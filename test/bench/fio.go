// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"time"
)

// randomReads are fio's arguments for direct random reads of 4 KiB, 32 at a time.
func randomReads(file string) []string {
	return []string{"--name=bench", "--filename=" + file, "--size=64M", "--rw=randread", "--bs=4k",
		"--direct=1", "--ioengine=libaio", "--iodepth=32", "--time_based"}
}

// fio prints how many reads a second fio makes while tools watch block I/O.
func (b *bench) fio(w io.Writer) error {
	data := filepath.Join(b.dir, "fio.data")
	if err := prepareFile(data, 64<<20); err != nil {
		return err
	}
	tools := []tool{b.nothing(), peer("biolatency"), peer("biolatency", "-Q"),
		b.agentWith("hostflame, histograms and CPU samples", "--sampling.io-rate=0", "--sampling.wait-rate=0"), b.agent()}
	perSecond := make([][]float64, len(tools))
	for round := range b.rounds {
		progress("fio: round %d of %d", round+1, b.rounds)
		for i := range tools {
			i := (i + round) % len(tools) // none is always first
			stop, err := tools[i].start()
			if err != nil {
				return err
			}
			time.Sleep(b.settle)
			n, err := readsPerSecond(data, b.window)
			if err := stop(); err != nil {
				return fmt.Errorf("stop %s: %w", tools[i].name, err)
			}
			if err != nil {
				return err
			}
			perSecond[i] = append(perSecond[i], n)
		}
	}
	fmt.Fprintf(w, "\n## fio: direct random reads of 4 KiB, 32 at a time, a second\n\n"+
		"%d interleaved rounds of %v. The share is the median of the rounds' ratios to \"nothing\" in the same round.\n\n", b.rounds, b.window)
	out := table{header: []string{"with", "median", "min", "quartiles", "max", "share", "quartiles"}}
	for i, t := range tools {
		share := make([]float64, b.rounds)
		for round := range share {
			share[round] = 100 * perSecond[i][round] / perSecond[0][round]
		}
		s, of := spreadOf(perSecond[i]), spreadOf(share)
		row := []string{t.name, fmt.Sprintf("%.0f", s.median), fmt.Sprintf("%.0f", s.min),
			fmt.Sprintf("%.0f-%.0f", s.q1, s.q3), fmt.Sprintf("%.0f", s.max), "", ""}
		if i > 0 {
			row[5], row[6] = fmt.Sprintf("%.1f %%", of.median), fmt.Sprintf("%.1f to %.1f %%", of.q1, of.q3)
		}
		out.add(row...)
	}
	out.print(w)
	return nil
}

// readsPerSecond is what fio says of a run of so long.
func readsPerSecond(file string, runtime time.Duration) (float64, error) {
	cmd := exec.Command("fio", append(randomReads(file), fmt.Sprintf("--runtime=%dms", runtime.Milliseconds()), "--output-format=json")...)
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", cmd, err)
	}
	var report struct {
		Jobs []struct {
			Read struct {
				PerSecond float64 `json:"iops"`
			} `json:"read"`
		} `json:"jobs"`
	}
	// Before it fio says what it has to complain of.
	begin := bytes.IndexByte(out, '{')
	if begin < 0 {
		return 0, fmt.Errorf("%s reports nothing", cmd)
	}
	if err := json.Unmarshal(out[begin:], &report); err != nil {
		return 0, fmt.Errorf("%s: parse report: %w", cmd, err)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Read.PerSecond == 0 {
		return 0, fmt.Errorf("%s made no reads", cmd)
	}
	return report.Jobs[0].Read.PerSecond, nil
}
