// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type books_group -type books_outside books testdata/books.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -I. -I/usr/include/x86_64-linux-gnu

// booksJudge measures what the kernel's books of block I/O have of a request's time beyond
// ours: before block_io_start and after block_rq_complete.
type booksJudge struct{ objs booksObjects }

// newJudgedBlock returns a Block and its judge, nil where the kernel does not say when it
// closes its books (block_io_done, since Linux 6.5).
func newJudgedBlock(t *testing.T, config BlockConfig) (*Block, *booksJudge) {
	t.Helper()
	j := newBooksJudge(t)
	if j == nil {
		return newTestBlockOf(t, config), nil
	}
	// Programs run in the order in which they were attached.
	attach(t, j.objs.BooksDone, j.objs.BooksComplete, j.objs.BooksStart)
	b := newTestBlockOf(t, config)
	attach(t, j.objs.BooksCompleted, j.objs.BooksStarted)
	return b, j
}

func attach(t *testing.T, programs ...*ebpf.Program) {
	t.Helper()
	for _, p := range programs {
		l, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
}

func newBooksJudge(t *testing.T) *booksJudge {
	t.Helper()
	kerneltest.Require(t)
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	if there, err := hasTracepoint(kernel, "block_io_done"); err != nil || !there {
		if err != nil {
			t.Fatal(err)
		}
		return nil
	}
	flags, err := requestFlagsOf(kernel, kernelBTF)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := loadBooks()
	if err != nil {
		t.Fatal(err)
	}
	if err := setVariables(spec, map[string]any{"flush_seq": flags.flushSeq, "io_stat": flags.ioStat}); err != nil {
		t.Fatal(err)
	}
	j := new(booksJudge)
	if err := spec.LoadAndAssign(&j.objs, nil); err != nil {
		t.Fatalf("load the judge: %+v", err)
	}
	t.Cleanup(func() { j.objs.Close() })
	return j
}

// outside is what was measured of a device, by books_group.
type outside [booksBooksGroupBOOKS_GROUPS]booksBooksOutside

func (j *booksJudge) of(t *testing.T, device string) (o outside) {
	t.Helper()
	if j == nil {
		return o
	}
	major, minor := numberOf(t, device)
	for group := range o {
		err := j.objs.Outside.Lookup(major<<52|minor<<32|uint64(group), &o[group])
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Fatal(err)
		}
	}
	return o
}

// numberOf is the number of a whole device.
func numberOf(t *testing.T, device string) (major, minor uint64) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "dev"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major, minor
}

func (o outside) since(before outside) outside {
	for i := range o {
		o[i].BeforeNs -= before[i].BeforeNs
		o[i].AfterNs -= before[i].AfterNs
		o[i].LeastNs -= before[i].LeastNs
		o[i].MostNs -= before[i].MostNs
	}
	return o
}

// before is in milliseconds, over all groups, as is after.
func (o *outside) before() (ms float64) {
	for _, g := range o {
		ms += float64(g.BeforeNs) / 1e6
	}
	return ms
}

func (o *outside) after() (ms float64) {
	for _, g := range o {
		ms += float64(g.AfterNs) / 1e6
	}
	return ms
}
