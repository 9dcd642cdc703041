// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
)

// largest is the library here with the most .eh_frame, of those known to be large.
func largest(t testing.TB) string {
	t.Helper()
	best, size := "", uint64(0)
	for _, pattern := range []string{"/usr/lib/*/libclang-cpp.so.*", "/usr/lib/*/libLLVM*.so*", "/usr/lib/*/libnode.so.*", "/usr/bin/node", "/usr/lib/*/libc.so.6"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range paths {
			f, err := openPath(t, p)
			if err != nil {
				continue
			}
			if f.frames != nil && f.frames.size > size {
				best, size = p, f.frames.size
			}
			closeFile(f)
		}
	}
	return best
}

func cpuTime(b testing.TB) int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		b.Fatal(err)
	}
	return ts.Nano()
}

// BenchmarkBuild makes all tables of a file: .eh_frame that is read a second, by CPU time,
// which other load on the machine disturbs less than the time that passes.
func BenchmarkBuild(b *testing.B) {
	libc, err := filepath.Glob("/lib/*-linux-gnu/libc.so.6")
	if err != nil || len(libc) == 0 {
		b.Fatal("no libc")
	}
	for _, path := range []string{libc[0], largest(b)} {
		b.Run(filepath.Base(path), func(b *testing.B) {
			b.ReportAllocs()
			bytes, words, rows := uint64(0), 0, 0
			before := cpuTime(b)
			for b.Loop() {
				f := openFile(b, path, nil)
				for _, n := range f.Regions() {
					r, err := f.Region(n)
					if err != nil {
						b.Fatal(err)
					}
					words, rows = words+len(r.Words), rows+r.Rows
				}
				bytes += f.frames.size
			}
			b.ReportMetric(float64(bytes)/1e6/(float64(cpuTime(b)-before)/1e9), "MB/cpu-s")
			b.ReportMetric(float64(2*words)/float64(rows), "B/row")
			b.ReportMetric(float64(bytes)/1e6/float64(b.N), "MB")
		})
	}
}

// TestPeakHeap makes all tables of the largest library here, and looks at the heap after
// each: garbage counts as long as it is there.
func TestPeakHeap(t *testing.T) {
	const budget = 64 << 20
	path := largest(t)
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	before, peak := m.HeapAlloc, uint64(0)
	f := openFile(t, path, nil)
	for _, n := range f.Regions() {
		if _, err := f.Region(n); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&m)
		peak = max(peak, m.HeapAlloc-min(before, m.HeapAlloc))
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s, %d MB, %d MB of .eh_frame: %d KiB of heap at most", path, st.Size()/1e6, f.frames.size/1e6, peak>>10)
	if peak > budget {
		t.Errorf("%d bytes of heap, want at most %d", peak, budget)
	}
}

// BenchmarkRegion makes the table of one region, as a sample asks for it.
func BenchmarkRegion(b *testing.B) {
	f := openFile(b, largest(b), nil)
	regions := f.Regions()
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if _, err := f.Region(regions[i%len(regions)]); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

// BenchmarkRule looks up addresses all over a region.
func BenchmarkRule(b *testing.B) {
	f := openFile(b, largest(b), nil)
	regions := f.Regions()
	r, err := f.Region(regions[len(regions)/2])
	if err != nil {
		b.Fatal(err)
	}
	off := uint64(0)
	var sum Rule
	for b.Loop() {
		sum += r.Rule(off & (RegionSize - 1))
		off += 0x9e3779b1
	}
	if sum == 0 {
		b.Error("no rules")
	}
}

// BenchmarkWalk walks 16 frames of a copy.
func BenchmarkWalk(b *testing.B) {
	stack := make([]byte, 4096)
	const start, code = 0x7ffe00000000, 0x400000
	for i := range 512 {
		v := uint64(code + 0x123)
		if i%4 == 2 {
			v = start + uint64(i)*8 + 16
		}
		for j := range 8 {
			stack[i*8+j] = byte(v >> (8 * j))
		}
	}
	bld := builder{rows: []row{{0, narrow(KindSP, 4, 2, 0)}}, end: RegionSize}
	r := bld.table()
	w, err := NewWalker(machine, func(addr uint64) (*Region, uint64, bool) { return &r, addr - code, addr-code < RegionSize })
	if err != nil {
		b.Fatal(err)
	}
	w.MaxFrames = 16
	addrs := make([]uint64, 0, 16)
	for b.Loop() {
		got, outcome := w.Walk(addrs[:0], bpf.Frame{IP: code + 0x100, SP: start, Exact: true, Leaf: true}, 0, stack, start)
		if len(got) != 16 || outcome != bpf.OutcomeTruncated {
			b.Fatalf("%d frames, %v", len(got), outcome)
		}
	}
}
