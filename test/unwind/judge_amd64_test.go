// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"debug/elf"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/kerneltest"
	tables "github.com/hostflame/hostflame/profiler/unwind"
	"github.com/hostflame/hostflame/test/workload"
)

// fullest is the largest of several looks at the mappings: a library may come and go.
func fullest(t *testing.T, pid int, dir string) (most []Mapping) {
	for range 20 {
		maps, err := Mappings(pid, dir)
		if err != nil {
			t.Fatal(err)
		}
		if len(maps) > len(most) {
			most = maps
		}
		time.Sleep(3 * time.Millisecond)
	}
	return most
}

// newWalk walks copies of a process's stacks by our own tables, in user space.
func newWalk(t *testing.T, maps []Mapping) func(*Copy) ([]uint64, bpf.Outcome) {
	w, err := tables.NewWalker(elf.EM_X86_64, nil)
	if err != nil {
		t.Fatal(err)
	}
	type key struct {
		path   string
		region uint32
	}
	files, made := map[string]*tables.File{}, map[key]*tables.Region{}
	w.Lookup = func(addr uint64) (*tables.Region, uint64, bool) {
		i := slices.IndexFunc(maps, func(m Mapping) bool { return addr >= m.Start && addr < m.End })
		if i < 0 {
			return nil, 0, false
		}
		m := &maps[i]
		offset := addr - m.Start + m.Offset
		k := key{m.Path, bpf.RegionOf(offset)}
		r, ok := made[k]
		if !ok {
			f, opened := files[m.Path]
			if !opened {
				f = openTables(t, m.Path)
				files[m.Path] = f
			}
			if f != nil {
				if made, err := f.Region(k.region); err == nil {
					r = &made
				}
			}
			made[k] = r
		}
		return r, offset, true
	}
	return func(c *Copy) ([]uint64, bpf.Outcome) {
		from := bpf.Frame{IP: c.Regs[16], SP: c.Regs[7], FP: c.Regs[6], Second: c.Regs[3], Exact: true, Leaf: true}
		copy(from.Registers[:], c.Regs[:16])
		return w.Walk(nil, from, 0, c.Bytes, c.Address)
	}
}

// openTables opens a file for as long as the test lasts; nil if it is no ELF file.
func openTables(t *testing.T, path string) *tables.File {
	content, err := os.Open(path)
	if err != nil {
		return nil
	}
	t.Cleanup(func() { content.Close() })
	info, err := content.Stat()
	if err != nil {
		t.Fatal(err)
	}
	f, err := tables.Open(content, info.Size(), nil)
	if err != nil {
		return nil
	}
	return f
}

func sameFrames(x, y []uint64) bool {
	return slices.EqualFunc(x, y, func(x, y uint64) bool { return x&^Exact == y&^Exact })
}

// The judge is judged by programs whose stacks are known, stopped and copied by ptrace,
// and it judges the walk of the same copies in user space.
func TestJudge(t *testing.T) {
	judge := buildJudge(t)
	kerneltest.MeasureLock(t) // it burns CPU
	for _, program := range workload.Known() {
		if !program.CFI {
			continue
		}
		t.Run(program.Name, func(t *testing.T) {
			if missing := program.Missing(); missing != nil {
				t.Skipf("no %s", strings.Join(missing, ", "))
			}
			dir := t.TempDir()
			command, err := program.Command(dir, 60)
			if err != nil {
				t.Fatal(err)
			}
			p := workload.Start(t, command[0], command[1:]...)
			p.Ready()
			copies, err := captureStacks(p.PID, 400, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			maps := fullest(t, p.PID, dir)
			p.Stop()
			begin := time.Now()
			verdicts, err := Judge(judge, [][]Mapping{maps}, copies)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%.0f us a stack", float64(time.Since(begin).Microseconds())/float64(len(copies)))
			names, err := NewNames(maps, "")
			if err != nil {
				t.Fatal(err)
			}
			held := newHeld(program.Chains)
			walk := newWalk(t, maps)
			var same, other int
			ended, missed, lost := 0, 0, 0
			for i, v := range verdicts {
				stack := names.Stack(v.Frames)
				switch walked, outcome := walk(&copies[i]); {
				case !v.Ended: // the judge knows less
				case outcome == bpf.OutcomeComplete && sameFrames(walked, v.Frames):
					same++
				default:
					if other++; other <= 3 {
						t.Logf("walked by our tables, %v: %s\nelfutils: %s", outcome,
							strings.Join(names.Stack(walked), " > "), strings.Join(stack, " > "))
					}
				}
				switch {
				case v.Error == lostRegister:
					lost++
					continue
				case v.Missed: // on a stack for signals, the one below is not in the copy
					if missed++; missed <= 3 {
						t.Logf("wants %#x, copy %#x + %#x: %s", v.MissedAt, copies[i].Address, len(copies[i].Bytes), strings.Join(stack, " > "))
					}
					continue
				case v.Ended:
					ended++
				case i-ended-missed-lost < 5: // not all of them
					t.Logf("%s\n%s", v.Error, strings.Join(stack, " > "))
				}
				held.add(stack)
			}
			t.Logf("%d end, %d are longer than their copy, %d want rbx, of %d", ended, missed, lost, len(verdicts))
			if share := float64(ended) / float64(len(verdicts)-missed-lost); !(share >= 0.995) || ended < 100 {
				t.Errorf("%.1f %% of %d stacks end", 100*share, len(verdicts)-missed-lost)
			}
			if share := float64(same) / float64(same+other); !(share >= 0.995) {
				t.Errorf("%.1f %% of %d copies are walked by our tables as by elfutils", 100*share, same+other)
			}
			held.check(t, 0, 1) // threads and children are not looked at
		})
	}
}
