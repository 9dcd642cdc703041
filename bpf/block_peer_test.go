// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"

	"github.com/hostflame/hostflame/internal/histogram"
	"github.com/hostflame/hostflame/internal/kerneltest"
)

// biolatency runs the libbpf-tools program of that name on a disk while fn does, and
// returns its histogram: the number of requests in 0 to 1 us, 2 to 3, 4 to 7, and so on.
func biolatency(t *testing.T, disk string, fn func()) []uint64 {
	t.Helper()
	// Into a pipe it would keep what it says in its buffer.
	cmd := exec.Command("stdbuf", "--output=L", "biolatency", "-d", disk)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	lines := bufio.NewReader(out)
	// It says so once it is attached.
	if _, err := lines.ReadString('\n'); err != nil {
		t.Fatalf("biolatency: %v", err)
	}
	fn()
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(lines)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Wait() // interrupted
	var counts []uint64
	for _, m := range regexp.MustCompile(`(?m)^\s*\d+ -> \d+\s*: (\d+)`).FindAllSubmatch(text, -1) {
		n, err := strconv.ParseUint(string(m[1]), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		counts = append(counts, n)
	}
	if len(counts) == 0 {
		t.Fatalf("biolatency printed no histogram: %q", text)
	}
	return counts
}

// biolatency's edges are powers of two of 1 us and none of ours: what it has counted up to
// an edge lies between our counts up to the two cuts that enclose the edge.
func TestBlockBesideBiolatency(t *testing.T) {
	kerneltest.RequireTool(t, "fio", "biolatency", "stdbuf")
	b := newTestBlock(t)
	kerneltest.MeasureLock(t)
	file := filepath.Join(t.TempDir(), "data")
	device := wholeDeviceOf(t, filepath.Dir(file))
	fio := func(args ...string) {
		output(t, "fio", append([]string{"--name=job", "--filename=" + file, "--size=64M", "--bs=4k",
			"--direct=1", "--ioengine=psync"}, args...)...)
	}
	fio("--rw=write", "--bs=1M", "--end_fsync=1")

	partition := histogram.Time()
	ours := histogram.Snapshot{Cells: make([]uint64, partition.Cells())}
	theirs := biolatency(t, device, func() {
		before := seriesOf(t, b, device)
		fio("--rw=randread", "--time_based", "--runtime=2")
		for op, s := range seriesOf(t, b, device) {
			for i, n := range s.DeviceTime.Cells {
				ours.Cells[i] += n - before[op].DeviceTime.Cells[i]
			}
		}
	})
	total := ours.Count()
	var cumulative uint64
	compared := 0
	for i, n := range theirs {
		cumulative += n
		edge := uint64(1000) << (i + 1)
		if cumulative < 1000 {
			continue
		}
		cell := partition.Cell(edge) // holds the edge, so its cuts enclose it
		var below uint64
		for _, n := range ours.Cells[:cell] {
			below += n
		}
		above := below + ours.Cells[cell]
		compared++
		slack := cumulative / 20
		if cumulative+slack < below || cumulative > above+slack {
			t.Errorf("up to %d us: %d requests by biolatency, %d to %d by our cells, of %d", edge/1000, cumulative, below, above, total)
		}
	}
	if compared == 0 || total < 10_000 {
		t.Errorf("%d edges compared over %d requests: no judgement", compared, total)
	}
	t.Logf("%d edges compared over %d requests", compared, total)
}
