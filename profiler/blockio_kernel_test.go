// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/symbolizer"
	"github.com/hostflame/hostflame/test/workload"
)

// loopDisk is a loop device over a file of 64 MiB, with its name.
func loopDisk(t *testing.T) (device, name string) {
	t.Helper()
	kerneltest.RequireTool(t, "losetup")
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 64<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", "--direct-io=on", file).Output()
	if err != nil {
		t.Fatalf("make a loop device: %v", err)
	}
	device = strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "--detach", device).Run() })
	return device, filepath.Base(device)
}

// samplingIO runs a profiler of block I/O that takes all stacks.
func samplingIO(t *testing.T) *Profiler {
	t.Helper()
	kerneltest.Require(t)
	tables, err := bpf.NewTables(bpf.DefaultTableMemory)
	if err != nil {
		t.Fatal(err)
	}
	const rate = 10_000
	block, err := bpf.NewBlock(bpf.BlockConfig{Tables: tables, StackRate: rate, CgroupV1: bpf.CPUControllerV1()})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	if !block.HasStacks() {
		t.Fatal("no stacks")
	}
	mappings, err := bpf.NewMappings(bpf.MappingsConfig{})
	if err != nil {
		t.Fatal(err)
	}
	s := symbolizer.New(symbolizer.Config{})
	p, err := New(Config{
		Feeds: []Feed{{Source: block, Profiles: []bpf.Profile{bpf.ProfileBlockIO}}}, Types: []Type{BlockIO(rate)},
		Symbolizer: s, Tables: tables, Mappings: mappings, Window: time.Hour,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		block.Close()
		mappings.Close()
		tables.Close()
		s.Close()
	})
	await(t, "ready", p.Ready)
	return p
}

// ioOf adds up the values of the samples of a profile whose stack has this function.
func ioOf(p *profile.Profile, function, operation string) (requests, nanos, bytes int64, kernelLeaf map[string]bool) {
	kernelLeaf = map[string]bool{}
	for _, s := range p.Sample {
		if s.Label["operation"][0] != operation || !slices.ContainsFunc(s.Location, func(l *profile.Location) bool {
			return len(l.Line) > 0 && l.Line[0].Function.Name == function
		}) {
			continue
		}
		requests, nanos, bytes = requests+s.Value[0], nanos+s.Value[1], bytes+s.Value[2]
		if leaf := s.Location[0]; len(leaf.Line) > 0 {
			kernelLeaf[leaf.Line[0].Function.Name] = true
		}
	}
	return requests, nanos, bytes, kernelLeaf
}

// Filters of completions: reads, and writes of one page and of two.
const (
	hiddenRead  = `rwbs~"R*"`
	hiddenPage  = `rwbs~"W*"&&nr_sector==8`
	hiddenWrite = `rwbs~"W*"&&nr_sector==16`
)

