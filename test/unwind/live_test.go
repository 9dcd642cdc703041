// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"cmp"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/kerneltest"
)

// What CFI alone describes: here elfutils is the judge.
var byCFI = []string{"deep", "frames", "signals", "plugin", "levels", "levels-abort", "python", "bash", "perl"}

// TestAgainstElfutils walks user stacks in the kernel and unwinds copies of the same stacks
// with elfutils. The programs' known stacks are looked for in both.
func TestAgainstElfutils(t *testing.T) {
	kerneltest.Require(t)
	judge := buildJudge(t)
	kerneltest.MeasureLock(t)
	l := startLoad(t, byCFI, 499)
	l.run(3*time.Second, 20*time.Second)

	var all tally
	for _, r := range l.running {
		got := l.judge(judge, r)
		t.Logf("%-12s %v", r.program.Name, got)
		all.add(got)
		l.checkKnown(r)
	}
	t.Logf("%-12s %v", "all", &all)
	for _, class := range slices.SortedFunc(maps.Keys(all.classes), func(x, y string) int {
		return cmp.Compare(all.classes[y], all.classes[x])
	}) {
		t.Logf("%5d times: %s", all.classes[class], class)
	}
	for class, text := range all.examples {
		t.Logf("example of %s\n%s", class, text)
	}
	if n := all.agree + all.differ; float64(all.agree) < 0.995*float64(n) || n < 1500 {
		t.Errorf("%d of %d stacks are the same, want 99.5 %%", all.agree, n)
	}
	if float64(all.complete) < 0.99*float64(all.samples) {
		t.Errorf("%d of %d stacks end at a known start, want 99 %%", all.complete, all.samples)
	}
	// Frames of 300 KiB, stacks for signals, and buffers on the stack that nobody has touched
	// yet (of Rust's sort): the copy ends there.
	if float64(all.short) > 0.2*float64(all.samples) {
		t.Errorf("%d of %d stacks could be compared in part only", all.short, all.samples)
	}
	if float64(all.gone) > 0.005*float64(all.samples) {
		t.Errorf("of %d samples the mappings were gone", all.gone)
	}
}

// tally counts what became of samples with a user stack.
type tally struct {
	samples  int
	complete int // by the kernel side: at a known start
	agree    int // frame for frame, those of short included
	differ   int
	short    int // the copy ended before the stack: as far as it went
	unjudged int // elfutils lacked CFI or lost a register: the same up to there
	gone     int
	bare     int // without a copy
	late     int // for which a table was made: the walk of the copy counts
	walk     int // the walk of the copy in user space is another one than the kernel's
	outcomes map[bpf.Outcome]int
	classes  map[string]int // of differences
	examples map[string]string
}

func (y *tally) add(x *tally) {
	y.samples += x.samples
	y.complete += x.complete
	y.agree += x.agree
	y.differ += x.differ
	y.short += x.short
	y.unjudged += x.unjudged
	y.gone += x.gone
	y.bare += x.bare
	y.late += x.late
	y.walk += x.walk
	if y.classes == nil {
		y.classes, y.examples, y.outcomes = map[string]int{}, map[string]string{}, map[bpf.Outcome]int{}
	}
	for k, n := range x.classes {
		y.classes[k] += n
	}
	for k, n := range x.outcomes {
		y.outcomes[k] += n
	}
	maps.Copy(y.examples, x.examples)
}

func (y *tally) String() string {
	percent := func(n, of int) string { return fmt.Sprintf("%.2f %%", 100*float64(n)/float64(max(of, 1))) }
	return fmt.Sprintf("%5d samples, %s agree, %s complete; short copies %s, no verdict %s, no copy %s, late %d, mappings gone %d, walk of the copy differs %d; %v",
		y.samples, percent(y.agree, y.agree+y.differ), percent(y.complete, y.samples),
		percent(y.short, y.samples), percent(y.unjudged, y.samples), percent(y.bare, y.samples), y.late, y.gone, y.walk, y.outcomes)
}

// judge compares a program's samples with what the judge says of their copies.
func (l *load) judge(judge string, r *running) *tally {
	l.t.Helper()
	got := &tally{gone: r.gone, late: r.late, classes: map[string]int{}, examples: map[string]string{}, outcomes: map[bpf.Outcome]int{}}
	var copies []Copy
	copied := map[int]int{} // by sample
	for i, s := range r.samples {
		if len(s.copy.Bytes) > 0 {
			copied[i] = len(copies)
			copies = append(copies, s.copy)
		}
	}
	verdicts, err := Judge(judge, r.sets, copies)
	if err != nil {
		l.t.Fatal(err)
	}
	for i := range r.samples {
		s := &r.samples[i]
		got.samples++
		got.outcomes[s.outcome]++
		if s.outcome == bpf.OutcomeComplete {
			got.complete++
		}
		at, ok := copied[i]
		if !ok {
			got.bare++
			continue
		}
		v := &verdicts[at]
		// Where there is no code there is no frame.
		if n := len(v.Frames); n > 1 && !l.inCode(r, s, v.Frames[n-1]) {
			v.Frames = v.Frames[:n-1]
		}
		if !sameWalk(s) {
			got.walk++
			l.explain(got, r, s, v, "the walk of the copy is another one")
		}
		switch class := l.compare(r, s, v); class {
		case "":
			got.agree++
		case classShort:
			got.agree++
			got.short++
		case classUnjudged:
			got.unjudged++
			l.explain(got, r, s, v, r.program.Name+", "+class+": "+v.Error)
		default:
			got.differ++
			l.explain(got, r, s, v, class)
		}
	}
	return got
}

