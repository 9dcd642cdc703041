// SPDX-License-Identifier: Apache-2.0

// Package repository tests what no package owns: the first lines of the files and what
// is shipped beside the binary.
package repository

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const root = "../.."

// license returns the SPDX expression that a file has to begin with, "" if it needs none.
func license(path string) string {
	name := filepath.Base(path)
	switch {
	case strings.Contains(name, "_bpfel"):
		return "" // bpf2go's
	case strings.HasSuffix(name, ".bpf.c"), strings.HasSuffix(name, ".h") && strings.HasPrefix(path, "bpf/"):
		return "(GPL-2.0-only OR BSD-2-Clause)"
	}
	switch filepath.Ext(name) {
	case ".go", ".c", ".cc", ".cpp", ".h", ".rs", ".sh", ".yml", ".yaml", ".service":
		return "Apache-2.0"
	}
	if name == "Makefile" || strings.HasPrefix(path, ".ci/") {
		return "Apache-2.0"
	}
	return ""
}

// hasLicense looks at the first lines only: what comes before may be a build constraint or
// the line that names the interpreter.
func hasLicense(content []byte, expression string) bool {
	head := bytes.SplitN(content, []byte("\n"), 4)
	for _, line := range head[:min(3, len(head))] {
		_, after, found := bytes.Cut(line, []byte("SPDX-License-Identifier: "))
		if found {
			after = bytes.TrimSpace(bytes.TrimSuffix(bytes.TrimSpace(after), []byte("*/")))
			return string(after) == expression
		}
	}
	return false
}

func TestLicenses(t *testing.T) {
	checked := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			switch {
			case rel == ".git", rel == "bin", d.Name() == "testdata":
				return filepath.SkipDir
			}
			return nil
		}
		want := license(rel)
		if want == "" {
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		checked++
		if !hasLicense(content, want) {
			t.Errorf("%s: the first three lines have no  SPDX-License-Identifier: %s", rel, want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if checked < 20 {
		t.Errorf("only %d files were checked", checked)
	}
}

// TestUnit has systemd judge the unit, in a root that has what the unit names.
func TestUnit(t *testing.T) {
	verify, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze: apt-get install systemd")
	}
	dir := t.TempDir()
	unit, err := os.ReadFile(filepath.Join(root, "deploy/hostflame.service"))
	if err != nil {
		t.Fatal(err)
	}
	write := func(path string, mode fs.FileMode, content []byte) {
		t.Helper()
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, mode); err != nil {
			t.Fatal(err)
		}
	}
	write("usr/local/bin/hostflame", 0o755, []byte("#!/bin/sh\n"))
	write("etc/systemd/system/hostflame.service", 0o644, unit)
	for _, target := range []string{"sysinit", "basic", "network", "multi-user", "shutdown"} {
		write("usr/lib/systemd/system/"+target+".target", 0o644, []byte("[Unit]\nDescription="+target+"\n"))
	}
	// An unknown key is a warning only, and the exit code is 0: nothing may be said at all.
	out, err := exec.Command(verify, "verify", "--root="+dir, "--man=no", "hostflame.service").CombinedOutput()
	if err != nil || len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}
