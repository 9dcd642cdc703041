// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// The whole bench in a few seconds, so that it never rots. No time is looked at.
func TestShort(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("loading BPF programs needs root")
	}
	kerneltest.MeasureLock(t) // not for itself: it makes load
	var out bytes.Buffer
	if err := run(&out, short, ""); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", out.String())
	number := `[0-9.]+`
	for _, row := range []string{
		`\| an empty program on sched_switch +\| .least. +\| ` + number,
		`\| runqlat +\| .[a-z_]*sched_switch. +\| ` + number,
		`\| runqlat +\| all, ns a switch +\| ` + number,
		`\| hostflame +\| .hf_sched_switch. +\| ` + number,
		`\| hostflame +\| all, ns a switch +\| ` + number,
		`\| biolatency +\| all, ns a request +\| ` + number,
		`\| hostflame +\| .hf_block_[a-z_]+. +\| ` + number,
		`\| hostflame, no stacks of I/O +\| all, ns a request +\| ` + number,
		`\| nothing +\| ` + number,
		`\| hostflame +\| ` + number + ` +\| [0-9-]+ +\| [+-][0-9]+ .*\| 50 % +\|`,
		`\| hostflame, histograms only +\| [0-9]+ +\| [0-9-]+ +\| 230 +\|`,
		`\| hostflame, histograms and CPU samples +\| ` + number + `.* % +\|`,
		`\| CPU of the process, BPF apart +\| ` + number + ` ms a second`,
		`\| - .hf_cpu. +\| ` + number + ` ns a run`,
		`\| kernel maps +\| ` + number + ` MB in [1-9][0-9]* maps`,
		`\| C\+\+ without frame pointers, 25 to 45 calls +\| bpftrace kstack, ustack +\| [1-9][0-9]{2,} `,
		`\| C\+\+ without frame pointers, 25 to 45 calls +\| hostflame +\| [1-9][0-9]{2,} `,
		`\| fft, shallow +\| ` + number + ` +\| ` + number + ` +\| ` + number + ` % +\| ` + number + ` % of a core`,
		`\| CPython: [a-z, ]+ +\| hostflame +\| [1-9][0-9]{2,} `,
		`to a sample in its metrics, with both CPUs busy: ` + number + ` s`,
	} {
		if !regexp.MustCompile(row).Match(out.Bytes()) {
			t.Errorf("no row like %s", row)
		}
	}
	if strings.Contains(out.String(), "NaN") {
		t.Error("a figure is not a number")
	}
}

func TestSpread(t *testing.T) {
	for _, test := range []struct {
		values []float64
		want   spread
	}{
		{[]float64{3}, spread{3, 3, 3, 3, 3}},
		{[]float64{5, 1, 3, 2, 4}, spread{1, 2, 3, 4, 5}},
		{[]float64{1, 2}, spread{1, 1.25, 1.5, 1.75, 2}},
	} {
		if got := spreadOf(test.values); got != test.want {
			t.Errorf("spread of %v: %v, want %v", test.values, got, test.want)
		}
	}
	if got := spreadOf(nil).median; !math.IsNaN(got) {
		t.Errorf("the median of nothing is %v", got)
	}
}

// The ranks are those of the binomial distribution: of 15 values the 4th to the 12th, for 0.9648.
func TestMedianInterval(t *testing.T) {
	for _, test := range []struct {
		n        int
		interval string
	}{
		{1, "1 to 1"}, {5, "1 to 5"}, {6, "1 to 6"}, {8, "1 to 8"}, {9, "2 to 8"}, {15, "4 to 12"}, {20, "6 to 15"}, {100, "40 to 61"},
	} {
		var values []float64
		for i := range test.n {
			values = append(values, float64(test.n-i))
		}
		median, interval := medianInterval(values, "%g")
		if want := fmt.Sprint(float64(test.n+1) / 2); median != want || interval != test.interval {
			t.Errorf("of %d: %s, %s, want %s, %s", test.n, median, interval, want, test.interval)
		}
	}
}

func TestTable(t *testing.T) {
	out := table{header: []string{"a", "bb"}}
	out.add("ccc", "µ")
	var b bytes.Buffer
	out.print(&b)
	const want = "| a   | bb |\n|-----|----|\n| ccc | µ  |\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

func TestProcessCPU(t *testing.T) {
	before, err := processCPU(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); time.Since(begin) < 200*time.Millisecond; {
	}
	after, err := processCPU(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	// Another process may have had the CPU for a part of the time.
	if grew := after - before; grew < 20*time.Millisecond || grew > time.Second {
		t.Errorf("burning 200 ms took %v of CPU", grew)
	}
	user, system, err := userSystem(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if d := after - user - system; d < -50*time.Millisecond || d > 100*time.Millisecond {
		t.Errorf("the clock says %v, the ticks %v", after, user+system)
	}
}
