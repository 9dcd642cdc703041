// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/elffile"
)

// copies writes n files with a function of their own each, at 0x1100.
func copies(t testing.TB, n int) (paths, names []string) {
	t.Helper()
	dir := t.TempDir()
	for i := range n {
		names = append(names, fmt.Sprintf("function_%d", i))
		paths = append(paths, filepath.Join(dir, fmt.Sprintf("lib%d.so", i)))
		spec := symbolSpec(false, elffile.SHTSymtab, specSymbol{names[i], 0x1100, 0x100, globalFunc, 1},
			specSymbol{names[i] + "_second", 0x1200, 0x100, globalFunc, 1})
		writeFile(t, paths[i], string(spec.bytes()))
	}
	return paths, names
}

func function(o *Object, addr uint64) string {
	r := o.Symbolize([]uint64{addr})[0]
	if len(r.Lines) == 0 {
		return "(" + string(r.Reason) + ")"
	}
	return r.Lines[0].Function
}

func TestOneObjectAFile(t *testing.T) {
	paths, _ := copies(t, 2)
	s := newSymbolizer(t, Config{})
	link := paths[0] + ".link"
	if err := os.Link(paths[0], link); err != nil {
		t.Fatal(err)
	}
	a, b, c := openObject(t, s, paths[0]), openObject(t, s, link), openObject(t, s, paths[1])
	if a != b {
		t.Error("two names of one file are two objects")
	}
	if a == c {
		t.Error("two files are one object")
	}
	later := time.Now().Add(time.Hour)
	if err := os.Chtimes(paths[0], later, later); err != nil {
		t.Fatal(err)
	}
	if openObject(t, s, paths[0]) == a {
		t.Error("a file that was written to is the same object")
	}
	if st := s.Stats(); st.Objects != 3 || st.OpenFiles != 3 {
		t.Errorf("stats: %+v", st)
	}
}

// TestFewDescriptors: files are opened again as they are needed, also under another name
// by the newest that asked for them.
func TestFewDescriptors(t *testing.T) {
	paths, names := copies(t, 10)
	s := newSymbolizer(t, Config{MaxFiles: 2})
	var objects []*Object
	var opens atomic.Int64
	for _, p := range paths {
		o, err := s.Object(File{Path: p, Open: func() (*os.File, error) {
			opens.Add(1)
			return os.Open(p)
		}})
		if err != nil {
			t.Fatal(err)
		}
		objects = append(objects, o)
		if n := s.Stats().OpenFiles; n > 2 {
			t.Fatalf("%d files are open", n)
		}
	}
	for i, o := range objects {
		if got := function(o, 0x1100); got != names[i] {
			t.Errorf("%s: %s, want %s", paths[i], got, names[i])
		}
		if n := s.Stats().OpenFiles; n > 2 {
			t.Errorf("%d files are open", n)
		}
	}
	if n := opens.Load(); n != 10+10 {
		t.Errorf("%d opens", n)
	}
	// The first one's path goes, another opener comes.
	if err := os.Rename(paths[0], paths[0]+".moved"); err != nil {
		t.Fatal(err)
	}
	if o := openObject(t, s, paths[0]+".moved"); o != objects[0] {
		t.Fatal("a renamed file is another object")
	}
	openObject(t, s, paths[1])
	openObject(t, s, paths[2])
	if got := function(objects[0], 0x1200); got != names[0]+"_second" {
		t.Errorf("by the newest opener: %s", got)
	}
}

func TestIdleDescriptorsAreClosed(t *testing.T) {
	paths, names := copies(t, 3)
	s := newSymbolizer(t, Config{})
	a, b := openObject(t, s, paths[0]), openObject(t, s, paths[1])
	s.files.mu.Lock()
	a.image.Content.(*openFile).used = time.Now().Add(-closeIdleAfter)
	s.files.mu.Unlock()
	openObject(t, s, paths[2])
	if n := s.Stats().OpenFiles; n != 2 {
		t.Errorf("%d files are open, want 2", n)
	}
	if function(a, 0x1100) != names[0] || function(b, 0x1100) != names[1] {
		t.Error("wrong names after an idle descriptor was closed")
	}
}

