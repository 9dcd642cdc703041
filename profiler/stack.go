// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"fmt"
	"strings"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/symbolizer"
)

// Addr is a virtual address: of the ELF file in a mapping of one, else of the process or
// the kernel.
type Addr uint64

// PID is a thread group, in the initial pid namespace.
type PID uint32

// TID is a thread, in the initial pid namespace.
type TID uint32

// Mapping is what the addresses of some locations belong to. For an ELF file Start, Limit
// and Offset are the segment's p_vaddr, p_vaddr + p_memsz and p_offset, the same for all
// processes; for other executable memory they are where the process has it. A Mapping does
// not change once a Location refers to it.
type Mapping struct {
	Start, Limit, Offset uint64
	File                 string // as the process sees it, or a name in brackets
	BuildID              string // in hex; "" if not known

	// At most one of them: what knows the names.
	object  *symbolizer.Object
	perfMap *symbolizer.PerfMap
	kernel  bool
	// note is the name of a frame that is not in the program but says something of the stack.
	note string
}

// Location is one frame. A caller's address is its return address - 1, so that it lies in
// the call; it is exact for the leaf, and for the user frame that entered the kernel.
type Location struct {
	Mapping *Mapping
	Addr    Addr
}

// Stack is leaf first, the kernel's frames before the program's. Frames that say why
// something is missing stand where it is missing.
type Stack []Location

func note(name string) *Mapping { return &Mapping{note: name} }

// The mapping of all kernel addresses. Which of them are a module's the symbolizer knows.
var kernelMapping = &Mapping{Start: kernelHalf, Limit: ^uint64(0), File: kernelFile, kernel: true}

const (
	kernelFile = "[kernel.kallsyms]"
	// kernelHalf is where the addresses of the kernel begin, on amd64 and on arm64.
	kernelHalf = 1 << 63
)

// The frames that are not in the program.
var (
	frameTruncated = note("[truncated]")        // the stack goes on, beyond the limit of frames
	frameNoUnwind  = note("[no unwind info]")   // neither unwind information nor a frame pointer that holds
	frameNoTable   = note("[no unwind table]")  // the table was not there yet
	frameBadStack  = note("[bad stack]")        // the stack's memory could not be read, or made no sense
	frameRegister  = note("[lost register]")    // the rule needs a register that is not known any more
	frameUnknown   = note("[unknown mapping]")  // an address that is in no mapping that we know
	frameExec      = note("[exec]")             // in execve: the address space was being replaced
	frameExiting   = note("[exiting]")          // the address space was gone when the sample was taken
	frameExited    = note("[process exited]")   // the process was gone before its mappings were read
	frameReplaced  = note("[process replaced]") // it executed another program before its mappings were read
	frameForbidden = note("[no permission]")    // its mappings may not be read
	frameOverflow  = note("[stacks overflow]")  // more different stacks than there is room for
)

// outcome is what became of the stacks of a sample: a label of hostflame_stacks_total.
type outcome uint8

const (
	outcomeComplete       = outcome(iota) // whole, and every frame is in a known mapping
	outcomeTruncated                      // by the limit of frames
	outcomeNoUnwindInfo                   // no unwind information, and no frame pointer that holds
	outcomeNoTable                        // the unwind table was not there yet
	outcomeBadStack                       // the stack's memory could not be read, or made no sense
	outcomeBadAddress                     // a return address is not in executable memory
	outcomeRegister                       // a rule needs a register that is not known any more
	outcomeUnknownMapping                 // a frame is in no known mapping
	outcomeExec                           // in execve: the kernel's frames only
	outcomeExiting                        // in exit, without address space: the kernel's frames only
	outcomeExited                         // gone before its mappings were read
	outcomeReplaced                       // another program was executed before its mappings were read
	outcomeNoPermission                   // its mappings may not be read
	outcomeOverflow                       // delivered without its stack
	outcomes
)

