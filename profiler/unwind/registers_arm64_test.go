// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"debug/elf"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
)

const (
	machine   = elf.EM_AARCH64
	pauseCall = 73 // ppoll: there is no pause
)

func registers(t *testing.T, tid int) bpf.Frame {
	t.Helper()
	var r unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &r); err != nil {
		t.Fatal(err)
	}
	f := bpf.Frame{IP: r.Pc, SP: r.Sp, FP: r.Regs[29], Second: r.Regs[30], Exact: true, Leaf: true}
	copy(f.Registers[:], r.Regs[:])
	f.Registers[31] = r.Sp
	return f
}
