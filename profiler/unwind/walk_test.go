// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bufio"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
)

// mapping is an executable line of /proc/PID/maps.
type mapping struct {
	start, end, offset uint64
	path               string
}

// process is a program that stands still, and what is mapped in it.
type process struct {
	mem     *os.File
	maps    []mapping
	tables  map[string]*tables
	symbols map[string][]elf.Symbol
}

// stopAt starts a program and stops the thread that has called pause.
func stopAt(t *testing.T, path string, env ...string) (*process, bpf.Frame) {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	cmd := exec.Command(path)
	cmd.Env = append(os.Environ(), env...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	pid := cmd.Process.Pid
	tid := 0
	for deadline := time.Now().Add(10 * time.Second); tid == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s does not pause", path)
		}
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
		for _, task := range tasks {
			b, _ := os.ReadFile(task)
			if f := strings.Fields(string(b)); len(f) > 0 && f[0] == strconv.Itoa(pauseCall) {
				tid, _ = strconv.Atoi(filepath.Base(filepath.Dir(task)))
			}
		}
	}
	if err := unix.PtraceSeize(tid); err != nil {
		t.Fatal(err)
	}
	if err := unix.PtraceInterrupt(tid); err != nil {
		t.Fatal(err)
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(tid, &status, unix.WALL, nil); err != nil {
		t.Fatal(err)
	}
	frame := registers(t, tid)
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	p := &process{mem: mem, tables: map[string]*tables{}, symbols: map[string][]elf.Symbol{}}
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if !strings.Contains(f[1], "x") {
			continue
		}
		start, end, _ := strings.Cut(f[0], "-")
		m := mapping{start: parseHex(t, start), end: parseHex(t, end), offset: parseHex(t, f[2])}
		if len(f) > 5 {
			m.path = f[5]
		}
		p.maps = append(p.maps, m)
	}
	return p, frame
}

// lookup makes tables as they are asked for.
func (p *process) lookup(t *testing.T) func(uint64) (*Region, uint64, bool) {
	return func(addr uint64) (*Region, uint64, bool) {
		m, ok := p.mapping(addr)
		if !ok {
			return nil, 0, false
		}
		off := addr - m.start + m.offset
		ts := p.tables[m.path]
		if ts == nil {
			ts = &tables{regions: map[uint32]*Region{}, skipped: map[Skip]int{}}
			switch {
			case m.path == "[vdso]":
				b := make([]byte, m.end-m.start)
				if _, err := p.mem.ReadAt(b, int64(m.start)); err != nil {
					t.Fatal(err)
				}
				f, err := Open(bytes.NewReader(b), int64(len(b)), nil)
				if err != nil {
					t.Fatal(err)
				}
				ts.file = f
			case strings.HasPrefix(m.path, "/"):
				ts.file = openFile(t, m.path, nil)
			}
			p.tables[m.path] = ts
		}
		if ts.file == nil {
			return nil, 0, true
		}
		n := uint32(off >> RegionShift)
		if ts.regions[n] == nil {
			r, err := ts.file.Region(n)
			if err != nil {
				t.Fatal(err)
			}
			ts.regions[n] = &r
		}
		return ts.regions[n], off, true
	}
}

func (p *process) mapping(addr uint64) (mapping, bool) {
	for _, m := range p.maps {
		if addr >= m.start && addr < m.end {
			return m, true
		}
	}
	return mapping{}, false
}

func (p *process) read(addr uint64) (uint64, bpf.Outcome) {
	var b [8]byte
	if _, err := p.mem.ReadAt(b[:], int64(addr)); err != nil {
		return 0, bpf.OutcomeBadStack
	}
	return binary.LittleEndian.Uint64(b[:]), 0
}

