// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const goSource = `package main

import (
	"fmt"
	"os"
	"sort"
	"strings"
)

type tree[K comparable, V any] struct{ m map[K]V }

//go:noinline
func (t *tree[K, V]) put(k K, v V) { t.m[k] = v }

func inner(i int) int {
	if i%7 == 0 {
		return len(os.Args) * i
	}
	return i / 3
}

func middle(i int) int { return inner(i)*3 + inner(i+1) }

//go:noinline
func hot(n int) (s int) {
	for i := 0; i < n; i++ {
		s += middle(i)
	}
	return s
}

func main() {
	t := tree[string, int]{m: map[string]int{}}
	t.put(strings.Repeat("x", 3), hot(1000))
	f := func() int { return hot(3) + 1 }
	a := []int{f(), 2, 1}
	sort.Slice(a, func(i, j int) bool { return a[i] < a[j] })
	fmt.Println(t.m, a)
}
`

const cgoSource = `package main

// static int triple(int x) { return x * 3; }
import "C"
import "fmt"

func main() { fmt.Println(C.triple(3)) }
`

// goFrame is one line of a judge, its function without type arguments.
type goFrame struct {
	function, file string
	line           int64
}

func frames(lines []Line) []goFrame {
	var fs []goFrame
	for _, l := range lines {
		fs = append(fs, goFrame{goName(l.Function), l.File, l.Line})
	}
	return fs
}

// goFunctions are the addresses of the Go functions of an unstripped binary.
func goFunctions(t testing.TB, path string) []nmSymbol {
	t.Helper()
	var syms []nmSymbol
	for line := range strings.Lines(string(run(t, ".", nil, "go", "tool", "nm", "-size", "-sort", "address", path))) {
		// "  401000        123 T main.main"
		f := strings.Fields(line)
		if len(f) < 4 || f[2] != "T" && f[2] != "t" {
			continue
		}
		addr, n := parseHex([]byte(f[0]))
		size, err := strconv.ParseUint(f[1], 10, 64)
		if n > 0 && err == nil && size > 0 && addr > 0 {
			syms = append(syms, nmSymbol{addr: addr, size: size, name: strings.Join(f[3:], " ")})
		}
	}
	return syms
}

// addr2line asks a tool that reads DWARF for the inlined calls and the function of each
// address. LLVM's does not read that of Go 1.18; binutils' does, but takes some inlined
// functions' names from the symbol table: then named is false.
func addr2line(t testing.TB, path string, addrs []uint64) (all [][]goFrame, named bool) {
	t.Helper()
	for _, tool := range []string{"llvm-addr2line-19", "addr2line"} {
		all := runAddr2line(t, tool, path, addrs)
		if slices.ContainsFunc(all, func(fs []goFrame) bool { return fs[0].line > 1 }) {
			return all, tool != "addr2line"
		}
	}
	t.Fatalf("%s: no lines in DWARF", path)
	return nil, false
}

func runAddr2line(t testing.TB, tool, path string, addrs []uint64) [][]goFrame {
	t.Helper()
	var in bytes.Buffer
	for _, a := range addrs {
		fmt.Fprintf(&in, "%#x\n", a)
	}
	cmd := exec.Command(tool, "-a", "-f", "-i", "-e", path)
	cmd.Stdin = &in
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v", tool, path, err)
	}
	var all [][]goFrame
	sc := bufio.NewScanner(bytes.NewReader(out))
	for sc.Scan() {
		if strings.HasPrefix(sc.Text(), "0x") {
			all = append(all, nil)
			continue
		}
		f := goFrame{function: goName(sc.Text())}
		sc.Scan()
		at, _, _ := strings.Cut(sc.Text(), " ")
		i := strings.LastIndexByte(at, ':')
		f.file = strings.TrimPrefix(at[:i], "./")
		f.line, _ = strconv.ParseInt(at[i+1:], 10, 64)
		n := len(all) - 1
		all[n] = append(all[n], f)
	}
	if len(all) != len(addrs) {
		t.Fatalf("%s: %d answers for %d addresses", tool, len(all), len(addrs))
	}
	return all
}

var abiSuffix = regexp.MustCompile(`\.abi(0|internal)$`)

// goName is a name as the runtime has it: symbol tables add the ABI of assembly functions,
// and write the middle dot of local types as a dot.
func goName(name string) string {
	return strings.ReplaceAll(goDisplayName(abiSuffix.ReplaceAllString(name, "")), "·", ".")
}

func TestGoAgreesWithDWARF(t *testing.T) {
	cgo := func(flags ...string) string {
		return build(t, "main.go", cgoSource, []string{"GO111MODULE=off", "GOFLAGS="},
			slices.Concat([]string{"go", "build", "-o", "OUT"}, flags, []string{"SRC"})...)
	}
	plain, pie, cgoExe, cgoPIE := buildGo(t, goSource), buildGo(t, goSource, "-buildmode=pie"), cgo(), cgo("-buildmode=pie")
	tests := []struct{ name, path, judge string }{
		{"plain", plain, plain},
		{"linked without symbols", buildGo(t, goSource, "-ldflags=-s -w"), plain},
		{"stripped", stripped(t, plain), plain},
		{"PIE", pie, pie},
		{"PIE linked without symbols", buildGo(t, goSource, "-buildmode=pie", "-ldflags=-s -w"), pie},
		{"cgo", cgoExe, cgoExe},
		{"cgo stripped", stripped(t, cgoExe), cgoExe},
		{"cgo PIE stripped", stripped(t, cgoPIE), cgoPIE},
		{"no section headers", withoutSections(t, plain), plain},
		{"PIE without section headers", withoutSections(t, pie), pie},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { compareWithDWARF(t, tt.path, tt.judge) })
	}
}

// compareWithDWARF compares what path's pclntab says with what judge's DWARF says, which
// has the same text: all functions, and many addresses of them.
func compareWithDWARF(t *testing.T, path, judge string) {
	o := openObject(t, newSymbolizer(t, Config{}), path)
	rnd := rand.New(rand.NewPCG(3, 4))
	var addrs []uint64
	var names []string
	functions := goFunctions(t, judge)
	for i, f := range functions {
		if len(functions) > 4000 && i%4 != 0 {
			continue
		}
		for _, off := range []uint64{0, rnd.Uint64N(f.size), f.size - 1} {
			addrs = append(addrs, f.addr+off)
			names = append(names, goName(f.name))
		}
	}
	if len(addrs) < 3000 {
		t.Fatalf("only %d addresses", len(addrs))
	}
	want, named := addr2line(t, judge, addrs)
	var compared, differ, inlined int
	for i, r := range o.Symbolize(addrs) {
		if !strings.Contains(names[i], ".") || strings.HasPrefix(names[i], "go:") || strings.HasSuffix(names[i], ".cold") {
			continue // C, and data in text
		}
		if len(r.Lines) == 0 {
			t.Errorf("%#x: %s, want %s", addrs[i], r.Reason, names[i])
			continue
		}
		got := frames(r.Lines)
		if outer := got[len(got)-1].function; outer != names[i] {
			t.Errorf("%#x: %s, want %s", addrs[i], outer, names[i])
		}
		if len(want[i]) == 0 || want[i][0].file == "??" || want[i][0].line == 0 {
			continue
		}
		compared++
		if len(got) > 1 {
			inlined++
		}
		for j := 0; !named && j < len(got) && j < len(want[i]); j++ {
			got[j].function, want[i][j].function = "", ""
		}
		if !reflect.DeepEqual(got, want[i]) {
			if differ++; differ <= 5 {
				t.Logf("%#x: %v, DWARF says %v", addrs[i], got, want[i])
			}
		}
	}
	t.Logf("%d addresses, %d with inlined calls, %d differ from DWARF", compared, inlined, differ)
	if compared < len(addrs)/2 || inlined < 100 {
		t.Errorf("too few compared: %d of %d, %d with inlined calls", compared, len(addrs), inlined)
	}
	if differ*1000 > compared {
		t.Errorf("%d of %d addresses differ from DWARF", differ, compared)
	}
}

// withoutSections is a copy of a binary whose header says that there are no sections.
func withoutSections(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	clear(b[0x28:0x30]) // e_shoff
	clear(b[0x3c:0x40]) // e_shnum, e_shstrndx
	out := filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(out, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return out
}

// selfAddress is the ELF address of an address in the test's own text.
func selfAddress(t testing.TB, o *Object, addr uint64) uint64 {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		var start, end, off uint64
		var perm string
		if _, err := fmt.Sscanf(line, "%x-%x %s %x", &start, &end, &perm, &off); err == nil && addr >= start && addr < end {
			if a, ok := o.Address(addr - start + off); ok {
				return a
			}
		}
	}
	t.Fatalf("no mapping of %#x", addr)
	return 0
}
