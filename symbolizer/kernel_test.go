// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// fakeProc is a procfs with the kernel files given.
func fakeProc(t testing.TB, kallsyms, modules string) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "kallsyms"), kallsyms)
	writeFile(t, filepath.Join(dir, "modules"), modules)
	return dir
}

func writeFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

const kallsymsText = `0000000000000000 A fixed_percpu_data
ffffffff81000000 T _text
ffffffff81000000 T startup_64
ffffffff81000010 t __pfx_vfs_read
ffffffff81000020 T vfs_read
ffffffff81000100 W weak_fn
ffffffff81000100 t local_fn
ffffffff81000200 T __memcpy
ffffffff81000200 W memcpy
ffffffff81000300 t $x
not a line
ffffffff81000400 D data_after_text
ffffffff81000500 r more_data
ffffffff82000000 T late_text
ffffffffc0100000 t nf_hook	[nf_tables]
ffffffffc0100080 T nf_register	[nf_tables]
ffffffffc0100100 d nf_data	[nf_tables]
ffffffffc0000000 t other_mod_fn	[other]
ffff800080001000 t bpf_prog_6deef7357e7b4530_sd_fw_ingress	[bpf]
`

func TestKallsymsRules(t *testing.T) {
	s := newSymbolizer(t, Config{Proc: fakeProc(t, kallsymsText, "")})
	const kernel = kernelFile
	tests := []struct {
		addr         uint64
		name, module string
	}{
		{0xffffffff80ffffff, "", ""},
		{0xffffffff81000000, "startup_64", kernel},
		{0xffffffff8100000f, "startup_64", kernel},
		{0xffffffff81000010, "__pfx_vfs_read", kernel},
		{0xffffffff81000020, "vfs_read", kernel},
		{0xffffffff810000ff, "vfs_read", kernel},
		{0xffffffff81000100, "weak_fn", kernel},
		{0xffffffff81000250, "__memcpy", kernel},
		{0xffffffff81000399, "__memcpy", kernel},
		{0xffffffff81000400, "", ""},
		{0xffffffff81000600, "", ""},
		{0xffffffff82001000, "late_text", kernel},
		{0xffffffffc0000010, "other_mod_fn", "[other]"},
		{0xffffffffc0100079, "nf_hook", "[nf_tables]"},
		{0xffffffffc01000ff, "nf_register", "[nf_tables]"},
		{0xffffffffc0100100, "", ""},
		{0xffff800080001800, "bpf_prog_6deef7357e7b4530_sd_fw_ingress", "[bpf]"},
		{0xffff800080001000 + maxModuleSymbol, "", ""},
		{0x1000, "", ""},
	}
	var addrs []uint64
	for _, tt := range tests {
		addrs = append(addrs, tt.addr)
	}
	for i, r := range s.Kernel(addrs) {
		tt := tests[i]
		want := Result{Reason: ReasonNotFound}
		if tt.name != "" {
			want = Result{Lines: []Line{{Function: tt.name, SystemName: tt.name}}, Module: tt.module}
		}
		if !reflect.DeepEqual(r, want) {
			t.Errorf("%#x: %+v, want %+v", tt.addr, r, want)
		}
	}
	if st := s.Stats().Kernel; st.Symbols != 10 || st.Modules != 3 || st.Reason != "" {
		t.Errorf("stats: %+v", st)
	}
}

func TestKallsymsInSmallReads(t *testing.T) {
	whole, err := parseKallsyms(strings.NewReader(kallsymsText), 0)
	if err != nil {
		t.Fatal(err)
	}
	bytewise, err := parseKallsyms(iotest.OneByteReader(strings.NewReader(kallsymsText)), 100)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(whole.rows, bytewise.rows) || whole.names != bytewise.names {
		t.Error("another table when read byte by byte")
	}
	if _, err := parseKallsyms(iotest.ErrReader(errors.New("broken")), 0); err == nil {
		t.Error("no error from a broken reader")
	}
}

