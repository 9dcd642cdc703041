// SPDX-License-Identifier: Apache-2.0

package unwind_test

import (
	"debug/elf"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/profiler/unwind"
	"github.com/hostflame/hostflame/symbolizer"
	"github.com/hostflame/hostflame/test/workload"
)

// functions names the addresses of a program that is linked to fixed ones.
type functions []elf.Symbol

func functionsOf(t *testing.T, path string) functions {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	syms, err := f.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	syms = slices.DeleteFunc(syms, func(s elf.Symbol) bool { return elf.ST_TYPE(s.Info) != elf.STT_FUNC })
	slices.SortStableFunc(syms, func(a, b elf.Symbol) int { return int(int64(a.Value) - int64(b.Value)) })
	return syms
}

func (f functions) name(addr uint64) string {
	i := sort.Search(len(f), func(i int) bool { return f[i].Value > addr }) - 1
	if i < 0 {
		return "?"
	}
	return f[i].Name
}

// TestUnwindKnown walks a program that does to its stacks what C programs do: signals on two
// stacks, faults, longjmp, tail calls, assembly, threads, vfork. Every stack with a witness in
// it is the chain that the witness stands for, as the kernel walks it by tables that were there
// from the start. It runs on foreign kernels and machines, too.
func TestUnwindKnown(t *testing.T) {
	kerneltest.Require(t)
	path := kerneltest.BuildProgram(t, "signals")
	names := functionsOf(t, path)
	cpu, err := bpf.NewCPU(bpf.CPUConfig{Frequency: 997, CgroupV1: bpf.CPUControllerV1()})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer cpu.Close()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	giveTables(t, cpu.Tables(), f, st.Size, bpf.File{
		Inode: st.Ino, MtimeNanos: uint64(st.Mtim.Nano()), Device: unix.Major(st.Dev)<<20 | unix.Minor(st.Dev),
	})
	sym := symbolizer.New(symbolizer.Config{})
	defer sym.Close()
	vdso, err := sym.VDSO()
	if err != nil {
		t.Fatal(err)
	}
	giveTables(t, cpu.Tables(), vdso.Content(), vdso.Content().Size(), bpf.VDSO)

	cmd := exec.Command(path, "6")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	comm := bpf.MakeComm(filepath.Base(path)) // also of the children of vfork
	type judged struct{ seen, right int }
	chains := map[string]*judged{}
	var total, complete int
	outcomes := map[bpf.Outcome]int{}
	drain := func(s *bpf.Sample) {
		if s.Comm != comm || len(s.User) == 0 {
			return
		}
		total++
		outcomes[s.UserOutcome]++
		if s.UserOutcome == bpf.OutcomeComplete {
			complete++
		}
		stack := make([]string, len(s.User))
		for i, addr := range s.User {
			if addr&bpf.ExactAddr == 0 {
				addr--
			}
			stack[len(stack)-1-i] = names.name(addr &^ bpf.ExactAddr)
		}
		for _, chain := range chainsOfSignals() {
			part, ok := chain.Witnessed(stack)
			if !ok {
				continue
			}
			w := chain.Witness()
			if chains[w] == nil {
				chains[w] = new(judged)
			}
			chains[w].seen++
			if chain.Match(part) {
				chains[w].right++
			} else if chains[w].seen-chains[w].right < 3 {
				t.Logf("%v: %v", chain, stack)
			}
			break
		}
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for ended := false; !ended; {
		select {
		case err := <-done:
			ended = true
			if err != nil {
				t.Error(err)
			}
		case <-time.After(100 * time.Millisecond):
		}
		if err := cpu.Drain(drain); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d stacks, %d complete; outcomes %v", total, complete, outcomes)
	for w, j := range chains {
		t.Logf("%s: %d of %d", w, j.right, j.seen)
		if j.right < j.seen*97/100-1 {
			t.Errorf("%s: %d of %d stacks are the chain", w, j.right, j.seen)
		}
	}
	if len(chains) < 6 || total < 500 {
		t.Errorf("%d stacks, %d chains seen: no judgement", total, len(chains))
	}
	if complete < total*98/100 {
		t.Errorf("%d of %d stacks are complete: %v", complete, total, outcomes)
	}
}

// chainsOfSignals are the chains of the program, but with whatever the timer interrupted
// below interrupted: an emulated CPU can be late.
func chainsOfSignals() []workload.Chain {
	chains := slices.Clone(workload.KnownNamed("signals").Chains)
	for i, c := range chains {
		if at := slices.Index(c, "interrupted_a"); at >= 0 {
			chains[i] = append(append(slices.Clone(c[:at]), "..."), c[at+3:]...)
		}
	}
	return chains
}

// giveTables puts the tables of a file into the kernel.
func giveTables(t *testing.T, tables *bpf.Tables, r io.ReaderAt, size int64, id bpf.File) {
	t.Helper()
	u, err := unwind.Open(r, size, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range u.Regions() {
		r, err := u.Region(n)
		if err != nil {
			t.Fatal(err)
		}
		table := bpf.Table{FirstBucket: r.FirstBucket, Buckets: uint16(r.Buckets()), Words: r.Words}
		if err := tables.Put(bpf.TableKey{File: id, Region: n}, table); err != nil {
			t.Fatal(err)
		}
	}
}
