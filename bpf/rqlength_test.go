// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/histogram"
	"github.com/hostflame/hostflame/internal/kerneltest"
)

// Five threads that never sleep, on one CPU: each tick there sees five, or more where others
// run beside them, and each sample has been a look at one run queue.
func TestRunQueueLength(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	known := kerneltest.BuildProgram(t, "known")
	const hz = 199
	c := newCPU(t, hz)
	read := func() (histogram.Snapshot, uint64) {
		t.Helper()
		s, err := c.RunQueueLengths()
		if err != nil {
			t.Fatal(err)
		}
		stats, err := c.Stats()
		if err != nil {
			t.Fatal(err)
		}
		due := stats.Delivered
		for _, n := range stats.Dropped {
			due += n
		}
		return s, due
	}
	startWorkload(t, known, lastCPU(t), "busy", "5")
	before, dueBefore := read()
	start := time.Now()
	time.Sleep(2 * time.Second)
	after, due := read()
	ticks := uint64(hz * time.Since(start).Seconds())
	d := since(after, before)
	t.Logf("lengths up to 1, 2, 4 ...: %v, mean %.2f; %d samples due", d.Cells, float64(d.Sum)/float64(d.Count()), due-dueBefore)
	five := histogram.Length().Cell(5)
	if n := sum(d.Cells[five:]); n < ticks*8/10 {
		t.Errorf("%d ticks saw five threads or more, want most of %d", n, ticks)
	}
	if n, want := d.Count(), due-dueBefore; n+2*4 < want || n > want+2*4 {
		t.Errorf("%d looks, %d samples due", n, want)
	}
}
