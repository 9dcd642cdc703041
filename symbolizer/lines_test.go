// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"debug/elf"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/elffile"
)

// addressOf is the address of a symbol.
func addressOf(t testing.TB, path, name string) uint64 {
	t.Helper()
	syms := symbolsOf(t, path)[name]
	if len(syms) != 1 {
		t.Fatalf("%d symbols %s in %s", len(syms), name, path)
	}
	return syms[0].Value
}

// describe is a result in one line: innermost first, with the lines.
func describe(r Result) string {
	if len(r.Lines) == 0 {
		return "(" + string(r.Reason) + ")"
	}
	var s []string
	for _, l := range r.Lines {
		s = append(s, fmt.Sprintf("%s:%d<%d", l.Function, l.Line, l.StartLine))
	}
	return strings.Join(s, " ")
}

// TestInlinedCalls: the chain, innermost first, with the lines of the calls and where the
// functions start, while the debug information is being read and after.
func TestInlinedCalls(t *testing.T) {
	path := buildC(t, deepC, "-g", "-O2")
	addr := addressOf(t, path, "outer")
	want := "outer:5<5" // its first instruction
	s := newSymbolizer(t, Config{})
	o := openObject(t, s, path)
	first := o.Symbolize([]uint64{addr})[0]
	if first.Provisional && describe(first) != "outer:0<0" || !first.Provisional && describe(first) != want {
		t.Errorf("at first: %s, provisional %v", describe(first), first.Provisional)
	}
	waitForIndex(t, s)
	if r := o.Symbolize([]uint64{addr})[0]; r.Provisional || describe(r) != want {
		t.Errorf("%s, provisional %v, want %s", describe(r), r.Provisional, want)
	}
	chains := map[string]bool{}
	var addrs []uint64
	for a := range uint64(64) {
		addrs = append(addrs, addr+a)
	}
	for _, r := range o.Symbolize(addrs) {
		chains[describe(r)] = true
	}
	if !chains["leaf:3<3 middle:4<4 outer:5<5"] {
		t.Errorf("no call of leaf in middle in outer among %v", chains)
	}
}

func waitForIndex(t testing.TB, s *Symbolizer) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); s.Stats().Index.Waiting > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the index is not ready")
		}
	}
}

