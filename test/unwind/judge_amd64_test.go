// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"strings"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/test/workload"
)

// The judge is judged by programs whose stacks are known, stopped and copied by ptrace.
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
			maps, err := Mappings(p.PID, dir)
			if err != nil {
				t.Fatal(err)
			}
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
			ended, missed, lost := 0, 0, 0
			for i, v := range verdicts {
				stack := names.Stack(v.Frames)
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
			held.check(t, 0, 1) // threads and children are not looked at
		})
	}
}
