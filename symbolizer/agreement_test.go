// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"cmp"
	"debug/elf"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/hostflame/hostflame/internal/elffile"
)

const judgeLLVM = "llvm-symbolizer-19"

// deepSource has what inlines: templates, lambdas, exceptions, parts that are split off.
const deepSource = `
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>
template <class T> struct Box {
  T v;
  Box(T x) : v(x) {}
  T get() const { return v; }
  template <class F> auto map(F f) const { return Box<decltype(f(v))>(f(v)); }
};
namespace app {
namespace {
struct Shape { virtual ~Shape() {} virtual double area() const = 0; };
struct Square : Shape { double s; Square(double x) : s(x) {} double area() const override { return s * s; } };
}
struct Registry {
  std::map<std::string, std::unique_ptr<Shape>> m;
  void add(std::string n, double s) { m[n] = std::make_unique<Square>(s); }
  double total() const { double t = 0; for (auto &k : m) t += k.second->area(); return t; }
};
}
static int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
int main(int argc, char **argv) {
  std::vector<int> v;
  for (int i = 0; i < argc * 50; i++) v.push_back((i * 7919) % 101);
  std::sort(v.begin(), v.end(), [](int a, int b) { return a > b; });
  app::Registry r;
  for (int i = 0; i < argc + 3; i++) r.add(std::to_string(i), v[i % v.size()]);
  auto b = Box<int>(fib(argc + 10)).map([](int x) { return x * 2.5; }).map([](double d) { return std::to_string(d); });
  std::printf("%s %f\n", b.get().c_str(), r.total());
  try { if (argc > 100) throw std::string("x"); } catch (std::string &s) { std::puts(s.c_str()); }
}
`

const deepC = `
#include <stdlib.h>
static inline __attribute__((always_inline)) int leaf(int x) { return x * 3 + 1; }
static inline __attribute__((always_inline)) int middle(int x) { return leaf(x) + leaf(x ^ 5); }
__attribute__((noinline)) int outer(int x) { if (__builtin_expect(x == 77, 0)) abort(); return middle(x) * 2; }
static __attribute__((noinline)) int clone(int x, int y) { int s = 0; for (int i = 0; i < x; i++) s += middle(i + y); return s; }
int main(int c, char **v) { return outer(c) + clone(c, 4) + clone(c + 1, 4); }
`

const assembly = `
	.text
	.globl	main
	.type	main, @function
main:
	xor	%eax, %eax
	call	helper
	ret
	.size	main, .-main
	.type	helper, @function
helper:
	nop
	ret
	.size	helper, .-helper
	.section .note.GNU-stack,"",@progbits
`

const deepRust = `
use std::collections::HashMap;
trait Op { fn run(&self, x: u64) -> u64; }
struct Add(u64);
struct Mul(u64);
impl Op for Add { fn run(&self, x: u64) -> u64 { x + self.0 } }
impl Op for Mul { fn run(&self, x: u64) -> u64 { x.wrapping_mul(self.0) } }
fn main() {
    let mut m: HashMap<String, Box<dyn Op>> = HashMap::new();
    for i in 0..std::env::args().count() as u64 + 5 {
        m.insert(format!("k{i}"), if i % 2 == 0 { Box::new(Add(i)) } else { Box::new(Mul(i)) });
    }
    let v: Vec<u64> = m.iter().map(|(k, o)| o.run(k.len() as u64)).filter(|x| x % 3 != 1).collect();
    println!("{}", v.iter().copied().fold(0, |a, b: u64| a ^ b.rotate_left(3)));
}
`

// compiled is a binary of the corpus: path is what we read, judged what the judge reads,
// where it can not read the same, symbols has the symbol table.
type compiled struct{ name, path, judged, symbols string }