func openTestCache(t testing.TB, dir string, quota int64) *Cache {
	t.Helper()
	c, err := OpenCache(dir, quota)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// answerOnce symbolizes all code of a file with a cache directory and returns the answers
// and what was done.
func answerOnce(t testing.TB, path, dir string) ([]string, IndexStats) {
	t.Helper()
	s := newSymbolizer(t, Config{Cache: openTestCache(t, dir, 64<<20), WaitForIndex: true})
	o := openObject(t, s, path)
	var answers []string
	for _, r := range o.Symbolize(codeAddresses(t, path, 5000)) {
		answers = append(answers, describe(r))
	}
	return answers, s.Stats().Index
}

func indexFiles(t testing.TB, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"+indexSuffix))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestIndexIsKept: an index is made once, and found again by the file's version and by
// what it is made of.
func TestIndexIsKept(t *testing.T) {
	path := buildC(t, deepC, "-g", "-O2")
	dir := filepath.Join(t.TempDir(), "cache")
	want, st := answerOnce(t, path, dir)
	if st.Built != 1 || st.Loaded != 0 || len(indexFiles(t, dir)) != 1 {
		t.Fatalf("first: %+v, files %v", st, indexFiles(t, dir))
	}
	got, st := answerOnce(t, path, dir)
	if st.Built != 0 || st.Loaded != 1 || !slices.Equal(got, want) {
		t.Errorf("second: %+v, same answers %v", st, slices.Equal(got, want))
	}
	// A copy is another version with the same content.
	other := filepath.Join(t.TempDir(), filepath.Base(path)) // made-up names tell the file
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(other, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if got, st = answerOnce(t, other, dir); st.Built != 0 || st.Loaded != 1 || !slices.Equal(got, want) {
		t.Errorf("copy: %+v", st)
	}
	// One that has the build id and the size, and other lines, is no copy.
	line := lineSection(t, path)
	b[line.Offset+line.Size-8] ^= 1
	if err := os.WriteFile(other, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, st = answerOnce(t, other, dir); st.Built != 1 {
		t.Errorf("another file with the same build id: %+v", st)
	}
}

func lineSection(t testing.TB, path string) *elf.Section {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return f.Section(".debug_line")
}

// TestDamagedIndex: what is not what was written is refused, removed and made again.
func TestDamagedIndex(t *testing.T) {
	path := buildC(t, deepC, "-g", "-O2")
	dir := filepath.Join(t.TempDir(), "cache")
	want, _ := answerOnce(t, path, dir)
	file := indexFiles(t, dir)[0]
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	foreignDir := filepath.Join(t.TempDir(), "cache")
	answerOnce(t, buildC(t, deepC, "-g", "-O1"), foreignDir)
	foreign, err := os.ReadFile(indexFiles(t, foreignDir)[0])
	if err != nil {
		t.Fatal(err)
	}
	damaged := map[string][]byte{"empty": {}, "half": good[:len(good)/2], "longer": append(slices.Clone(good), 0), "of another binary": foreign}
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 40 {
		b := slices.Clone(good)
		at := rnd.IntN(len(b))
		b[at] ^= 1 << rnd.IntN(8)
		damaged[fmt.Sprintf("bit of byte %d", at)] = b
	}
	for name, b := range damaged {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		got, st := answerOnce(t, path, dir)
		if st.Built != 1 || st.Loaded != 0 || !slices.Equal(got, want) {
			t.Errorf("%s: %+v, same answers %v", name, st, slices.Equal(got, want))
		}
		if b, err := os.ReadFile(file); err != nil || len(b) != len(good) {
			t.Errorf("%s: not replaced: %d bytes, %v", name, len(b), err)
		}
	}
	// A FIFO and a link in its place.
	for name, put := range map[string]func() error{
		"FIFO": func() error { return unix.Mkfifo(file, 0o600) },
		"link": func() error { return os.Symlink("/etc/passwd", file) },
	} {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if err := put(); err != nil {
			t.Fatal(err)
		}
		if got, _ := answerOnce(t, path, dir); !slices.Equal(got, want) {
			t.Errorf("%s: other answers", name)
		}
	}
}

// TestIndexShrinks: an index that is cut off while it is in use costs its lines, not the
// agent.
func TestIndexShrinks(t *testing.T) {
	path := buildCXX(t, deepSource, "-g", "-O2")
	dir := filepath.Join(t.TempDir(), "cache")
	s := newSymbolizer(t, Config{Cache: openTestCache(t, dir, 64<<20), WaitForIndex: true})
	o := openObject(t, s, path)
	addr := addressOf(t, path, "main")
	if r := o.Symbolize([]uint64{addr})[0]; r.Lines[0].Line == 0 {
		t.Fatalf("%s", describe(r))
	}
	if err := os.Truncate(indexFiles(t, dir)[0], 0); err != nil {
		t.Fatal(err)
	}
	if r := o.Symbolize([]uint64{addr})[0]; describe(r) != "main:0<0" {
		t.Errorf("%s, want the name from the symbol table", describe(r))
	}
}

// TestCacheQuota: the least recently used index goes, and links that lead to it.
func TestCacheQuota(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	old := buildC(t, deepC, "-g", "-O2")
	answerOnce(t, old, dir)
	oldFile := indexFiles(t, dir)[0]
	past := time.Now().Add(-2 * touchAfter)
	if err := os.Chtimes(oldFile, past, past); err != nil {
		t.Fatal(err)
	}
	answerOnce(t, buildC(t, deepC, "-g", "-O1"), dir)
	c := openTestCache(t, dir, 64<<20)
	c.quota = 1
	for _, f := range indexFiles(t, dir) {
		if fi, err := os.Stat(f); err == nil && f != oldFile {
			c.quota = fi.Size()
		}
	}
	evicted, err := c.trim()
	if err != nil || evicted != 1 || c.bytes.Load() != c.quota {
		t.Errorf("%d evicted, %d bytes of %d left, %v", evicted, c.bytes.Load(), c.quota, err)
	}
	if _, err := os.Stat(oldFile); err == nil {
		t.Error("the older index is still there")
	}
	links, err := filepath.Glob(filepath.Join(dir, "*"+versionSuffix))
	if err != nil || len(links) != 1 {
		t.Errorf("links %v, %v", links, err)
	}
	foreign := t.TempDir()
	if err := os.Chown(foreign, 1234, 1234); err != nil {
		t.Skip("not root")
	}
	if _, err := OpenCache(foreign, 1<<20); err == nil {
		t.Error("took a directory of another user")
	}
}

// TestVmlinux: lines and inlined functions of the kernel, which has moved, from the file
// with its build id, and from no other.
func TestVmlinux(t *testing.T) {
	source := strings.Replace(deepC, "int main(int c, char **v) {", "int _start(int c) {", 1)
	source = strings.ReplaceAll(source, "abort()", "__builtin_trap()")
	path := buildC(t, source, "-g", "-O2", "-nostdlib", "-static", "-fno-pie", "-no-pie", "-mcmodel=kernel", "-Wl,-Ttext=0xffffffff81000000", "-Wl,--build-id=sha1")
	root, sys := t.TempDir(), t.TempDir()
	const slide = 0x1200000
	const release = "6.1.0-test"
	outer := addressOf(t, path, "outer")
	kallsyms := fmt.Sprintf("%x T _stext\n%x T outer\n%x T _etext\n", uint64(0xffffffff81000000)+slide, outer+slide, uint64(0xffffffff81100000)+slide)
	proc := fakeProc(t, kallsyms, "")
	if err := os.MkdirAll(filepath.Join(proc, "sys/kernel"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(proc, "sys/kernel/osrelease"), []byte(release+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	notes, err := f.Section(".note.gnu.build-id").Data()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(sys, "kernel"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(sys, "kernel/notes"), notes, 0o644); err != nil {
		t.Fatal(err)
	}
	boot := filepath.Join(root, "boot")
	if err := os.MkdirAll(boot, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, boot, nil, "cp", path, "vmlinux-"+release)
	ask := func() Result {
		s := newSymbolizer(t, Config{Proc: proc, Sys: sys, Root: root, WaitForIndex: true})
		return s.Kernel([]uint64{outer + slide})[0]
	}
	if r := ask(); describe(r) != "outer:5<5" || r.Module != kernelFile {
		t.Errorf("%s of %s, want outer with its line", describe(r), r.Module)
	}
	notes[len(notes)-1] ^= 1
	if err := os.WriteFile(filepath.Join(sys, "kernel/notes"), notes, 0o644); err != nil {
		t.Fatal(err)
	}
	if r := ask(); describe(r) != "outer:0<0" {
		t.Errorf("%s from a file with another build id", describe(r))
	}
}

// TestVDSOLines: the vDSO's debug file is found by its build id, and no other is taken.
func TestVDSOLines(t *testing.T) {
	path := buildC(t, strings.ReplaceAll(strings.ReplaceAll(deepC, "abort()", "__builtin_trap()"), "main", "last"), "-g", "-O2", "-shared", "-fPIC", "-nostdlib", "-Wl,--build-id=sha1")
	image, err := os.ReadFile(stripped(t, path))
	if err != nil {
		t.Fatal(err)
	}
	proc, root := t.TempDir(), t.TempDir()
	dir := filepath.Join(root, "lib/modules/6.1.0-test/vdso")
	for _, d := range []string{dir, filepath.Join(proc, "self"), filepath.Join(proc, "sys/kernel")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(proc, "self/maps"), fmt.Sprintf("1000-%x r-xp 00000000 00:00 0                          [vdso]\n", 0x1000+len(image)))
	writeFile(t, filepath.Join(proc, "self/mem"), string(append(make([]byte, 0x1000), image...)))
	writeFile(t, filepath.Join(proc, "sys/kernel/osrelease"), "6.1.0-test\n")
	syms := nmText(t, path)
	outer := syms[slices.IndexFunc(syms, func(s nmSymbol) bool { return s.name == "outer" })].addr
	ask := func() string {
		o, err := newSymbolizer(t, Config{Proc: proc, Root: root, WaitForIndex: true}).VDSO()
		if err != nil {
			t.Fatal(err)
		}
		return describe(o.Symbolize([]uint64{outer})[0])
	}
	if got := ask(); got != "outer:0<0" {
		t.Errorf("%s without a debug file", got)
	}
	run(t, dir, nil, "cp", buildC(t, deepC+"int more;", "-g", "-O2", "-shared", "-fPIC", "-Wl,--build-id=sha1"), "vdso64.so")
	if got := ask(); got != "outer:0<0" {
		t.Errorf("%s from a file with another build id", got)
	}
	run(t, dir, nil, "cp", path, "vdso64.so.dbg")
	if got := ask(); got != "outer:5<5" {
		t.Errorf("%s, want outer with its line", got)
	}
}

// TestContainer: a process in namespaces of its own, whose binary was deleted and whose
// debug file, jitdump and perf map are only in its own root.
func TestContainer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root")
	}
	// The marker of a jitdump is a mapping of it that can be executed.
	source := strings.Replace(deepC, "int main(int c, char **v) {", `
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
int main(int c, char **v) {
	mmap(0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, open("/tmp/jit-1.dump", O_RDONLY), 0);
	pause();`, 1)
	path := buildC(t, source, "-g", "-O2", "-static", "-no-pie")
	root := t.TempDir()
	for _, d := range []string{"app/.debug", "proc", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	bin := filepath.Join(root, "app/hostflame-test")
	run(t, root, nil, "objcopy", "--only-keep-debug", path, filepath.Join(root, "app/.debug/hostflame-test.debug"))
	run(t, root, nil, "strip", "-R", ".note.gnu.build-id", "-o", bin, path)
	run(t, filepath.Join(root, "app/.debug"), nil, "objcopy", "--remove-section=.note.gnu.build-id", "hostflame-test.debug")
	run(t, filepath.Join(root, "app/.debug"), nil, "objcopy", "--add-gnu-debuglink=hostflame-test.debug", bin)
	dump := newJITFile()
	dump.load(0x7f0000001000, 0x100, "_ZN3jit4glueEv")
	writeFile(t, filepath.Join(root, "tmp/jit-1.dump"), string(dump))
	cmd := exec.Command("unshare", "--mount", "--pid", "--fork", "--kill-child", "chroot", root, "/app/hostflame-test")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	pid := ""
	for end := time.Now().Add(10 * time.Second); pid == "" && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range strings.Fields(string(children)) {
			if exe, err := os.Readlink("/proc/" + c + "/exe"); err == nil && strings.HasSuffix(exe, "hostflame-test") {
				pid = c
			}
		}
	}
	if pid == "" {
		t.Fatal("the process has not started")
	}
	if err := os.Remove(bin); err != nil {
		t.Fatal(err)
	}
	s := newSymbolizer(t, Config{WaitForIndex: true})
	o, err := s.Object(File{
		Path:  "/app/hostflame-test",
		Open:  func() (*os.File, error) { return os.Open("/proc/" + pid + "/exe") },
		Roots: []string{"/proc/" + pid + "/root", "/"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if r := o.Symbolize([]uint64{addressOf(t, path, "outer")})[0]; describe(r) != "outer:5<5" {
		t.Errorf("%s, want outer with its line; sources %v", describe(r), o.Sources())
	}

	number, err := strconv.ParseUint(pid, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	named := func(want string) {
		t.Helper()
		var got string
		for end := time.Now().Add(10 * time.Second); got != want && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			got = nameAt(t, newSymbolizer(t, Config{}).PerfMap(uint32(number)), 0x7f0000001010)
		}
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	named("jit::glue")
	writeFile(t, filepath.Join(root, "tmp/perf-1.map"), "7f0000001000 100 by_perf_map\n")
	named("by_perf_map")
	if err := os.Remove(filepath.Join(root, "tmp/perf-1.map")); err != nil {
		t.Fatal(err)
	}
	// A dump that is removed is read where it is mapped.
	if err := os.Remove(filepath.Join(root, "tmp/jit-1.dump")); err != nil {
		t.Fatal(err)
	}
	named("jit::glue")
}

// TestDebugFilesStayInRoot: links that lead out of a root, and what is no regular file, are
// not followed and not opened.
func TestDebugFilesStayInRoot(t *testing.T) {
	root, outside := t.TempDir(), t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../../../../.."+secret, filepath.Join(root, "up")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(secret, filepath.Join(root, "absolute")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/proc/self/root"+secret, filepath.Join(root, "magic")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(root, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"up", "absolute", "magic", "fifo", "."} {
		if f, err := elffile.OpenBelow(root, name, nil); err == nil {
			f.Close()
			t.Errorf("%s was opened", name)
		}
	}
	if f, err := elffile.OpenBelow("/", secret, nil); err != nil {
		t.Errorf("a plain file: %v", err)
	} else {
		f.Close()
	}
}

// TestBuildIDPath: an id is digits, and long enough to be one.
func TestBuildIDPath(t *testing.T) {
	for id, want := range map[string]string{
		"":                       "",
		"ab":                     "",
		"../../../etc/passwd":    "",
		"abcdef0123456789":       "/usr/lib/debug/.build-id/ab/cdef0123456789.debug",
		"ABCDEF0123456789":       "",
		"abcdef012345678/":       "",
		strings.Repeat("ab", 65): "",
	} {
		if got := elffile.BuildIDPath(id); got != want {
			t.Errorf("%q: %q, want %q", id, got, want)
		}
	}
}
