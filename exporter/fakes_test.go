// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"bytes"
	"context"
	"flag"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/pprof"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/internal/histogram"
	"github.com/hostflame/hostflame/profiler"
)

var update = flag.Bool("update", false, "rewrite the golden files in testdata")

// golden compares got with a file in testdata.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s differs; if that is right, run go test -update (-want +got):\n%s", path, diff)
	}
}

var testStart = time.Date(2026, 11, 22, 19, 44, 10, 0, time.UTC)

func snapshotOf(p *histogram.Partition, values ...uint64) histogram.Snapshot {
	s := histogram.Snapshot{Cells: make([]uint64, p.Cells())}
	for _, v := range values {
		s.Cells[p.Cell(v)]++
		s.Sum += v
	}
	return s
}

type fakeRunqueue struct {
	r   Runqueue
	err error
}

func (f *fakeRunqueue) ReadRunqueue() (Runqueue, error) { return f.r, f.err }

type fakeBlock struct {
	series []Block
	err    error
}

func (f *fakeBlock) ReadBlock() ([]Block, error) { return f.series, f.err }

func (f *fakeBlock) ReadBlockContainers() ([]BlockContainer, error) {
	read := testBlock("vda", "read", 2)
	return []BlockContainer{{
		Container: "0123456789ab", Since: testStart.Add(time.Minute),
		Operations: map[string]BlockContainerIO{"read": {read.Total, read.Queue, read.DeviceTime, read.Size}},
		Attributed: map[string]uint64{"cgroup": 3, "submitter": 1},
	}}, f.err
}

func (f *fakeBlock) ReadBlockBios() ([]BlockBio, error) {
	read := testBlock("zram0", "read", 5)
	return []BlockBio{{"zram0", "read", read.Total, read.Size, map[string]uint64{"io": 3, "medium": 0}}}, f.err
}

func (f *fakeBlock) ReadInFlight() (map[string]int, error) { return map[string]int{"vda": 7}, f.err }

type fakeCPU []profiler.ContainerCPU

func (f fakeCPU) CPUByContainer() []profiler.ContainerCPU { return f }

type fakeUnwind Unwind

func (f fakeUnwind) ReadUnwind() (Unwind, error) { return Unwind(f), nil }

type fakeSymbols Symbols

func (f fakeSymbols) ReadSymbols() Symbols { return Symbols(f) }

type fakeAgent Agent

func (f fakeAgent) ReadAgent() (Agent, error) { return Agent(f), nil }

func testBlock(device, operation string, factor uint64) Block {
	return Block{
		Device: device, Operation: operation,
		Total:      snapshotOf(histogram.Time(), 90_000*factor, 210_000*factor, 64_000_000_001),
		Queue:      snapshotOf(histogram.Time(), 900, 10_000*factor),
		DeviceTime: snapshotOf(histogram.Time(), 80_000*factor, 200_000*factor),
		Size:       snapshotOf(histogram.Size(), 0, 512, 4096*factor, 128<<20),
		Depth:      snapshotOf(histogram.Depth(), 1, 2, 31+factor),
		Errors:     map[string]uint64{"io": factor, "timeout": 1},
		Flagged:    map[string]uint64{"sync": 3, "readahead": factor, "metadata": 0},
		Merges:     2 * factor, Requeues: 5, Splits: factor,
	}
}

func testRunqueueContainer(name string, factor uint64, by map[string]uint64) RunqueueContainer {
	return RunqueueContainer{
		Container: name,
		Since:     testStart.Add(time.Minute),
		Latency:   snapshotOf(histogram.Time(), 1_000*factor, 30_000*factor),
		Blocked: map[string]histogram.Snapshot{
			"block_io": snapshotOf(histogram.Time()),
			"other":    snapshotOf(histogram.Time(), 7_000*factor),
		},
		DelayNanos:     map[string]uint64{"quota": 0, "own": 18_000 * factor, "other": 13_000 * factor},
		Preemptions:    map[string]uint64{"own": 3 * factor, "other": 0},
		DelayedByNanos: by,
	}
}

