// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"debug/dwarf"
	"debug/elf"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	ourdwarf "github.com/hostflame/hostflame/internal/dwarf"
	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/symbolizer"
	"github.com/hostflame/hostflame/symbolizer/index"
)

// manyAddresses is how many random addresses are asked for.
const manyAddresses = 10_000

// symbols measures how fast addresses of a big binary get their names, inlined functions
// and lines, from nothing and again.
func (b *bench) symbols(w io.Writer) error {
	fmt.Fprintf(w, "\n## Symbolizing %s\n\n", filepath.Base(b.vmlinux))
	addrs, debugBytes, err := textAddresses(b.vmlinux, manyAddresses)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "Debug sections: %.0f MB. Functions, inlined functions, file and line; nothing is kept from one run to the next; the file is in the page cache.\n\n", float64(debugBytes)/1e6)
	t := table{header: []string{"tool", "1 address", fmt.Sprintf("%d addresses", len(addrs)), "CPU", "anonymous memory", "resident memory"}}
	for _, c := range []struct {
		name string
		args []string
	}{
		{"hostflame symbolize", []string{b.hostflame, "symbolize", "--exe", b.vmlinux}},
		{"llvm-symbolizer 19", []string{"llvm-symbolizer-19", "--inlines", "--obj=" + b.vmlinux}},
		{"eu-addr2line", []string{"eu-addr2line", "-f", "-i", "-e", b.vmlinux}},
		{"addr2line (binutils)", []string{"addr2line", "-f", "-i", "-e", b.vmlinux}},
	} {
		progress("symbols: %s", c.name)
		one, err := b.asked(c.args, addrs[:1])
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		many, err := b.asked(c.args, addrs)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		t.add(c.name, seconds(one.took), seconds(many.took), seconds(many.cpu), megabytes(many.anonymous), megabytes(many.resident))
	}
	progress("symbols: llvm-gsymutil")
	gsym := filepath.Join(b.dir, "vmlinux.gsym")
	convert, err := b.asked([]string{"llvm-gsymutil-19", "--convert=" + b.vmlinux, "--out-file=" + gsym, "--num-threads=" + strconv.Itoa(runtime.NumCPU())}, nil)
	if err != nil {
		return fmt.Errorf("llvm-gsymutil: %w", err)
	}
	size := int64(0)
	if fi, err := os.Stat(gsym); err == nil {
		size = fi.Size()
	}
	t.add("llvm-gsymutil --convert", "", seconds(convert.took), seconds(convert.cpu), megabytes(convert.anonymous), megabytes(convert.resident))
	progress("symbols: Go's debug/dwarf")
	goes, err := b.asked([]string{os.Args[0], "-debug-dwarf=" + b.vmlinux}, addrs[:b.dwarfAddresses])
	if err != nil {
		return fmt.Errorf("debug/dwarf: %w", err)
	}
	t.add(fmt.Sprintf("Go's debug/dwarf, %d addresses, lines only", b.dwarfAddresses), "", seconds(goes.took), seconds(goes.cpu), megabytes(goes.anonymous), megabytes(goes.resident))
	t.print(w)
	fmt.Fprintf(w, "\nllvm-gsymutil's index has %.1f MB, %.1f %% of the debug sections; hostflame's is below.\n\n", float64(size)/1e6, 100*float64(size)/float64(debugBytes))
	return b.indexCosts(w, addrs, debugBytes)
}

// indexCosts measures the parts of ours within this process.
func (b *bench) indexCosts(w io.Writer, addrs []uint64, debugBytes int64) error {
	t := table{header: []string{"hostflame", ""}}
	first, err := firstName(b.vmlinux, addrs[0])
	if err != nil {
		return err
	}
	t.add("first name, from the symbol table", first.Round(10*time.Microsecond).String())
	var file *os.File
	for workers := 1; workers <= runtime.NumCPU(); workers *= 2 {
		start := time.Now()
		f, st, err := buildIndex(b.dir, b.vmlinux, workers)
		if err != nil {
			return err
		}
		took := time.Since(start)
		t.add(fmt.Sprintf("index, %d threads", workers), fmt.Sprintf("%s, %.0f MB of debug sections a second", seconds(took), float64(debugBytes)/1e6/took.Seconds()))
		if workers == 1 {
			t.add("index's size", fmt.Sprintf("%.1f MB, %.1f %% of the debug sections", float64(st.Bytes)/1e6, 100*float64(st.Bytes)/float64(debugBytes)))
		}
		if file != nil {
			file.Close()
		}
		file = f
	}
	defer file.Close()
	x, err := index.Open(file, index.Identity{})
	if err != nil {
		return err
	}
	frames := make([]index.Frame, 0, 64)
	r := testing.Benchmark(func(tb *testing.B) {
		tb.ReportAllocs()
		err = x.Batch(func() {
			for i := range tb.N {
				frames = x.Lookup(addrs[i%len(addrs)], frames[:0])
			}
		})
	})
	if err != nil {
		return err
	}
	t.add("look-up of a random address, all frames", fmt.Sprintf("%d ns, %d allocations", r.NsPerOp(), r.AllocsPerOp()))
	if err := goCosts(&t, b.hostflame); err != nil {
		return err
	}
	if err := kallsymsCosts(&t, b.dir); err != nil {
		return err
	}
	t.print(w)
	return nil
}

