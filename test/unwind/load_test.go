// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hostflame/hostflame/bpf"
	tables "github.com/hostflame/hostflame/profiler/unwind"
	"github.com/hostflame/hostflame/test/workload"
)

// A load is programs that run, and the samples of them that the kernel side takes. It
// makes the unwind tables itself, at once when a sample shows that one is missing.
type load struct {
	t       *testing.T
	dir     string
	cpu     *bpf.CPU
	cgroup  *cgroup // of the programs
	walker  *tables.Walker
	running []*running
	files   map[bpf.File]*tables.File
	made    map[bpf.TableKey]*tables.Region
	counted bool // samples are kept
}

type running struct {
	program *workload.Program
	process *workload.Process
	sets    [][]Mapping // as its mappings changed
	samples []sample
	gone    int // samples in mappings that were gone when they were looked for
	kernel  int // samples without a user stack: exec, exit
	late    int // samples whose walk lacked a table
	bare    int // samples without a copy: not all of the stack was in memory
}

// sample is a user stack and what it can be unwound from.
type sample struct {
	user    []uint64
	outcome bpf.Outcome
	copy    Copy // its Set is an index of running.sets
	walked  []uint64
	again   bpf.Outcome // of the walk of the copy
}

// startLoad builds and starts the programs. Those that this machine has no compiler or
// interpreter for are left out, which the log says.
func startLoad(t *testing.T, names []string, frequency int) *load {
	l := &load{t: t, dir: t.TempDir(), files: map[bpf.File]*tables.File{}, made: map[bpf.TableKey]*tables.Region{}}
	var commands [][]string
	for _, name := range names {
		p := workload.KnownNamed(name)
		if missing := p.Missing(); missing != nil {
			t.Logf("%s is left out: no %s", name, strings.Join(missing, ", "))
			continue
		}
		command, err := p.Command(l.dir, 300)
		if err != nil {
			t.Fatal(err)
		}
		commands = append(commands, command)
		l.running = append(l.running, &running{program: p})
	}
	var err error
	if l.cpu, err = bpf.NewCPU(bpf.CPUConfig{Frequency: frequency, CgroupV1: bpf.CPUControllerV1(), CopyStacks: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.cpu.Close() })
	machine := elf.EM_X86_64
	if runtime.GOARCH == "arm64" {
		machine = elf.EM_AARCH64
	}
	if l.walker, err = tables.NewWalker(machine, nil); err != nil {
		t.Fatal(err)
	}
	l.walker.AddressMask = bpf.AddressMask()
	l.cgroup = newCgroup(t, "hostflame-stacks")
	for i, r := range l.running {
		r.process = l.cgroup.start(t, commands[i])
		r.process.Ready()
		if r.program.PerfMap {
			perfMap := perfMapPath(r.process.PID)
			t.Cleanup(func() { os.Remove(perfMap) })
		}
	}
	return l
}

func perfMapPath(pid int) string { return fmt.Sprintf("/tmp/perf-%d.map", pid) }

// run lets the programs run for a while until the tables are there, and then takes
// samples for so long. At the end it stops the programs.
func (l *load) run(warm, d time.Duration) {
	l.t.Helper()
	l.sampleFor(warm)
	l.counted = true
	l.sampleFor(d)
	if err := l.cpu.Detach(); err != nil {
		l.t.Fatal(err)
	}
	l.drain()
	stats, err := l.cpu.Stats()
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Logf("delivered %d, dropped %v", stats.Delivered, stats.Dropped)
	for _, r := range l.running {
		r.process.Stop()
	}
}

func (l *load) sampleFor(d time.Duration) {
	l.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		l.drain()
	}
}

func (l *load) drain() {
	l.t.Helper()
	if err := l.cpu.Drain(l.take); err != nil {
		l.t.Fatal(err)
	}
}

// take keeps a sample of one of the programs, and gives the kernel the tables that it
// may have lacked.
func (l *load) take(s *bpf.Sample) {
	if s.Cgroup != l.cgroup.id {
		return
	}
	r, set := l.whose(s)
	if r == nil {
		return // a shell that has not yet executed the program
	}
	if len(s.User) == 0 {
		if l.counted {
			r.kernel++
		}
		return
	}
	if set < 0 {
		r.gone++
		return
	}
	l.makeTables(s, r.sets[set])
	if !l.counted {
		return
	}
	got := sample{user: slices.Clone(s.User), outcome: s.UserOutcome}
	if len(s.Stack) == 0 {
		r.bare++
	} else {
		got.copy = Copy{Set: set, Regs: registers(&s.Stop), Address: s.StackStart, Bytes: bytes.Clone(s.Stack)}
		l.walker.Lookup = func(addr uint64) (*tables.Region, uint64, bool) { return l.lookup(s, r.sets[set], addr) }
		got.walked, got.again = l.walker.Walk(nil, s.Stop, 0, s.Stack, s.StackStart)
		if s.UserOutcome == bpf.OutcomeNoTable {
			// As the agent does. It has the tables from then on.
			r.late++
			got.user, got.outcome = got.walked, got.again
		}
	}
	r.samples = append(r.samples, got)
}