// name is the function at an address: from Go's table, else a symbol.
func (p *process) name(t *testing.T, addr uint64) string {
	exact := addr&bpf.ExactAddr != 0
	addr &^= bpf.ExactAddr
	if !exact {
		addr--
	}
	m, ok := p.mapping(addr)
	if !ok {
		return "?"
	}
	ts := p.tables[m.path]
	if ts == nil || ts.file == nil {
		return m.path
	}
	vaddr, ok := ts.file.image.Address(addr - m.start + m.offset)
	if !ok {
		return "?"
	}
	if g := ts.file.gotab; g != nil && vaddr >= g.Text && vaddr < g.Text+g.TextEnd {
		name, _ := goFunction(t, g, vaddr)
		return name
	}
	syms, ok := p.symbols[m.path]
	if !ok && strings.HasPrefix(m.path, "/") {
		f, err := elf.Open(m.path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		static, _ := f.Symbols()
		dynamic, _ := f.DynamicSymbols()
		syms = append(static, dynamic...)
		p.symbols[m.path] = syms
	}
	for _, s := range syms {
		if elf.ST_TYPE(s.Info) == elf.STT_FUNC && vaddr >= s.Value && vaddr-s.Value < s.Size {
			return s.Name
		}
	}
	return filepath.Base(m.path)
}

// walkNames walks the stack of the paused thread and returns its functions.
func walkNames(t *testing.T, path string, env ...string) ([]string, bpf.Outcome) {
	t.Helper()
	p, frame := stopAt(t, path, env...)
	w, err := NewWalker(machine, p.lookup(t))
	if err != nil {
		t.Fatal(err)
	}
	addrs, outcome := w.walk(nil, frame, 0, p.read)
	var names []string
	for _, a := range addrs {
		names = append(names, p.name(t, a))
	}
	return names, outcome
}

// wantInOrder checks that names has the wanted ones, in order, with what stands for others
// between them only where "..." says so.
func wantInOrder(t *testing.T, names []string, want ...string) {
	t.Helper()
	i := 0
	gap := false
	for _, w := range want {
		if w == "..." {
			gap = true
			continue
		}
		for gap && i < len(names) && !named(names[i], w) {
			i++
		}
		if i == len(names) || !named(names[i], w) {
			t.Fatalf("want %q at %d of\n\t%s", w, i, strings.Join(names, "\n\t"))
		}
		i, gap = i+1, false
	}
	if !gap && i < len(names) {
		t.Errorf("more than wanted:\n\t%s", strings.Join(names[i:], "\n\t"))
	}
}

// named is whether a function, or a clone that the compiler made of it, has a name.
func named(function, name string) bool {
	return function == name || strings.HasPrefix(function, name+".")
}

const cWalkSource = `
#include <alloca.h>
#include <immintrin.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define NOINLINE __attribute__((noinline, noclone))
#define AFTER __asm__ volatile("" ::: "memory")

NOINLINE void leaf(int n) { pause(); AFTER; }
NOINLINE void handler(int sig) { leaf(sig); AFTER; }
NOINLINE void bad(int *p) { *(volatile int *)p = 1; AFTER; }
NOINLINE int compare(const void *a, const void *b) { bad(0); AFTER; return 0; }
NOINLINE void sorts(int n) { int v[2] = {n, 2}; qsort(v, 2, sizeof *v, compare); AFTER; }
NOINLINE void realigned(int n) {
	char b[64] __attribute__((aligned(64)));
	char *more = alloca(n * 10);
	memset(b, n, sizeof b); memset(more, n, n * 10);
	__asm__ volatile("" :: "r"(b), "r"(more) : "memory");
	sorts(n); AFTER;
}
NOINLINE void dynamic(int n) {
	char *b = alloca(n * 100);
	memset(b, n, n * 100);
	__asm__ volatile("" :: "r"(b) : "memory");
	realigned(n); AFTER;
}
NOINLINE void deep(int n) { if (n) deep(n - 1); else dynamic(3); AFTER; }
int main(void)
{
	stack_t alternate = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16};
	struct sigaction act = {.sa_handler = handler, .sa_flags = SA_ONSTACK};
	if (getenv("ALTERNATE"))
		sigaltstack(&alternate, 0);
	sigaction(SIGSEGV, &act, 0);
	deep(5);
	return 0;
}
`

// TestWalkC walks through what C has: no frame pointers, alloca, realigned stacks, a
// callback from libc, a signal on its own stack or not, and the program's start.
func TestWalkC(t *testing.T) {
	for _, flags := range [][]string{
		{"-O2", "-fomit-frame-pointer"}, {"-O2", "-fno-omit-frame-pointer"}, {"-O0"}, {"-O2", "-static"},
		{"-O2", "-static-pie"}, {"-O2", "-fno-plt"}, {"-O2", "-Wl,-z,noseparate-code"}, {"-O2", "-Wl,--no-eh-frame-hdr", "-static", "-fuse-ld=gold"},
		{"-O2", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-g", "-static"},
	} {
		path := buildC(t, cWalkSource, flags...)
		for _, env := range []string{"NONE=1", "ALTERNATE=1"} {
			t.Run(strings.Join(append(flags, env), " "), func(t *testing.T) {
				names, outcome := walkNames(t, path, env)
				if outcome != bpf.OutcomeComplete {
					t.Errorf("%v:\n\t%s", outcome, strings.Join(names, "\n\t"))
				}
				wantInOrder(t, names, "...", "leaf", "handler", "...", "bad", "compare", "...", "sorts", "realigned", "dynamic",
					"deep", "deep", "deep", "deep", "deep", "deep", "main", "...", "_start")
			})
		}
	}
}

func buildC(t testing.TB, source string, flags ...string) string {
	t.Helper()
	dir := t.TempDir()
	src, out := filepath.Join(dir, "main.c"), filepath.Join(dir, "out")
	if err := os.WriteFile(src, []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, "gcc", slices.Concat([]string{"-o", out, src}, flags)...)
	return out
}

const cgoWalkSource = `package main

// #include <unistd.h>
// extern void callback(int);
// static void into(int n) { callback(n); __asm__ volatile("" ::: "memory"); }
// __attribute__((noinline)) static void outof(int n) { pause(); __asm__ volatile("" ::: "memory"); }
// __attribute__((noinline)) static void first(int n) { into(n); __asm__ volatile("" ::: "memory"); }
import "C"

//go:noinline
func inner(n int) { C.outof(C.int(n)) }

//export callback
func callback(n C.int) { inner(int(n)) }

//go:noinline
func outer(n int) { C.first(C.int(n)) }

func main() {
	done := make(chan bool)
	go func() { outer(3); done <- true }()
	<-done
}
`

// TestWalkGo walks from C, called by Go, called back by C, called by Go, to the start of
// the goroutine: over two switches from the goroutine's stack to the thread's, and one back.
func TestWalkGo(t *testing.T) {
	roots := map[string]string{"this release": ""}
	if *goReleases {
		cache := strings.TrimSpace(string(run(t, "go", "env", "GOMODCACHE")))
		found, err := filepath.Glob(filepath.Join(cache, "golang.org", "toolchain@v0.0.1-go1.*."+runtime.GOOS+"-"+runtime.GOARCH))
		if err != nil {
			t.Fatal(err)
		}
		for _, root := range found {
			roots[filepath.Base(root)] = root
		}
	}
	for name, root := range roots {
		t.Run(name, func(t *testing.T) {
			env := []string{"CGO_ENABLED=1"}
			if root != "" {
				env = append(env, "GOROOT="+root, "GOTOOLCHAIN=local")
			}
			names, outcome := walkNames(t, buildGo(t, cgoWalkSource, env))
			if outcome != bpf.OutcomeComplete {
				t.Errorf("%v:\n\t%s", outcome, strings.Join(names, "\n\t"))
			}
			wantInOrder(t, names, "...", "outof", "...", "runtime.asmcgocall", "...", "main.inner", "...",
				"runtime.cgocallback", "crosscall2", "...", "first", "...", "runtime.asmcgocall", "...", "main.outer", "...", "runtime.goexit")
		})
	}
}
