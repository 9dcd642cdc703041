// SPDX-License-Identifier: Apache-2.0

// Package workload builds and runs programs whose behaviour is known beforehand: what
// share of CPU each function takes, how many switches or reads there are. They are what
// tests and benchmarks measure against. The head of each source file (in src and burngo)
// says what it does.
package workload

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// The workloads, by the names that Compile takes.
const (
	Burn       = "burn"       // C++, frame pointers kept
	BurnNoFP   = "burn-nofp"  // the same at -O2 as distributions build it
	BurnGo     = "burngo"     // the same in Go
	PingPong   = "pingpong"   // context switches on one CPU
	DirectRead = "directread" // block reads, by number
	NamedIO    = "namedio"    // reads in one function, syncs in another; no frame pointers
	Storm      = "storm"      // short-lived processes
	Threads    = "threads"    // hogs and sleepers that all live to the end
	BadELF     = "badelf"     // runs code of a corrupt file
	Phases     = "phases"     // computes, and waits in five ways
	ShellStorm = "shellstorm" // sh, ls, expr, sed and gcc, over and over
)

// BurnShares are the designed shares of the CPU time of a burn program, in percent, by
// the last part of the function's name.
var BurnShares = map[string]float64{"fifty": 50, "thirty": 30, "twenty": 20}

// A workload is built from one source file, or a Go package, by one command.
var builds = map[string][]string{
	Burn:       {"g++", "-O2", "-g", "-fno-omit-frame-pointer", "-mno-omit-leaf-frame-pointer", "-pthread", "src/burn.cc"},
	BurnNoFP:   {"g++", "-O2", "-g", "-fomit-frame-pointer", "-pthread", "src/burn.cc"},
	BurnGo:     {"go", "build", "./burngo"},
	PingPong:   {"gcc", "-O2", "-g", "src/pingpong.c"},
	DirectRead: {"gcc", "-O2", "-g", "src/directread.c"},
	NamedIO:    {"gcc", "-O2", "-g", "-fomit-frame-pointer", "src/namedio.c"},
	Storm:      {"gcc", "-O2", "-g", "src/storm.c"},
	Threads:    {"gcc", "-O2", "-g", "-pthread", "src/threads.c"},
	BadELF:     {"gcc", "-O2", "-g", "src/badelf.c"},
	Phases:     {"gcc", "-O2", "-g", "-pthread", "src/phases.c"},
	ShellStorm: {"gcc", "-O2", "-g", "src/shellstorm.c"},
}

// Names lists the workloads.
func Names() []string {
	var names []string
	for name := range builds {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// source is the directory of this package, where the sources are.
func source() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(file)
}

// Python returns the command line of burn.py without its argument, or nil where no
// Python 3 is installed.
func Python() []string {
	for _, name := range []string{"/usr/bin/python3", "python3"} {
		if path, err := exec.LookPath(name); err == nil {
			return []string{path, filepath.Join(source(), "src/burn.py")}
		}
	}
	return nil
}

// Compile builds a workload into dir with the compilers of this machine (gcc, g++, go)
// and returns the path of the executable, whose base name is the workload's.
func Compile(dir, name string) (string, error) {
	command, ok := builds[name]
	if !ok {
		return "", fmt.Errorf("build workload %q: there are only %s", name, strings.Join(Names(), ", "))
	}
	out := filepath.Join(dir, name)
	// The flag stands before the sources: go build takes none after them.
	args := slices.Concat(command[1:len(command)-1], []string{"-o", out}, command[len(command)-1:])
	cmd := exec.Command(command[0], args...)
	cmd.Dir = source()
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build workload %s: %w\n%s", name, err, bytes.TrimSpace(text))
	}
	return out, nil
}

// Corrupt copies the executable at path to dir and scrambles what an ELF reader looks at
// and the kernel does not: the section headers, and what the notes and the symbol and
// string tables hold. The copy still runs. Its name is path's with "-corrupt" behind.
func Corrupt(dir, path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("corrupt a copy: %w", err)
	}
	if err := scramble(b); err != nil {
		return "", fmt.Errorf("corrupt a copy of %s: %w", path, err)
	}
	out := filepath.Join(dir, filepath.Base(path)+"-corrupt")
	if err := os.WriteFile(out, b, 0o755); err != nil {
		return "", fmt.Errorf("corrupt a copy: %w", err)
	}
	return out, nil
}

// Numbers reads a line of words and numbers in turn, as the workloads print their
// results: "reads 1009 bytes 4132864".
func Numbers(text string) (map[string]int64, error) {
	fields := strings.Fields(text)
	if len(fields)%2 != 0 {
		return nil, fmt.Errorf("parse workload's result %q: a name without a number", text)
	}
	numbers := make(map[string]int64)
	for i := 0; i < len(fields); i += 2 {
		n, err := strconv.ParseInt(fields[i+1], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("parse workload's result %q: %w", text, err)
		}
		numbers[fields[i]] = n
	}
	return numbers, nil
}
