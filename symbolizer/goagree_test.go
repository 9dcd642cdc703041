// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// goJudgeSource is a program that tells the frames of its own code, as the runtime does:
// it reads file offsets, and prints a line for each frame (function, file, line, line
// where the function starts) and an empty one after each offset. runtime.Callers expands
// inlined calls before CallersFrames sees them; what does that for the CPU profiler does it
// here. STARTLINE is replaced, as Go 1.18 and 1.19 have none.
const goJudgeSource = `package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"go/types"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"text/template"
	_ "unsafe"
)

//go:linkname expand runtime/pprof.runtime_expandFinalInlineFrame
func expand(stack []uintptr) []uintptr

STARTLINE

func main() {
	if len(os.Args) > 1 { // for their code
		fmt.Println(http.ListenAndServe("", nil), types.NewPackage("", ""), template.New(""), json.Valid(nil))
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		panic(err)
	}
	var start, end, offset uintptr
	for _, line := range strings.Split(string(maps), "\n") {
		var permissions string
		fmt.Sscanf(line, "%x-%x %s %x", &start, &end, &permissions, &offset)
		if strings.Contains(permissions, "x") {
			break
		}
	}
	out := bufio.NewWriter(os.Stdout)
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		at, err := strconv.ParseUint(in.Text(), 10, 64)
		if err != nil {
			panic(err)
		}
		// Callers have return addresses. One that is where a function starts is taken for it.
		caller := uintptr(at) - offset + start + 1
		if f := runtime.FuncForPC(caller); f != nil && f.Entry() == caller {
			out.WriteString("unasked\n\n")
			continue
		}
		frames := runtime.CallersFrames(expand([]uintptr{caller}))
		for more := true; more; {
			var f runtime.Frame
			f, more = frames.Next()
			if f.File == "?" { // between two functions
				f.File = ""
			}
			fmt.Fprintf(out, "%s\t%s\t%d\t%d\n", f.Function, f.File, f.Line, startLine(&f))
		}
		out.WriteByte('\n')
	}
	out.Flush()
}
`

// goJudge builds the judge by a Go release. What it says of another build of the same
// source says nothing: it judges itself.
func goJudge(t testing.TB, goroot string, minor int, flags ...string) string {
	t.Helper()
	startLine := "//go:linkname startLine runtime/pprof.runtime_FrameStartLine\nfunc startLine(f *runtime.Frame) int"
	if minor < 20 {
		startLine = "func startLine(f *runtime.Frame) int { return 0 }"
	}
	env := []string{"GO111MODULE=off", "GOFLAGS=", "CGO_ENABLED=0"}
	tool := "go"
	if goroot != "" {
		env = append(env, "GOROOT="+goroot, "GOTOOLCHAIN=local")
		tool = filepath.Join(goroot, "bin/go")
	}
	return build(t, "judge.go", strings.Replace(goJudgeSource, "STARTLINE", startLine, 1), env,
		slices.Concat([]string{tool, "build", "-o", "OUT"}, flags, []string{"SRC"})...)
}

// compareWithRuntime asks a judge for random addresses of its code: at most one answer in a
// thousand may differ.
func compareWithRuntime(t *testing.T, path string, n int) {
	o := openObject(t, newSymbolizer(t, Config{}), path)
	addrs := codeAddresses(t, path, n)
	var in bytes.Buffer
	for _, a := range addrs {
		off, ok := o.image.FileOffset(a)
		if !ok {
			t.Fatalf("%#x is in no segment", a)
		}
		fmt.Fprintln(&in, off.Off)
	}
	answers := strings.SplitAfter(string(ask(t, &in, path)), "\n\n")
	answers = answers[:len(answers)-1]
	compareGo(t, o, addrs, answers, func(lines []Line) (s string) {
		if len(lines) == 0 {
			return "\t\t0\t0\n\n"
		}
		for _, l := range lines {
			s += fmt.Sprintf("%s\t%s\t%d\t%d\n", l.Function, l.File, l.Line, l.StartLine)
		}
		return s + "\n"
	})
}

