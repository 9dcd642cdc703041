// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"errors"
	"io/fs"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/symbolizer"
)

// fakeSource has mappings by pid, and counts how often they are asked for.
type fakeSource struct {
	maps  map[uint32][]vma
	errs  map[uint32]error
	reads int
}

func (f *fakeSource) mappings(s *bpf.Sample) ([]vma, error) {
	f.reads++
	return f.maps[s.PID], f.errs[s.PID]
}

func (f *fakeSource) open(PID, vma) (*os.File, error) { return nil, fs.ErrNotExist }

func newTestTable(t *testing.T, limit int) (*processTable, *fakeSource, *time.Time) {
	t.Helper()
	source := &fakeSource{maps: map[uint32][]vma{}, errs: map[uint32]error{}}
	s := symbolizer.New(symbolizer.Config{})
	t.Cleanup(func() { s.Close() })
	table := newProcessTable(source, s, limit)
	clock := time.Unix(1000, 0)
	table.now = func() time.Time { return clock }
	return table, source, &clock
}

// stack is how a sample is attributed: its frames as text, and the outcome.
func stackOf(table *processTable, s *bpf.Sample) ([]string, outcome) {
	tr := new(trace)
	table.complete(table.lookup(s), tr, s)
	var frames []string
	for _, l := range tr.stack {
		frames = append(frames, l.String())
	}
	return frames, tr.outcome
}

func file(start, end, offset uint64, path string) vma {
	return vma{start: start, end: end, offset: offset, major: 8, inode: 1, path: path}
}

