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
	"errors"
	"fmt"
	"math"
	"slices"
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
	ProfileCulprit  = Profile(cpuHfProfileHF_PROFILE_CULPRIT) // who was waited for in a sample of ProfileRunqueue
)

// Outcome says how the walk of a stack ended (enum hf_outcome).
type Outcome uint8

// The outcomes of a walk.
const (
	OutcomeNone       = Outcome(cpuHfOutcomeHF_OUTCOME_NONE)        // no such stack: kernel thread, or the CPU was in user mode
	OutcomeComplete   = Outcome(cpuHfOutcomeHF_OUTCOME_COMPLETE)    // the outermost frame was reached
	OutcomeTruncated  = Outcome(cpuHfOutcomeHF_OUTCOME_TRUNCATED)   // longer than the limit of frames
	OutcomeFailed     = Outcome(cpuHfOutcomeHF_OUTCOME_FAILED)      // of kernel stacks: the walker returned an error; at most the leaf is there
	OutcomeExiting    = Outcome(cpuHfOutcomeHF_OUTCOME_EXITING)     // the address space was gone
	OutcomeExec       = Outcome(cpuHfOutcomeHF_OUTCOME_EXEC)        // in execve: the address space was being replaced
	OutcomeNoTable    = Outcome(cpuHfOutcomeHF_OUTCOME_NO_TABLE)    // the unwind table of the last frame was not there; Stop and Stack go on
	OutcomeNoRule     = Outcome(cpuHfOutcomeHF_OUTCOME_NO_RULE)     // no unwind information at the last frame, and no frame pointer that holds
	OutcomeBadStack   = Outcome(cpuHfOutcomeHF_OUTCOME_BAD_STACK)   // stack memory could not be read
	OutcomeBadAddress = Outcome(cpuHfOutcomeHF_OUTCOME_BAD_ADDRESS) // the caller of the last frame is not in executable memory
	OutcomeRegister   = Outcome(cpuHfOutcomeHF_OUTCOME_REGISTER)    // the rule of the last frame needs a register that is not known any more
	outcomes          = int(OutcomeRegister) + 1
)

var outcomeNames = [outcomes]string{
	OutcomeNone:       "none",
	OutcomeComplete:   "complete",
	OutcomeTruncated:  "truncated",
	OutcomeFailed:     "failed",
	OutcomeExiting:    "exiting",
	OutcomeExec:       "exec",
	OutcomeNoTable:    "no table",
	OutcomeNoRule:     "no rule",
	OutcomeBadStack:   "bad stack",
	OutcomeBadAddress: "bad address",
	OutcomeRegister:   "register",
}

func (o Outcome) String() string {
	if int(o) < outcomes {
		return outcomeNames[o]
	}
	return fmt.Sprintf("outcome %d", uint8(o))
}

// The largest numbers of frames of the two stacks, and of the areas of one.
const (
	MaxKernelFrames = 127
	MaxUserFrames   = 512
	maxAreas        = 32
)

// ExactAddr is set in a user address that is no return address: of the leaf, and of a
// frame that a signal interrupted.
const ExactAddr = 1 << 63

// Area is an executable mapping as it was when a sample was taken.
type Area struct {
	Start, End uint64
	Offset     uint64 // of Start, in the file; 0 without one
	File       File
}

// Frame is where a walk stopped: the registers of the frame whose rule is wanted next.
type Frame struct {
	IP, SP    uint64
	FP        uint64     // rbp, x29
	Second    uint64     // rbx; x30
	Exact     bool       // IP is an instruction, not a return address
	Leaf      bool       // Registers are those of this frame
	Registers [32]uint64 // by DWARF number
}

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
// Addresses are raw: leaf first, a caller's address is its return address, and user
// addresses that are exact have ExactAddr set.
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
	Value         uint64  // ns that it stands for; for ProfileCPU the sampling period times the weight, for ProfileBlockIO the latency of one request
	IO            BlockIO // of ProfileBlockIO
	Duration      uint64  // ns that were observed; 0 for ProfileCPU
	Lasted        uint64  // likewise, and what was observed before of a thread that was blocked all the while
	Cause         Cause   // of ProfileRunqueue and ProfileCulprit
	State         State   // of ProfileOffCPU
	ByPID         uint32  // of ProfileRunqueue: the process that it waited for, 0 where that is not known; of ProfileCulprit: the one that waited
	By            Comm
	Start         uint64 // when the thread group leader was born
	ExecID        uint64
	Kernel, User  []uint64
	Areas         []Area // that the user addresses lie in
	Stop          Frame  // with Stack: where the walk stopped
	Stack         []byte // from StackStart on; empty unless UserOutcome is OutcomeNoTable
	StackStart    uint64 // Stop.SP, less the red zone of amd64
}