func (l *load) explain(got *tally, r *running, s *sample, v *Verdict, class string) {
	got.classes[class]++
	if got.classes[class] > 1 {
		return
	}
	names, err := NewNames(r.sets[s.copy.Set], "")
	if err != nil {
		l.t.Fatal(err)
	}
	list := func(frames []uint64) string {
		var lines []string
		stack := names.Stack(frames)
		for i, addr := range frames {
			lines = append(lines, fmt.Sprintf("\t%s %s", l.place(r, s, addr), stack[len(stack)-1-i]))
		}
		return strings.Join(lines, "\n")
	}
	got.examples[class] = fmt.Sprintf("hostflame, %v:\n%s\nelfutils, %q, ended %t, missed %t %#x, copy %#x + %#x:\n%s\nwalk of the copy, %v:\n%s",
		s.outcome, list(s.user), v.Error, v.Ended, v.Missed, v.MissedAt, s.copy.Address, len(s.copy.Bytes), list(v.Frames), s.again, list(s.walked))
}

// place is where an address is, in a file.
func (l *load) place(r *running, s *sample, addr uint64) string {
	exact := ""
	if addr&Exact != 0 {
		exact = "!"
	}
	addr &^= Exact
	for _, m := range r.sets[s.copy.Set] {
		if addr >= m.Start && addr < m.End {
			return fmt.Sprintf("%s%s+%#x", exact, filepath.Base(m.Path), addr-m.Start+m.Offset)
		}
	}
	return fmt.Sprintf("%s%#x", exact, addr)
}

func (l *load) inCode(r *running, s *sample, addr uint64) bool {
	addr &^= Exact
	return slices.ContainsFunc(r.sets[s.copy.Set], func(m Mapping) bool { return addr >= m.Start && addr <= m.End })
}

// sameWalk compares the walk in user space with the kernel's, as far as the copy reaches.
func sameWalk(s *sample) bool {
	if s.again == bpf.OutcomeTruncated || s.again == bpf.OutcomeBadStack {
		n := min(len(s.walked), len(s.user))
		return slices.Equal(s.walked[:n], s.user[:n])
	}
	return slices.Equal(s.walked, s.user) && s.again == s.outcome
}

const (
	classShort    = "the copy ends"
	classUnjudged = "no verdict"
)

// compare says how a stack differs from the verdict, or "" if it does not.
func (l *load) compare(r *running, s *sample, v *Verdict) string {
	n := min(len(s.user), len(v.Frames))
	at := 0
	for at < n && s.user[at]&^Exact == v.Frames[at]&^Exact {
		at++
	}
	switch {
	case at < n || len(s.user) < len(v.Frames):
	case v.Ended && len(s.user) == len(v.Frames):
		if s.outcome == bpf.OutcomeComplete {
			// The judge marks the trampoline too.
			for i := 2; i < n; i++ {
				if v.Frames[i]&v.Frames[i-1]&Exact != 0 && s.user[i]&Exact == 0 {
					return "an interrupted frame is not exact"
				}
			}
			return ""
		}
	case v.Missed && (v.MissedAt < s.copy.Address || v.MissedAt+8 > s.copy.Address+uint64(len(s.copy.Bytes))):
		return classShort
	case v.Error != "":
		return classUnjudged
	}
	// Named by the frame that the two do not agree on the caller of.
	last := ""
	if at > 0 {
		names, err := NewNames(r.sets[s.copy.Set], "")
		if err != nil {
			l.t.Fatal(err)
		}
		stack := names.Stack(s.user[:at])
		last = l.place(r, s, s.user[at-1]) + " " + stack[0]
	}
	return fmt.Sprintf("%s at %s: hostflame %d frames, %v; elfutils %d, ended %t, missed %t, %s", r.program.Name, last,
		len(s.user)-at, s.outcome, len(v.Frames)-at, v.Ended, v.Missed, v.Error)
}

// checkKnown looks for the program's known stacks.
func (l *load) checkKnown(r *running) {
	perfMap := ""
	if r.program.PerfMap {
		perfMap = perfMapPath(r.process.PID)
	}
	held := newHeld(r.program.Chains)
	names := map[int]*Names{}
	for i := range r.samples {
		s := &r.samples[i]
		n := names[s.copy.Set]
		if n == nil {
			var err error
			if n, err = NewNames(r.sets[s.copy.Set], perfMap); err != nil {
				l.t.Error(err)
				return
			}
			names[s.copy.Set] = n
		}
		held.add(n.Stack(s.user))
	}
	l.t.Run(r.program.Name, func(t *testing.T) { held.check(t, 1, 0.97) })
}