// goCosts measures what names and lines by a Go binary's pclntab cost.
func goCosts(t *table, path string) error {
	addrs, err := goAddresses(path, manyAddresses)
	if err != nil {
		return err
	}
	known := symbolizer.New(symbolizer.Config{})
	defer known.Close()
	open := func(s *symbolizer.Symbolizer) (*symbolizer.Object, error) {
		return s.Object(symbolizer.File{Path: path, Open: func() (*os.File, error) { return os.Open(path) }})
	}
	o, err := open(known)
	if err != nil {
		return err
	}
	o.Symbolize(addrs)
	r := testing.Benchmark(func(tb *testing.B) {
		tb.ReportAllocs()
		for tb.Loop() {
			o.Symbolize(addrs)
		}
	})
	each := func(n int64) float64 { return float64(n) / float64(len(addrs)) }
	t.add("pclntab, a random address of a line that was asked for", fmt.Sprintf("%.0f ns, %.4f allocations", each(r.NsPerOp()), each(r.AllocsPerOp())))
	for _, order := range []string{"random", "ascending"} {
		if order == "ascending" {
			slices.Sort(addrs)
		}
		s := symbolizer.New(symbolizer.Config{})
		o, err := open(s)
		if err != nil {
			return err
		}
		o.Symbolize(addrs[:1])
		start := time.Now()
		o.Symbolize(addrs)
		t.add("pclntab, the first time, in "+order+" order", fmt.Sprintf("%.0f ns, which pages of the file that are read take (pread)", each(int64(time.Since(start)))))
		s.Close()
	}
	return nil
}

// goAddresses are random addresses of a Go binary's text.
func goAddresses(path string, n int) ([]uint64, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text := f.Section(".text")
	if text == nil {
		return nil, fmt.Errorf("%s has no .text", path)
	}
	rnd := rand.New(rand.NewPCG(13, 14))
	addrs := make([]uint64, n)
	for i := range addrs {
		addrs[i] = text.Addr + rnd.Uint64N(text.Size)
	}
	return addrs, nil
}

// kallsymsCosts measures the reading of the kernel's own symbols: from a copy, which is our
// part (what user time the kernel accounts depends on its ticks), and from the kernel.
func kallsymsCosts(t *table, dir string) error {
	b, err := os.ReadFile("/proc/kallsyms")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "kallsyms"), b, 0o600); err != nil {
		return err
	}
	read := func(proc string) (took time.Duration, kept *symbolizer.Symbolizer) {
		took = time.Hour
		for range 5 {
			s := symbolizer.New(symbolizer.Config{Proc: proc, Root: os.DevNull}) // without a vmlinux
			start := time.Now()
			s.Kernel([]uint64{1 << 63})
			took = min(took, time.Since(start))
			s.Close()
			kept = s
		}
		return took, kept
	}
	ours, _ := read(dir)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	whole, kept := read("/proc")
	runtime.GC()
	runtime.ReadMemStats(&after)
	st := kept.Stats().Kernel
	t.add(fmt.Sprintf("kallsyms, %d symbols", st.Symbols), fmt.Sprintf("%.1f ms from a copy, %.0f ms from the kernel, %.1f MB kept",
		1e3*ours.Seconds(), 1e3*whole.Seconds(), float64(after.HeapAlloc-before.HeapAlloc)/1e6))
	runtime.KeepAlive(kept)
	return st.Err
}

