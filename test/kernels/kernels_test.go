// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/test/kernels/guest"
)

func TestPattern(t *testing.T) {
	for _, tt := range []struct {
		name string
		want []target
	}{
		{"linux-image-6.1.0-47-cloud-amd64", []target{{"6.1", "amd64"}}},
		{"linux-image-6.12.100+deb12-cloud-amd64", []target{{"6.12", "amd64"}}},
		{"linux-image-6.12.117+deb12-cloud-arm64", []target{{"6.12", "arm64"}}},
		{"linux-image-6.12-cloud-amd64", nil}, // depends on one, and is empty
		{"linux-image-6.1.0-47-cloud-amd64-dbg", nil},
		{"linux-image-6.1.0-47-cloud-amd64-unsigned", nil},
		{"linux-image-6.1.0-47-amd64", nil},
	} {
		var got []target
		for _, k := range matrix {
			if regexp.MustCompile(k.pattern()).MatchString(tt.name) {
				got = append(got, k)
			}
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s is for %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestNumbersSortVersions(t *testing.T) {
	names := []string{
		"linux-image-6.1.0-9-cloud-amd64",
		"linux-image-6.1.0-10-cloud-amd64",
		"linux-image-6.12.99+deb12-cloud-amd64",
		"linux-image-6.12.100+deb12-cloud-amd64",
		"linux-image-6.12.100+deb13-cloud-amd64",
	}
	if !slices.IsSortedFunc(names, func(a, b string) int { return slices.Compare(numbers(a), numbers(b)) }) {
		t.Errorf("not in order: %v", names)
	}
}

func TestDebianSource(t *testing.T) {
	for source, want := range map[string]bool{
		"Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\n":             true,
		"Types: deb\nURIs: http://mirror.example/debian-security/\nSuites: x\n":          true,
		"deb [signed-by=/x.gpg] http://mirror.example/debian bookworm main\n":            true,
		"deb https://packages.example/apt cloud-sdk-bookworm main\n":                     false,
		"# deb http://mirror.example/debian bookworm main\n":                             false,
		"Types: deb\n# http://mirror.example/debian/2025\nURIs: https://deb.example/x\n": false,
	} {
		if got := debianSource.MatchString(source); got != want {
			t.Errorf("%q: %v, want %v", source, got, want)
		}
	}
}

// cpio is the judge of the archive.
func TestInitramfs(t *testing.T) {
	kerneltest.RequireTool(t, "cpio")
	testdata := t.TempDir()
	if err := os.WriteFile(filepath.Join(testdata, "odd"), []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	a := initramfs{mtime: time.Unix(1_700_000_000, 0)}
	a.mkdir("/dev")
	a.add("/init", 0o755, []byte("#!/bin/true\n"))
	a.add("/a/b/c", 0o644, nil)
	a.add("/a/b/d", 0o644, []byte("x"))
	if err := a.addTree("/src/testdata", testdata); err != nil {
		t.Fatal(err)
	}
	archive := a.bytes()

	list := exec.Command("cpio", "--list", "--quiet")
	list.Stdin = strings.NewReader(string(archive))
	out, err := list.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	want := []string{"dev", "init", "a", "a/b", "a/b/c", "a/b/d", "src", "src/testdata", "src/testdata/odd"}
	if got := strings.Fields(string(out)); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	dir := t.TempDir()
	extract := exec.Command("cpio", "--extract", "--quiet", "--preserve-modification-time")
	extract.Dir, extract.Stdin = dir, strings.NewReader(string(archive))
	if out, err := extract.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, want := range map[string]string{"init": "#!/bin/true\n", "a/b/c": "", "a/b/d": "x", "src/testdata/odd": "12345"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); string(b) != want || err != nil {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	st, err := os.Stat(filepath.Join(dir, "init"))
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() != 0o755 {
		t.Errorf("mode of init: %v", st.Mode())
	}
	if !st.ModTime().Equal(a.mtime) {
		t.Errorf("init is of %v", st.ModTime())
	}
}

func TestFollow(t *testing.T) {
	const console = "[    0.1] Linux\r\n\r\n=== RUN   TestA\r\n--- PASS: TestA (0.0s)\r\n" +
		guest.Mark + `{"Name":"a","Seconds":1.5}` + "\r\n" +
		"[    0.2] late" + guest.Mark + `{"Name":"b","Error":"exit status 1","Kernel":["BUG: x","y"]}` + "\r\nend"
	var lines []string
	verdicts, err := follow(strings.NewReader(console), func(line string) { lines = append(lines, line) })
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"[    0.1] Linux", "=== RUN   TestA", "--- PASS: TestA (0.0s)", "end"}; !slices.Equal(lines, want) {
		t.Errorf("lines %q, want %q", lines, want)
	}
	plan := func(names ...string) (p guest.Plan) {
		for _, n := range names {
			p.Commands = append(p.Commands, guest.Command{Name: n})
		}
		return p
	}
	if err := judge(plan("a"), verdicts); err != nil {
		t.Errorf("a passed: %v", err)
	}
	err = judge(plan("a", "b", "c"), verdicts)
	for _, want := range []string{"b: exit status 1", "b: the kernel complained:\n\tBUG: x\n\ty", "c: the machine ended"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if _, err := follow(strings.NewReader(guest.Mark+"mount /proc: no such device\r\n"), func(string) {}); err == nil {
		t.Error("no error of init")
	}
}

func TestTally(t *testing.T) {
	var n tally
	for _, line := range []string{"--- PASS: TestA (0.0s)", "    --- PASS: TestA/b (0.0s)", "--- FAIL: TestB (0.0s)", "--- SKIP: TestC (0.0s)", "PASS"} {
		n.count(line)
	}
	if want := (tally{1, 1, 1}); n != want {
		t.Errorf("%v, want %v", n, want)
	}
}
