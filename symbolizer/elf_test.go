// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/elffile"
)

const cSource = `
#include <time.h>
__attribute__((noinline)) int alpha(int x) { return x * 3 + 1; }
static __attribute__((noinline)) int beta(int x) { return alpha(x) / 7; }
__attribute__((weak, noinline)) int gamma_weak(int x) { return beta(x) - 2; }
int _gamma(int x) __attribute__((alias("alpha")));
static void *resolve(void) { return alpha; }
int chosen(int) __attribute__((ifunc("resolve")));
__asm__(".text\n.globl bare\nbare:\n nop\n nop\n nop\n nop\n ret\n");
__attribute__((section(".text.elsewhere"), noinline)) int elsewhere(int x) { return x ^ 5; }
int main(int argc, char **argv) { return gamma_weak(argc) + chosen(argc) + _gamma(argc) + elsewhere(argc) + (int)time(0); }
`

// bareSource needs no C library.
const bareSource = `
__attribute__((noinline)) int alpha(int x) { return x * 3 + 1; }
static __attribute__((noinline)) int beta(int x) { return alpha(x) / 7; }
__asm__(".text\n.globl bare\nbare:\n nop\n nop\n nop\n");
void _start(void) { volatile int x = beta(3); (void)x; for (;;) ; }
`

var bareHigh = []string{"-O1", "-nostdlib", "-static", "-fPIE", "-Wl,-Ttext-segment=0x7fff00000000"}

const cxxSource = `
#include <map>
#include <string>
#include <vector>
namespace ns {
template <typename T> struct Box {
  T v;
  __attribute__((noinline)) T get(int n) const { return v + n; }
  __attribute__((noinline)) ~Box() { asm volatile(""); }
};
struct Base { virtual ~Base(); virtual int f(int) = 0; };
Base::~Base() {}
struct Derived : Base { int f(int) override; };
int Derived::f(int x) { auto l = [x](int y) __attribute__((noinline)) { return x * y; }; return l(3); }
__attribute__((noinline)) int operator+(const Box<int> &a, int b) { return a.get(b); }
}
int main(int argc, char **) {
  ns::Box<int> b{argc};
  ns::Box<double> d{1.5};
  std::map<std::string, std::vector<int>> m;
  m["x"].push_back(argc);
  ns::Base *p = new ns::Derived;
  int r = p->f(argc) + (b + 2) + (int)d.get(1) + (int)m.size();
  delete p;
  return r;
}
`

func TestSymbolsAgreeWithNM(t *testing.T) {
	cc := buildC(t, cSource, "-O1")
	tests := []struct {
		name, path string
		nm         []string
	}{
		{"C PIE", cc, nil},
		{"C ET_EXEC", buildC(t, cSource, "-O1", "-no-pie"), nil},
		{"C static", buildC(t, cSource, "-O1", "-static"), nil},
		{"C unaligned segments", buildC(t, cSource, "-O1", "-Wl,-z,noseparate-code"), nil},
		{"high addresses", buildC(t, bareSource, bareHigh...), nil},
		{"C gold", buildC(t, cSource, "-O1", "-fuse-ld=gold"), nil},
		{"C++", buildCXX(t, cxxSource, "-O1"), nil},
		{"C++ shared", buildCXX(t, cxxSource, "-O1", "-shared", "-fPIC"), nil},
		{"C++ stripped shared", stripped(t, buildCXX(t, cxxSource, "-O1", "-shared", "-fPIC")), []string{"-D", "--without-symbol-versions"}},
		{"libc", libc(t), []string{"-D", "--without-symbol-versions"}},
	}
	if runtime.GOARCH == "amd64" {
		tests = append(tests, tests[0])
		tests[len(tests)-1].name = "32 bits"
		tests[len(tests)-1].path = buildC(t, bareSource, "-O1", "-m32", "-nostdlib", "-static")
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSymbolizer(t, Config{})
			o := openObject(t, s, tt.path)
			syms := nmText(t, tt.path, tt.nm...)
			addrs := sampleAddrs(t, tt.path, syms, 2000)
			secs := executableSections(t, tt.path)
			found := 0
			for i, r := range o.Symbolize(addrs) {
				want := covering(syms, secs, addrs[i])
				if len(r.Lines) == 0 {
					if len(want) > 0 && !(len(tt.nm) > 0 && sizeless(syms, want)) {
						t.Errorf("%#x: %s, nm says %v", addrs[i], r.Reason, want)
					}
					continue
				}
				name := r.Lines[0].SystemName
				if r.made && len(want) == 0 {
					continue // a stub, or a function without a name: nm knows none
				}
				found++
				if !want[name] {
					t.Errorf("%#x: %s, nm says %v", addrs[i], name, want)
				}
			}
			t.Logf("%d of %d addresses have symbols, of %d", found, len(addrs), len(syms))
			if found < len(syms)/2 {
				t.Errorf("only %d addresses found for %d symbols", found, len(syms))
			}
		})
	}
}

