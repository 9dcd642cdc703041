// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/hostflame/hostflame/internal/pclntab"
)

var goReleases = flag.Bool("go-releases", false, "build with each Go release in the module cache")

const goSource = `package main

import (
	"fmt"
	"os"
	"sort"
	"time"
)

func big(n int) byte {
	var b [200 << 10]byte
	for i := range b {
		b[i] = byte(i * n)
	}
	return b[n]
}

func main() {
	sort.Strings(os.Args)
	fmt.Println(time.Now().Unix() < 0, len(os.Args) > 1000 && big(len(os.Args)) > 0)
}
`

// buildGo builds a program and returns the path of the binary.
func buildGo(t testing.TB, source string, env []string, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	src, out := filepath.Join(dir, "main.go"), filepath.Join(dir, "out")
	if err := os.WriteFile(src, []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	name := "go"
	for _, e := range env {
		if root, ok := strings.CutPrefix(e, "GOROOT="); ok {
			name = filepath.Join(root, "bin/go")
		}
	}
	cmd := exec.Command(name, slices.Concat([]string{"build", "-o", out}, args, []string{src})...)
	cmd.Env = slices.Concat(os.Environ(), []string{"GO111MODULE=off", "GOFLAGS="}, env)
	cmd.Dir = dir
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, b)
	}
	return out
}

// TestGoRowsAgreeWithDWARF compares pclntab's rows with the .debug_frame that Go's linker
// writes.
func TestGoRowsAgreeWithDWARF(t *testing.T) {
	binaries := map[string]string{
		"amd64": buildGo(t, goSource, []string{"CGO_ENABLED=0", "GOARCH=amd64"}, "-ldflags=-compressdwarf=false"),
		"arm64": buildGo(t, goSource, []string{"CGO_ENABLED=0", "GOARCH=arm64"}, "-ldflags=-compressdwarf=false"),
		"PIE":   buildGo(t, goSource, []string{"CGO_ENABLED=0", "GOARCH=amd64"}, "-buildmode=pie"),
	}
	if *goReleases {
		cache := strings.TrimSpace(string(run(t, "go", "env", "GOMODCACHE")))
		roots, err := filepath.Glob(filepath.Join(cache, "golang.org", "toolchain@v0.0.1-go1.*."+runtime.GOOS+"-"+runtime.GOARCH))
		if err != nil {
			t.Fatal(err)
		}
		for _, root := range roots {
			for _, arch := range []string{"amd64", "arm64"} {
				env := []string{"GOROOT=" + root, "GOTOOLCHAIN=local", "CGO_ENABLED=0", "GOARCH=" + arch, "PATH=" + root + "/bin:" + os.Getenv("PATH")}
				binaries[filepath.Base(root)+" "+arch] = buildGo(t, goSource, env)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(binaries)) {
		t.Run(name, func(t *testing.T) { compareGo(t, binaries[name]) })
	}
}

// noGoRule are functions where the return address is in a register for some instructions,
// or the stack pointer beyond it.
var noGoRule = map[string]bool{"syscall.rawVforkSyscall": true, "runtime.asyncPreempt": true, "runtime.debugCallV2": true}

// compareGo compares CFAs: .debug_frame says of registers what a debugger would restore,
// not what the code does.
func compareGo(t *testing.T, path string) {
	f := openFile(t, path, nil)
	if f.gotab == nil {
		t.Fatal("no pclntab")
	}
	ts := build(t, f)
	kinds := map[Kind]int{}
	points, different := 0, map[string][]string{}
	switching := map[string]bool{}
	for _, j := range judgeFile(t, path, "-d") {
		if j.none {
			continue
		}
		for _, addr := range []uint64{j.start, j.end - 1} {
			if addr < f.gotab.Text || addr >= f.gotab.Text+f.gotab.TextEnd {
				continue
			}
			points++
			r := ts.rule(addr)
			kinds[r.Kind()]++
			want, got := j.meaning(f.arch), ruleMeaning(f.arch, r)
			name, fn := goFunction(t, f.gotab, addr)
			switch r.Kind() {
			case KindGo, KindEnd, KindSignal:
				switching[name] = true
				if _, listed := goSwitches[name]; !listed && fn.Flags&(pclntab.FlagSPWrite|pclntab.FlagTopFrame) == 0 {
					t.Errorf("%s: %v", name, r)
				}
				continue
			case KindFP, KindWide:
				if w := r.wide(); r.Kind() == KindWide && w.base == f.arch.fp {
					if want.cfa != fmt.Sprintf("r%d%+d", f.arch.sp, 8*(w.offset-1)) {
						different[name] = append(different[name], fmt.Sprintf("%#x: %v, want %s", addr, r, j.in))
					}
					continue
				}
				if fn.Flags&pclntab.FlagSPWrite == 0 && strings.HasPrefix(name, "runtime.call") {
					continue // a frame of more than 256 KiB
				}
			case KindNone:
				var frame int64
				if _, err := fmt.Sscanf(want.cfa, "r31+%d", &frame); err == nil && frame > 2<<20 || noGoRule[name] || strings.HasPrefix(name, "runtime.call") {
					kinds[KindNone]--
					continue
				}
			}
			if want.cfa != got.cfa {
				different[name] = append(different[name], fmt.Sprintf("%#x: %v, want %s", addr, r, j.in))
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(different)) {
		t.Errorf("%s:\n\t%s", name, strings.Join(different[name], "\n\t"))
	}
	if points < 10000 || kinds[KindNone] > 0 {
		t.Errorf("%d points, kinds %v", points, kinds)
	}
	for _, name := range []string{"runtime.systemstack", "runtime.mcall", "runtime.asmcgocall", "runtime.goexit", "runtime.rt0_go", "runtime.mstart"} {
		if !switching[name] {
			t.Errorf("%s is not among the switches", name)
		}
	}
	t.Logf("%d points, kinds %v, %d bytes a row; switches: %v", points, kinds, 2*ts.words/ts.rows, slices.Sorted(maps.Keys(switching)))
}

func goFunction(t testing.TB, g *pclntab.Table, addr uint64) (string, pclntab.Func) {
	t.Helper()
	entry, _, record, err := g.Find(uint32(addr - g.Text))
	if err != nil {
		t.Fatal(err)
	}
	fn, err := g.Func(entry, record)
	if err != nil {
		t.Fatal(err)
	}
	name, err := g.Pager.CString(g.Names+uint64(fn.Name), g.Units, 1024)
	if err != nil {
		t.Fatal(err)
	}
	return string(bytes.Clone([]byte(name))), fn
}