const (
	sampleHeaderSize = int(unsafe.Sizeof(cpuHfSample{}))
	areaSize         = int(unsafe.Sizeof(cpuHfArea{}))
	frameSize        = int(unsafe.Sizeof(cpuHfFrame{}))
	maxStackCopy     = 16 << 10
	maxSampleSize    = sampleHeaderSize + 8*(MaxKernelFrames+MaxUserFrames) + areaSize*maxAreas + frameSize + maxStackCopy
)

// decode fills s from one record. The frames, areas and stack go to s's old arrays where
// they are large enough, so a sample that is decoded again and again allocates once.
func (s *Sample) decode(record []byte) error {
	if len(record) < sampleHeaderSize {
		return fmt.Errorf("decode sample: %d bytes, want at least %d", len(record), sampleHeaderSize)
	}
	var h cpuHfSample
	fill(&h, record)
	nk, nu, na, ns := int(h.KernelFrames), int(h.UserFrames), int(h.Areas), int(h.StackBytes)
	want := sampleHeaderSize + 8*(nk+nu) + areaSize*na
	if ns > 0 {
		want += frameSize + ns
	}
	if len(record) < want || nk > MaxKernelFrames || nu > MaxUserFrames || na > maxAreas {
		return fmt.Errorf("decode sample: %d bytes, its header says %d + %d frames, %d areas and %d bytes of stack",
			len(record), nk, nu, na, ns)
	}
	rest := record[sampleHeaderSize:]
	frames := s.Kernel[:0]
	if cap(frames) < MaxKernelFrames+MaxUserFrames {
		frames = make([]uint64, 0, MaxKernelFrames+MaxUserFrames)
	}
	frames = frames[:nk+nu]
	if len(frames) > 0 {
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&frames[0])), 8*len(frames)), rest)
	}
	rest = rest[8*len(frames):]
	areas, stack := s.Areas[:0], s.Stack[:0]
	for range na {
		var a cpuHfArea
		fill(&a, rest)
		areas = append(areas, Area{a.Start, a.End, a.Offset, File{a.File.Inode, a.File.MtimeNs, a.File.Device}})
		rest = rest[areaSize:]
	}
	var stop Frame
	if ns > 0 {
		var f cpuHfFrame
		fill(&f, rest)
		stop = Frame{f.Ip, f.Sp, f.Fp, f.Second, f.Exact != 0, f.Leaf != 0, f.Registers}
		stack = append(stack, rest[frameSize:][:ns]...)
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
		Areas:         areas,
		Stop:          stop,
		Stack:         stack,
		StackStart:    stop.SP - redZone,
	}
	if h.MeanNs > 0 && h.Value == 0 {
		return errors.New("decode sample: it was drawn by time and took none")
	}
	if h.MeanNs > 0 {
		s.Duration, s.Lasted = h.Value, max(h.Value, h.LastedNs)
		s.Cause, s.State, s.ByPID, s.By = Cause(h.Cause), State(h.State), h.ByPid, makeComm(&h.By)
		s.weigh(h.MeanNs)
		if s.Profile == ProfileCulprit { // it ran for a part of the wait
			s.Value = uint64(math.Round(float64(s.Value) * float64(h.ByNs) / float64(h.Value)))
		}
	}
	return nil
}

// weigh gives a sample that was drawn by time what it stands for: the inverse of the
// probability with which it was taken (bpf/draw.bpf.h). Weight is a whole number, rounded up
// or down at random, so that sums of it are right.
func (s *Sample) weigh(mean uint64) {
	w := 1 / -math.Expm1(-float64(s.Duration)/float64(mean))
	s.Value = uint64(math.Round(float64(s.Duration) * w))
	random := (s.Time ^ uint64(s.TID)<<32) * 0x9e3779b97f4a7c15 >> 11
	s.Weight = uint32(min(w+float64(random)/(1<<53), math.MaxUint32))
}

// fill copies the first bytes of b, which has enough of them, into v.
func fill[T any](v *T, b []byte) {
	copy(unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v)), b)
}

// Clone returns a copy of s with memory of its own.
func (s *Sample) Clone() *Sample {
	c := *s
	frames := append(append(make([]uint64, 0, len(s.Kernel)+len(s.User)), s.Kernel...), s.User...)
	c.Kernel, c.User = frames[:len(s.Kernel):len(s.Kernel)], frames[len(s.Kernel):]
	c.Areas = slices.Clone(s.Areas)
	c.Stack = slices.Clone(s.Stack)
	return &c
}
