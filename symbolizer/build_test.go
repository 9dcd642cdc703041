// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bufio"
	"bytes"
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/elffile"
)

var workDir string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "symbolizer")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	workDir = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func fileAt(path string) File {
	return File{Path: path, Open: func() (*os.File, error) { return os.Open(path) }}
}

func newSymbolizer(t testing.TB, cfg Config) *Symbolizer {
	t.Helper()
	s := New(cfg)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

func openObject(t testing.TB, s *Symbolizer, path string) *Object {
	t.Helper()
	o, err := s.Object(fileAt(path))
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	return o
}

func run(t testing.TB, dir string, env []string, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, stderr.Bytes())
	}
	return out
}

// built keeps what was built: by recipe, a path.
var built struct {
	sync.Mutex
	paths map[string]string
}

// build writes source to a file of that name and runs a command on it in which OUT and
// SRC stand for the paths. The same recipe is built once for all tests.
func build(t testing.TB, name, source string, env []string, command ...string) string {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	key := strings.Join(slices.Concat([]string{name, source}, env, command), "\x00")
	if p := built.paths[key]; p != "" {
		return p
	}
	// The same source is at the same path, which ends up in debug information.
	h := fnv.New64a()
	h.Write([]byte(source))
	dir := filepath.Join(workDir, fmt.Sprintf("%x", h.Sum64()))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	src, out := filepath.Join(dir, name), filepath.Join(dir, fmt.Sprintf("out%d", len(built.paths)))
	if err := os.WriteFile(src, []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	args := make([]string, len(command))
	for i, a := range command {
		args[i] = strings.NewReplacer("OUT", out, "SRC", src).Replace(a)
	}
	run(t, dir, env, args[0], args[1:]...)
	if built.paths == nil {
		built.paths = map[string]string{}
	}
	built.paths[key] = out
	return out
}

func buildC(t testing.TB, source string, flags ...string) string {
	t.Helper()
	return build(t, "main.c", source, nil, slices.Concat([]string{"gcc", "-o", "OUT", "SRC"}, flags)...)
}

func buildCXX(t testing.TB, source string, flags ...string) string {
	t.Helper()
	return build(t, "main.cc", source, nil, slices.Concat([]string{"g++", "-o", "OUT", "SRC"}, flags)...)
}

func buildGo(t testing.TB, source string, flags ...string) string {
	t.Helper()
	return build(t, "main.go", source, []string{"GO111MODULE=off", "GOFLAGS="},
		slices.Concat([]string{"go", "build", "-o", "OUT"}, flags, []string{"SRC"})...)
}

// stripped is a copy of a binary without symbols.
func stripped(t testing.TB, path string, flags ...string) string {
	t.Helper()
	return build(t, "path", path, nil, slices.Concat([]string{"strip", "-o", "OUT"}, flags, []string{path})...)
}

// nmSymbol is a line of nm.
type nmSymbol struct {
	addr, size uint64
	typ        byte
	name       string
}

// nmText returns the text symbols that nm knows, sorted by address.
func nmText(t testing.TB, path string, flags ...string) []nmSymbol {
	t.Helper()
	out := run(t, ".", nil, "nm", append(append([]string{"--format=posix"}, flags...), path)...)
	var syms []nmSymbol
	sc := bufio.NewScanner(bytes.NewReader(out))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		// "name T 1139 1f", the size only where there is one.
		f := strings.Fields(sc.Text())
		if len(f) < 3 || len(f[1]) != 1 || !strings.Contains("TtWwVvi", f[1]) {
			continue
		}
		addr, err := strconv.ParseUint(f[2], 16, 64)
		if err != nil {
			t.Fatalf("nm: %q", sc.Text())
		}
		s := nmSymbol{addr: addr, typ: f[1][0], name: f[0]}
		if len(f) > 3 {
			s.size, _ = strconv.ParseUint(f[3], 16, 64)
		}
		syms = append(syms, s)
	}
	slices.SortStableFunc(syms, func(a, b nmSymbol) int { return int(int64(a.addr) - int64(b.addr)) })
	if len(syms) == 0 {
		t.Fatalf("nm %v %s: no text symbols", flags, path)
	}
	return syms
}