// compareWithAddr2line does so with go tool addr2line, which tells the function, and the
// file and line of what is inlined there.
func compareWithAddr2line(t *testing.T, path string, n int) {
	o := openObject(t, newSymbolizer(t, Config{}), path)
	addrs := codeAddresses(t, path, n)
	var in bytes.Buffer
	for _, a := range addrs {
		fmt.Fprintf(&in, "%#x\n", a)
	}
	var answers []string
	out := bufio.NewScanner(bytes.NewReader(ask(t, &in, "go", "tool", "addr2line", path)))
	for out.Scan() {
		function := out.Text()
		out.Scan()
		line, none := strings.CutSuffix(out.Text(), ":-1") // between two functions
		if none {
			line += ":0"
		}
		answers = append(answers, function+" "+line)
	}
	compareGo(t, o, addrs, answers, func(lines []Line) string {
		if len(lines) == 0 {
			return "? ?:0"
		}
		return fmt.Sprintf("%s %s:%d", lines[len(lines)-1].SystemName, lines[0].File, lines[0].Line)
	})
}

func ask(t *testing.T, in io.Reader, name string, args ...string) []byte {
	t.Helper()
	judge := exec.Command(name, args...)
	judge.Stdin, judge.Stderr = in, os.Stderr
	out, err := judge.Output()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return out
}

func compareGo(t *testing.T, o *Object, addrs []uint64, answers []string, say func([]Line) string) {
	t.Helper()
	if len(answers) != len(addrs) {
		t.Fatalf("%d answers for %d addresses", len(answers), len(addrs))
	}
	compared, wrappers, differ, inlined := 0, 0, 0, 0
	for i, r := range o.Symbolize(addrs) {
		if strings.HasPrefix(answers[i], "unasked") {
			continue
		}
		compared++
		if len(r.Lines) > 1 {
			inlined++
		}
		ours := say(r.Lines)
		if ours != answers[i] && say(withoutWrappers(r.Lines)) == answers[i] {
			wrappers++
		} else if ours != answers[i] {
			if differ++; differ <= 5 {
				t.Logf("%#x:\n%s\nthe judge says\n%s", addrs[i], ours, answers[i])
			}
		}
	}
	t.Logf("%d addresses, %d with inlined calls, %d in wrappers that the judge leaves out, %d differ", compared, inlined, wrappers, differ)
	if differ*1000 > compared || inlined*20 < compared || compared*10 < len(addrs)*9 {
		t.Errorf("%d of %d answers differ, %d with inlined calls", differ, compared, inlined)
	}
}

// wrapperName is a function that the compiler makes round a deferred call or a go
// statement, or one that it is told to take for such.
var wrapperName = regexp.MustCompile(`\.(defer|go)wrap\d+$|^reflect\.call(Method|Reflect)$`)

// withoutWrappers leaves out what the runtime hides in its traces: functions that the
// compiler makes to call another one. They are there, and can be what takes the time.
func withoutWrappers(lines []Line) []Line {
	return slices.DeleteFunc(slices.Clone(lines), func(l Line) bool {
		return l.File == "<autogenerated>" || wrapperName.MatchString(l.Function)
	})
}

// TestGoAgrees compares with the two judges that Go has.
func TestGoAgrees(t *testing.T) {
	const many, some = 100_000, 10_000 // the text is the same without symbols
	plain, pie := goJudge(t, "", 26), goJudge(t, "", 26, "-buildmode=pie")
	for _, tt := range []struct {
		name, path string
		n          int
	}{
		{"plain", plain, many},
		{"stripped", stripped(t, plain), some},
		{"without symbols", goJudge(t, "", 26, "-ldflags=-s -w"), some},
		{"PIE", pie, many},
		{"PIE stripped", stripped(t, pie), some},
		{"PIE without symbols", goJudge(t, "", 26, "-buildmode=pie", "-ldflags=-s -w"), some},
	} {
		t.Run(tt.name, func(t *testing.T) { compareWithRuntime(t, tt.path, tt.n) })
	}
	t.Run("addr2line", func(t *testing.T) { compareWithAddr2line(t, plain, many) })
	t.Run("addr2line, PIE", func(t *testing.T) { compareWithAddr2line(t, pie, some) })
}

