// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// sleeper starts a process that does nothing until the test ends.
func sleeper(t testing.TB) uint32 {
	t.Helper()
	cmd := exec.Command("sleep", "300")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return uint32(cmd.Process.Pid)
}

func perfMapPath(t testing.TB, pid uint32) string {
	path := fmt.Sprintf("/tmp/perf-%d.map", pid)
	t.Cleanup(func() { os.Remove(path) })
	return path
}

func appendFile(t testing.TB, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
}

// lookAgain makes the next call look at the path.
func (pm *PerfMap) lookAgain() {
	pm.mu.Lock()
	pm.lookAfter = time.Time{}
	pm.mu.Unlock()
}

func nameAt(t testing.TB, pm *PerfMap, addr uint64) string {
	t.Helper()
	r := pm.Symbolize([]uint64{addr})[0]
	if (len(r.Lines) == 0) == (r.Reason == "") {
		t.Errorf("%#x: %+v: neither lines nor a reason, or both", addr, r)
	}
	if len(r.Lines) == 0 {
		return "(" + string(r.Reason) + ")"
	}
	return r.Lines[0].Function
}

func TestPerfMapGrows(t *testing.T) {
	pid := sleeper(t)
	path := perfMapPath(t, pid)
	s := newSymbolizer(t, Config{})
	pm := s.PerfMap(pid)
	check := func(addr uint64, want string) {
		t.Helper()
		if got := nameAt(t, pm, addr); got != want {
			t.Errorf("%#x: %s, want %s", addr, got, want)
		}
	}
	check(0x7f0000001000, "(no_perf_map)")

	appendFile(t, path, "7f0000001000 100 LazyCompile:*add /app/math.js:3\n7f0000001100 40 _ZN3jit4glueEv\n")
	pm.lookAgain()
	check(0x7f0000001000, "LazyCompile:*add /app/math.js:3")
	check(0x7f00000010ff, "LazyCompile:*add /app/math.js:3")
	check(0x7f0000001100, "jit::glue")
	check(0x7f0000001140, "(not_found)")
	check(0x7f0000000fff, "(not_found)")

	// A tail, the last line of it unfinished, and code that replaces code.
	appendFile(t, path, "0x7f0000001080 0x100 replaced\n7f0000002000 10 half")
	check(0x7f000000107f, "LazyCompile:*add /app/math.js:3")
	check(0x7f0000001080, "replaced")
	check(0x7f0000001110, "replaced")
	check(0x7f0000002000, "(not_found)")
	appendFile(t, path, " a name\n")
	check(0x7f0000002000, "half a name")

	// Written anew, shorter; and written anew, longer.
	writeFile(t, path, "7f0000003000 10 fresh\n")
	check(0x7f0000003000, "fresh")
	check(0x7f0000001000, "(not_found)")
	writeFile(t, path, "7f0000004000 10 other_contents\n7f0000005000 10 and_longer_than_before\n")
	check(0x7f0000004000, "other_contents")
	check(0x7f0000003000, "(not_found)")

	// Another file under the name.
	writeFile(t, path+".new", "7f0000006000 10 renamed\n")
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	pm.lookAgain()
	check(0x7f0000006000, "renamed")
	check(0x7f0000004000, "(not_found)")

	if s.PerfMap(pid) != pm {
		t.Error("the second call returned another map")
	}
	if st := s.Stats(); st.PerfMaps != 1 || st.TableBytes == 0 {
		t.Errorf("stats: %+v", st)
	}
}

// TestPerfMapOfAGoneProcess: what a process wrote before it went is read after.
func TestPerfMapOfAGoneProcess(t *testing.T) {
	cmd := exec.Command("sleep", "300")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := uint32(cmd.Process.Pid)
	path := perfMapPath(t, pid)
	appendFile(t, path, "7f0000001000 100 first\n")
	s := newSymbolizer(t, Config{})
	pm := s.PerfMap(pid)
	appendFile(t, path, "7f0000002000 100 last\n")
	cmd.Process.Kill()
	cmd.Wait()
	pm.lookAgain()
	if got := nameAt(t, pm, 0x7f0000002000); got != "last" {
		t.Errorf("after the exit: %s", got)
	}
	if s.PerfMap(pid) != pm {
		t.Error("the map of a gone process is forgotten at once")
	}
	if got := nameAt(t, s.PerfMap(1<<22+1), 0x1000); got != "(unreadable)" {
		t.Errorf("a pid that nobody has: %s", got)
	}
}

