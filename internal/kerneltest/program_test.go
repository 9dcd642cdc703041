// SPDX-License-Identifier: Apache-2.0

package kerneltest

import (
	"os"
	"path/filepath"
	"testing"
)

func TestProgramsHaveSources(t *testing.T) {
	root, err := ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, p := range Programs {
		if seen[p.Name] {
			t.Errorf("%s: twice", p.Name)
		}
		seen[p.Name] = true
		if _, err := os.Stat(filepath.Join(root, p.Source)); err != nil {
			t.Errorf("%s: %v", p.Name, err)
		}
	}
}

func TestProgramIsTheOneBuiltBeforehand(t *testing.T) {
	t.Setenv(ProgramsVariable, "/programs")
	if path := BuildProgram(t, Programs[0].Name); path != "/programs/"+Programs[0].Name {
		t.Errorf("%s: %s", Programs[0].Name, path)
	}
	if _, err := program("no such program"); err == nil {
		t.Error("no error for a program that is not listed")
	}
}