// TestKallsymsInAnyOrder: where modules lie says nothing of when they are printed.
func TestKallsymsInAnyOrder(t *testing.T) {
	var kernel, modules []string
	var addrs []uint64
	for i := range uint64(400) {
		addr := 0xffffffff81000000 + i*16
		kernel = append(kernel, fmt.Sprintf("%x %c core_%d\n", addr, "tTWd"[i%4], i))
		module := 0xffffffffc0000000 + i*32
		modules = append(modules, fmt.Sprintf("%x %c fn_%d\t[m%d]\n", module, "ttdt"[i%4], i, i/40))
		addrs = append(addrs, addr, addr+15, module, module+31)
	}
	ordered, err := parseKallsyms(strings.NewReader(strings.Join(kernel, "")+strings.Join(modules, "")), 0)
	if err != nil {
		t.Fatal(err)
	}
	rand.New(rand.NewPCG(5, 6)).Shuffle(len(modules), func(i, j int) { modules[i], modules[j] = modules[j], modules[i] })
	mixed, err := parseKallsyms(strings.NewReader(strings.Join(kernel, "")+strings.Join(modules, "")), 0)
	if err != nil {
		t.Fatal(err)
	}
	say := func(k *kernelTable, addr uint64) string {
		row, module, ok := k.find(addr)
		if !ok {
			return ""
		}
		return k.name(k.rows[row].name) + k.modules[module]
	}
	for _, addr := range addrs {
		if want, got := say(ordered, addr), say(mixed, addr); got != want {
			t.Errorf("%#x: %q, in order %q", addr, got, want)
		}
	}
	if say(mixed, 0xffffffffc0000000+399*32) != "fn_399[m9]" || say(mixed, 0xffffffffc0000000+2*32) != "" || mixed.symbols != 600 {
		t.Errorf("%d symbols, %d rows", mixed.symbols, len(mixed.rows))
	}
}

func TestHiddenKernelAddresses(t *testing.T) {
	hidden := "0000000000000000 T _text\n0000000000000000 t vfs_read\n"
	s := newSymbolizer(t, Config{Proc: fakeProc(t, hidden, "")})
	if r := s.Kernel([]uint64{0xffffffff81000000})[0]; r.Reason != ReasonNoPermission {
		t.Errorf("%+v, want no_permission", r)
	}
	st := s.Stats().Kernel
	if st.Reason != ReasonNoPermission || st.Err == nil || !strings.Contains(st.Err.Error(), "CAP_SYSLOG") {
		t.Errorf("stats: %+v", st)
	}
	s = newSymbolizer(t, Config{Proc: t.TempDir()})
	if r := s.Kernel([]uint64{0xffffffff81000000})[0]; r.Reason != ReasonUnreadable {
		t.Errorf("without kallsyms: %+v, want unreadable", r)
	}
}

// TestKernelReload: a module that is loaded is found; that is looked for only when an
// address asks for it, and not at each address.
func TestKernelReload(t *testing.T) {
	const modules = "nf_tables 303104 35 nft_ct,nft_nat, Live 0xffffffffc0100000\n"
	proc := fakeProc(t, kallsymsText, modules)
	s := newSymbolizer(t, Config{Proc: proc})
	const inKernel, inNew = 0xffffffff81000020, 0xffffffffc0500010
	loads := func() uint64 { return s.Stats().Kernel.Loads }
	age := func(d time.Duration) {
		s.kernel.mu.Lock()
		s.kernel.checkAfter = s.kernel.checkAfter.Add(-d)
		s.kernel.loadAfter = s.kernel.loadAfter.Add(-d)
		s.kernel.mu.Unlock()
	}
	s.Kernel([]uint64{inKernel})
	if r := s.Kernel([]uint64{inNew})[0]; r.Reason != ReasonNotFound || loads() != 1 {
		t.Fatalf("before: %+v, %d loads", r, loads())
	}
	writeFile(t, filepath.Join(proc, "kallsyms"), kallsymsText+"ffffffffc0500000 t fresh_fn\t[fresh]\n")
	writeFile(t, filepath.Join(proc, "modules"), strings.Replace(modules, " 35 ", " 36 ", 1))
	age(time.Hour)
	if s.Kernel([]uint64{inNew}); loads() != 1 {
		t.Errorf("a use count made it load again: %d loads", loads())
	}
	writeFile(t, filepath.Join(proc, "modules"), "fresh 16384 0 - Live 0xffffffffc0500000\n"+modules)
	if s.Kernel([]uint64{inNew}); loads() != 1 {
		t.Errorf("%d loads within a second", loads())
	}
	age(time.Hour)
	if s.Kernel([]uint64{inKernel, 0x401000}); loads() != 1 {
		t.Errorf("an address in the kernel's own text, or of a process, made it load again")
	}
	if r := s.Kernel([]uint64{inNew})[0]; len(r.Lines) != 1 || r.Module != "[fresh]" || loads() != 2 {
		t.Errorf("after: %+v, %d loads", r, loads())
	}
}