func TestPerfMapIsNotTrusted(t *testing.T) {
	pid := sleeper(t)
	path := perfMapPath(t, pid)
	s := newSymbolizer(t, Config{})
	pm := s.PerfMap(pid)
	line := "7f0000001000 100 false_name\n"
	check := func(what, want string) {
		t.Helper()
		pm.lookAgain()
		if got := nameAt(t, pm, 0x7f0000001000); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
		os.Remove(path)
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	check("directory", "(not_regular_file)")
	run(t, ".", nil, "mkfifo", path)
	check("FIFO", "(not_regular_file)")
	target := filepath.Join(t.TempDir(), "map")
	writeFile(t, target, line)
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
	check("symbolic link", "(untrusted_file)")
	writeFile(t, path, line)
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	check("older than the process", "(stale_perf_map)")
	if os.Geteuid() == 0 {
		writeFile(t, path, line)
		if err := os.Chown(path, 12345, 12345); err != nil {
			t.Fatal(err)
		}
		check("another user's", "(untrusted_file)")
	}
	writeFile(t, path, line)
	check("its own", "false_name")
}

// TestPerfMapInNamespaces: a process in its own pid and mount namespace writes its map by
// the pid that it sees, into the /tmp that it sees.
func TestPerfMapInNamespaces(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("namespaces need root")
	}
	script := `mount -t tmpfs none /tmp && echo "7f0000001000 100 in_namespace_$$" > /tmp/perf-$$.map && echo ready && read x`
	cmd := exec.Command("unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		cmd.Wait()
	}()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.ParseUint(strings.Fields(string(children))[0], 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	pm := newSymbolizer(t, Config{}).PerfMap(uint32(pid))
	if got := nameAt(t, pm, 0x7f0000001010); got != "in_namespace_1" {
		t.Errorf("%s, want in_namespace_1", got)
	}
}

// perfMapOf reads text in pieces of random size.
func perfMapOf(t testing.TB, text string, limit int64) *perfTable {
	t.Helper()
	p := newPerfTable(limit)
	rnd := rand.New(rand.NewPCG(1, 2))
	for size := int64(0); ; {
		size = min(size+rnd.Int64N(2000)+1, int64(len(text)))
		if err := p.readOn(strings.NewReader(text), size); err != nil {
			t.Fatal(err)
		}
		if size == int64(len(text)) {
			return p
		}
	}
}

func TestPerfMapLines(t *testing.T) {
	text := strings.Join([]string{
		"1000 10 a", "2000 10  two spaces", "bad", "", "3000", "3000 10", "3000 10 ", "3000 0 empty",
		"ffffffff81000000 10 kernel", "fffffffffffffff0 20 wraps", "4000 g not hex", "5000 10 carriage\r",
		"11112222333344445 10 too many digits", "6000 10 control\x01\xff", "7000 1ffffffff too big",
		"8000 10 " + strings.Repeat("x", 3*maxName), "9000 10 after",
	}, "\n") + "\n"
	p := perfMapOf(t, text, 1<<20)
	for addr, want := range map[uint64]string{
		0x1000: "a", 0x2000: "two spaces", 0x3000: "", 0x4000: "", 0x5000: "carriage", 0x6000: "control?\ufffd",
		0x7000: "", 0x9000: "after", 0xffffffff81000000: "", ^uint64(0): "", 0: "",
	} {
		r := p.lookup(addr)
		if want == "" && r.Reason != ReasonNotFound || want != "" && (len(r.Lines) != 1 || r.Lines[0].Function != want) {
			t.Errorf("%#x: %+v, want %q", addr, r, want)
		}
	}
}

// TestPerfMapAgainstPainting: later entries win, at every time.
func TestPerfMapAgainstPainting(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	paint := make([]string, 4096)
	var text bytes.Buffer
	p := newPerfTable(1 << 20)
	for i := range 5000 {
		start, size := rnd.IntN(4000), rnd.IntN(64)+1
		name := fmt.Sprintf("f%d", i)
		fmt.Fprintf(&text, "%x %x %s\n", 0x10000+start, size, name)
		for a := start; a < start+size && a < len(paint); a++ {
			paint[a] = name
		}
		if rnd.IntN(20) > 0 {
			continue
		}
		if err := p.readOn(bytes.NewReader(text.Bytes()), int64(text.Len())); err != nil {
			t.Fatal(err)
		}
		if len(p.newer) > len(p.older)/4 {
			t.Fatalf("%d rows are not merged with %d", len(p.newer), len(p.older))
		}
		for a, want := range paint {
			r := p.lookup(0x10000 + uint64(a))
			if want == "" && len(r.Lines) > 0 || want != "" && (len(r.Lines) == 0 || r.Lines[0].Function != want) {
				t.Fatalf("%d entries, %#x: %+v, want %q", i+1, a, r, want)
			}
		}
	}
	if len(p.names) > text.Len() || p.bytes() > 1<<20 {
		t.Errorf("%d bytes of names, %d in all, for %d of text", len(p.names), p.bytes(), text.Len())
	}
}

func TestPerfMapLimits(t *testing.T) {
	var text bytes.Buffer
	for i := range 20000 {
		fmt.Fprintf(&text, "%x 10 function_number_%d\n", 0x10000+i*16, i)
	}
	p := perfMapOf(t, text.String(), 100<<10)
	if !p.full || p.bytes() > 400<<10 {
		t.Errorf("full %v with %d bytes", p.full, p.bytes())
	}
	if r := p.lookup(0x10000); len(r.Lines) != 1 {
		t.Errorf("the first entry: %+v", r)
	}
	if r := p.lookup(0x10000 + 19999*16); r.Reason != ReasonTooLarge {
		t.Errorf("beyond the limit: %+v", r)
	}
	if err := p.readOn(failingReader{}, 1<<40); err != nil {
		t.Errorf("a full table reads on: %v", err)
	}
}

type failingReader struct{}

func (failingReader) ReadAt([]byte, int64) (int, error) { return 0, io.ErrUnexpectedEOF }