//go:noinline
func outermost(pcs []uintptr) int { return middlemost(pcs) }

func middlemost(pcs []uintptr) int { return innermost(pcs) + len(pcs)/1000 }

func innermost(pcs []uintptr) int { return runtime.Callers(1, pcs) }

// TestGoAgreesWithRuntime walks the test's own stack: the runtime expands the inlined
// calls of a stack itself.
func TestGoAgreesWithRuntime(t *testing.T) {
	pcs := make([]uintptr, 64)
	pcs = pcs[:outermost(pcs)]
	var want []goFrame
	for fs := runtime.CallersFrames(pcs); ; {
		f, more := fs.Next()
		want = append(want, goFrame{goName(f.Function), f.File, int64(f.Line)})
		if !more {
			break
		}
	}
	o := openObject(t, newSymbolizer(t, Config{}), "/proc/self/exe")
	// One physical frame for each function that is not inlined: the first pc is in the
	// innermost function, and those after it are return addresses.
	var got []goFrame
	var physical []uint64
	for i, pc := range pcs {
		if i == 0 || runtime.FuncForPC(pcs[i-1]-1).Entry() != runtime.FuncForPC(pc-1).Entry() {
			physical = append(physical, selfAddress(t, o, uint64(pc-1)))
		}
	}
	for _, r := range o.Symbolize(physical) {
		got = append(got, frames(r.Lines)...)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("stack:\n%v\nruntime says\n%v", got, want)
	}
	if len(physical) >= len(want) {
		t.Errorf("%d frames of %d functions: nothing was inlined", len(want), len(physical))
	}
}

var goReleases = flag.Bool("go-releases", false, "compare binaries of Go 1.18 to 1.25 and of arm64 too; loads the releases")

// releases are the last of each minor version that we read.
var releases = []string{"1.18.10", "1.19.13", "1.20.14", "1.21.13", "1.22.12", "1.23.12", "1.24.13", "1.25.9"}

// TestGoReleases compares with the judges as TestGoAgrees, and with DWARF, what other
// releases of Go build. It is for make test-symbols, as a release has 70 MB to load.
func TestGoReleases(t *testing.T) {
	if !*goReleases {
		t.Skip("without -go-releases; TestGoFormats has the formats")
	}
	arm64 := build(t, "main.go", goSource, []string{"GO111MODULE=off", "GOFLAGS=", "GOARCH=arm64", "CGO_ENABLED=0"},
		"go", "build", "-o", "OUT", "SRC")
	t.Run("arm64", func(t *testing.T) { compareWithDWARF(t, arm64, arm64) })
	for i, release := range releases {
		t.Run(release, func(t *testing.T) {
			root := strings.TrimSpace(string(run(t, t.TempDir(), []string{"GOTOOLCHAIN=go" + release}, "go", "env", "GOROOT")))
			for _, flags := range [][]string{nil, {"-ldflags=-s -w"}, {"-buildmode=pie"}} {
				path := goJudge(t, root, 18+i, flags...)
				compareWithRuntime(t, path, 100_000)
				compareWithRuntime(t, stripped(t, path), 100_000)
				compareWithAddr2line(t, path, 100_000)
			}
			env := []string{"GOROOT=" + root, "GOTOOLCHAIN=local", "GO111MODULE=off", "GOFLAGS=", "CGO_ENABLED=0"}
			at := func(flags ...string) string {
				return build(t, "main.go", goSource, env,
					slices.Concat([]string{root + "/bin/go", "build", "-o", "OUT"}, flags, []string{"SRC"})...)
			}
			plain, pie := at(), at("-buildmode=pie")
			compareWithDWARF(t, plain, plain)
			compareWithDWARF(t, at("-ldflags=-s -w"), plain)
			compareWithDWARF(t, stripped(t, pie), pie)
		})
	}
}