// naiveKallsyms is the judge: all lines, sorted.
type naiveSymbol struct {
	addr uint64
	typ  string
	name string
	bpf  bool
}

func naiveKallsyms(t testing.TB) []naiveSymbol {
	t.Helper()
	b, err := os.ReadFile("/proc/kallsyms")
	if err != nil {
		t.Fatal(err)
	}
	var syms []naiveSymbol
	for line := range bytes.Lines(b) {
		var s naiveSymbol
		if _, err := fmt.Sscanf(string(line), "%x %s %s", &s.addr, &s.typ, &s.name); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		s.bpf = bytes.HasSuffix(line, []byte("\t[bpf]\n"))
		syms = append(syms, s)
	}
	slices.SortStableFunc(syms, func(a, b naiveSymbol) int { return cmp.Compare(a.addr, b.addr) })
	return syms
}

func TestKernelAgreesWithKallsyms(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("kernel addresses need root")
	}
	syms := naiveKallsyms(t)
	rnd := rand.New(rand.NewPCG(7, 8))
	var addrs []uint64
	for i, s := range syms {
		if s.addr < kernelHalf || s.bpf {
			continue // others load and unload programs meanwhile
		}
		addrs = append(addrs, s.addr)
		if i+1 < len(syms) && syms[i+1].addr > s.addr && i%4 == 0 {
			addrs = append(addrs, s.addr+rnd.Uint64N(syms[i+1].addr-s.addr), syms[i+1].addr-1)
		}
	}
	s := newSymbolizer(t, Config{})
	found := 0
	for i, r := range s.Kernel(addrs) {
		at, _ := slices.BinarySearchFunc(syms, addrs[i]+1, func(s naiveSymbol, a uint64) int {
			return cmp.Compare(s.addr, a)
		})
		want := map[string]bool{}
		for j := at - 1; j >= 0 && syms[j].addr == syms[at-1].addr; j-- {
			if strings.Contains("TtWw", syms[j].typ) {
				want[syms[j].name] = true
			}
		}
		switch {
		case len(r.Lines) == 0 && len(want) > 0:
			t.Errorf("%#x: %s, kallsyms has %v", addrs[i], r.Reason, want)
		case len(r.Lines) > 0 && !want[r.Lines[0].SystemName]:
			t.Errorf("%#x: %v, kallsyms has %v", addrs[i], r.Lines, want)
		}
		found += len(r.Lines)
		if t.Failed() && i > 50 {
			t.FailNow()
		}
	}
	st := s.Stats().Kernel
	t.Logf("%d of %d addresses found; %d symbols in %d bytes", found, len(addrs), st.Symbols, st.Bytes)
	if found < st.Symbols || st.Bytes > 8<<20 {
		t.Errorf("found %d, table %+v", found, st)
	}
}

