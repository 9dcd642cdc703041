// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
)

func TestParseMapsLine(t *testing.T) {
	for _, test := range []struct {
		line string
		want *vma
	}{
		{"55d4c8a00000-55d4c8a25000 r-xp 00002000 fe:01 131 /usr/bin/cat\n",
			&vma{0x55d4c8a00000, 0x55d4c8a25000, 0x2000, 0xfe, 1, 131, "/usr/bin/cat", 0}},
		{"7f1000-7f2000 rwxs 00000000 00:01 2051                       /memfd:jit (deleted)\n",
			&vma{0x7f1000, 0x7f2000, 0, 0, 1, 2051, "/memfd:jit (deleted)", 0}},
		{"7f1000-7f2000 r-xp 00000000 00:00 0 \n", &vma{start: 0x7f1000, end: 0x7f2000}},
		{"7f1000-7f2000 r-xp 00000000 00:00 0", &vma{start: 0x7f1000, end: 0x7f2000}},
		{"7fffe000-7ffff000 r-xp 00000000 00:00 0                  [vdso]\n",
			&vma{start: 0x7fffe000, end: 0x7ffff000, path: "[vdso]"}},
		{"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]\n",
			&vma{start: 0xffffffffff600000, end: 0xffffffffff601000, path: "[vsyscall]"}},
		{`1000-2000 r-xp 00000000 103:05 18446744073709551615 /a b\012c` + "\n",
			&vma{0x1000, 0x2000, 0, 0x103, 5, 1<<64 - 1, "/a b\nc", 0}},
		{"1000-2000 r--p 00000000 fe:01 131 /usr/bin/cat\n", nil},
		{"2000-1000 r-xp 00000000 fe:01 131 /usr/bin/cat\n", nil},
		{"1000-2000 r-xp 00000000 fe:01 131x /usr/bin/cat\n", nil},
		{"1000-2000 r-xp 00000000 fe01 131 /usr/bin/cat\n", nil},
		{"1000-2000 x\n", nil},
		{"\n", nil},
		{"", nil},
	} {
		p := newProcfs("")
		v, path, ok := parseMapsLine([]byte(test.line))
		if !ok {
			if test.want != nil {
				t.Errorf("%q: not parsed", test.line)
			}
			continue
		}
		v.path = p.intern(path)
		if test.want == nil || v != *test.want {
			t.Errorf("%q: %+v, want %+v", test.line, v, test.want)
		}
	}
}

func FuzzParseMapsLine(f *testing.F) {
	f.Add([]byte("55d4c8a00000-55d4c8a25000 r-xp 00002000 fe:01 131 /usr/bin/cat\n"))
	f.Add([]byte("1000-2000 r-xp 00000000 00:00 0"))
	f.Fuzz(func(t *testing.T, line []byte) {
		if v, _, ok := parseMapsLine(line); ok && v.start >= v.end {
			t.Errorf("%q: %+v", line, v)
		}
	})
}