func TestFewObjects(t *testing.T) {
	paths, names := copies(t, 10)
	s := newSymbolizer(t, Config{MaxObjects: 3})
	first := openObject(t, s, paths[0])
	for _, p := range paths {
		openObject(t, s, p)
	}
	if st := s.Stats(); st.Objects != 3 || st.OpenFiles > 3 {
		t.Errorf("stats: %+v", st)
	}
	if got := function(first, 0x1100); got != names[0] {
		t.Errorf("a forgotten object: %s", got)
	}
}

// TestTableEviction: the tables of many files stay within the limit, and come back.
func TestTableEviction(t *testing.T) {
	paths, names := copies(t, 20)
	s := newSymbolizer(t, Config{MaxTableBytes: 8 << 10})
	for range 3 {
		for i, p := range paths {
			if got := function(openObject(t, s, p), 0x1100); got != names[i] {
				t.Fatalf("%s: %s, want %s", p, got, names[i])
			}
			if st := s.Stats(); st.TableBytes > 8<<10 {
				t.Fatalf("tables take %d bytes", st.TableBytes)
			}
		}
	}
	st := s.Stats()
	if st.Evictions < 40 || st.TableLoads < 60 || st.Tables == 0 {
		t.Errorf("stats: %+v", st)
	}
}

func TestFilesThatAreNone(t *testing.T) {
	dir := t.TempDir()
	text, fifo, empty := filepath.Join(dir, "text"), filepath.Join(dir, "fifo"), filepath.Join(dir, "empty")
	writeFile(t, text, strings.Repeat("not an ELF file\n", 10))
	writeFile(t, empty, "")
	if err := unix.Mkfifo(fifo, 0o644); err != nil {
		t.Fatal(err)
	}
	big := symbolSpec(false, elffile.SHTSymtab).bytes()
	big[5] = 2
	bigEndian := filepath.Join(dir, "big")
	writeFile(t, bigEndian, string(big))
	big[5], big[16] = 1, elffile.TypeRel
	object := filepath.Join(dir, "object.o")
	writeFile(t, object, string(big))
	s := newSymbolizer(t, Config{})
	for path, want := range map[string]Reason{
		text: ReasonMalformed, empty: ReasonMalformed, bigEndian: ReasonUnsupported, object: ReasonUnsupported,
		fifo: ReasonNotRegular, dir: ReasonNotRegular, "/dev/null": ReasonNotRegular,
		filepath.Join(dir, "none"): ReasonUnreadable,
	} {
		opens := 0
		f := File{Path: path, Open: func() (*os.File, error) {
			opens++
			return os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
		}}
		_, err1 := s.Object(f)
		_, err2 := s.Object(f)
		if err1 == nil || err2 == nil || ReasonOf(err1) != want || ReasonOf(err2) != want {
			t.Errorf("%s: %v (%s), again %v (%s), want %s", path, err1, ReasonOf(err1), err2, ReasonOf(err2), want)
		} else if !strings.Contains(err1.Error(), path) {
			t.Errorf("%s: the error does not name it: %v", path, err1)
		}
	}
	if st := s.Stats(); st.OpenFiles != 0 || st.Objects != 4 {
		t.Errorf("stats: %+v", st)
	}
	if got := ReasonOf(fmt.Errorf("open: %w", fs.ErrPermission)); got != ReasonNoPermission {
		t.Errorf("permission error: %s", got)
	}
	if got := ReasonOf(nil); got != "" {
		t.Errorf("no error: %s", got)
	}
}

// TestFileChangesUnderUs: written over, cut short, replaced.
func TestFileChangesUnderUs(t *testing.T) {
	for _, how := range []string{"overwrite", "truncate", "replace", "remove"} {
		t.Run(how, func(t *testing.T) {
			paths, _ := copies(t, 2)
			s := newSymbolizer(t, Config{MaxFiles: 1})
			o := openObject(t, s, paths[0])
			if how == "replace" || how == "remove" {
				openObject(t, s, paths[1]) // takes the descriptor away
			} else {
				function(o, 0x1100)
			}
			want := ReasonChanged
			switch how {
			case "overwrite":
				time.Sleep(20 * time.Millisecond) // the granularity of mtime
				other := symbolSpec(false, elffile.SHTSymtab, specSymbol{"wrong", 0x1000, 0x1000, globalFunc, 1}).bytes()
				writeFile(t, paths[0], string(other))
			case "truncate":
				if err := os.Truncate(paths[0], 100); err != nil {
					t.Fatal(err)
				}
			case "replace":
				if err := os.Rename(paths[1], paths[0]); err != nil {
					t.Fatal(err)
				}
			case "remove":
				want = ReasonUnreadable
				if err := os.Remove(paths[0]); err != nil {
					t.Fatal(err)
				}
			}
			f := o.image.Content.(*openFile)
			s.files.mu.Lock()
			f.checked = time.Time{}
			s.files.mu.Unlock()
			if got := function(o, 0x1200); got != "("+string(want)+")" {
				t.Errorf("%s, want %s", got, want)
			}
		})
	}
}

