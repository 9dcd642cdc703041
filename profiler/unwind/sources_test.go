// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// sameAs compares a file's rows with what elfutils says of another file, or of itself.
func sameAs(t *testing.T, f *File, judgePath string, flags ...string) *tables {
	t.Helper()
	ts := build(t, f)
	c := compare(ts, judgeFile(t, judgePath, flags...), goCode(f))
	if c.different > 0 || c.points < 10 {
		t.Errorf("%d of %d points differ:\n\t%s", c.different, c.points, strings.Join(c.examples, "\n\t"))
	}
	return ts
}

// TestDebugFrame reads .debug_frame where there is no .eh_frame: in the binary, compressed,
// and in a separate file.
func TestDebugFrame(t *testing.T) {
	flags := []string{"-O2", "-nostartfiles", "-shared", "-fPIC", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-Wl,--build-id"}
	path := buildC(t, cWalkSource, append(flags, "-g")...)
	t.Run("own", func(t *testing.T) { sameAs(t, openFile(t, path, nil), path, "-d") })
	t.Run("own, DWARF 4", func(t *testing.T) {
		p := buildC(t, cWalkSource, append(flags, "-gdwarf-4")...)
		sameAs(t, openFile(t, p, nil), p, "-d")
	})
	t.Run("compressed", func(t *testing.T) {
		p := path + ".z"
		run(t, "objcopy", "--compress-debug-sections=zlib", path, p)
		sameAs(t, openFile(t, p, nil), path, "-d")
	})
	debug, bare := path+".debug", path+".bare"
	run(t, "objcopy", "--only-keep-debug", path, debug)
	run(t, "strip", "-o", bare, path)
	run(t, "objcopy", "--add-gnu-debuglink="+debug, bare)
	t.Run("separate", func(t *testing.T) {
		opened := 0
		f := openFile(t, bare, func(buildID, link string, crc uint32) (io.ReaderAt, int64, error) {
			opened++
			if link != filepath.Base(debug) || len(buildID) != 40 || crc == 0 {
				t.Errorf("build id %q, link %q, crc %#x", buildID, link, crc)
			}
			b, err := os.ReadFile(debug)
			return bytes.NewReader(b), int64(len(b)), err
		})
		sameAs(t, f, path, "-d")
		if opened != 1 {
			t.Errorf("opened %d times", opened)
		}
	})
	t.Run("another build's", func(t *testing.T) {
		other := buildC(t, cWalkSource, append(flags, "-g", "-O1")...)
		f := openFile(t, bare, func(string, string, uint32) (io.ReaderAt, int64, error) {
			b, err := os.ReadFile(other)
			return bytes.NewReader(b), int64(len(b)), err
		})
		if ts := build(t, f); ts.rows > 2 || ts.skipped[SkipDebugFile] != 1 { // .plt has .eh_frame
			t.Errorf("%d rows, skipped %v", ts.rows, ts.skipped)
		}
	})
	t.Run("not needed", func(t *testing.T) {
		f := openFile(t, buildC(t, cWalkSource, "-O2"), func(string, string, uint32) (io.ReaderAt, int64, error) {
			t.Error("asked for a debug file")
			return nil, 0, os.ErrNotExist
		})
		build(t, f)
	})
}

// TestVDSO makes the table of the running kernel's vDSO, from memory.
func TestVDSO(t *testing.T) {
	p, _ := stopAt(t, buildC(t, "#include <unistd.h>\nint main(void) { return pause(); }"))
	i := slices.IndexFunc(p.maps, func(m mapping) bool { return m.path == "[vdso]" })
	if i < 0 {
		t.Fatal("no vDSO")
	}
	b := make([]byte, p.maps[i].end-p.maps[i].start)
	if _, err := p.mem.ReadAt(b, int64(p.maps[i].start)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "vdso")
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	ts := sameAs(t, openFile(t, path, nil), path)
	if ts.rows < 10 {
		t.Errorf("%d rows", ts.rows)
	}
}

const muslSource = `
#include <signal.h>
#define NOINLINE __attribute__((noinline, noclone))
#define AFTER __asm__ volatile("" ::: "memory")

#if defined(__x86_64__)
NOINLINE void leaf(int n) { __asm__ volatile("syscall" :: "a"(34) : "rcx", "r11", "memory"); }
#else
NOINLINE void leaf(int n) {
	register long x8 __asm__("x8") = 73, x0 __asm__("x0") = 0, x1 __asm__("x1") = 0, x2 __asm__("x2") = 0, x3 __asm__("x3") = 0;
	__asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
}
#endif
NOINLINE void handler(int sig) { leaf(sig); AFTER; }
NOINLINE void bad(int *p) { *(volatile int *)p = 1; AFTER; }
NOINLINE void deep(int n) { if (n) deep(n - 1); else bad(0); AFTER; }
int main(void)
{
	struct sigaction act = {.sa_handler = handler};
	sigaction(SIGSEGV, &act, 0);
	deep(3);
	return 0;
}
`

// TestWalkMusl walks through musl's signal trampoline, which has no CFI. Neither has the
// rest of musl, nor frame pointers: what is above main can not be told.
func TestWalkMusl(t *testing.T) {
	dir := t.TempDir()
	src, out := filepath.Join(dir, "main.c"), filepath.Join(dir, "out")
	if err := os.WriteFile(src, []byte(muslSource), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, "musl-gcc", "-O2", "-static", "-o", out, src)
	names, _ := walkNames(t, out)
	wantInOrder(t, names, "leaf", "handler", "...", "bad", "deep", "deep", "deep", "deep", "main", "...")
}

// TestARM64 compares cross-built programs and libraries.
func TestARM64(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "main.c")
	if err := os.WriteFile(src, []byte(strings.ReplaceAll(cWalkSource, "#include <immintrin.h>", "")), 0o644); err != nil {
		t.Fatal(err)
	}
	for i, flags := range [][]string{
		{"-O2"}, {"-O2", "-fno-omit-frame-pointer", "-mbranch-protection=standard"}, {"-O2", "-static", "-mbranch-protection=pac-ret+b-key+leaf"},
	} {
		t.Run(strings.Join(flags, " "), func(t *testing.T) {
			out := filepath.Join(dir, fmt.Sprint("out", i))
			run(t, "aarch64-linux-gnu-gcc", append(flags, "-o", out, src)...)
			sameAs(t, openFile(t, out, nil), out)
		})
	}
	libs, err := filepath.Glob("/usr/aarch64-linux-gnu/lib/*.so.*")
	if err != nil || len(libs) == 0 {
		t.Fatalf("no libraries for arm64: %v", err)
	}
	for _, lib := range libs {
		t.Run(filepath.Base(lib), func(t *testing.T) {
			ts := build(t, openFile(t, lib, nil))
			c := compare(ts, judgeFile(t, lib), nil)
			t.Logf("%d points, %d rows of %.2f bytes, skipped %v, no rule for %v", c.points, ts.rows, float64(2*ts.words)/float64(max(ts.rows, 1)), ts.skipped, c.shapes)
			if c.different > 0 {
				t.Errorf("%d of %d points differ:\n\t%s", c.different, c.points, strings.Join(c.examples, "\n\t"))
			}
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	good, err := os.ReadFile(buildC(t, "int main(void) { return 0; }"))
	if err != nil {
		t.Fatal(err)
	}
	changed := func(at int, to ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[at:], to)
		return b
	}
	for _, tt := range []struct {
		name string
		b    []byte
		want error
	}{
		{"nothing", nil, ErrNotELF},
		{"text", []byte(strings.Repeat("#!/bin/sh\n", 100)), ErrNotELF},
		{"32 bits", changed(4, 1), nil},
		{"big-endian", changed(5, 2), ErrUnsupported},
		{"object file", changed(16, 1), ErrUnsupported},
		{"RISC-V", changed(18, 243), ErrUnsupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Open(bytes.NewReader(tt.b), int64(len(tt.b)), nil)
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
}