// corpus builds it. What is to be beside a binary (packages, split files) is.
func corpus(t *testing.T) []compiled {
	cxx := func(compiler string, flags ...string) string {
		return build(t, "deep.cc", deepSource, nil, slices.Concat([]string{compiler, "-O2", "-o", "OUT"}, flags, []string{"SRC"})...)
	}
	shell := func(from, script string) string {
		return build(t, "path", from+script, nil, "sh", "-e", "-c", script, "sh", from, "OUT")
	}
	plain := cxx("g++", "-g")
	var all []compiled
	add := func(name, path string) { all = append(all, compiled{name, path, path, path}) }
	as := func(name, path, judged string) { all = append(all, compiled{name, path, judged, judged}) }
	add("C", buildC(t, deepC, "-g", "-O2"))
	add("C, not PIE", buildC(t, deepC, "-g", "-O2", "-no-pie"))
	add("C++", plain)
	add("C++, DWARF 4", cxx("g++", "-gdwarf-4"))
	add("C++, LTO", cxx("g++", "-g", "-flto"))
	add("C++, zlib", cxx("g++", "-g", "-gz=zlib"))
	add("C++, sections", cxx("g++", "-g", "-ffunction-sections", "-Wl,--gc-sections"))
	add("clang", cxx("clang++-19", "-g"))
	add("clang, DWARF 2", cxx("clang++-19", "-gdwarf-2"))
	add("clang, DWARF 3", cxx("clang++-19", "-gdwarf-3"))
	add("clang, 64-bit DWARF", cxx("clang++-19", "-g", "-gdwarf64"))
	add("zstd", shell(plain, `llvm-objcopy-19 --compress-debug-sections=zstd "$1" "$2"`))
	as(".zdebug", shell(plain, `objcopy --compress-debug-sections=zlib-gnu "$1" "$2"`), plain)
	add("assembly", build(t, "main.s", assembly, nil, "gcc", "-g", "-o", "OUT", "SRC"))
	add("Rust", build(t, "deep.rs", deepRust, nil, "rustc", "-g", "-O", "-o", "OUT", "SRC"))
	as("dwz", shell(plain, `cp "$1" "$2"; cp "$1" "$2.other"; dwz -m "$2.alt" -M "$2.alt" "$2" "$2.other"`), plain)
	as("dwz without -m", shell(plain, `dwz -o "$2" "$1"`), plain)
	as("separate, by link", shell(plain, `objcopy --only-keep-debug "$1" "$2.debug"; cp "$1" "$2"; strip "$2"; cd "$(dirname "$2")"; objcopy --add-gnu-debuglink="$2.debug" "$2"`), plain)

	// Split files are named in the binary by where they were made.
	split := func(name, compiler string, flags ...string) {
		cmd := slices.Concat([]string{compiler, "-O2", "-gsplit-dwarf", "-c", "-o", "OUT"}, flags, []string{"SRC"})
		object := build(t, "split.cc", "// "+name+"\n"+deepSource, nil, cmd...)
		bin := shell(object, compiler+` -o "$2" "$1"`)
		add(name, bin)
		packed := shell(bin, `cp "$1" "$2"; llvm-dwp-19 -e "$1" -o "$2.dwp"`)
		as(name+", package", packed, bin)
	}
	split("split", "g++", "-g")
	split("split, DWARF 4", "g++", "-gdwarf-4")
	split("clang, split", "clang++-19", "-g")
	return all
}

// codeAddresses are addresses of code: all, or n at random.
func codeAddresses(t testing.TB, path string, n int) []uint64 {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	total := uint64(0)
	var addrs []uint64
	for _, s := range f.Sections {
		if s.Flags&elf.SHF_EXECINSTR != 0 {
			total += s.Size
		}
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, s := range f.Sections {
		if s.Flags&elf.SHF_EXECINSTR == 0 {
			continue
		}
		if total <= uint64(n) {
			for a := range s.Size {
				addrs = append(addrs, s.Addr+a)
			}
			continue
		}
		for range uint64(n) * s.Size / total {
			addrs = append(addrs, s.Addr+rnd.Uint64N(s.Size))
		}
	}
	return addrs
}

// frameAnswer is a frame as both sides tell it.
type frameAnswer struct {
	name, file string
	line       int
}

// askLLVM asks the judge for linkage names.
func askLLVM(t testing.TB, path string, addrs []uint64) [][]frameAnswer {
	t.Helper()
	var in bytes.Buffer
	for _, a := range addrs {
		fmt.Fprintf(&in, "%#x\n", a)
	}
	cmd := exec.Command(judgeLLVM, "--no-demangle", "--obj="+path)
	cmd.Stdin = &in
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", judgeLLVM, err)
	}
	var answers [][]frameAnswer
	for block := range strings.SplitSeq(strings.TrimSuffix(string(out), "\n\n"), "\n\n") {
		lines := strings.Split(strings.Trim(block, "\n"), "\n")
		var frames []frameAnswer
		for i := 0; i+1 < len(lines); i += 2 {
			place := strings.Split(lines[i+1], ":")
			n := len(place)
			line, err := strconv.Atoi(place[n-2])
			if err != nil {
				t.Fatalf("%s printed %q", judgeLLVM, lines[i+1])
			}
			frames = append(frames, frameAnswer{lines[i], strings.Join(place[:n-2], ":"), line})
		}
		answers = append(answers, frames)
	}
	if len(answers) != len(addrs) {
		t.Fatalf("%d answers for %d addresses", len(answers), len(addrs))
	}
	return answers
}

func ourFrames(r Result) []frameAnswer {
	if len(r.Lines) == 0 {
		return []frameAnswer{{"??", "??", 0}}
	}
	var frames []frameAnswer
	for _, l := range r.Lines {
		frames = append(frames, frameAnswer{cmp.Or(cutVersion(l.SystemName), "??"), cmp.Or(l.File, "??"), int(l.Line)})
	}
	return frames
}

// symbolsOf are a file's symbols by name, more than one where static functions share it.
func symbolsOf(t testing.TB, path string) map[string][]elf.Symbol {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	syms, _ := f.Symbols()
	dynamic, _ := f.DynamicSymbols()
	byName := map[string][]elf.Symbol{}
	for _, s := range append(syms, dynamic...) {
		name := cutVersion(s.Name)
		byName[name] = append(byName[name], s)
	}
	return byName
}