// sizeless: in .dynsym a symbol without a size covers one byte.
func sizeless(syms []nmSymbol, names map[string]bool) bool {
	for _, s := range syms {
		if names[s.name] && s.size > 0 {
			return false
		}
	}
	return true
}

// TestFoldedFunctions: what a linker has made one function of is told.
func TestFoldedFunctions(t *testing.T) {
	const folded = `
__attribute__((noinline)) int second_of_two(int x) { return x * 77 + 3; }
__attribute__((noinline)) int first_of_two(int x) { return x * 77 + 3; }
__attribute__((noinline)) int another(int x) { return x * 78 + 3; }
int main(int c, char **v) { return first_of_two(c) + second_of_two(c + 1) + another(c + 2); }
`
	path := buildC(t, folded, "-O2", "-g", "-fno-ipa-icf", "-ffunction-sections", "-fuse-ld=gold", "-Wl,--icf=all")
	addrs := map[string]uint64{}
	for _, s := range nmText(t, path) {
		addrs[s.name] = s.addr
	}
	if addrs["first_of_two"] != addrs["second_of_two"] {
		t.Fatal("the linker has not folded them")
	}
	o := openObject(t, newSymbolizer(t, Config{WaitForIndex: true}), path)
	r := o.Symbolize([]uint64{addrs["first_of_two"], addrs["another"]})
	if got := r[0].Lines[0].SystemName; got != "first_of_two" {
		t.Errorf("%s, want first_of_two", got)
	}
	if got := o.Aliases(addrs["first_of_two"] + 1); !slices.Equal(got, []string{"second_of_two"}) {
		t.Errorf("aliases %v, want second_of_two", got)
	}
	if got := o.Aliases(addrs["another"]); got != nil {
		t.Errorf("aliases %v of a function that has none", got)
	}
}

func TestChosenNames(t *testing.T) {
	s := newSymbolizer(t, Config{})
	o := openObject(t, s, buildC(t, cSource, "-O1"))
	for _, want := range []string{"alpha", "beta", "gamma_weak", "bare", "elsewhere", "main", "chosen"} {
		for _, sym := range nmText(t, buildC(t, cSource, "-O1")) {
			if sym.name != want {
				continue
			}
			// chosen and _gamma have the address of resolve and alpha.
			if want == "chosen" {
				want = "resolve"
			}
			got := o.Symbolize([]uint64{sym.addr})[0]
			if len(got.Lines) != 1 || got.Lines[0].Function != want && got.Lines[0].Function != "chosen" {
				t.Errorf("%s: %+v", want, got)
			}
		}
	}
}

