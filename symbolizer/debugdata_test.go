// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/elffile"
)

// TestDebugdata: the names in .gnu_debugdata, made as distributions make it, are those that
// eu-addr2line finds there.
func TestDebugdata(t *testing.T) {
	plain := buildCXX(t, deepSource, "-g", "-O2")
	path := build(t, "path", plain, nil, "sh", "-e", "-c", `
		cd "$(dirname "$2")"
		nm -D "$1" --format=posix --defined-only | cut -d' ' -f1 | sort >dynamic
		nm "$1" --format=posix --defined-only | awk '$2 == "T" || $2 == "t" || $2 == "W" { print $1 }' | sort >all
		comm -13 dynamic all >keep
		objcopy --only-keep-debug "$1" debug
		objcopy -S --remove-section .comment --keep-symbols=keep debug mini
		xz -f mini
		strip -R .comment -o "$2" "$1"
		objcopy --add-section .gnu_debugdata=mini.xz "$2"`, "sh", plain, "OUT")
	addrs := codeAddresses(t, plain, 20_000)
	var in bytes.Buffer
	for _, a := range addrs {
		fmt.Fprintf(&in, "%#x\n", a)
	}
	judge := exec.Command("eu-addr2line", "-f", "-e", path)
	judge.Stdin = &in
	out, err := judge.Output()
	if err != nil {
		t.Fatalf("eu-addr2line, of Debian's elfutils, is the judge: %v", err)
	}
	answers := strings.Split(string(out), "\n")
	symbols := symbolsOf(t, plain)
	same, different := 0, 0
	for i, r := range openObject(t, newSymbolizer(t, Config{}), path).Symbolize(addrs) {
		want := answers[2*i]
		if len(r.Lines) == 0 || r.made {
			// It gives what comes after a symbol without a size to that symbol.
			continue
		}
		if got := r.Lines[0].SystemName; got == want || sameFunction(symbols, got, want) {
			same++
		} else if different++; different <= 3 {
			t.Errorf("%#x: %s, eu-addr2line says %s", addrs[i], got, want)
		}
	}
	t.Logf("%d of %d addresses have the judge's name, %d another", same, len(addrs), different)
	if same < len(addrs)*8/10 || different > 0 {
		t.Error("names from .gnu_debugdata are missing or wrong")
	}
}

// TestHostileDebugdata: what claims a big dictionary, or unpacks to more than it may.
func TestHostileDebugdata(t *testing.T) {
	pack := func(args ...string) []byte {
		cmd := exec.Command("xz", append([]string{"-c", "--format=xz"}, args...)...)
		cmd.Stdin = bytes.NewReader(make([]byte, 8<<20))
		b, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if n, err := unpackXZ(io.Discard, pack(), 8<<20); err != nil || n != 8<<20 {
		t.Errorf("%d bytes, %v", n, err)
	}
	if n, err := unpackXZ(io.Discard, pack("--block-size=1000000"), 8<<20); err != nil || n != 8<<20 {
		t.Errorf("blocks: %d bytes, %v", n, err)
	}
	for name, err := range map[string]error{
		string(ReasonTooLarge) + " bomb":          second(unpackXZ(io.Discard, pack(), 1<<20)),
		string(ReasonTooLarge) + " dictionary":    second(unpackXZ(io.Discard, pack("--lzma2=dict=512MiB"), 8<<20)),
		string(ReasonUnsupported) + " filters":    second(unpackXZ(io.Discard, pack("--x86", "--lzma2"), 8<<20)),
		string(ReasonMalformed) + " half of it":   second(unpackXZ(io.Discard, pack("-0")[:200], 8<<20)),
		string(ReasonMalformed) + " not an xz":    second(unpackXZ(io.Discard, make([]byte, 100), 8<<20)),
		string(ReasonMalformed) + " only a magic": second(unpackXZ(io.Discard, append(bytes.Clone(xzMagic), bytes.Repeat([]byte{0xff}, 40)...), 8<<20)),
	} {
		if want, _, _ := strings.Cut(name, " "); string(ReasonOf(err)) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestBigDebugdata: what is big is in a file, which is asked for again where there was no
// place for it, and closed when the table is evicted. Small ones need none.
func TestBigDebugdata(t *testing.T) {
	open := func(names int) *Object {
		mini := symbolSpec(false, elffile.SHTSymtab, specSymbol{"f", 0x1100, 0x100, globalFunc, 1})
		mini.sections[5].data = append(mini.sections[5].data, make([]byte, names)...)
		cmd := exec.Command("xz", "-c", "-0", "--format=xz")
		cmd.Stdin = bytes.NewReader(mini.bytes())
		b, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		e := symbolSpec(false, elffile.SHTSymtab)
		e.sections[4].typ = 1
		e.sections = append(e.sections, specSection{name: ".gnu_debugdata", typ: 1, data: b})
		path := filepath.Join(t.TempDir(), "out")
		writeFile(t, path, string(e.bytes()))
		s := newSymbolizer(t, Config{})
		s.index.temp = "/nonexistent"
		return openObject(t, s, path)
	}
	small := open(1 << 20)
	if r := small.Symbolize([]uint64{0x1100})[0]; len(r.Lines) != 1 || r.Lines[0].Function != "f" {
		t.Errorf("small: %+v", r)
	}
	if n := small.tables.Load().byKind[tableMini].bytes(); n < 1<<20 {
		t.Errorf("small: counted as %d bytes", n)
	}
	big := open(2 * maxHeldData)
	if r := big.Symbolize([]uint64{0x1100})[0]; r.Reason != ReasonUnreadable {
		t.Errorf("no directory: %+v, want unreadable", r)
	}
	big.sym.index.temp = t.TempDir()
	big.failed[tableMini].until = time.Now()
	if r := big.Symbolize([]uint64{0x1100})[0]; len(r.Lines) != 1 || r.Lines[0].Function != "f" {
		t.Errorf("big: %+v", r)
	}
	file := big.tables.Load().file.Load()
	if n := big.tables.Load().byKind[tableMini].bytes(); n < 2*maxHeldData/fileShare || file == nil {
		t.Fatalf("big: counted as %d bytes", n)
	}
	big.sym.memory.remove(&big.tables.Load().resident)
	for range 1000 {
		if _, err := file.Stat(); errors.Is(err, os.ErrClosed) {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Error("the file of an evicted table is open")
}

func second(_ int64, err error) error { return err }
