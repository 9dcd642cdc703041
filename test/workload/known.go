// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// A Program is one of which it is known what its stacks look like: Command builds and
// names it, and Chains are the stacks of its samples.
type Program struct {
	Name   string
	Needs  []string   // programs to be found: compilers, interpreters
	build  [][]string // commands; {out} is the path of the program, {src} the directory src
	run    []string   // likewise; {seconds} is how long. {out} {seconds} if empty
	Chains []Chain

	// How its addresses get names, besides symbol tables: PerfMap where a JIT compiler
	// writes /tmp/perf-PID.map while it runs, or as it ends.
	PerfMap bool
	// Whether a tool that knows CFI alone can judge its stacks.
	CFI bool
	// Unrooted are programs whose C library has no unwind information and keeps no frame
	// pointers (Debian's musl): no walk gets from main to the start of the process.
	Unrooted bool
}

// Unstripped is what a copy of a program has behind its name that has kept its symbols.
const Unstripped = ".unstripped"

// Missing says what this machine lacks for the program, or nothing.
func (p *Program) Missing() (missing []string) {
	for _, name := range p.Needs {
		if _, err := exec.LookPath(name); err != nil {
			missing = append(missing, name)
		}
	}
	return missing
}

// Command builds the program in dir, and returns the command line of a run of that many
// seconds. A run says "ready" first, and ends at SIGTERM.
func (p *Program) Command(dir string, seconds int) ([]string, error) {
	words := strings.NewReplacer("{out}", filepath.Join(dir, p.Name), "{dir}", dir,
		"{src}", filepath.Join(source(), "src"), "{seconds}", fmt.Sprint(seconds))
	replace := func(command []string) []string {
		command = slices.Clone(command)
		for i := range command {
			command[i] = words.Replace(command[i])
		}
		return command
	}
	for _, command := range p.build {
		command = replace(command)
		cmd := exec.Command("env", command...) // which takes assignments
		cmd.Dir = source()
		if text, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build workload %s: %w\n%s", p.Name, err, bytes.TrimSpace(text))
		}
	}
	if p.run == nil {
		return replace([]string{"{out}", "{seconds}"}), nil
	}
	return replace(p.run), nil
}

// As distributions build.
var (
	c   = []string{"gcc", "-O2", "-g", "-fomit-frame-pointer", "-pthread", "-o", "{out}"}
	cxx = []string{"g++", "-O2", "-g", "-fomit-frame-pointer", "-pthread", "-o", "{out}"}
)