// Who reads and who syncs shows in the block I/O profile, with the bytes and the time that it
// was, though the program keeps no frame pointers.
func TestBlockIOByFunction(t *testing.T) {
	p := samplingIO(t)
	kerneltest.MeasureLock(t)
	device, name := loopDisk(t)
	path, err := workload.Compile(t.TempDir(), workload.NamedIO)
	if err != nil {
		t.Fatal(err)
	}
	type result struct {
		p   *profile.Profile
		err error
	}
	// A capture that the program outlasted, as it does on a busy machine, says nothing.
	var got, none result
	var numbers map[string]int64
	var booked, hiddenReads, hiddenBytes int64
	completions := map[string]kerneltest.TracepointCounter{}
	for _, filter := range []string{hiddenRead, hiddenPage, hiddenWrite} {
		completions[filter] = kerneltest.CountHiddenCompletions(t, device, filter)
	}
	hidden := func(filter string) int64 { return int64(completions[filter].Read(t)) }
	for d := 4 * time.Second; ; d *= 4 {
		captured, slow := make(chan result, 1), make(chan result, 1)
		capture := func(f Filter, into chan result) {
			p, err := p.Capture(context.Background(), Request{Type: "blockio", Duration: d, Filter: f})
			into <- result{p, err}
		}
		start, before := time.Now(), readMillis(t, name)
		hiddenReads, hiddenBytes = hidden(hiddenRead), 4096*hidden(hiddenPage)+8192*hidden(hiddenWrite)
		go capture(Filter{Labels: map[string][]string{"device": {name}}, Comms: []string{"namedio"}}, captured)
		go capture(Filter{Labels: map[string][]string{"device": {name}, "operation": {"read"}}, Least: 3_600_000_000_000}, slow)
		time.Sleep(300 * time.Millisecond)
		out, err := exec.Command(path, device, "211").Output()
		if err != nil {
			t.Fatal(err)
		}
		took := time.Since(start)
		booked = readMillis(t, name) - before
		hiddenReads = hidden(hiddenRead) - hiddenReads
		hiddenBytes = 4096*hidden(hiddenPage) + 8192*hidden(hiddenWrite) - hiddenBytes
		if numbers, err = workload.Numbers(string(out)); err != nil {
			t.Fatal(err)
		}
		got, none = <-captured, <-slow
		if got.err != nil {
			t.Fatal(got.err)
		}
		if took < d {
			break
		}
		if d > time.Minute {
			t.Fatalf("the program took %v", took)
		}
	}
	// Those are missing whose completion the kernel hides from BPF.
	requests, nanos, bytes, leaves := ioOf(got.p, "readKnown", "read")
	if requests != numbers["reads"]-hiddenReads || bytes != requests*16384 {
		t.Errorf("readKnown: %d reads of %d bytes, the program made %d of %d, %d hidden",
			requests, bytes, numbers["reads"], numbers["readbytes"], hiddenReads)
	}
	// The program waits for CPUs too; the kernel has the time of the requests, in ms.
	kernel := booked * 1e6
	if nanos <= 0 || nanos > numbers["readns"] || nanos < kernel*8/10-2e6 || nanos > kernel*11/10+2e6 {
		t.Errorf("readKnown: %d ns of I/O in %d ns of pread, the kernel has %d ms", nanos, numbers["readns"], booked)
	}
	if len(leaves) == 0 || slices.ContainsFunc(keys(leaves), func(f string) bool { return strings.Contains(f, "bpf_") }) {
		t.Errorf("leaves of the stacks: %v", leaves)
	}
	requests, nanos, bytes, _ = ioOf(got.p, "syncKnown", "write")
	if bytes != numbers["syncbytes"]-hiddenBytes || requests < bytes/8192 {
		t.Errorf("syncKnown: %d writes of %d bytes, the program made %d, %d hidden", requests, bytes, numbers["syncbytes"], hiddenBytes)
	}
	// Writing and flushing follow each other.
	if nanos <= 0 || nanos > numbers["syncns"] {
		t.Errorf("syncKnown: %d ns of I/O in %d ns of fsync", nanos, numbers["syncns"])
	}
	t.Logf("%v; profile: %d syncs' writes, %d ns; %d reads and %d bytes hidden; %d rows, stacks %v; comments %q",
		numbers, requests, nanos, hiddenReads, hiddenBytes, len(got.p.Sample), p.Stats().Stacks["blockio"], got.p.Comments)
	if none.err != nil || len(none.p.Sample) != 0 {
		t.Errorf("%d samples of reads that took an hour: %v", len(none.p.Sample), none.err)
	}
}

// readMillis is for how long reads of a device took together, by the kernel's
// books, in ms.
func readMillis(t *testing.T, device string) (ms int64) {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + device + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	var skip int64
	if _, err := fmt.Sscan(string(b), &skip, &skip, &skip, &ms); err != nil {
		t.Fatal(err)
	}
	return ms
}

func keys(m map[string]bool) (list []string) {
	for k := range m {
		list = append(list, k)
	}
	return list
}
