// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

var allJobs = flag.Bool("all", false, "run all fio jobs of TestBlockPairwise, not a part of them")

// ioDimensions are what jobs differ in. Each value meets each value of the others in some
// job, where they go together.
var ioDimensions = [][]string{
	{"none", "mq-deadline", "kyber", "bfq"},
	{"read", "write", "randread", "randwrite", "randrw", "randtrim"},
	{"512", "4k", "16k", "128k", "1M"},
	{"1", "8", "64"},
	{"libaio", "psync", "buffered"},
}

// ioJob has a value of each dimension.
type ioJob struct{ scheduler, rw, size, depth, mode string }

func (j ioJob) possible() bool {
	return (j.mode == "libaio" || j.depth == "1") && (j.rw != "randtrim" || j.mode != "buffered" && j.size != "512")
}

func (j ioJob) values() []string { return []string{j.scheduler, j.rw, j.size, j.depth, j.mode} }

func (j ioJob) pairs() (list [][4]string) {
	v := j.values()
	for a := range v {
		for b := a + 1; b < len(v); b++ {
			list = append(list, [4]string{fmt.Sprint(a), v[a], fmt.Sprint(b), v[b]})
		}
	}
	return list
}

// pairwise are jobs that have each pair of values that is possible, chosen greedily.
func pairwise() (jobs []ioJob) {
	var all []ioJob
	var build func(v []string)
	build = func(v []string) {
		if len(v) < len(ioDimensions) {
			for _, next := range ioDimensions[len(v)] {
				build(append(slices.Clone(v), next))
			}
			return
		}
		if j := (ioJob{v[0], v[1], v[2], v[3], v[4]}); j.possible() {
			all = append(all, j)
		}
	}
	build(nil)
	left := map[[4]string]bool{}
	for _, j := range all {
		for _, p := range j.pairs() {
			left[p] = true
		}
	}
	for len(left) > 0 {
		best, most := ioJob{}, 0
		for _, j := range all {
			n := 0
			for _, p := range j.pairs() {
				if left[p] {
					n++
				}
			}
			if n > most {
				best, most = j, n
			}
		}
		for _, p := range best.pairs() {
			delete(left, p)
		}
		jobs = append(jobs, best)
	}
	return jobs
}

// Over jobs in which everything meets everything: counts, bytes and merges equal
// /proc/diskstats, and bytes what fio says; times agree with diskstats; nothing stays in
// flight. A part of them runs by default, the rest with -all (make test-block).
func TestBlockPairwise(t *testing.T) {
	kerneltest.RequireTool(t, "fio")
	jobs := pairwise()
	if len(jobs) > 40 {
		t.Errorf("%d jobs, want at most 40", len(jobs))
	}
	requests := "5000"
	if !*allJobs {
		requests = "2000"
		// Those that cover most come first.
		jobs = jobs[:6]
	}
	device, _ := loopDevice(t)
	b := newTestBlock(t)
	for _, j := range jobs {
		t.Run(strings.Join(j.values(), "-"), func(t *testing.T) {
			setScheduler(t, device, j.scheduler)
			args := []string{"--rw=" + j.rw, "--bs=" + j.size, "--size=64M", "--number_ios=" + requests,
				"--iodepth=" + j.depth, "--invalidate=0"}
			if j.mode == "buffered" {
				args = append(args, "--ioengine=psync", "--direct=0", "--fsync=64")
			} else {
				args = append(args, "--ioengine="+j.mode, "--direct=1")
			}
			var report fioReport
			counts, books := measureDevice(t, b, device, func() { report = fio(t, device, args...) })
			for _, d := range counts.differences(books) {
				t.Error(d)
			}
			awaitIdle(t, b, device)
			if j.mode == "buffered" {
				return // what the cache made of it
			}
			for _, x := range []struct {
				op  string
				fio uint64
			}{{"read", report.Read.Bytes}, {"write", report.Write.Bytes}, {"discard", report.Trim.Bytes}} {
				if n := counts[x.op].Size.Sum; n != x.fio {
					t.Errorf("%s: %d bytes, fio says %d", x.op, n, x.fio)
				}
			}
			if report.Read.Bytes+report.Write.Bytes+report.Trim.Bytes == 0 {
				t.Error("fio did nothing: no judgement")
			}
		})
	}
	t.Logf("%d jobs of %d", len(jobs), len(pairwise()))
}