func TestDemangledLikeCXXFilt(t *testing.T) {
	path := buildCXX(t, cxxSource, "-O1")
	s := newSymbolizer(t, Config{})
	o := openObject(t, s, path)
	var addrs []uint64
	for _, sym := range nmText(t, path) {
		addrs = append(addrs, sym.addr)
	}
	spaces := regexp.MustCompile(`\s+`)
	checked := 0
	for _, r := range o.Symbolize(addrs) {
		if len(r.Lines) == 0 || !strings.HasPrefix(r.Lines[0].SystemName, "_Z") {
			continue
		}
		l := r.Lines[0]
		want := strings.TrimSpace(string(run(t, ".", nil, "c++filt", "-p", l.SystemName)))
		want, _, _ = strings.Cut(want, " [clone")
		if spaces.ReplaceAllString(l.Function, "") != spaces.ReplaceAllString(want, "") {
			t.Errorf("%s: %q, c++filt says %q", l.SystemName, l.Function, want)
		}
		checked++
	}
	if checked < 10 {
		t.Errorf("only %d mangled names", checked)
	}
}

func TestDemangled(t *testing.T) {
	deep := "_Z1f" + strings.Repeat("P", 1<<20) + "i"
	for name, want := range map[string]string{
		"main":          "main",
		"_Z3fooi":       "foo",
		"_Z3fooi.cold":  "foo",
		"_ZN2ns1fEv":    "ns::f",
		"_Znot_mangled": "_Znot_mangled",
		"_ZN4core3fmt9Formatter9write_fmt17h0123456789abcdefE": "core::fmt::Formatter::write_fmt",
		"_RNvCs1234_7mycrate3foo":                              "mycrate::foo",
		"clock_gettime@@GLIBC_2.17":                            "clock_gettime",
		"memcpy@GLIBC_2.2.5":                                   "memcpy",
		"user@host.of:me":                                      "user@host.of:me",
		"finish_task_switch.isra.0":                            "finish_task_switch.isra.0",
		deep:                                                   deep,
	} {
		if got := demangled(name); got != want {
			t.Errorf("%.60s: %.60q, want %.60q", name, got, want)
		}
	}
}

// TestDemanglingIsBounded: names that are made to take long do not.
func TestDemanglingIsBounded(t *testing.T) {
	within(t, 2*time.Second, "conversion operators", func() {
		bomb := "_Z1fI" + strings.Repeat("ZcvT_I", 25)
		if got := demangled(bomb); got != bomb {
			t.Errorf("%s", got)
		}
	})
	d := demangler{}
	slow := "_Z" + strings.Repeat("UlTk", maxName/4-1)
	within(t, 30*time.Second, "slow names", func() {
		for range 1000 {
			d.name(slow)
		}
	})
	if d = (demangler{}); d.name("_Z1fv") != "f" {
		t.Error("a fast name is not demangled")
	}
	if d.slow = maxSlowTime + 1; d.name("_Z1fv") != "_Z1fv" || d.name("f@@V_1") != "f" {
		t.Error("names after many slow ones")
	}
}

func TestRust(t *testing.T) {
	rustc, err := exec.LookPath("rustc")
	if err != nil {
		t.Skip("no rustc; TestDemangled has names of both of its manglings")
	}
	path := build(t, "main.rs", `
mod shapes { #[inline(never)] pub fn area<T: Into<u64>>(x: T) -> u64 { x.into() * 3 } }
fn main() { println!("{}", shapes::area(std::env::args().count() as u32)); }
`, nil, rustc, "-Copt-level=1", "-o", "OUT", "SRC")
	o := openObject(t, newSymbolizer(t, Config{}), path)
	found := false
	for _, sym := range nmText(t, path) {
		if !strings.Contains(sym.name, "shapes") {
			continue
		}
		found = true
		r := o.Symbolize([]uint64{sym.addr})[0]
		if len(r.Lines) != 1 || strings.TrimSuffix(r.Lines[0].Function, "::<u32>") != "main::shapes::area" {
			t.Errorf("%s: %+v", sym.name, r)
		}
	}
	if !found {
		t.Error("nm knows no symbol of the function")
	}
}

