// SPDX-License-Identifier: Apache-2.0

// Package bpf is the kernel side: the BPF programs, how they are loaded and attached,
// and typed access to what they measured. It is a leaf: it knows nothing of processes,
// symbols or expositions.
//
// One hook family is one object (cpu, sched, block), loaded and closed on its own, so
// that a kernel that lacks what one needs still gets the others.
package bpf

import (
	"bytes"
	"fmt"
	"unsafe"
)

// Profile says what a sample is a sample of (enum hf_profile).
type Profile uint8

// The profile types, in the order of the ABI.
const (
	ProfileCPU      = Profile(cpuHfProfileHF_PROFILE_CPU)
	ProfileRunqueue = Profile(cpuHfProfileHF_PROFILE_RUNQUEUE)
	ProfileOffCPU   = Profile(cpuHfProfileHF_PROFILE_OFFCPU)
	ProfileBlockIO  = Profile(cpuHfProfileHF_PROFILE_BLOCKIO)
)

// Outcome says how the walk of a stack ended (enum hf_outcome).
type Outcome uint8

// The outcomes of a walk.
const (
	OutcomeNone      = Outcome(cpuHfOutcomeHF_OUTCOME_NONE)      // no such stack: kernel thread, or the CPU was in user mode
	OutcomeComplete  = Outcome(cpuHfOutcomeHF_OUTCOME_COMPLETE)  // walked until the walker found an end
	OutcomeTruncated = Outcome(cpuHfOutcomeHF_OUTCOME_TRUNCATED) // longer than the limit of frames
	OutcomeFailed    = Outcome(cpuHfOutcomeHF_OUTCOME_FAILED)    // the walker returned an error
	OutcomeExiting   = Outcome(cpuHfOutcomeHF_OUTCOME_EXITING)   // the address space was gone
)

func (o Outcome) String() string {
	switch o {
	case OutcomeNone:
		return "none"
	case OutcomeComplete:
		return "complete"
	case OutcomeTruncated:
		return "truncated"
	case OutcomeFailed:
		return "failed"
	case OutcomeExiting:
		return "exiting"
	}
	return fmt.Sprintf("outcome %d", uint8(o))
}

// MaxFrames is the largest number of frames of each of the two stacks.
const MaxFrames = 127

// Sample is one observation as the kernel took it. Time is the boot clock in ns.
// Addresses are raw: leaf first, a caller's address is its return address.
type Sample struct {
	Profile       Profile
	KernelOutcome Outcome
	UserOutcome   Outcome
	UserMode      bool   // the CPU was in user mode
	CPU           uint32 // logical CPU
	PID           uint32 // tgid in the initial pid namespace
	TID           uint32
	Comm          string // comm of the thread group leader
	Thread        string // comm of the thread
	Cgroup        uint64 // kernfs id: cpu hierarchy on v1 and hybrid hosts, else v2
	Time          uint64 // boot clock, ns
	Value         uint64 // ns; for ProfileCPU the sampling period
	Kernel, User  []uint64
}

const sampleHeaderSize = int(unsafe.Sizeof(cpuHfSample{}))

// decode fills s from one record. The frames are copied.
func (s *Sample) decode(record []byte) error {
	if len(record) < sampleHeaderSize {
		return fmt.Errorf("decode sample: %d bytes, want at least %d", len(record), sampleHeaderSize)
	}
	var h cpuHfSample
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&h)), sampleHeaderSize), record)
	nk, nu := int(h.KernelFrames), int(h.UserFrames)
	if want := sampleHeaderSize + 8*(nk+nu); len(record) < want {
		return fmt.Errorf("decode sample: %d bytes, its header says %d", len(record), want)
	}
	frames := make([]uint64, nk+nu)
	if len(frames) > 0 {
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&frames[0])), 8*len(frames)), record[sampleHeaderSize:])
	}
	*s = Sample{
		Profile:       Profile(h.Profile),
		KernelOutcome: Outcome(h.KernelOutcome),
		UserOutcome:   Outcome(h.UserOutcome),
		UserMode:      h.UserMode != 0,
		CPU:           h.Cpu,
		PID:           h.Pid,
		TID:           h.Tid,
		Comm:          cString(h.Comm[:]),
		Thread:        cString(h.Thread[:]),
		Cgroup:        h.CgroupId,
		Time:          h.TimeNs,
		Value:         h.Value,
		Kernel:        frames[:nk:nk],
		User:          frames[nk:],
	}
	return nil
}

func cString(c []int8) string {
	b := unsafe.Slice((*byte)(unsafe.Pointer(&c[0])), len(c))
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