func TestParseStat(t *testing.T) {
	rest := " S 1 2 3 4 5 4194560 7 8 9 10 11 12 13 14 15 16 3 18 4242 20\n"
	cat := procStat{comm: bpf.MakeComm("cat"), threads: 3, start: 4242}
	for _, test := range []struct {
		stat string
		want procStat
		ok   bool
	}{
		{"12 (cat)" + rest, cat, true},
		{"12 (a) b (c)" + rest, procStat{comm: bpf.MakeComm("a) b (c"), threads: 3, start: 4242}, true},
		{"12 ()" + rest, procStat{threads: 3, start: 4242}, true},
		{strings.Replace("12 (cat)"+rest, "4194560", "69238880", 1), procStat{bpf.MakeComm("cat"), true, 3, 4242}, true},
		{"12 (cat) S 1 2", procStat{}, false},
		{"12 cat" + rest, procStat{}, false},
		{"12 )cat(" + rest, procStat{}, false},
		{strings.Replace("12 (cat)"+rest, "4242", "x", 1), procStat{}, false},
		{"", procStat{}, false},
	} {
		got, err := parseStat([]byte(test.stat))
		if (err == nil) != test.ok || test.ok && got != test.want {
			t.Errorf("%q: %+v %v, want %+v", test.stat, got, err, test.want)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("12 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20\n"))
	f.Fuzz(func(t *testing.T, stat []byte) { parseStat(stat) })
}

// fakeProcess writes what procfs reads of a process.
func fakeProcess(t *testing.T, root string, pid int, comm string, startTicks uint64, maps string) {
	t.Helper()
	dir := filepath.Join(root, fmt.Sprint(pid))
	write(t, filepath.Join(dir, "maps"), maps)
	write(t, filepath.Join(dir, "stat"), fmt.Sprintf("%d (%s) S%s %d 20\n", pid, comm, strings.Repeat(" 0", 18), startTicks))
}

func TestProcfsMappings(t *testing.T) {
	root := t.TempDir()
	const maps = "1000-2000 r--p 00000000 fe:01 7 /bin/a\n2000-3000 r-xp 00001000 fe:01 7 /bin/a\n9000-a000 r-xp 00000000 00:00 0\n"
	fakeProcess(t, root, 42, "a", 100, maps)
	fakeProcess(t, root, 43, "a", 100, "")
	write(t, filepath.Join(root, "43/task/44/maps"), maps)
	fakeProcess(t, root, 45, "a", 100, "")
	want := []vma{
		{0x2000, 0x3000, 0x1000, 0xfe, 1, 7, "/bin/a", 0},
		{start: 0x9000, end: 0xa000},
	}
	for _, test := range []struct {
		name string
		s    bpf.Sample
		err  error
	}{
		{"alive", bpf.Sample{PID: 42, Start: 1_009_999_999, Comm: bpf.MakeComm("a")}, nil},
		{"main thread gone", bpf.Sample{PID: 43, TID: 44, Start: 1_000_000_000, Comm: bpf.MakeComm("a")}, nil},
		{"other thread gone", bpf.Sample{PID: 43, TID: 43, Start: 1_000_000_000, Comm: bpf.MakeComm("a")}, errExited},
		{"gone", bpf.Sample{PID: 41, Start: 1_000_000_000, Comm: bpf.MakeComm("a")}, errExited},
		{"zombie", bpf.Sample{PID: 45, TID: 45, Start: 1_000_000_000, Comm: bpf.MakeComm("a")}, errExited},
		{"id used again", bpf.Sample{PID: 42, Start: 990_000_000, Comm: bpf.MakeComm("a")}, errExited},
		{"another program", bpf.Sample{PID: 42, Start: 1_000_000_000, Comm: bpf.MakeComm("b")}, errReplaced},
	} {
		got, err := newProcfs(root).mappings(&test.s)
		if !errors.Is(err, test.err) {
			t.Errorf("%s: %v, want %v", test.name, err, test.err)
		}
		if test.err == nil {
			if d := cmp.Diff(want, got, cmp.AllowUnexported(vma{})); d != "" {
				t.Errorf("%s: %s", test.name, d)
			}
		}
	}
}

// A file is opened by its mapping, else by a path that still leads to it, and only if it
// is a regular file.
func TestProcfsOpen(t *testing.T) {
	root, dir := t.TempDir(), t.TempDir()
	file := filepath.Join(dir, "file")
	write(t, file, "mapped")
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	v := vma{start: 0x1000, end: 0x2000, major: unix.Major(st.Dev), minor: unix.Minor(st.Dev), inode: st.Ino, path: file}
	p := newProcfs(root)
	read := func() (string, error) {
		f, err := p.open(42, v)
		if err != nil {
			return "", err
		}
		defer f.Close()
		b, err := io.ReadAll(f)
		return string(b), err
	}

	// By the path, in our own root: the process is gone.
	if got, err := read(); got != "mapped" {
		t.Errorf("process gone: %q, %v", got, err)
	}
	// By the path in the root of the process, where the file of that path is another one.
	write(t, filepath.Join(root, "42/root", file), "in the container")
	if got, err := read(); got != "mapped" {
		t.Errorf("other file in the root of the process: %q, %v", got, err)
	}
	// Nowhere.
	if err := os.Rename(file, file+".old"); err != nil {
		t.Fatal(err)
	}
	write(t, file, "another")
	if got, err := read(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("replaced file: %q, %v", got, err)
	}
	// By the mapping.
	if err := os.MkdirAll(filepath.Join(root, "42/map_files"), 0o755); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(root, "42/map_files/1000-2000")
	if err := os.Symlink(file+".old", link); err != nil {
		t.Fatal(err)
	}
	if got, err := read(); got != "mapped" {
		t.Errorf("mapping: %q, %v", got, err)
	}
	// A FIFO would block, a device do anything.
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(link, 0o644); err != nil {
		t.Fatal(err)
	}
	v.path = "/memfd:x (deleted)"
	if _, err := read(); err == nil {
		t.Error("a FIFO was opened")
	}
}
