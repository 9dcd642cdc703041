// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"fmt"
	"maps"
	"testing"
	"time"
)

// Culprits come, rise and fall: those that are waited for the most get the series, no
// series ever falls, and together they grow by what was waited.
func TestCulprits(t *testing.T) {
	c := newCulprits()
	now := c.rivalry
	last := map[string]uint64{} // also of those that are left out meanwhile
	step := func(by map[string]uint64) map[string]uint64 {
		t.Helper()
		before := c.series()
		var grown int64
		for name, ns := range by {
			c.add(name, ns)
			grown += int64(ns)
		}
		after := c.series()
		for name, ns := range after {
			if ns < last[name] {
				t.Fatalf("%s fell from %d to %d", name, last[name], ns)
			}
			last[name] = ns
			grown -= int64(ns - before[name])
		}
		if grown != 0 || len(after) > maxCulprits+1 {
			t.Fatalf("%d series, and %d ns that are in none of them", len(after), grown)
		}
		now = now.Add(slotRivalry)
		c.rival(now)
		return c.series()
	}
	small := map[string]uint64{}
	for i := range 2 * maxCulprits {
		small[fmt.Sprintf("small%d", i)] = 1000
	}
	small[OtherContainers] = 10
	step(small)
	named := step(small)
	if len(named) != maxCulprits+1 {
		t.Fatalf("%d series, want %d and %s", len(named), maxCulprits, OtherContainers)
	}
	// As long as none has twice as much, nothing moves.
	if after := step(small); !maps.EqualFunc(named, after, func(uint64, uint64) bool { return true }) {
		t.Errorf("among equals other culprits have series than before")
	}
	large := maps.Clone(small)
	large["large"] = 10000
	step(large)
	before := step(large)
	if _, ok := before["large"]; !ok {
		t.Fatal("the culprit that is waited for the most has no series")
	}
	if got := step(large)["large"] - before["large"]; got != 10000 {
		t.Errorf("its series grew by %d, want 10000", got)
	}
	// Once it is idle, those that are new and busier take its series; back, it goes on.
	busy := map[string]uint64{}
	for i := range maxCulprits {
		busy[fmt.Sprintf("busy%d", i)] = 50000
	}
	for range 40 {
		named = step(busy)
	}
	if _, ok := named["large"]; ok {
		t.Error("a culprit that nobody waits for any more keeps its series")
	}
	for i := range maxCulprits {
		if _, ok := named[fmt.Sprintf("busy%d", i)]; !ok {
			t.Errorf("busy%d has no series", i)
		}
	}
	large["large"] = 10_000_000
	step(large)
	if got := step(large)["large"]; got < last["large"] {
		t.Errorf("the series of one that came back goes on at %d, it was at %d", got, last["large"])
	}
	c.forget(func(name string) bool { return name != "large" }) // that of another was given away for it
	if got := c.series(); c.named != 1 || len(got) != 2 {
		t.Errorf("all but one are gone: %v", got)
	}
	c.rival(now.Add(slotRivalry / 2))
	if d := c.rivalry.Sub(now); d != 0 {
		t.Errorf("rivals meet after %v, want %v", d, time.Duration(slotRivalry))
	}
}
