// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hostflame/hostflame/bpf"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares got with a file in testdata.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s: %s", name, d)
	}
}

// cpuType is what most tests profile.
var cpuType = CPU("", 99)

// aggregated puts samples together as a window does. The memory of each is used again.
func aggregated(table *processTable, limit int, samples ...bpf.Sample) *aggregate {
	all, agg := newTraces(), newAggregate(&cpuType, limit, 0)
	for _, s := range samples {
		s.Kernel, s.User = slices.Clone(s.Kernel), slices.Clone(s.User)
		p := table.lookup(&s)
		tr := all.find(p, &s)
		if tr == nil {
			tr = all.insert(p, &s)
			table.complete(p, tr, &s)
		}
		container := "/"
		if s.Cgroup != 0 {
			container = "app.service"
		}
		agg.add(&s, tr, container)
		clear(s.Kernel)
		clear(s.User)
	}
	return agg
}

// testSamples are of one process, but for the last two. Each differs from the first in
// one thing, except for the second.
func testSamples() []bpf.Sample {
	const kernel = 0xffffffff81000000
	base := bpf.Sample{
		PID: 1, TID: 1, Start: 1, ExecID: 1, Comm: bpf.MakeComm("app"), Thread: bpf.MakeComm("main"), Weight: 1, Value: 10,
		KernelOutcome: bpf.OutcomeComplete, UserOutcome: bpf.OutcomeComplete,
		Kernel: []uint64{kernel, kernel + 0x10}, User: []uint64{bpf.ExactAddr | 0x1000, 0x1100},
	}
	change := func(f func(*bpf.Sample)) bpf.Sample {
		s := base
		f(&s)
		return s
	}
	return []bpf.Sample{
		base,
		change(func(s *bpf.Sample) { s.Weight, s.Value, s.Time, s.CPU = 3, 30, 7, 1 }),
		change(func(s *bpf.Sample) { s.TID = 2 }),
		change(func(s *bpf.Sample) { s.Thread = bpf.MakeComm("worker") }),
		change(func(s *bpf.Sample) { s.Comm = bpf.MakeComm("renamed") }),
		change(func(s *bpf.Sample) { s.Cgroup = 5 }),
		change(func(s *bpf.Sample) { s.Kernel = []uint64{kernel, kernel + 0x20} }),
		change(func(s *bpf.Sample) { s.User = []uint64{bpf.ExactAddr | 0x1000, 0x1200} }),
		// The same addresses, divided otherwise.
		change(func(s *bpf.Sample) {
			s.Kernel, s.User = []uint64{kernel}, []uint64{bpf.ExactAddr | kernel + 0x10, 0x1000, 0x1100}
		}),
		change(func(s *bpf.Sample) { s.UserOutcome = bpf.OutcomeTruncated }),
		change(func(s *bpf.Sample) { s.ExecID = 2 }),
		change(func(s *bpf.Sample) { s.PID, s.TID, s.User = 2, 2, []uint64{bpf.ExactAddr | 0x1000} }),
		{PID: 3, TID: 3, Comm: bpf.MakeComm("kworker/0:1"), Thread: bpf.MakeComm("kworker/0:1"), Weight: 1, Value: 10,
			KernelOutcome: bpf.OutcomeComplete, Kernel: []uint64{kernel}},
	}
}

func testTable(t *testing.T) *processTable {
	table, source, _ := newTestTable(t, 10)
	source.maps[1] = []vma{file(0x1000, 0x3000, 0x10000, "/bin/app")}
	source.errs[2] = errExited
	return table
}

func TestAggregate(t *testing.T) {
	samples := testSamples()
	agg := aggregated(testTable(t), 100, append(samples, samples...)...)
	rows := agg.result()
	if len(rows) != len(samples)-1 {
		t.Errorf("%d rows for %d samples of which one is another's like", len(rows), len(samples))
	}
	var buf bytes.Buffer
	writeRows(&buf, &cpuType, rows)
	golden(t, "aggregate.txt", buf.Bytes())
	var count, value uint64
	for _, r := range rows {
		count += r.count
		value += r.values[1]
	}
	if want := uint64(2 * (len(samples) + 2)); count != want || value != 10*want || agg.samples != want {
		t.Errorf("%d samples, %d by rows, %d ns; want %d and 10 times that", agg.samples, count, value, want)
	}
}

// What finds no room is counted, in one row of its own.
func TestAggregateOverflow(t *testing.T) {
	samples := testSamples()
	agg := aggregated(testTable(t), 3, append(samples, samples...)...)
	rows := agg.result()
	if len(rows) != 4 {
		t.Fatalf("%d rows, want 3 and the overflow", len(rows))
	}
	var count uint64
	for _, r := range rows {
		count += r.count
	}
	if count != agg.samples {
		t.Errorf("%d samples in rows, want %d", count, agg.samples)
	}
	last := rows[3]
	if last.stack[0].String() != "[stacks overflow]" || last.container != otherName || last.count != agg.samples-rows[0].count-rows[1].count-rows[2].count {
		t.Errorf("overflow: %+v", last)
	}
	if rows[0].count != 8 {
		t.Errorf("%d samples in the first row, want those after the overflow too: 8", rows[0].count)
	}
}

func TestTracesDiffer(t *testing.T) {
	table, all := testTable(t), newTraces()
	samples := testSamples()
	// Those in between have the stack of the first.
	samples = append(samples[:1], samples[6:]...)
	for i := range samples {
		tr := all.insert(table.lookup(&samples[i]), &samples[i])
		for j := range samples {
			if got := tr.equal(table.lookup(&samples[j]), &samples[j]); got != (i == j) {
				t.Errorf("samples %d and %d have one stack: %v", i, j, got)
			}
		}
	}
}

// Different stacks whose hashes are equal stay different.
func TestTracesCollide(t *testing.T) {
	table, all := testTable(t), newTraces()
	samples := testSamples()
	p := table.lookup(&samples[0])
	a := all.insert(p, &samples[0])
	// The second stack is put where the first one's hash leads.
	h := all.hash(p, &samples[6])
	delete(all.byHash, all.hash(p, &samples[0]))
	all.byHash[h] = a
	if got := all.find(p, &samples[6]); got != nil {
		t.Error("a stack was found by its hash alone")
	}
	b := all.insert(p, &samples[6])
	if got := all.find(p, &samples[6]); got != b {
		t.Error("a stack behind one of the same hash was not found")
	}
	a.kept = true
	all.retain()
	if all.byHash[h] != a || a.next != nil || a.kept || all.n != 1 {
		t.Errorf("after retain: %d traces, next %p", all.n, a.next)
	}
}