// Known lists the programs whose stacks are known. Those whose interpreter or compiler is
// missing here are listed too (see Program.Missing).
func Known() []*Program {
	return []*Program{{
		Name:   "deep",
		Needs:  []string{"g++"},
		build:  [][]string{append(cxx[:len(cxx):len(cxx)], "src/deep.cc")},
		run:    []string{"{out}", "1", "{seconds}"},
		Chains: []Chain{deepChain()},
		CFI:    true,
	}, {
		Name:  "frames",
		Needs: []string{"g++"},
		build: [][]string{append(cxx[:len(cxx):len(cxx)], "src/frames.cc")},
		Chains: below("_start ? ? main turn",
			"sorted ... less leaf_sort",
			"thrower guarded leaf_caught",
			"thrower guarded thrower_a thrower_b ... Guard::~Guard leaf_cleanup",
			"allocas_a allocas_b allocas_c leaf_alloca",
			"vla_a vla_b leaf_vla",
			"aligned_a aligned_b leaf_aligned",
			"realigned_a realigned_b leaf_realigned",
			"many_a many_b leaf_many",
			"pushed_a pushed_b leaf_pushed",
			"big_a big_b big_c leaf_big"),
		CFI: true,
	}, {
		Name:   "signals",
		Needs:  []string{"gcc"},
		build:  [][]string{append(c[:len(c):len(c)], "src/signals.c")},
		Chains: signalChains("_start ? ? main turn"),
		CFI:    true,
	}, {
		Name:     "signals-musl",
		Needs:    []string{"musl-gcc"},
		build:    [][]string{append([]string{"musl-gcc"}, append(c[1:len(c):len(c)], "src/signals.c")...)},
		Chains:   muslChains(),
		Unrooted: true,
	}, {
		Name:     "signals-musl-static",
		Needs:    []string{"musl-gcc"},
		build:    [][]string{append([]string{"musl-gcc", "-static"}, append(c[1:len(c):len(c)], "src/signals.c")...)},
		Chains:   muslChains(),
		Unrooted: true,
	}, {
		Name:  "plugin",
		Needs: []string{"gcc"},
		build: [][]string{
			{"gcc", "-O2", "-g", "-fomit-frame-pointer", "-shared", "-fPIC", "-Wl,-z,lazy", "-DPLUGIN", "-o", "{out}.so", "src/plugin.c"},
			append(c[:len(c):len(c)], "src/plugin.c"),
		},
		run:    []string{"env", "-u", "LD_BIND_NOW", "{out}", "{out}.so", "{seconds}"},
		Chains: []Chain{pluginChain()},
		CFI:    true,
	}, {
		Name:   "levels",
		Needs:  []string{"rustc"},
		build:  [][]string{{"rustc", "-C", "opt-level=2", "-g", "-o", "{out}", "src/levels.rs"}},
		Chains: append(rustChains(), parse("_start ... levels::main levels::turn levels::caught ... levels::panics ... <levels::Guard as core::ops::drop::Drop>::drop levels::leaf_drop")),
		CFI:    true,
	}, {
		Name:   "levels-abort",
		Needs:  []string{"rustc"},
		build:  [][]string{{"rustc", "-C", "opt-level=2", "-C", "panic=abort", "-g", "-o", "{out}", "src/levels.rs"}},
		Chains: append(rustChains(), parse("_start ... levels::main levels::turn ... levels::leaf_drop")),
		CFI:    true,
	}, {
		Name:   "gostacks",
		Needs:  []string{"go", "gcc"},
		build:  [][]string{{"go", "build", "-o", "{out}", "./gostacks"}},
		Chains: append(goChains(), cgoChains()...),
	}, {
		Name:   "gostacks-pie", // and with the internal linker, which needs no C
		Needs:  []string{"go"},
		build:  [][]string{{"CGO_ENABLED=0", "go", "build", "-buildmode=pie", "-o", "{out}", "./gostacks"}},
		Chains: goChains(),
	}, {
		Name:  "gostacks-stripped", // of symbols and DWARF; the names are those of another copy
		Needs: []string{"go", "gcc", "strip"},
		build: [][]string{
			{"go", "build", "-o", "{out}" + Unstripped, "./gostacks"},
			{"strip", "-o", "{out}", "{out}" + Unstripped},
		},
		Chains: append(goChains(), cgoChains()...),
	}, {
		Name:  "python",
		Needs: []string{"/usr/bin/python3"},
		run:   []string{"/usr/bin/python3", "{src}/library.py", "{seconds}"},
		CFI:   true,
	}, {
		Name:  "bash",
		Needs: []string{"bash"},
		run:   []string{"bash", "{src}/loop.sh", "{seconds}"},
		CFI:   true,
	}, {
		Name:  "perl",
		Needs: []string{"perl"},
		run:   []string{"perl", "{src}/loop.pl", "{seconds}"},
		CFI:   true,
	}, {
		Name:  "node",
		Needs: []string{"node"},
		run: []string{"env", "-C", "{dir}", "node", "--perf-basic-prof", "--interpreted-frames-native-stack", "--no-turbo-inlining",
			"--no-maglev-inlining", "{src}/chain.js", "{seconds}"},
		Chains: below("_start ... turn",
			"outer middle inner leafPlain",
			"sorting ... order leafSort",
			strings.Repeat("walk ", 15)+"leafWalk"),
		PerfMap: true,
	}, {
		Name:  "java",
		Needs: []string{"java", "javac"},
		build: [][]string{{"javac", "-d", "{dir}", "src/Chain.java"}},
		// All methods of Chain are compiled, once and at their first call, the library's
		// are interpreted.
		run: []string{"java", "-XX:+UnlockDiagnosticVMOptions", "-XX:+PreserveFramePointer", "-XX:+DumpPerfMapAtExit",
			"-Xcomp", "-XX:-TieredCompilation", "-XX:CompileCommand=quiet", "-XX:CompileCommand=dontinline,Chain::*",
			"-XX:CompileCommand=compileonly,Chain::*", "-cp", "{dir}", "Chain", "{seconds}"},
		Chains: below("... Chain.turn",
			"Chain.outer Chain.middle Chain.inner Chain.leafPlain",
			"Chain.sorting ... Chain.order Chain.leafSort",
			strings.Repeat("Chain.walk ", 15)+"Chain.leafWalk"),
		PerfMap: true,
	}, {
		Name:   "fft",
		Needs:  []string{"gcc"},
		build:  [][]string{append(c[:len(c):len(c)], "-ffast-math", "src/fft.c", "-lm")},
		run:    []string{"{out}", "1", "{seconds}"},
		Chains: below("_start ? ? main work", "transform"),
		CFI:    true,
	}}
}