func buildIndex(dir, path string, workers int) (*os.File, index.Stats, error) {
	src, err := os.Open(path)
	if err != nil {
		return nil, index.Stats{}, err
	}
	defer src.Close()
	fi, err := src.Stat()
	if err != nil {
		return nil, index.Stats{}, err
	}
	m, err := elffile.Parse(sized{src, fi.Size()})
	if err != nil {
		return nil, index.Stats{}, err
	}
	secs, err := m.Sections()
	if err != nil {
		return nil, index.Stats{}, err
	}
	z := &elffile.Inflater{Dir: dir, Disk: 4 << 30}
	defer z.Close()
	d, err := ourdwarf.Open(m, secs, z)
	if err != nil {
		return nil, index.Stats{}, err
	}
	f, err := elffile.TempFile(dir)
	if err != nil {
		return nil, index.Stats{}, err
	}
	st, err := index.Build(context.Background(), d, index.Options{File: f, Dir: dir, Workers: workers})
	return f, st, err
}

type sized struct {
	*os.File
	size int64
}

func (s sized) Size() int64 { return s.size }

// firstName is the time to the first answer of a symbolizer that makes indexes in the
// background, as the agent's.
func firstName(path string, addr uint64) (time.Duration, error) {
	s := symbolizer.New(symbolizer.Config{})
	defer s.Close()
	start := time.Now()
	o, err := s.Object(symbolizer.File{Path: path, Open: func() (*os.File, error) { return os.Open(path) }})
	if err != nil {
		return 0, err
	}
	r := o.Symbolize([]uint64{addr})[0]
	if len(r.Lines) == 0 {
		return 0, fmt.Errorf("no name for %#x: %s", addr, r.Reason)
	}
	return time.Since(start), nil
}

// asking is what a tool took.
type asking struct {
	took, cpu           time.Duration
	anonymous, resident int64 // bytes, the most
}

// asked runs a tool and writes addresses to it.
func (b *bench) asked(args []string, addrs []uint64) (asking, error) {
	var in bytes.Buffer
	for _, a := range addrs {
		fmt.Fprintf(&in, "%#x\n", a)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = &in
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return asking{}, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var a asking
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			a.took = time.Since(start)
			if usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
				a.resident = usage.Maxrss << 10
			}
			a.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
			return a, err
		case <-tick.C:
			a.anonymous = max(a.anonymous, anonymousOf(cmd.Process.Pid))
		}
	}
}

func anonymousOf(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), "RssAnon:")
	var kb int64
	fmt.Sscan(rest, &kb)
	return kb << 10
}

// textAddresses are random addresses of .text, and the size of the debug sections.
func textAddresses(path string, n int) (addrs []uint64, debugBytes int64, err error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	for _, s := range f.Sections {
		if strings.HasPrefix(s.Name, ".debug_") {
			debugBytes += int64(s.Size)
		}
	}
	// Not the whole section: a kernel's ends in megabytes of nothing.
	syms, err := f.Symbols()
	if err != nil {
		return nil, 0, err
	}
	var functions []elf.Symbol
	for _, s := range syms {
		if elf.ST_TYPE(s.Info) == elf.STT_FUNC && s.Size > 0 {
			functions = append(functions, s)
		}
	}
	if len(functions) == 0 {
		return nil, 0, fmt.Errorf("%s has no functions", path)
	}
	rnd := rand.New(rand.NewPCG(11, 12))
	for range n {
		s := functions[rnd.IntN(len(functions))]
		addrs = append(addrs, s.Value+rnd.Uint64N(s.Size))
	}
	return addrs, debugBytes, nil
}

// debugDwarf answers addresses on standard input by the standard library: the line, as a
// program that uses it would look it up.
func debugDwarf(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return err
	}
	d, err := f.DWARF()
	if err != nil {
		return err
	}
	for {
		var addr uint64
		if _, err := fmt.Scan(&addr); err != nil {
			return nil
		}
		unit, err := d.Reader().SeekPC(addr)
		if err != nil {
			continue
		}
		lines, err := d.LineReader(unit)
		if err != nil || lines == nil {
			continue
		}
		var entry dwarf.LineEntry
		if lines.SeekPC(addr, &entry) == nil {
			fmt.Printf("%s:%d\n", entry.File.Name, entry.Line)
		}
	}
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
func megabytes(n int64) string       { return fmt.Sprintf("%.0f MB", float64(n)/1e6) }