// The classes of differences to llvm-symbolizer; docs/internals.md says who is right.
const (
	classSame      = "same"
	classAlias     = "another name of the same function"
	classClone     = "a part or clone that only the debug file's symbols tell"
	classFileOnly  = "file without a line, from the symbol table"
	classBeyond    = "a symbol beyond its end"
	classLineOnly  = "a line of a unit that does not list its ranges"
	classMadeUp    = "a name where the judge has none"
	classDifferent = "different"
)

// classify compares answers.
func classify(symbols map[string][]elf.Symbol, addr uint64, judge, ours []frameAnswer, r Result) string {
	if slices.Equal(judge, ours) {
		return classSame
	}
	j, o := judge[len(judge)-1], ours[len(ours)-1]
	if len(judge) == 1 && j.name == "??" && j.file == "??" {
		if r.made || len(ours) == 1 && o.file == "??" {
			return classMadeUp
		}
		return classLineOnly
	}
	covers := false
	for _, s := range symbols[j.name] {
		covers = covers || addr >= s.Value && (addr < s.Value+s.Size)
	}
	if !covers && len(judge) == 1 && j.line == 0 && len(ours) == 1 && (r.made || o.name == "??" || o.name != j.name) {
		return classBeyond
	}
	if len(judge) != len(ours) || !slices.Equal(judge[:len(judge)-1], ours[:len(ours)-1]) {
		return classDifferent
	}
	same := j.name == o.name || sameFunction(symbols, j.name, o.name)
	if stem, _, cut := strings.Cut(o.name, "."); cut && (stem == j.name || sameFunction(symbols, stem, j.name)) && j.file == o.file && j.line == o.line {
		return classClone
	}
	switch {
	case same && j.line == 0 && o.line == 0 && o.file == "??" && !strings.Contains(j.file, "/"):
		return classFileOnly
	case same && j.file == o.file && j.line == o.line:
		return classAlias
	}
	return classDifferent
}

func sameFunction(symbols map[string][]elf.Symbol, a, b string) bool {
	for _, x := range symbols[a] {
		for _, y := range symbols[b] {
			if x.Value == y.Value {
				return true
			}
		}
	}
	return false
}

// compareWithLLVM requires that all but one in a thousand answers are the judge's, or of a
// class that is explained.
func compareWithLLVM(t *testing.T, c compiled, n int) {
	addrs := codeAddresses(t, c.judged, n)
	s := newSymbolizer(t, Config{WaitForIndex: true, IndexWorkers: runtime.GOMAXPROCS(0)})
	o, err := s.Object(File{Path: c.path, Open: func() (*os.File, error) { return os.Open(c.path) }, Roots: []string{"/"}})
	if err != nil {
		t.Fatal(err)
	}
	symbols := symbolsOf(t, c.symbols)
	judge := askLLVM(t, c.judged, addrs)
	classes := map[string]int{}
	lines := 0
	for i, r := range o.Symbolize(addrs) {
		ours := ourFrames(r)
		class := classify(symbols, addrs[i], judge[i], ours, r)
		if classes[class]++; class == classDifferent && classes[class] <= 3 {
			t.Logf("%#x: %v, %s says %v", addrs[i], ours, judgeLLVM, judge[i])
		}
		if ours[0].line > 0 {
			lines++
		}
	}
	t.Logf("%d addresses, %d with lines: %v", len(addrs), lines, classes)
	if st := s.Stats().Index; st.Failed > 0 || st.Broken > 0 {
		t.Errorf("debug information: %d failed, %d broken units: %v", st.Failed, st.Broken, st.LastFail)
	}
	if bad := classes[classDifferent]; bad*1000 > len(addrs) {
		t.Errorf("%d of %d answers differ", bad, len(addrs))
	}
	if classes[classSame] == 0 || lines == 0 {
		t.Error("nothing was compared")
	}
}

func needJudge(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath(judgeLLVM); err != nil {
		t.Fatalf("%s, of Debian's llvm-19, is the judge: %v", judgeLLVM, err)
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("the corpus is built for amd64")
	}
}

var vmlinuxPath = flag.String("vmlinux", "", "a kernel with debug information, to compare")

// TestVmlinuxAgrees is for make test-symbols, as the file is big.
func TestVmlinuxAgrees(t *testing.T) {
	if *vmlinuxPath == "" {
		t.Skip("no -vmlinux")
	}
	needJudge(t)
	compareWithLLVM(t, compiled{"vmlinux", *vmlinuxPath, *vmlinuxPath, *vmlinuxPath}, 100_000)
}

func TestAgreesWithLLVM(t *testing.T) {
	needJudge(t)
	for _, c := range append(corpus(t), debianLibc(t)) {
		t.Run(c.name, func(t *testing.T) { compareWithLLVM(t, c, 100_000) })
	}
}

// debianLibc is the C library, whose debug file is in Debian's libc6-dbg.
func debianLibc(t testing.TB) compiled {
	const path = "/lib/x86_64-linux-gnu/libc.so.6"
	o := openObject(t, newSymbolizer(t, Config{}), path)
	debug := elffile.BuildIDPath(o.BuildID())
	if _, err := os.Stat(debug); err != nil {
		t.Fatalf("Debian's libc6-dbg is needed: %v", err)
	}
	return compiled{"libc", path, path, debug}
}