// TestBPFProgramIsFound loads a program after the table was read.
func TestBPFProgramIsFound(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("loading a BPF program needs root")
	}
	load := func(name string) {
		t.Helper()
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: name, Type: ebpf.SocketFilter, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { prog.Close() })
	}
	load("hf_before")
	s := newSymbolizer(t, Config{})
	s.Kernel([]uint64{0xffffffff81000000})
	load("hf_after")
	var addr uint64
	for _, sym := range naiveKallsyms(t) {
		if strings.HasSuffix(sym.name, "_hf_after") {
			addr = sym.addr
		}
	}
	if addr == 0 {
		t.Fatal("kallsyms does not have the program: is net.core.bpf_jit_enable 0?")
	}
	s.kernel.mu.Lock()
	s.kernel.loadAfter, s.kernel.checkAfter = time.Time{}, time.Time{}
	s.kernel.mu.Unlock()
	r := s.Kernel([]uint64{addr})[0]
	if len(r.Lines) != 1 || r.Module != "[bpf]" || !strings.HasSuffix(r.Lines[0].Function, "_hf_after") {
		t.Errorf("%#x: %+v", addr, r)
	}
	if st := s.Stats().Kernel; st.Loads != 2 {
		t.Errorf("%d loads, want 2", st.Loads)
	}
}

// TestBPFLines: the lines of a program that clang compiled.
func TestBPFLines(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("loading a BPF program needs root")
	}
	const source = `
typedef unsigned int u32;
static long (*ktime)(void) = (void *)5;
__attribute__((section("socket"), used)) int hf_lines(void *ctx)
{
	long a = ktime();
	long b = ktime();
	return a ^ b;
}
char hf_license[] __attribute__((section("license"), used)) = "GPL";
`
	object := build(t, "lines.bpf.c", source, nil, "clang-19", "-g", "-O2", "-target", "bpf", "-c", "-o", "OUT", "SRC")
	spec, err := ebpf.LoadCollectionSpec(object)
	if err != nil {
		t.Fatal(err)
	}
	programs, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer programs.Close()
	var addr uint64
	for _, sym := range naiveKallsyms(t) {
		if strings.HasSuffix(sym.name, "_hf_lines") {
			addr = sym.addr
		}
	}
	if addr == 0 {
		t.Fatal("kallsyms does not have the program: is net.core.bpf_jit_enable 0?")
	}
	var addrs []uint64
	for off := range uint64(256) {
		addrs = append(addrs, addr+off)
	}
	lines := map[int64]bool{}
	for _, r := range newSymbolizer(t, Config{}).Kernel(addrs) {
		if len(r.Lines) > 0 && strings.HasSuffix(r.Lines[0].Function, "_hf_lines") && r.Lines[0].Line > 0 {
			lines[r.Lines[0].Line] = true
			if !strings.HasSuffix(r.Lines[0].File, "/lines.bpf.c") {
				t.Errorf("file %q", r.Lines[0].File)
			}
		}
	}
	if !lines[6] || !lines[7] || !lines[8] || len(lines) > 5 {
		t.Errorf("lines %v, want 6 to 8", lines)
	}
}

func BenchmarkKernel(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("kernel addresses need root")
	}
	s := newSymbolizer(b, Config{})
	var addrs []uint64
	for i, sym := range naiveKallsyms(b) {
		if i%50 == 0 && sym.addr >= kernelHalf {
			addrs = append(addrs, sym.addr+1)
		}
	}
	shuffle(addrs)
	s.Kernel(addrs)
	b.ReportAllocs()
	measure(b, len(addrs), func() { s.Kernel(addrs) })
	st := s.Stats().Kernel
	b.ReportMetric(float64(st.Bytes), "table-bytes")
	b.ReportMetric(float64(st.Symbols), "symbols")
}

// BenchmarkKallsyms is the parsing; BenchmarkReadKallsyms has the kernel's part too.
func BenchmarkKallsyms(b *testing.B) {
	text, err := os.ReadFile("/proc/kallsyms")
	if err != nil || os.Geteuid() != 0 {
		b.Skip("kernel addresses need root")
	}
	b.ReportAllocs()
	measure(b, bytes.Count(text, []byte("\n")), func() {
		if _, err := parseKallsyms(bytes.NewReader(text), expectSymbols); err != nil {
			b.Fatal(err)
		}
	})
}

func BenchmarkReadKallsyms(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("kernel addresses need root")
	}
	b.ReportAllocs()
	measure(b, 1, func() {
		if _, err := readKallsyms("/proc/kallsyms", expectSymbols); err != nil {
			b.Fatal(err)
		}
	})
}
