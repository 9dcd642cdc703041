// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/test/agent"
)

// inlining is a C program whose time goes into calls that are all inlined.
const inlining = `#include <stdint.h>
static inline __attribute__((always_inline)) uint64_t mix(uint64_t x) {
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	return x ^ (x >> 29);
}
static inline __attribute__((always_inline)) uint64_t rounds(uint64_t x) {
	for (int i = 0; i < 64; i++)
		x = mix(x + i);
	return x;
}
static inline __attribute__((always_inline)) uint64_t level(uint64_t x) { return rounds(x) + 1; }
__attribute__((noinline)) uint64_t burn(uint64_t x) {
	return level(x) * 3;
}
int main(void) {
	volatile uint64_t v = 1;
	for (;;)
		v = burn(v);
}
`

// hot is a Go program with a method that is too big to be inlined, unless a profile says
// that it is hot.
const hot = `package main

import "fmt"

type table struct{ v [256]uint64 }

func (t *table) step(x, salt uint64) uint64 {
	i := x & 255
	a := t.v[i] ^ salt
	b := a*0x9e3779b97f4a7c15 + x>>7
	if b&1 == 0 {
		b ^= a << 13
	} else {
		b ^= a >> 11
	}
	if b&2 == 0 {
		b += t.v[(i+1)&255]
	} else {
		b -= t.v[(i+7)&255]
	}
	t.v[i] = b
	if b&4 == 0 {
		t.v[(i+3)&255] ^= b >> 3
	}
	return b ^ x
}

func burn(t *table, n int) (x uint64) {
	for i := 0; i < n; i++ {
		x = t.step(x, uint64(i))
	}
	return x
}

func main() {
	t := &table{}
	for {
		if burn(t, 1_000_000) == 1 {
			fmt.Println(t)
		}
	}
}
`

// TestSymbols: inlined functions with their lines in pprof's listing and in folded stacks,
// and a profile by which the Go compiler optimizes.
func TestSymbols(t *testing.T) {
	kerneltest.Require(t)
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	source := write("inlining.c", inlining)
	write("hot/main.go", hot)
	write("hot/go.mod", "module hot\n\ngo 1.26\n")
	hostflame, err := agent.Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	output(t, dir, "gcc", "-g", "-O2", "-o", "inlining", source)
	output(t, filepath.Join(dir, "hot"), "go", "build", "-pgo=off", "-o", "hot", ".")
	for _, program := range []string{"inlining", "hot/hot"} {
		cmd := exec.Command(filepath.Join(dir, program))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
	}
	output(t, dir, hostflame, "record", "-d", "4s", "-o", "cpu.pb.gz", "--symbols.cache-directory="+filepath.Join(dir, "symbols"))

	list := output(t, dir, "go", "tool", "pprof", "-list", "^(mix|rounds|level|burn)$", "cpu.pb.gz")
	for _, want := range []string{
		`ROUTINE =+ mix in .*inlining.c`,
		`ROUTINE =+ rounds in .*inlining.c`,
		// What is inlined there is spent there, and not by the line itself.
		`(?m)^\s+\.\s+\d\S*s\s+9:\s+x = mix\(x \+ i\);`,
		`(?m)^\s+\.\s+\d\S*s\s+14:\s+return level\(x\) \* 3;`,
	} {
		if !regexp.MustCompile(want).MatchString(list) {
			t.Errorf("no %s in\n%s", want, list)
		}
	}
	folded := output(t, dir, "go", "tool", "pprof", "-traces", "cpu.pb.gz")
	if !regexp.MustCompile(`mix \(inline\)\s+rounds \(inline\)\s+level \(inline\)\s+burn\s+main`).MatchString(folded) {
		t.Errorf("no stack of inlined functions in\n%.2000s", folded)
	}

	inlines := func(pgo string) bool {
		cmd := exec.Command("go", "build", "-gcflags=-m", "-pgo="+pgo, "-o", os.DevNull, ".")
		cmd.Dir = filepath.Join(dir, "hot")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", cmd, err, out)
		}
		return strings.Contains(string(out), "inlining call to (*table).step")
	}
	if inlines("off") || !inlines(filepath.Join(dir, "cpu.pb.gz")) {
		t.Errorf("step is inlined without a profile: %v, with it: %v", inlines("off"), inlines(filepath.Join(dir, "cpu.pb.gz")))
	}
}

func output(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, stderr.Bytes())
	}
	return string(out)
}
