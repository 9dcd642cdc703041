// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/pprof/profile"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/symbolizer"
)

// testRows are rows as a window has them, and the names of their locations.
func testRows() ([]row, names) {
	line := func(name string) symbolizer.Line {
		return symbolizer.Line{Function: name, SystemName: "_" + name}
	}
	app, other, jit1, jit2 := new(symbolizer.Object), new(symbolizer.Object), new(symbolizer.PerfMap), new(symbolizer.PerfMap)
	text := func() *Mapping { // one for each process
		return &Mapping{Start: 0x1000, Limit: 0x5000, Offset: 0x400, File: "/bin/app", BuildID: "abcd", object: app}
	}
	text1, text2 := text(), text()
	lib := &Mapping{Start: 0x1000, Limit: 0x5000, Offset: 0x400, File: "/lib/other.so", object: other}
	code1 := &Mapping{Start: 0x7000, Limit: 0x8000, File: "[anon]", perfMap: jit1}
	code2 := &Mapping{Start: 0x7000, Limit: 0x8000, File: "[anon]", perfMap: jit2}
	raw := &Mapping{Start: 0, Limit: 0x100, File: "/bin/a;b\nc"}
	const kernel = 0xffffffff81000000
	found := names{
		app: {
			0x1010: {Lines: []symbolizer.Line{
				{Function: "inlined", SystemName: "inlined", File: "a.h", Line: 3, StartLine: 1},
				{Function: "leaf", SystemName: "leaf", File: "a.cc", Line: 20, StartLine: 10},
			}},
			0x1020: {Lines: []symbolizer.Line{line("main")}},
			0x1030: {Reason: symbolizer.ReasonNotFound},
		},
		other: {0x1010: {Lines: []symbolizer.Line{line("helper")}}},
		jit1:  {0x7010: {Lines: []symbolizer.Line{line("js:~f 1.js;2")}}},
		jit2:  {0x7010: {Lines: []symbolizer.Line{line("other.py")}}},
		kernelMapping: {
			kernel:        {Lines: []symbolizer.Line{{Function: "do_syscall_64", SystemName: "do_syscall_64"}}, Module: "[kernel.kallsyms]"},
			kernel + 0x10: {Lines: []symbolizer.Line{{Function: "ext4_read", SystemName: "ext4_read"}}, Module: "[ext4]"},
			kernel + 0x20: {Reason: symbolizer.ReasonNoPermission},
		},
	}
	sample := func(pid PID, comm string, count uint64, stack ...Location) row {
		return row{stack: stack, pid: pid, tid: TID(pid + 1), comm: comm, thread: comm + "-t", container: "/", count: count, values: [maxValues]uint64{count, 10 * count}}
	}
	return []row{
		sample(1, "app", 5, Location{kernelMapping, kernel + 0x10}, Location{kernelMapping, kernel}, Location{text1, 0x1010}, Location{text1, 0x1020}),
		sample(2, "app", 7, Location{text2, 0x1010}, Location{text2, 0x1020}),
		sample(2, "app", 1, Location{text2, 0x1030}, Location{lib, 0x1010}, Location{text2, 0x1020}, Location{Mapping: frameTruncated}),
		sample(3, "node js", 2, Location{code1, 0x7010}),
		sample(4, "py", 3, Location{code2, 0x7010}),
		sample(5, "gone", 1, Location{frameUnknown, 0x1234}, Location{frameUnknown, 0x5678}, Location{Mapping: frameExited}),
		sample(6, "x", 1, Location{raw, 0x10}, Location{kernelMapping, kernel + 0x20}),
		{stack: Stack{{Mapping: frameOverflow}}, comm: otherName, thread: otherName, container: otherName, count: 4, values: [maxValues]uint64{4, 40}},
	}, found
}

func testMeta() meta {
	return meta{
		typ: &cpuType, host: "host1",
		start: time.Unix(1_700_000_000, 5).UTC(), duration: 10*time.Second + 7,
		samples: 90, lost: map[string]uint64{"ring_full": 9, "no_ring": 0, "zz": 1}, late: 2,
	}
}

func testProfile(t *testing.T) *profile.Profile {
	t.Helper()
	rows, found := testRows()
	p, err := buildProfile(rows, found, testMeta())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestBuildProfile(t *testing.T) {
	p := testProfile(t)
	golden(t, "profile.txt", []byte(p.String()))

	// It survives the wire.
	var buf bytes.Buffer
	if err := p.Write(&buf); err != nil {
		t.Fatal(err)
	}
	parsed, err := profile.Parse(&buf)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "profile.txt", []byte(parsed.String()))

	if p.TimeNanos != 1_700_000_000_000_000_005 || p.DurationNanos != 10_000_000_007 || p.Period != 10_101_010 {
		t.Errorf("time %d, duration %d, period %d", p.TimeNanos, p.DurationNanos, p.Period)
	}
	for _, m := range p.Mapping {
		// /bin/app and the kernel have an address without a name, for others to look up.
		named := m.File != "/bin/app" && m.File != kernelFile && !strings.HasPrefix(m.File, "/bin/a;")
		if m.HasFunctions != named {
			t.Errorf("%s: HasFunctions %v", m.File, m.HasFunctions)
		}
	}
}

