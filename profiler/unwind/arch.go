// SPDX-License-Identifier: Apache-2.0

package unwind

import "github.com/hostflame/hostflame/internal/elffile"

// arch is what differs between machines. Registers have their DWARF numbers (x86-64 psABI,
// figure 3.36; "DWARF for the Arm 64-bit Architecture").
type arch struct {
	machine uint16
	sp, fp  uint8
	second  uint8 // rbx; x30
	ra      uint8 // the column of the return address

	trampolines [][]byte // code that returns from a signal handler

	// From the stack pointer at a trampoline: where the kernel saved the registers.
	signalIP, signalSP uint64
	signalReg          func(n uint8) (uint64, bool)
}

var amd64 = arch{
	machine: elffile.MachineAMD64, sp: 7, fp: 6, second: 3, ra: 16,
	trampolines: [][]byte{
		{0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05}, // mov $15,%rax; syscall
		{0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05},             // mov $15,%eax; syscall
	},
	// struct ucontext, struct sigcontext_64 (arch/x86/include/uapi/asm/sigcontext.h).
	signalIP: 40 + 16*8, signalSP: 40 + 15*8,
	signalReg: func(n uint8) (uint64, bool) {
		at := [...]uint64{13, 12, 14, 11, 9, 8, 10, 15, 0, 1, 2, 3, 4, 5, 6, 7}
		if int(n) >= len(at) {
			return 0, false
		}
		return 40 + 8*at[n], true
	},
}

var arm64 = arch{
	machine: elffile.MachineARM64, sp: 31, fp: 29, second: 30, ra: 30,
	trampolines: [][]byte{
		{0x68, 0x11, 0x80, 0xd2, 0x01, 0, 0, 0xd4}, // mov x8,#139; svc #0
	},
	// struct rt_sigframe: siginfo, 128 bytes; ucontext, sigcontext at 176.
	signalIP: 128 + 176 + 8 + 32*8, signalSP: 128 + 176 + 8 + 31*8,
	signalReg: func(n uint8) (uint64, bool) { return 128 + 176 + 8 + 8*uint64(n), n < 31 },
}

func archOf(machine uint16) *arch {
	switch machine {
	case elffile.MachineAMD64:
		return &amd64
	case elffile.MachineARM64:
		return &arm64
	}
	return nil
}
