// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/symbolizer"
)

// What is not there in time is left out, said, and there the next time.
func TestSymbolsDeadline(t *testing.T) {
	s := symbolizer.New(symbolizer.Config{})
	defer s.Close()
	table := newProcessTable(newProcfs("/proc"), s, 10)
	sample := ownSample(t)
	agg := aggregated(table, 10, sample)
	rows := agg.result()
	symbols := newSymbols(s)

	start := time.Now()
	found, late := symbols.lookup(rows, start.Add(-time.Second))
	if late != 1 {
		t.Errorf("%d binaries late, want this test's", late)
	}
	if r := found.of(rows[0].stack[0]); len(r.Lines) != 0 {
		t.Errorf("names after the deadline: %v", r)
	}
	if got := (meta{typ: &cpuType, late: late}).comments(); !strings.Contains(got[len(got)-1], "symbols: 1 binaries") {
		t.Errorf("comments %q", got)
	}
	found, late = symbols.lookup(rows, time.Time{})
	if r := found.of(rows[0].stack[0]); late != 0 || len(r.Lines) != 1 || !strings.HasSuffix(r.Lines[0].Function, ".leafFunction") {
		t.Errorf("%d late, %v", late, r)
	}
	// Now it is known without asking.
	found, late = symbols.lookup(rows, start.Add(-time.Second))
	if r := found.of(rows[0].stack[0]); late != 0 || len(r.Lines) != 1 {
		t.Errorf("%d late, %v", late, r)
	}
}

// One that takes its time costs its own names only.
func TestSymbolsDoNotQueue(t *testing.T) {
	proc := t.TempDir()
	kallsyms := filepath.Join(proc, "kallsyms")
	if err := unix.Mkfifo(kallsyms, 0o600); err != nil {
		t.Fatal(err)
	}
	s := symbolizer.New(symbolizer.Config{Proc: proc})
	defer s.Close()
	table := newProcessTable(newProcfs("/proc"), s, 10)
	sample := ownSample(t)
	sample.Kernel = []uint64{0xffffffff81000000}
	rows := aggregated(table, 10, sample).result()
	symbols := newSymbols(s)
	found, late := symbols.lookup(rows, time.Now().Add(5*time.Second))
	user := slices.IndexFunc(rows[0].stack, func(l Location) bool { return l.Mapping.object != nil })
	if user < 0 {
		t.Fatalf("no user frame in %v", rows[0].stack)
	}
	if r := found.of(rows[0].stack[user]); late != 1 || len(r.Lines) == 0 {
		t.Errorf("%d late, %v for a frame of this test: want it named, and the kernel late", late, r)
	}
	// Let the reader go.
	if f, err := os.OpenFile(kallsyms, os.O_WRONLY, 0); err != nil {
		t.Error(err)
	} else {
		f.Close()
	}
}

func TestSymbolsAreBounded(t *testing.T) {
	s := newSymbols(nil)
	o := new(symbolizer.Object)
	for addr := range uint64(3 * maxCachedSymbols) {
		s.put(symbolKey{o, addr}, symbolizer.Result{})
	}
	if n := len(s.young) + len(s.old); n > 2*maxCachedSymbols {
		t.Errorf("%d results are kept", n)
	}
	last := symbolKey{o, 2*maxCachedSymbols - 1}
	if _, ok := s.get(last); !ok {
		t.Error("a result of the generation before is forgotten")
	}
}

// The kernel's names are read before there is a sample that needs them.
func TestKernelNamesAtStart(t *testing.T) {
	r := run(t, nil, nil)
	await(t, "the kernel's symbols", func() bool { return r.cfg.Symbolizer.Stats().Kernel.Loads > 0 })
}

// Code that a JIT compiler has put in the place of other code does not get its samples.
func TestJITCodeOfItsTime(t *testing.T) {
	words := func(b []byte, size int, values ...uint64) []byte {
		for _, v := range values {
			b = append(b, binary.LittleEndian.AppendUint64(nil, v)[:size]...)
		}
		return b
	}
	const addr = 0x7f0000001000
	dump := append(words(nil, 4, 0x4a695444, 1, 40, 62, 0, 1), make([]byte, 16)...)
	begun := uint64(bootTime()) // as on the clock of jitdumps, where nothing has slept
	var monotonic unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &monotonic); err != nil {
		t.Fatal(err)
	}
	asleep := begun - uint64(monotonic.Nano())
	for i, name := range []string{"before\x00", "after\x00\x00"} {
		dump = words(dump, 4, 0, uint64(16+40+len(name)))
		dump = words(dump, 8, begun-asleep+uint64(i)*1e9, 0, addr, addr, 64, 1)
		dump = append(dump, name...)
	}
	path := filepath.Join(t.TempDir(), fmt.Sprintf("jit-%d.dump", os.Getpid()))
	if err := os.WriteFile(path, dump, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	marker, err := unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(marker)
	s := symbolizer.New(symbolizer.Config{})
	defer s.Close()
	stack := Stack{{Mapping: &Mapping{perfMap: s.PerfMap(uint32(os.Getpid()))}, Addr: addr + 5}}
	symbols := newSymbols(s)
	for want, last := range map[string]uint64{"before": begun + 5e8, "after": begun + 15e8} {
		found, _ := symbols.lookup([]row{{stack: stack, last: last - 4e8}, {stack: stack, last: last}}, time.Time{})
		if r := found.of(stack[0]); len(r.Lines) != 1 || r.Lines[0].Function != want {
			t.Errorf("%+v, want %s", r, want)
		}
	}
}