var outcomeNames = [outcomes]string{
	outcomeComplete:       "complete",
	outcomeTruncated:      "truncated",
	outcomeNoUnwindInfo:   "no_unwind_info",
	outcomeNoTable:        "no_unwind_table",
	outcomeBadStack:       "bad_stack",
	outcomeBadAddress:     "bad_address",
	outcomeRegister:       "lost_register",
	outcomeUnknownMapping: "unknown_mapping",
	outcomeExec:           "exec",
	outcomeExiting:        "exiting",
	outcomeExited:         "process_exited",
	outcomeReplaced:       "process_replaced",
	outcomeNoPermission:   "no_permission",
	outcomeOverflow:       "stacks_overflow",
}

func (o outcome) String() string { return outcomeNames[o] }

// earlyEnds are how walks end before the outermost frame: the frame that says so, and the
// outcome of the stack.
var earlyEnds = map[bpf.Outcome]struct {
	frame   *Mapping
	outcome outcome
}{
	bpf.OutcomeTruncated:  {frameTruncated, outcomeTruncated},
	bpf.OutcomeFailed:     {frameNoUnwind, outcomeNoUnwindInfo},
	bpf.OutcomeNoRule:     {frameNoUnwind, outcomeNoUnwindInfo},
	bpf.OutcomeNoTable:    {frameNoTable, outcomeNoTable},
	bpf.OutcomeBadStack:   {frameBadStack, outcomeBadStack},
	bpf.OutcomeBadAddress: {frameUnknown, outcomeBadAddress},
	bpf.OutcomeRegister:   {frameRegister, outcomeRegister},
	bpf.OutcomeExec:       {frameExec, outcomeExec},
	bpf.OutcomeExiting:    {frameExiting, outcomeExiting},
}

// complete makes the stack of tr with what is known of p. It reads p's mappings where an
// address of s, a sample of tr, is in none of them and a read is due.
func (t *processTable) complete(p *process, tr *trace, s *bpf.Sample) {
	stack := make(Stack, 0, len(s.Kernel)+len(s.User)+2)
	t.update(p, s)
	areas := t.areasOf(p, s)
	tr.generation = p.generation
	tr.outcome, tr.whole = outcomeComplete, true
	for i, addr := range s.Kernel {
		stack = append(stack, Location{kernelMapping, callAddr(addr, i)})
	}
	if s.KernelOutcome == bpf.OutcomeTruncated {
		stack = append(stack, Location{Mapping: frameTruncated})
		tr.outcome = outcomeTruncated
	}
	for _, addr := range s.User {
		a := userAddr(addr)
		l, ok := t.location(p, s, areas, a)
		if !ok {
			l = Location{frameUnknown, a}
			tr.outcome, tr.whole = outcomeUnknownMapping, false
		}
		stack = append(stack, l)
	}
	if p.absence != nil && !tr.whole {
		stack = append(stack, Location{Mapping: p.absence.frame})
		tr.outcome = p.absence.outcome
	} else if e, ok := earlyEnds[s.UserOutcome]; ok {
		stack = append(stack, Location{Mapping: e.frame})
		tr.outcome = e.outcome
	}
	tr.stack = stack
}

// userAddr is an address inside the instruction that a user frame is at.
func userAddr(addr uint64) Addr {
	if addr&bpf.ExactAddr != 0 || addr == 0 {
		return Addr(addr &^ bpf.ExactAddr)
	}
	return Addr(addr - 1)
}

// callAddr is an address inside the instruction that frame i of a kernel stack is at.
func callAddr(addr uint64, i int) Addr {
	if i > 0 && addr > 0 {
		addr--
	}
	return Addr(addr)
}

// String is the location as the dumps show it.
func (l Location) String() string {
	m := l.Mapping
	switch {
	case m.note != "" && l.Addr == 0:
		return m.note
	case m.note != "":
		return fmt.Sprintf("%s %#x", m.note, uint64(l.Addr))
	case m.kernel:
		return fmt.Sprintf("%s %#x", m.File, uint64(l.Addr))
	}
	return fmt.Sprintf("%s %#x", m, uint64(l.Addr))
}

// String is the mapping as the dumps show it.
func (m *Mapping) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s [%#x-%#x @%#x", m.File, m.Start, m.Limit, m.Offset)
	if m.BuildID != "" {
		fmt.Fprintf(&b, " %s", m.BuildID)
	}
	b.WriteByte(']')
	return b.String()
}
