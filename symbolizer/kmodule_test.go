// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/hostflame/hostflame/internal/elffile"
)

var moduleSource = strings.ReplaceAll(deepC, "int main(", "int last(") + `
__attribute__((section(".init.text"), noinline)) int start(int x) {
	return middle(x) +
		leaf(x);
}
`

// fakeModule is what the kernel and the distribution tell of a module that is loaded: its
// sections at other addresses than in the file, and the files in root.
func fakeModule(t *testing.T, ko string, text, init uint64) (cfg Config) {
	t.Helper()
	f, err := elf.Open(ko)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	notes, err := f.Section(".note.gnu.build-id").Data()
	if err != nil {
		t.Fatal(err)
	}
	kallsyms := "ffffffff81000000 T _stext\n"
	syms, err := f.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range syms {
		if elf.ST_TYPE(s.Info) == elf.STT_FUNC {
			base := text
			if f.Sections[s.Section].Name != ".text" {
				base = init
			}
			kallsyms += fmt.Sprintf("%x t %s\t[my_module]\n", base+s.Value, s.Name)
		}
	}
	cfg = Config{Proc: fakeProc(t, kallsyms, ""), Sys: t.TempDir(), Root: t.TempDir(), WaitForIndex: true}
	module := filepath.Join(cfg.Sys, "module/my_module")
	modules := filepath.Join(cfg.Root, "lib/modules/6.1.0-test")
	for _, d := range []string{filepath.Join(module, "sections"), filepath.Join(module, "notes"), filepath.Join(cfg.Proc, "sys/kernel"), modules, filepath.Join(cfg.Root, "usr/lib/debug/lib/modules/6.1.0-test/kernel/fs")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(module, "sections/.text"), fmt.Sprintf("%#x\n", text))
	writeFile(t, filepath.Join(module, "sections/.init.text"), fmt.Sprintf("%#x\n", init))
	writeFile(t, filepath.Join(module, "notes/.note.gnu.build-id"), string(notes))
	writeFile(t, filepath.Join(cfg.Proc, "sys/kernel/osrelease"), "6.1.0-test\n")
	writeFile(t, filepath.Join(modules, "modules.dep"), "kernel/fs/other.ko.xz:\nkernel/fs/my-module.ko.xz: kernel/fs/other.ko.xz\n")
	run(t, cfg.Root, nil, "cp", ko, "usr/lib/debug/lib/modules/6.1.0-test/kernel/fs/my-module.ko.debug")
	return cfg
}

func buildModule(t testing.TB, flags ...string) string {
	compile := strings.Join(append([]string{"gcc", "-c", "-O2", "-fno-pic", "-ffreestanding"}, flags...), " ")
	return build(t, "module.c", moduleSource, nil, "sh", "-e", "-c", compile+` -o "$2.o" "$1"; ld -r --build-id=sha1 -o "$2" "$2.o"`, "sh", "SRC", "OUT")
}