func TestAddressOfFileOffset(t *testing.T) {
	for _, flags := range [][]string{
		{"-O1"}, {"-O1", "-no-pie"}, {"-O1", "-Wl,-z,noseparate-code"},
		bareHigh,
	} {
		source := cSource
		if slices.Equal(flags, bareHigh) {
			source = bareSource
		}
		path := buildC(t, source, flags...)
		s := newSymbolizer(t, Config{})
		o := openObject(t, s, path)
		checked := 0
		for line := range strings.Lines(string(run(t, ".", nil, "readelf", "-SW", path))) {
			_, rest, _ := strings.Cut(line, "]")
			f := strings.Fields(rest)
			if len(f) < 7 || !strings.Contains(f[6], "X") {
				continue
			}
			addr, _ := parseHex([]byte(f[2]))
			off, _ := parseHex([]byte(f[3]))
			if got, ok := o.Address(off); !ok || got != addr {
				t.Errorf("%v: %s at offset %#x: %#x %v, want %#x", flags, f[0], off, got, ok, addr)
			}
			checked++
		}
		if checked == 0 {
			t.Errorf("%v: no sections", flags)
		}
		if _, ok := o.Address(1 << 40); ok {
			t.Errorf("%v: an offset beyond the file has an address", flags)
		}
	}
}

func TestBuildID(t *testing.T) {
	goBinary := buildGo(t, goSource)
	for path, want := range map[string]string{
		buildC(t, cSource, "-O1"):                       "",
		buildC(t, cSource, "-Wl,--build-id=0xc0ffee01"): "c0ffee01",
		buildC(t, cSource, "-Wl,--build-id=none"):       "none",
		libc(t):  "",
		goBinary: "",
	} {
		if want == "" {
			m := regexp.MustCompile(`Build ID: ([0-9a-f]+)`).FindSubmatch(run(t, ".", nil, "readelf", "-n", path))
			if m == nil {
				t.Fatalf("readelf -n %s: no build id", path)
			}
			want = string(m[1])
		}
		if want == "none" {
			want = ""
		}
		if got := openObject(t, newSymbolizer(t, Config{}), path).BuildID(); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	noGNU := build(t, "path", goBinary, nil, "objcopy", "--remove-section=.note.gnu.build-id", goBinary, "OUT")
	want := strings.TrimSpace(string(run(t, ".", nil, "go", "tool", "buildid", goBinary)))
	if got := openObject(t, newSymbolizer(t, Config{}), noGNU).BuildID(); got != want || want == "" {
		t.Errorf("Go build id: %q, want %q", got, want)
	}
}

func TestVDSO(t *testing.T) {
	s := newSymbolizer(t, Config{})
	o, err := s.VDSO()
	if err != nil {
		t.Fatal(err)
	}
	image := make([]byte, o.image.Size())
	if err := elffile.ReadAt(o.image.Content, image, 0); err != nil {
		t.Fatal(err)
	}
	path := workDir + "/vdso.so"
	if err := os.WriteFile(path, image, 0o644); err != nil {
		t.Fatal(err)
	}
	if o.BuildID() == "" || len(o.Segments()) == 0 {
		t.Errorf("build id %q, segments %v", o.BuildID(), o.Segments())
	}
	clock := 0
	syms := nmText(t, path, "-D", "--without-symbol-versions")
	for _, sym := range syms {
		r := o.Symbolize([]uint64{sym.addr + sym.size/2})[0]
		if len(r.Lines) != 1 || !covering(syms, nil, sym.addr)[r.Lines[0].SystemName] {
			t.Errorf("%s: %+v", sym.name, r)
			continue
		}
		if strings.Contains(r.Lines[0].Function, "clock_gettime") {
			clock++
		}
	}
	if clock == 0 {
		t.Error("no clock_gettime")
	}
	if again, err := s.VDSO(); err != nil || again != o {
		t.Errorf("the second call returned another object: %v", err)
	}
}