// registers are those of the leaf, as the judge takes them.
func registers(f *bpf.Frame) []uint64 {
	n := 16
	if runtime.GOARCH == "arm64" {
		n = 32
	}
	return append(slices.Clone(f.Registers[:n]), f.IP)
}

// whose finds the program that a sample is of, by its process, or, for one that a program
// forked, by its mappings; and which of the program's sets of mappings it goes with.
func (l *load) whose(s *bpf.Sample) (*running, int) {
	for _, r := range l.running {
		if r.process.PID == int(s.PID) {
			set := r.set(s.Areas)
			if set < 0 {
				maps, err := Mappings(r.process.PID, l.dir)
				if err != nil {
					return r, -1 // it is about to end
				}
				r.sets = append(r.sets, maps)
				set = r.set(s.Areas)
			}
			return r, set
		}
	}
	if len(s.Areas) == 0 {
		return nil, -1
	}
	for _, r := range l.running {
		if set := r.set(s.Areas); set >= 0 {
			return r, set
		}
	}
	return nil, -1
}

// set is the newest set of mappings that has the areas, or -1.
func (r *running) set(areas []bpf.Area) int {
	for i, set := range slices.Backward(r.sets) {
		if !slices.ContainsFunc(areas, func(a bpf.Area) bool { return mapping(set, a) == nil }) {
			return i
		}
	}
	return -1
}

// mapping finds an area's. A JIT compiler changes the bounds of its own all the time.
func mapping(set []Mapping, a bpf.Area) *Mapping {
	for i := range set {
		m := &set[i]
		if m.Start == a.Start && m.End == a.End && m.Offset == a.Offset ||
			a.File == (bpf.File{}) && m.Path == "" && m.Start < a.End && a.Start < m.End {
			return m
		}
	}
	return nil
}

func area(areas []bpf.Area, addr uint64) *bpf.Area {
	for i := range areas {
		if addr >= areas[i].Start && addr < areas[i].End {
			return &areas[i]
		}
	}
	return nil
}

// makeTables sees that the kernel has the tables of all frames.
func (l *load) makeTables(s *bpf.Sample, set []Mapping) {
	for _, addr := range s.User {
		exact := addr&bpf.ExactAddr != 0
		addr &^= bpf.ExactAddr
		if !exact {
			addr--
		}
		if a := area(s.Areas, addr); a != nil && a.File != (bpf.File{}) {
			l.table(*a, mapping(set, *a).Path, addr-a.Start+a.Offset)
		}
	}
}

// table makes the table of an offset of a file.
func (l *load) table(a bpf.Area, path string, offset uint64) *tables.Region {
	key := bpf.TableKey{File: a.File, Region: bpf.RegionOf(offset)}
	if r, ok := l.made[key]; ok {
		return r
	}
	r := new(tables.Region)
	if f := l.open(a.File, path); f != nil {
		made, err := f.Region(key.Region)
		if err != nil {
			l.t.Logf("no table for %s, region %d: %v", path, key.Region, err)
		}
		r = &made
	}
	l.made[key] = r
	err := l.cpu.Tables().Put(key, bpf.Table{FirstBucket: r.FirstBucket, Buckets: uint16(r.Buckets()), Words: r.Words})
	if err != nil {
		l.t.Errorf("table for %s, region %d: %v", path, key.Region, err)
	}
	return r
}

func (l *load) open(id bpf.File, path string) *tables.File {
	if f, ok := l.files[id]; ok {
		return f
	}
	l.files[id] = nil
	content, err := os.Open(path) // until the test ends
	if err != nil {
		l.t.Logf("no unwind information: %v", err)
		return nil
	}
	info, err := content.Stat()
	if err != nil {
		l.t.Fatal(err)
	}
	f, err := tables.Open(content, info.Size(), nil)
	if err != nil {
		l.t.Logf("no unwind information: %s: %v", path, err)
		return nil
	}
	l.files[id] = f
	return f
}

// lookup is what the walk of a copy asks: the sample's areas, and what else is mapped.
func (l *load) lookup(s *bpf.Sample, set []Mapping, addr uint64) (*tables.Region, uint64, bool) {
	if a := area(s.Areas, addr); a != nil {
		if a.File == (bpf.File{}) {
			return nil, 0, true
		}
		offset := addr - a.Start + a.Offset
		return l.table(*a, mapping(set, *a).Path, offset), offset, true
	}
	for _, m := range set {
		if addr >= m.Start && addr < m.End {
			if m.Path == "" {
				return nil, 0, true
			}
			// The kernel's name of the file is not known: it shows in the next sample there.
			offset := addr - m.Start + m.Offset
			for id, f := range l.files {
				if f != nil && id.Inode == m.Inode {
					return l.table(bpf.Area{File: id}, m.Path, offset), offset, true
				}
			}
			return nil, offset, true
		}
	}
	return nil, 0, false
}
