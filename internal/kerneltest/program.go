// SPDX-License-Identifier: Apache-2.0

package kerneltest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// A Program is a workload that kernel tests start.
type Program struct {
	Name string
	// Source is below the root of the module: a file of C, C++ or assembler, or else the
	// folder of a Go command.
	Source string
	// Flags are the compiler's, after -O2 -g -Wall -Werror. Without -static, the virtual
	// machine gets the shared libraries that the program needs, too.
	Flags []string
	// Arch is the only architecture, in Go's words, that the program is for, if not empty.
	Arch string
}

// Programs are all workloads of the kernel tests. test/kernels builds them beforehand,
// for the virtual machine has no compiler.
var Programs = []Program{
	{Name: "known", Source: "bpf/testdata/known.c", Flags: []string{"-static", "-pthread"}},
	{Name: "signals", Source: "test/workload/src/signals.c", Flags: []string{"-static", "-pthread"}},
	{Name: "threads", Source: "test/workload/src/threads.c", Flags: []string{"-static", "-pthread"}},
	{Name: "waiters", Source: "bpf/testdata/waiters.c", Flags: []string{"-static", "-pthread"}},
}

// ProgramsVariable names the environment variable with the folder of the programs that
// were built beforehand, if there is one.
const ProgramsVariable = "HOSTFLAME_TEST_PROGRAMS"

// Build compiles the program into dir, for arch in Go's words, and returns its path.
// root is the root of the module. cross is what stands before the names of the compilers,
// as in aarch64-linux-gnu-, empty for those of this machine.
func (p Program) Build(root, arch, cross, dir string) (string, error) {
	out := filepath.Join(dir, p.Name)
	compiler := "gcc"
	switch filepath.Ext(p.Source) {
	case ".c", ".S":
	case ".cc", ".cpp":
		compiler = "g++"
	default:
		cmd := exec.Command("go", append(append([]string{"build", "-o", out}, p.Flags...), "./"+p.Source)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
		return out, p.run(cmd, root)
	}
	args := append([]string{"-O2", "-g", "-Wall", "-Werror", "-o", out, p.Source}, p.Flags...)
	return out, p.run(exec.Command(cross+compiler, args...), root)
}

func (p Program) run(cmd *exec.Cmd, root string) error {
	cmd.Dir = root
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build program %s: %s: %w\n%s", p.Name, strings.Join(cmd.Args, " "), err, text)
	}
	return nil
}

// BuildProgram returns the path of the program of that name in Programs, built for this
// machine. The file lives until the test ends.
func BuildProgram(t testing.TB, name string) string {
	t.Helper()
	p, err := program(name)
	if err != nil {
		t.Fatal(err)
	}
	if p.Arch != "" && p.Arch != runtime.GOARCH {
		t.Skipf("program %s is for %s", name, p.Arch)
	}
	if dir := os.Getenv(ProgramsVariable); dir != "" {
		return filepath.Join(dir, name)
	}
	root, err := ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	path, err := p.Build(root, runtime.GOARCH, "", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func program(name string) (Program, error) {
	for _, p := range Programs {
		if p.Name == name {
			return p, nil
		}
	}
	return Program{}, fmt.Errorf("no program %s in kerneltest.Programs", name)
}

// ModuleRoot returns the folder of go.mod, at or above the working directory.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		_, err := os.Stat(filepath.Join(dir, "go.mod"))
		if err == nil {
			return dir, nil
		}
		if up := filepath.Dir(dir); up != dir && errors.Is(err, os.ErrNotExist) {
			dir = up
			continue
		}
		return "", fmt.Errorf("find the root of the module: %w", err)
	}
}
