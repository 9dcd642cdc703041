// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"path/filepath"
	"testing"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// TestBlockLosesOnlyTheHidden: every completion that perf sees runs our program, but for those
// that come while process 1 is current, where the kernel hides it; and these are counted.
func TestBlockLosesOnlyTheHidden(t *testing.T) {
	kerneltest.RequireTool(t, "fio")
	b := newTestBlock(t)
	kerneltest.MeasureLock(t)
	all := kerneltest.CountTracepoint(t, "block/block_rq_complete", "")
	hidden := kerneltest.CountHiddenCompletions(t, "", "")
	// seen is read before and after the others, since the disk is never still.
	type counts struct{ seen, hidden, ran, noEnd, seenAfter int64 }
	read := func() (c counts) {
		c.seen = int64(all.Read(t))
		c.hidden = int64(hidden.Read(t))
		s, err := b.Stats()
		if err != nil {
			t.Fatal(err)
		}
		c.ran, c.noEnd = int64(s.Programs[2].Runs), int64(s.Dropped[DropNoEnd])
		c.seenAfter = int64(all.Read(t))
		return c
	}
	file := filepath.Join(t.TempDir(), "data")
	fio := func(args ...string) {
		output(t, "fio", append([]string{"--name=job", "--filename=" + file, "--size=64M", "--bs=4k",
			"--direct=1", "--ioengine=psync"}, args...)...)
	}
	fio("--rw=write", "--bs=1M", "--end_fsync=1")
	before := read()
	fio("--rw=randread", "--time_based", "--runtime=5")
	after := read()
	// Process 1 can run for long at the end. So that every place is taken once more:
	fio("--rw=randread", "--io_size=16M")
	settled := read().noEnd - before.noEnd
	ran, whileHidden, noEnd := after.ran-before.ran, after.hidden-before.hidden, after.noEnd-before.noEnd
	least, most := after.seen-before.seenAfter-ran, after.seenAfter-before.seen-ran
	t.Logf("of %d completions %d to %d ran no program, %d came while process 1 was current, %d were counted as no_end, and later %d",
		after.seen-before.seen, least, most, whileHidden, noEnd, settled)
	// Where process 1 is not hidden none is lost. A place that was not taken again tells
	// nothing yet.
	const slack = 3
	if (least > slack || most < -slack) && (least > whileHidden+slack || most < whileHidden-slack) {
		t.Error("completions that ran no program are not those that came while process 1 was current")
	}
	if noEnd > max(0, most)+slack || settled < least-slack {
		t.Error("completions that ran no program are not those that were counted")
	}
	if ran < 10_000 {
		t.Errorf("%d completions: no judgement", ran)
	}
}