// TestRetryAfterReadFailure: a file that could not be read is tried again later, not at
// every call.
func TestRetryAfterReadFailure(t *testing.T) {
	paths, names := copies(t, 2)
	s := newSymbolizer(t, Config{MaxFiles: 1})
	broken := errors.New("too many open files")
	var fail atomic.Bool
	var opens atomic.Int64
	o, err := s.Object(File{Path: paths[0], Open: func() (*os.File, error) {
		opens.Add(1)
		if fail.Load() {
			return nil, broken
		}
		return os.Open(paths[0])
	}})
	if err != nil {
		t.Fatal(err)
	}
	openObject(t, s, paths[1])
	fail.Store(true)
	for range 5 {
		if got := function(o, 0x1100); got != "(unreadable)" {
			t.Fatalf("%s, want unreadable", got)
		}
	}
	if n := opens.Load(); n > 1+int64(tableKinds)+1 { // and the debug information
		t.Errorf("%d opens", n)
	}
	fail.Store(false)
	o.mu.Lock()
	for i := range o.failed {
		if o.failed[i].until.IsZero() {
			t.Errorf("table %d failed for good", i)
		}
		o.failed[i].until = o.failed[i].until.Add(-retryAfter)
	}
	o.mu.Unlock()
	if got := function(o, 0x1100); got != names[0] {
		t.Errorf("after the retry: %s", got)
	}
}

func TestConcurrentUse(t *testing.T) {
	paths, names := copies(t, 12)
	pid := sleeper(t)
	path := perfMapPath(t, pid)
	appendFile(t, path, "7f0000001000 100 jitted\n")
	s := newSymbolizer(t, Config{MaxFiles: 3, MaxObjects: 6, MaxTableBytes: 8 << 10, Proc: "/proc"})
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 1))
			pm := s.PerfMap(pid)
			for range 200 {
				i := rnd.IntN(len(paths))
				o, err := s.Object(fileAt(paths[i]))
				if err != nil {
					t.Error(err)
					return
				}
				if got := function(o, 0x1100); got != names[i] {
					t.Errorf("%s: %s, want %s", paths[i], got, names[i])
				}
				if got := nameAt(t, pm, 0x7f0000001000); got != "jitted" {
					t.Errorf("perf map: %s", got)
				}
				s.Stats()
			}
		})
	}
	wg.Wait()
	st := s.Stats()
	if st.OpenFiles > 3 || st.TableBytes > 8<<10 {
		t.Errorf("stats: %+v", st)
	}
}

func TestClosed(t *testing.T) {
	paths, _ := copies(t, 1)
	pid := sleeper(t)
	appendFile(t, perfMapPath(t, pid), "7f0000001000 100 jitted\n")
	s := New(Config{})
	o := openObject(t, s, paths[0])
	pm := s.PerfMap(pid)
	nameAt(t, pm, 0x7f0000001000)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.Object(fileAt(paths[0])); ReasonOf(err) != ReasonClosed {
		t.Errorf("Object: %v", err)
	}
	if _, err := s.VDSO(); ReasonOf(err) != ReasonClosed {
		t.Errorf("VDSO: %v", err)
	}
	if got := function(o, 0x1100); got != "(symbolizer_closed)" {
		t.Errorf("Symbolize: %s", got)
	}
	for _, pm := range []*PerfMap{pm, s.PerfMap(pid)} {
		if got := nameAt(t, pm, 0x7f0000001000); got != "(symbolizer_closed)" {
			t.Errorf("perf map: %s", got)
		}
	}
	if st := s.Stats(); st.OpenFiles != 0 || st.Tables != 0 || st.Objects != 0 {
		t.Errorf("stats: %+v", st)
	}
}
