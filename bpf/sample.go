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
	OutcomeFailed    = Outcome(cpuHfOutcomeHF_OUTCOME_FAILED)    // the walker returned an error; at most the leaf is there
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

// Comm is the name of a task as the kernel keeps it, padded with NUL. It compares equal
// exactly when the names do.
type Comm [16]byte

// MakeComm cuts name to what a Comm holds, 15 bytes.
func MakeComm(name string) (c Comm) {
	copy(c[:len(c)-1], name)
	return c
}

// makeComm clears what follows the name: the kernel side can leave an older one's rest.
func makeComm(raw *[len(Comm{})]int8) (c Comm) {
	for i, b := range raw {
		if b == 0 {
			break
		}
		c[i] = byte(b)
	}
	return c
}

func (c Comm) String() string {
	b := c[:]
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// Sample is one observation as the kernel took it. Times are of the boot clock, in ns.
// Addresses are raw: leaf first, a caller's address is its return address.
//
// PID, Start and ExecID together name one program image: an id that was reused has
// another start, and an execve changes the exec id.
type Sample struct {
	Profile       Profile
	KernelOutcome Outcome
	UserOutcome   Outcome
	UserMode      bool   // the CPU was in user mode
	CPU           uint32 // logical CPU
	PID           uint32 // tgid in the initial pid namespace
	TID           uint32
	Weight        uint32 // how many observations it stands for
	Comm          Comm   // of the thread group leader
	Thread        Comm   // of the thread
	Cgroup        uint64 // kernfs id: cpu hierarchy on v1 and hybrid hosts, else v2
	Time          uint64
	Value         uint64 // ns; for ProfileCPU the sampling period times the weight
	Start         uint64 // when the thread group leader was born
	ExecID        uint64
	Kernel, User  []uint64
}

const sampleHeaderSize = int(unsafe.Sizeof(cpuHfSample{}))

// decode fills s from one record. The frames go to s.Kernel's old array where it is large
// enough, so a sample that is decoded again and again allocates once.
func (s *Sample) decode(record []byte) error {
	if len(record) < sampleHeaderSize {
		return fmt.Errorf("decode sample: %d bytes, want at least %d", len(record), sampleHeaderSize)
	}
	var h cpuHfSample
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&h)), sampleHeaderSize), record)
	nk, nu := int(h.KernelFrames), int(h.UserFrames)
	if want := sampleHeaderSize + 8*(nk+nu); len(record) < want || nk > MaxFrames || nu > MaxFrames {
		return fmt.Errorf("decode sample: %d bytes, its header says %d + %d frames", len(record), nk, nu)
	}
	frames := s.Kernel[:0]
	if cap(frames) < 2*MaxFrames {
		frames = make([]uint64, 0, 2*MaxFrames)
	}
	frames = frames[:nk+nu]
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
		Weight:        h.Weight,
		Comm:          makeComm(&h.Comm),
		Thread:        makeComm(&h.Thread),
		Cgroup:        h.CgroupId,
		Time:          h.TimeNs,
		Value:         h.Value,
		Start:         h.StartNs,
		ExecID:        h.ExecId,
		Kernel:        frames[:nk],
		User:          frames[nk:],
	}
	return nil
}