// TestKernelModule: inlined functions and lines of a module, section by section, by debug
// information that was not linked. The judge reads what a linker makes of it.
func TestKernelModule(t *testing.T) {
	needJudge(t)
	const text, init = 0xffffffffc0200000, 0xffffffffc0100000
	for _, flags := range []string{"-g", "-gdwarf-4", "-g -gz=zlib"} {
		t.Run(flags, func(t *testing.T) {
			ko := buildModule(t, strings.Fields(flags)...)
			cfg := fakeModule(t, ko, text, init)
			linked := build(t, "path", ko, nil, "ld", "-e", "0", "--unresolved-symbols=ignore-all", "-o", "OUT", ko)
			f, err := elf.Open(ko)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			shift := addressOf(t, linked, "outer") - addressOf(t, ko, "outer")
			var offsets, addrs []uint64
			for off := range f.Section(".text").Size {
				offsets, addrs = append(offsets, off+shift), append(addrs, text+off)
			}
			judge := askLLVM(t, linked, offsets)
			s := newSymbolizer(t, cfg)
			same, inlined := 0, 0
			for i, r := range s.Kernel(addrs) {
				if judge[i][0].name == "??" {
					continue // between functions
				}
				if ours := ourFrames(r); slices.Equal(ours, judge[i]) {
					same++
				} else {
					t.Errorf("%#x: %v, %s says %v", offsets[i], ours, judgeLLVM, judge[i])
				}
				inlined += len(r.Lines) - 1
			}
			if same < len(addrs)*8/10 || inlined == 0 {
				t.Errorf("%d of %d addresses are the same, %d inlined", same, len(addrs), inlined)
			}
			if got := describe(s.Kernel([]uint64{init + 1})[0]); !strings.Contains(got, "start:") || !strings.HasSuffix(got, "<9") {
				t.Errorf("%s of .init.text, want start with a line", got)
			}
			// A file of another build, and a kernel that hides its addresses.
			writeFile(t, filepath.Join(cfg.Sys, "module/my_module/notes/.note.gnu.build-id"), "\x04\x00\x00\x00\x08\x00\x00\x00\x03\x00\x00\x00GNU\x00abcdefgh")
			if r := newSymbolizer(t, cfg).Kernel(addrs[:1])[0]; len(r.Lines) != 1 || r.Lines[0].Line != 0 {
				t.Errorf("%s from a file with another build id", describe(r))
			}
		})
	}
}

// TestKernelModuleFiles: the list of all modules is read once, however many are asked for, and
// in pieces.
func TestKernelModuleFiles(t *testing.T) {
	const text, init = 0xffffffffc0200000, 0xffffffffc0100000
	cfg := fakeModule(t, buildModule(t, "-g"), text, init)
	other := filepath.Join(cfg.Sys, "module/other/notes")
	if err := os.MkdirAll(other, 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(other, ".note.gnu.build-id"), "\x04\x00\x00\x00\x08\x00\x00\x00\x03\x00\x00\x00GNU\x00abcdefgh")
	appendFile(t, filepath.Join(cfg.Proc, "kallsyms"), "ffffffffc0300000 t other_start\t[other]\n")
	s := newSymbolizer(t, cfg)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if r := s.Kernel([]uint64{0xffffffffc0300000})[0]; r.Module != "[other]" {
		t.Fatal(describe(r))
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 8<<20 {
		t.Errorf("%d bytes allocated", n)
	}
	if err := os.Remove(filepath.Join(cfg.Root, "lib/modules/6.1.0-test/modules.dep")); err != nil {
		t.Fatal(err)
	}
	if got := describe(s.Kernel([]uint64{init + 1})[0]); !strings.Contains(got, "start:") || !strings.HasSuffix(got, "<9") {
		t.Errorf("%s, want start with a line", got)
	}
}

// TestModuleSectionsApart: the end of a section of a file that was not linked is no address
// of another, whatever its size.
func TestModuleSectionsApart(t *testing.T) {
	o := build(t, "sections.s", ".text\n.skip 70000\n.section .init.text,\"ax\"\nnop\n.section .exit.text,\"ax\"\n.skip 65536\n.section .noinstr.text,\"ax\"\nnop\n",
		nil, "gcc", "-c", "-o", "OUT", "SRC")
	b, err := os.ReadFile(o)
	if err != nil {
		t.Fatal(err)
	}
	m, err := elffile.ParseObject(elffile.FromBytes(b))
	if err != nil {
		t.Fatal(err)
	}
	sections, err := m.Sections()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for i := range sections {
		s := &sections[i]
		if !s.Executable() || s.Size == 0 {
			continue
		}
		n++
		for j := range sections {
			if o := &sections[j]; j != i && o.Executable() && o.Addr >= s.Addr && o.Addr <= s.Addr+s.Size {
				t.Errorf("section %d is at %#x, %d at %#x to %#x", j, o.Addr, i, s.Addr, s.Addr+s.Size)
			}
		}
	}
	if n != 4 {
		t.Errorf("%d sections of code, want 4", n)
	}
}