func TestAttribution(t *testing.T) {
	const kernel = 0xffffffff81000000
	table, source, _ := newTestTable(t, 10)
	source.maps[1] = []vma{
		file(0x1000, 0x3000, 0x10000, "/bin/a"),
		file(0x3000, 0x4000, 0, "/lib/b (deleted)"),
		{start: 0x9000, end: 0xa000},
		{start: 0xb000, end: 0xc000, path: "[anon:v8]"},
	}
	source.errs[2] = errExited
	source.errs[3] = errReplaced
	source.errs[4] = fs.ErrPermission
	source.errs[5] = errors.New("anything else")
	for _, test := range []struct {
		name   string
		sample bpf.Sample
		want   []string
		o      outcome
	}{
		{
			"leaf exact, callers less one",
			bpf.Sample{PID: 1, UserMode: true, UserOutcome: bpf.OutcomeComplete, User: []uint64{bpf.ExactAddr | 0x1000, 0x2001, 0x3000, 0x4000}},
			[]string{"/bin/a [0x10000-0x12000 @0x10000] 0x10000", "/bin/a [0x10000-0x12000 @0x10000] 0x11000", "/bin/a [0x10000-0x12000 @0x10000] 0x11fff", "/lib/b [0x0-0x1000 @0x0] 0xfff"},
			outcomeComplete,
		}, {
			"kernel before user, each with its leaf",
			bpf.Sample{PID: 1, KernelOutcome: bpf.OutcomeComplete, UserOutcome: bpf.OutcomeComplete, Kernel: []uint64{kernel, kernel + 9}, User: []uint64{bpf.ExactAddr | 0x1000}},
			[]string{"[kernel.kallsyms] 0xffffffff81000000", "[kernel.kallsyms] 0xffffffff81000008", "/bin/a [0x10000-0x12000 @0x10000] 0x10000"},
			outcomeComplete,
		}, {
			"kernel thread",
			bpf.Sample{PID: 9, KernelOutcome: bpf.OutcomeComplete, Kernel: []uint64{kernel}},
			[]string{"[kernel.kallsyms] 0xffffffff81000000"},
			outcomeComplete,
		}, {
			"anonymous memory",
			bpf.Sample{PID: 1, UserOutcome: bpf.OutcomeComplete, User: []uint64{bpf.ExactAddr | 0x9000, 0xb001}},
			[]string{"[anon] [0x9000-0xa000 @0x0] 0x9000", "[anon] [0xb000-0xc000 @0x0] 0xb000"},
			outcomeComplete,
		}, {
			"unknown mapping",
			bpf.Sample{PID: 1, UserOutcome: bpf.OutcomeComplete, User: []uint64{bpf.ExactAddr | 0x1000, 0x5001}},
			[]string{"/bin/a [0x10000-0x12000 @0x10000] 0x10000", "[unknown mapping] 0x5000"},
			outcomeUnknownMapping,
		}, {
			"address beyond the last mapping",
			bpf.Sample{PID: 1, UserOutcome: bpf.OutcomeComplete, User: []uint64{bpf.ExactAddr | 0xc000}},
			[]string{"[unknown mapping] 0xc000"},
			outcomeUnknownMapping,
		}, {
			"truncated",
			bpf.Sample{PID: 1, UserOutcome: bpf.OutcomeTruncated, User: []uint64{bpf.ExactAddr | 0x1000}},
			[]string{"/bin/a [0x10000-0x12000 @0x10000] 0x10000", "[truncated]"},
			outcomeTruncated,
		}, {
			"kernel stack truncated",
			bpf.Sample{PID: 1, KernelOutcome: bpf.OutcomeTruncated, UserOutcome: bpf.OutcomeComplete, Kernel: []uint64{kernel}, User: []uint64{bpf.ExactAddr | 0x1000}},
			[]string{"[kernel.kallsyms] 0xffffffff81000000", "[truncated]", "/bin/a [0x10000-0x12000 @0x10000] 0x10000"},
			outcomeTruncated,
		}, {
			"walk failed",
			bpf.Sample{PID: 1, UserMode: true, UserOutcome: bpf.OutcomeFailed, User: []uint64{bpf.ExactAddr | 0x1000}},
			[]string{"/bin/a [0x10000-0x12000 @0x10000] 0x10000", "[no unwind info]"},
			outcomeNoUnwindInfo,
		}, {
			"in exit",
			bpf.Sample{PID: 2, KernelOutcome: bpf.OutcomeComplete, UserOutcome: bpf.OutcomeExiting, Kernel: []uint64{kernel}},
			[]string{"[kernel.kallsyms] 0xffffffff81000000", "[exiting]"},
			outcomeExiting,
		}, {
			"exited before it was looked at",
			bpf.Sample{PID: 2, UserOutcome: bpf.OutcomeTruncated, User: []uint64{bpf.ExactAddr | 0x1000}},
			[]string{"[unknown mapping] 0x1000", "[process exited]"},
			outcomeExited,
		}, {
			"executed another program",
			bpf.Sample{PID: 3, UserOutcome: bpf.OutcomeComplete, User: []uint64{bpf.ExactAddr | 0x1000}},
			[]string{"[unknown mapping] 0x1000", "[process replaced]"},
			outcomeReplaced,
		}, {
			"no permission",
			bpf.Sample{PID: 4, UserOutcome: bpf.OutcomeComplete, User: []uint64{bpf.ExactAddr | 0x1000}},
			[]string{"[unknown mapping] 0x1000", "[no permission]"},
			outcomeNoPermission,
		}, {
			"unreadable",
			bpf.Sample{PID: 5, UserOutcome: bpf.OutcomeComplete, User: []uint64{bpf.ExactAddr | 0x1000}},
			[]string{"[unknown mapping] 0x1000", "[process exited]"},
			outcomeExited,
		},
	} {
		got, o := stackOf(table, &test.sample)
		if d := cmp.Diff(test.want, got); d != "" || o != test.o {
			t.Errorf("%s: %v, want %v; %s", test.name, o, test.o, d)
		}
	}
}

// One process is several images: after an execve, and when its id is used again.
func TestImages(t *testing.T) {
	table, source, _ := newTestTable(t, 10)
	source.maps[1] = []vma{file(0x1000, 0x2000, 0, "/bin/sh")}
	s := bpf.Sample{PID: 1, Start: 5, ExecID: 1, User: []uint64{bpf.ExactAddr | 0x1000}}
	stackOf(table, &s)
	source.maps[1] = []vma{file(0x1000, 0x2000, 0, "/bin/ls")}
	for _, later := range []bpf.Sample{
		{PID: 1, Start: 5, ExecID: 2, User: []uint64{bpf.ExactAddr | 0x1000}},
		{PID: 1, Start: 9, ExecID: 1, User: []uint64{bpf.ExactAddr | 0x1000}},
	} {
		if got, _ := stackOf(table, &later); got[0] != "/bin/ls [0x0-0x1000 @0x0] 0x0" {
			t.Errorf("start %d exec %d: %v", later.Start, later.ExecID, got)
		}
	}
	// A sample from the ring of another CPU can be older than those before it.
	if got, _ := stackOf(table, &s); got[0] != "/bin/sh [0x0-0x1000 @0x0] 0x0" {
		t.Errorf("late sample of the first image: %v", got)
	}
	if source.reads != 3 {
		t.Errorf("%d reads of mappings, want one an image", source.reads)
	}
}