// covering are the names that may be given to addr: of the symbols with a size that cover
// it, those that start last; if none does, the last one before it in its section where
// that has no size.
func covering(syms []nmSymbol, secs []elffile.Extent, addr uint64) map[string]bool {
	names := map[string]bool{}
	i, _ := slices.BinarySearchFunc(syms, addr+1, func(s nmSymbol, a uint64) int { return int(int64(s.addr) - int64(a)) })
	start := uint64(0)
	for j := i - 1; j >= 0 && (len(names) == 0 || syms[j].addr == start); j-- {
		if s := syms[j]; addr-s.addr < s.size {
			names[s.name], start = true, s.addr
		}
	}
	if len(names) > 0 || i == 0 {
		return names
	}
	last := syms[i-1].addr
	if !slices.ContainsFunc(secs, func(s elffile.Extent) bool {
		return last >= s.Off && last-s.Off < s.Size && addr >= s.Off && addr-s.Off < s.Size
	}) {
		return names
	}
	for j := i - 1; j >= 0 && syms[j].addr == last; j-- {
		if syms[j].size == 0 {
			names[syms[j].name] = true
		}
	}
	return names
}

// executableSections are the address ranges that are code, by readelf.
func executableSections(t testing.TB, path string) []elffile.Extent {
	t.Helper()
	var secs []elffile.Extent
	for line := range strings.Lines(string(run(t, ".", nil, "readelf", "-SW", path))) {
		// "  [15] .text  PROGBITS  0000000000402300 002300 09e9e4 00  AX  0   0 64"
		_, rest, ok := strings.Cut(line, "]")
		f := strings.Fields(rest)
		if !ok || len(f) < 7 || !strings.Contains(f[6], "X") {
			continue
		}
		addr, err1 := strconv.ParseUint(f[2], 16, 64)
		size, err2 := strconv.ParseUint(f[4], 16, 64)
		if err1 == nil && err2 == nil && size > 0 {
			secs = append(secs, elffile.Extent{Off: addr, Size: size})
		}
	}
	if len(secs) == 0 {
		t.Fatalf("readelf -S %s: no code", path)
	}
	return secs
}

// sampleAddrs are the first and last byte of every symbol, the bytes around it, and n
// random addresses in code.
func sampleAddrs(t testing.TB, path string, syms []nmSymbol, n int) []uint64 {
	t.Helper()
	secs := executableSections(t, path)
	inCode := func(a uint64) bool {
		return slices.ContainsFunc(secs, func(s elffile.Extent) bool { return a >= s.Off && a-s.Off < s.Size })
	}
	set := map[uint64]bool{}
	for _, s := range syms {
		for _, a := range []uint64{s.addr, s.addr + s.size - 1, s.addr + s.size, s.addr + s.size/2} {
			if inCode(a) {
				set[a] = true
			}
		}
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range n {
		s := secs[rnd.IntN(len(secs))]
		set[s.Off+rnd.Uint64N(s.Size)] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// system returns the first of the files that exists.
func system(t testing.TB, paths ...string) string {
	t.Helper()
	for _, p := range paths {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	t.Fatalf("none of %v is here", paths)
	return ""
}

func libc(t testing.TB) string {
	return system(t, "/lib/x86_64-linux-gnu/libc.so.6", "/lib/aarch64-linux-gnu/libc.so.6", "/lib64/libc.so.6")
}

// measure runs f and reports the CPU time of the process for each of n items, which other
// load on the machine disturbs less than the time that passes.
func measure(b *testing.B, n int, f func()) {
	before := cpuTime(b)
	for b.Loop() {
		f()
	}
	b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N)/float64(n), "cpu-ns/item")
}

func cpuTime(b *testing.B) int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		b.Fatal(err)
	}
	return ts.Nano()
}

func shuffle(addrs []uint64) {
	rand.New(rand.NewPCG(9, 9)).Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
}

// heapOf is what the heap grows by while f runs, garbage excluded.
func heapOf(f func()) int64 {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	f()
	runtime.GC()
	runtime.ReadMemStats(&after)
	return int64(after.HeapAlloc) - int64(before.HeapAlloc)
}