// testReaders have something in every family.
func testReaders() Readers {
	return Readers{
		Runqueue: &fakeRunqueue{r: Runqueue{
			Latency: snapshotOf(histogram.Time(), 0, 953, 954, 1_000, 1_001, 2_500, 50_000_000_000, 50_000_000_001),
			Blocked: map[string]histogram.Snapshot{
				"block_io": snapshotOf(histogram.Time(), 310_000),
				"other":    snapshotOf(histogram.Time(), 7_000, 3_000_000_000),
			},
			KernelDelayNanos: 1_500_000_001,
			Length:           snapshotOf(histogram.Length(), 1, 1, 2, 3, 2048),
			Containers: []RunqueueContainer{
				testRunqueueContainer("/", 1, map[string]uint64{"0123456789ab": 11_000, "~other": 2_000}),
				testRunqueueContainer("~other", 0, nil),
			},
		}},
		Block: &fakeBlock{series: []Block{testBlock("vda", "read", 1), testBlock("vda", "write", 3)}},
		CPU: fakeCPU{
			{Container: "/", User: 1500 * time.Millisecond, System: 20 * time.Millisecond},
			{Container: "0123456789ab", User: time.Second},
			{Container: "~other"},
		},
		Unwind: fakeUnwind{
			Tables: 101, Rows: 5_003, Memory: 1 << 20, MemoryLimit: 32 << 20, Evicted: 7, Made: 103,
			CacheHits: 11, CacheErrors: 1, Finished: 13, Skipped: map[string]uint64{"register": 2},
		},
		Symbols: fakeSymbols{
			Tables: 17, TableMemory: 3 << 20, TableLimit: 32 << 20, TablesEvicted: 5,
			IndexesMade: 19, IndexesCached: 23, IndexesFailed: 2, IndexesWaiting: 3, UnitsSkipped: 29,
			CacheBytes: 31 << 20, CacheLimit: 1 << 30, CacheEvicted: 37, CacheRefused: 1,
		},
		Agent: fakeAgent{
			Samples: map[string]uint64{"cpu": 1009},
			Lost:    map[string]map[string]uint64{"cpu": {"ring_full": 0, "no_ring": 2}},
			Stacks:  map[string]map[string]uint64{"cpu": {"complete": 1000, "truncated": 9}},
			Unseen:  map[string]map[string]uint64{"runqueue": {"switch_unseen": 3}},
			Programs: []Program{
				{Name: "hf_cpu", Runs: 1011, RecursionMisses: 1, TimedRuns: 100, RunTime: 250 * time.Microsecond},
				{Name: "hf_sched_switch", Runs: 4_000_000},
			},
			Maps:       []Map{{1, "hf_count", 4096}, {0, "hf_ring", 1 << 20}, {2, "hf_count", 8192}, {2, "hf_count", 8192}},
			Accounting: map[string]float64{"runqueue": 0.9987},
		},
	}
}

// burnKnownFunction is the function that the flame graph must show.
//
//go:noinline
func burnKnownFunction(d time.Duration) {
	n := uint64(0)
	for end := time.Now().Add(d); time.Now().Before(end); {
		for i := range uint64(10_000) {
			n = n*31 + i
		}
	}
	burnt = n
}

// burnt keeps the burning from being optimized away.
var burnt uint64

// realProfile is a CPU profile of this process, with the labels that the profiler sets.
var realProfile = sync.OnceValues(func() (*profile.Profile, error) {
	var b bytes.Buffer
	if err := pprof.StartCPUProfile(&b); err != nil {
		return nil, err
	}
	burnKnownFunction(500 * time.Millisecond)
	pprof.StopCPUProfile()
	p, err := profile.Parse(&b)
	if err != nil {
		return nil, err
	}
	for _, s := range p.Sample {
		s.Label = map[string][]string{"comm": {"knowncomm"}, "container": {"/"}}
		s.NumLabel = map[string][]int64{"pid": {42}, "tid": {43}}
	}
	p.Comments = []string{"host: testhost"}
	return p, p.CheckValid()
})

// fakeCapturer hands out one profile.
type fakeCapturer struct {
	profile *profile.Profile
	capture func(context.Context, profiler.Request) error // in place of waiting

	mu       sync.Mutex
	ready    bool
	newest   *profiler.Window
	requests []profiler.Request
}

func newFakeCapturer(t *testing.T) *fakeCapturer {
	t.Helper()
	p, err := realProfile()
	if err != nil {
		t.Fatal(err)
	}
	return &fakeCapturer{
		profile: p,
		ready:   true,
		newest: &profiler.Window{
			Start: testStart, End: testStart.Add(10 * time.Second),
			Profiles: []profiler.Profile{profiler.NewProfile("cpu", p, 1009, map[string]uint64{"ring_full": 1, "no_ring": 2}), profiler.NewProfile("blockio", p, 0, nil)},
		},
	}
}

// testTypes are what the tests serve.
var testTypes = []profiler.Type{profiler.CPU("", 99), profiler.BlockIO(50)}

// allTypes are what the agent serves.
var allTypes = func() []profiler.Type {
	states := profiler.NewStates(nil)
	return []profiler.Type{
		profiler.CPU("", 99), profiler.Runqueue(), profiler.Culprit(), profiler.OffCPU(states), profiler.Wall(99, states), profiler.BlockIO(50),
	}
}()

// windowOf is a window with a profile of CPU time.
func windowOf(p *profile.Profile) *profiler.Window {
	return &profiler.Window{Start: testStart, End: testStart, Profiles: []profiler.Profile{profiler.NewProfile("cpu", p, 0, nil)}}
}

func (f *fakeCapturer) Capture(ctx context.Context, r profiler.Request) (*profile.Profile, error) {
	f.mu.Lock()
	f.requests = append(f.requests, r)
	f.mu.Unlock()
	if f.capture != nil {
		return f.profile, f.capture(ctx, r)
	}
	select {
	case <-time.After(r.Duration):
		return f.profile, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (f *fakeCapturer) Newest() *profiler.Window {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.newest
}

func (f *fakeCapturer) setNewest(w *profiler.Window) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.newest = w
}

func (f *fakeCapturer) Ready() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ready
}

// logs is a logger and what it wrote.
func logs() (*slog.Logger, *bytes.Buffer) {
	var b bytes.Buffer
	return slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	})), &b
}

// contextOf makes http.Server.BaseContext of a context.
func contextOf(ctx context.Context) func(net.Listener) context.Context {
	return func(net.Listener) context.Context { return ctx }
}
