// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"fmt"

	"github.com/hostflame/hostflame/internal/histogram"
)

// RunQueueLengths returns how many threads a busy CPU's run queue held, the one that ran
// included, in cells of histogram.Length: one value for each sample that was due, of the CPU
// that it was taken on. Idle CPUs are not looked at.
func (c *CPU) RunQueueLengths() (histogram.Snapshot, error) {
	var perCPU []cpuHfRqlength
	if err := c.coll.Maps[cpuMapHfRqlengths].Lookup(uint32(0), &perCPU); err != nil {
		return histogram.Snapshot{}, fmt.Errorf("read run-queue lengths: %w", err)
	}
	var s histogram.Snapshot
	for i := range perCPU {
		s.Add(histogram.Snapshot{Cells: perCPU[i].Cells[:], Sum: perCPU[i].Sum})
	}
	return s, nil
}
