// SPDX-License-Identifier: Apache-2.0

package index

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/hostflame/hostflame/internal/dwarf"
	"github.com/hostflame/hostflame/internal/elffile"
)

const source = `
static inline __attribute__((always_inline)) int leaf(int x) { return x * 3 + 1; }
static inline __attribute__((always_inline)) int middle(int x) { return leaf(x) + leaf(x ^ 5); }
__attribute__((noinline)) int outer(int x) { return middle(x) * 2; }
int main(int c, char **v) { return outer(c); }
`

// buildIndex makes an index of source, and returns its file and where its code is.
func buildIndex(t testing.TB, id Identity) (*os.File, []dwarf.Range) {
	t.Helper()
	dir := t.TempDir()
	src, bin := filepath.Join(dir, "main.c"), filepath.Join(dir, "main")
	if err := os.WriteFile(src, []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	if b, err := exec.Command("gcc", "-g", "-O2", "-o", bin, src).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, b)
	}
	b, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	m, err := elffile.Parse(elffile.FromBytes(b))
	if err != nil {
		t.Fatal(err)
	}
	secs, err := m.Sections()
	if err != nil {
		t.Fatal(err)
	}
	d, err := dwarf.Open(m, secs, &elffile.Inflater{})
	if err != nil {
		t.Fatal(err)
	}
	file := tempFile(t)
	st, err := Build(context.Background(), d, Options{Identity: id, File: file, Dir: dir, Workers: 2})
	if err != nil || st.BrokenUnits > 0 || st.Pieces == 0 {
		t.Fatalf("build: %+v, %v", st, err)
	}
	return file, d.Code
}

func tempFile(t testing.TB) *os.File {
	t.Helper()
	f, err := elffile.TempFile(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestLookupAllocates nothing, for addresses that are known and for others.
func TestLookupAllocates(t *testing.T) {
	file, code := buildIndex(t, Identity{1})
	x, err := Open(file, Identity{1})
	if err != nil {
		t.Fatal(err)
	}
	frames := make([]Frame, 0, 16)
	known, deepest := 0, 0
	err = x.Batch(func() {
		allocs := testing.AllocsPerRun(10, func() {
			for _, r := range code {
				for a := r.Low - 8; a < r.High+8; a++ {
					frames = x.Lookup(a, frames[:0])
					known += min(1, len(frames))
					deepest = max(deepest, len(frames))
				}
			}
		})
		if allocs != 0 {
			t.Errorf("%v allocations", allocs)
		}
	})
	if err != nil || known == 0 || deepest != 3 {
		t.Errorf("%d addresses known, %d deep, %v", known, deepest, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	file, _ := buildIndex(t, Identity{1})
	if _, err := Open(file, Identity{2}); !errors.Is(err, ErrForeign) {
		t.Errorf("another identity: %v", err)
	}
	if _, err := file.WriteAt([]byte{9}, 200); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(file, Identity{1}); !errors.Is(err, ErrDamaged) {
		t.Errorf("damaged: %v", err)
	}
	if err := file.Truncate(50); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(file, Identity{1}); !errors.Is(err, ErrDamaged) {
		t.Errorf("short: %v", err)
	}
}

// FuzzIndex looks addresses up in what no checksum has vouched for.
func FuzzIndex(f *testing.F) {
	file, code := buildIndex(f, Identity{})
	fi, err := file.Stat()
	if err != nil {
		f.Fatal(err)
	}
	b := make([]byte, fi.Size())
	if _, err := file.ReadAt(b, 0); err != nil {
		f.Fatal(err)
	}
	f.Add(b, code[0].Low)
	f.Fuzz(func(t *testing.T, b []byte, addr uint64) {
		x, err := parse(b, Identity{})
		if err != nil {
			return
		}
		var frames []Frame
		for a := addr; a < addr+4096 && a >= addr; a += 3 {
			if frames = x.Lookup(a, frames[:0]); len(frames) > maxChain {
				t.Fatalf("%d frames", len(frames))
			}
			for _, fr := range frames {
				x.Function(fr.Function)
				x.File(fr.File)
			}
		}
	})
}