// New mappings are seen, and a process whose stacks never become whole is not read all
// the time.
func TestMappingsAreReadAgain(t *testing.T) {
	table, source, clock := newTestTable(t, 10)
	source.maps[1] = []vma{file(0x1000, 0x2000, 0, "/bin/a")}
	known := bpf.Sample{PID: 1, User: []uint64{bpf.ExactAddr | 0x1000}}
	loaded := bpf.Sample{PID: 1, User: []uint64{bpf.ExactAddr | 0x8000}}
	stackOf(table, &known)
	for range 100 {
		stackOf(table, &known)
	}
	if source.reads != 1 {
		t.Fatalf("%d reads for known mappings, want 1", source.reads)
	}
	source.maps[1] = append(source.maps[1], file(0x8000, 0x9000, 0, "/lib/plugin"))
	*clock = clock.Add(drainInterval)
	if got, o := stackOf(table, &loaded); o != outcomeComplete {
		t.Errorf("mapping that was added: %v %v", got, o)
	}
	if p := table.lookup(&known); p.generation != 2 || p.areas[0].mapping == nil {
		t.Errorf("generation %d, what was known of the old mapping: %v", p.generation, p.areas[0].mapping)
	}

	// An hour of drains with an address that is nowhere.
	lost := bpf.Sample{PID: 1, User: []uint64{bpf.ExactAddr | 0xdead000}}
	before := source.reads
	for range 4 * 3600 {
		*clock = clock.Add(drainInterval)
		stackOf(table, &lost)
	}
	if n := source.reads - before; n < 100 || n > 150 {
		t.Errorf("%d reads in an hour, want one every %v", n, maxReadInterval)
	}
	// What can be no address is no reason to read.
	before = source.reads
	*clock = clock.Add(time.Hour)
	stackOf(table, &bpf.Sample{PID: 1, User: []uint64{bpf.ExactAddr | 0x1000, 0x10, kernelHalf + 1}})
	if n := source.reads - before; n != 0 {
		t.Errorf("%d reads for what is no address", n)
	}
}

// Reading the mappings of one process takes a hundredth of the time at most.
func TestSlowMappingsAreReadRarely(t *testing.T) {
	table, source, clock := newTestTable(t, 10)
	slow := slowSource{source, clock}
	table.source = slow
	for i := range uint64(4 * 600) {
		*clock = clock.Add(drainInterval)
		// Each time another mapping is new, so that a read always helps.
		source.maps[1] = []vma{file(0x1000*(i+1), 0x1000*(i+2), 0, "/bin/a")}
		stackOf(table, &bpf.Sample{PID: 1, User: []uint64{bpf.ExactAddr | 0x1000*(i+1)}})
	}
	if source.reads < 50 || source.reads > 62 {
		t.Errorf("%d reads of 100 ms in 10 minutes, want 60 at most", source.reads)
	}
}

type slowSource struct {
	*fakeSource
	clock *time.Time
}

func (s slowSource) mappings(sample *bpf.Sample) ([]vma, error) {
	*s.clock = s.clock.Add(100 * time.Millisecond)
	return s.fakeSource.mappings(sample)
}

func TestProcessTableIsBounded(t *testing.T) {
	table, source, _ := newTestTable(t, 3)
	for _, pid := range []uint32{1, 2, 3, 1, 4} {
		source.maps[pid] = []vma{file(0x1000, 0x2000, 0, "/bin/a")}
		stackOf(table, &bpf.Sample{PID: pid, User: []uint64{bpf.ExactAddr | 0x1000}})
	}
	if len(table.byID) != 3 || table.recent.Len() != 3 {
		t.Errorf("%d processes are kept, want 3", len(table.byID))
	}
	reads := source.reads
	stackOf(table, &bpf.Sample{PID: 1, User: []uint64{bpf.ExactAddr | 0x1000}})
	if source.reads != reads {
		t.Error("the process sampled before the last was forgotten")
	}
	stackOf(table, &bpf.Sample{PID: 2, User: []uint64{bpf.ExactAddr | 0x1000}})
	if source.reads != reads+1 {
		t.Error("the process that was sampled least lately was kept")
	}
}