func TestWriteFolded(t *testing.T) {
	p := testProfile(t)
	for _, test := range []struct{ index, golden string }{
		{"", "samples.folded"}, {"samples", "samples.folded"}, {"0", "samples.folded"},
		{"cpu", "cpu.folded"}, {"1", "cpu.folded"},
	} {
		var buf bytes.Buffer
		if err := WriteFolded(&buf, p, test.index); err != nil {
			t.Fatal(err)
		}
		golden(t, test.golden, buf.Bytes())
	}
	for _, index := range []string{"2", "-1", "wall"} {
		err := WriteFolded(&bytes.Buffer{}, p, index)
		if err == nil || !strings.Contains(err.Error(), "samples, cpu") {
			t.Errorf("sample_index %q: %v", index, err)
		}
	}
	if err := WriteFolded(failingWriter{}, p, ""); err == nil {
		t.Error("a writer that fails: no error")
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, bytes.ErrTooLarge }

// An empty window is a valid profile too.
func TestEmptyProfile(t *testing.T) {
	m := testMeta()
	m.samples, m.lost, m.late = 0, nil, 0
	p, err := buildProfile(nil, nil, m)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if err := p.Write(&buf); err != nil {
		t.Fatal(err)
	}
	if _, err := profile.Parse(&buf); err != nil {
		t.Error(err)
	}
}

// A window of a busy host: 2,000 samples, nearly all different.
func BenchmarkBuildProfile(b *testing.B) {
	app := new(symbolizer.Object)
	found := names{app: {}, kernelMapping: {}}
	var rows []row
	rnd := rand.New(rand.NewPCG(1, 2))
	var mappings []*Mapping
	for range 5 {
		mappings = append(mappings, &Mapping{Start: 0x1000, Limit: 0x500000, Offset: 0x400, File: "/usr/lib/x86_64-linux-gnu/app", BuildID: "0123456789abcdef0123456789abcdef01234567", object: app})
	}
	for i := range 2000 {
		r := row{pid: PID(i % 50), tid: TID(i % 100), comm: "app", thread: "worker", container: "/", count: 1, values: [maxValues]uint64{1, 10}}
		for range 3 {
			addr := Addr(1<<63 + rnd.Uint64N(300))
			r.stack = append(r.stack, Location{kernelMapping, addr})
			found[kernelMapping][addr] = symbolizer.Result{Lines: []symbolizer.Line{{Function: fmt.Sprint("k", addr), SystemName: fmt.Sprint("k", addr), File: kernelFile}}}
		}
		for range 20 {
			addr := Addr(rnd.Uint64N(4000))
			r.stack = append(r.stack, Location{mappings[i%5], addr})
			found[app][addr] = symbolizer.Result{Lines: []symbolizer.Line{{Function: fmt.Sprint("f", addr/4), SystemName: fmt.Sprint("_f", addr/4), File: "file.cc", Line: int64(addr)}}}
		}
		rows = append(rows, r)
	}
	b.ReportAllocs()
	var before, after unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &before)
	defer func() {
		unix.Getrusage(unix.RUSAGE_SELF, &after)
		cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
		b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/op")
	}()
	for b.Loop() {
		if _, err := buildProfile(rows, found, testMeta()); err != nil {
			b.Fatal(err)
		}
	}
}

// What only says that a thread gave its CPU away is no part of the stack of a wait; that of a
// thread that was on the CPU stays as it is.
func TestSchedulerFrames(t *testing.T) {
	found := names{kernelMapping: {}}
	stackOf := func(functions ...string) (stack Stack) {
		for _, function := range functions {
			addr := Addr(kernelHalf) + Addr(16*len(found[kernelMapping]))
			stack = append(stack, Location{kernelMapping, addr})
			var lines []symbolizer.Line
			for name := range strings.SplitSeq(function, "<") { // the innermost that is inlined first
				lines = append(lines, symbolizer.Line{Function: name})
			}
			found[kernelMapping][addr] = symbolizer.Result{Lines: lines}
		}
		return stack
	}
	wait := stackOf("__schedule", "schedule", "futex_do_wait", "__schedule")
	wall, both := Wall(99, NewStates(nil)), Type{Name: "both", Samples: []bpf.Profile{bpf.ProfileCPU, bpf.ProfileRunqueue}, Values: OffCPU(NewStates(nil)).Values}
	for _, test := range []struct {
		typ   Type
		label string
		stack Stack
		want  int
	}{
		{Runqueue(), "own", wait, 2},
		{OffCPU(NewStates(nil)), stateLock, wait, 2},
		{OffCPU(NewStates(nil)), stateSleep, stackOf("context_switch<__schedule.isra.0", "schedule", "schedule_timeout_idle", "rcu_gp_fqs_loop"), 3},
		{OffCPU(NewStates(nil)), stateLock, stackOf("futex_do_wait", "schedule"), 0},
		{OffCPU(NewStates(nil)), stateOther, stackOf("__schedule", "schedule"), 0}, // never nothing
		{Culprit(), "own", stackOf("bpf_prog_1_hf_wait_culprit", "bpf_trace_run4", "__schedule", "preempt_schedule_irq", "irqentry_exit"), 4},
		{wall, stateLock, wait, 2},
		{wall, stateRunqueue, wait, 2},
		{wall, stateCPU, wait, 0},
		{CPU("", 99), "", wait, 0},
		{BlockIO(50), "", wait, 0},
		{both, "", wait, 0}, // nothing tells
	} {
		p, err := buildProfile([]row{{stack: test.stack, pid: 1, count: 1, labels: [maxLabels]string{test.label}}}, found, meta{typ: &test.typ})
		if err != nil {
			t.Fatal(err)
		}
		if n := len(test.stack) - len(p.Sample[0].Location); n != test.want {
			t.Errorf("%s, %q: %d frames of %v were cut, want %d", test.typ.Name, test.label, n, test.stack, test.want)
		}
	}
}