// KnownNamed returns the program of Known with that name. There must be one.
func KnownNamed(name string) *Program {
	all := Known()
	return all[slices.IndexFunc(all, func(p *Program) bool { return p.Name == name })]
}

func deepChain() Chain {
	chain := parse("_start ? ? main deep::run ...")
	for level := 25; level > 0; level-- {
		chain = append(chain, fmt.Sprintf("deep::Level<%d>::visit", level))
	}
	return append(chain, "deep::burn")
}

func signalChains(root string) []Chain {
	return append(ownChains(root), below(root, "raiser ... on_raise leaf_raised", "clocked ...")...)
}

// muslChains are those that do not lead through the C library.
func muslChains() []Chain { return ownChains("... main turn") }

func ownChains(root string) []Chain {
	return append(below(root,
		// The frame between is the one that the kernel made, in its trampoline.
		"interrupted interrupted_a interrupted_b ? on_signal handled leaf_signal",
		"interrupted interrupted_a interrupted_b ? on_altstack handled_alt leaf_altstack",
		"faulter faulting ? on_fault leaf_fault",
		"jumper ... leaf_jump",
		"tail_a leaf_tail",
		"asm_push asm_frame asm_saved leaf_asm",
		"forker leaf_vfork",
	), parse("... worker thread_a thread_b leaf_thread"))
}

func pluginChain() Chain {
	chain := parse("_start ? ? main turn plug_entry")
	for i := range 40 {
		chain = append(chain, fmt.Sprint("plug_", i))
	}
	return append(chain, "leaf_plugin")
}

func rustChains() []Chain {
	return below("_start ... levels::main levels::turn",
		"levels::outer <levels::Middle as levels::Visit>::visit levels::inner levels::leaf_dyn",
		"levels::sorted ... levels::order levels::leaf_sort")
}

const goroutine = "runtime.goexit* main.main.gowrap1 main.worker"

func goChains() []Chain {
	return below(goroutine,
		"main.called main.(*shape).visit main.called.func1 main.leafGo",
		strings.Repeat("main.deep ", 20)+"main.leafDeep",
		"main.panics main.panicking runtime.gopanic ... main.panics.func1 main.leafDefer",
		"main.grows ...")
}

func cgoChains() []Chain {
	return below(goroutine+" main.foreign",
		"main.callC ... runtime.cgocall runtime.asmcgocall* ? c_outer c_inner leaf_c",
		"main.callBack ... runtime.cgocall runtime.asmcgocall* ? c_back c_back_inner goCallback crosscall2 ... _cgoexp_* main.leafCallback")
}
