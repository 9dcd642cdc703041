// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"debug/elf"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
)

const (
	machine   = elf.EM_X86_64
	pauseCall = 34
)

func registers(t *testing.T, tid int) bpf.Frame {
	t.Helper()
	var r unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &r); err != nil {
		t.Fatal(err)
	}
	f := bpf.Frame{IP: r.Rip, SP: r.Rsp, FP: r.Rbp, Second: r.Rbx, Exact: true, Leaf: true}
	copy(f.Registers[:], []uint64{r.Rax, r.Rdx, r.Rcx, r.Rbx, r.Rsi, r.Rdi, r.Rbp, r.Rsp, r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15})
	return f
}
