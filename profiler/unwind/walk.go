// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"debug/elf"
	"encoding/binary"
	"fmt"
	"sort"

	"github.com/hostflame/hostflame/bpf"
)

// Walker walks copies of stacks as the kernel side walks stacks (bpf/unwind.bpf.h): by the
// same rows, looked up in the same way, with the same checks. It keeps nothing between
// walks, and may be used from any goroutine if Lookup may.
type Walker struct {
	// Lookup finds the table of an address and the offset in the file that is mapped there.
	// ok is false where no executable memory is mapped. Without a table (nil, or one without
	// words: JIT code, a file without unwind information) frame pointers are followed.
	Lookup func(addr uint64) (table *Region, offset uint64, ok bool)

	// AddressMask has the bits of a user address; others hold a signature (arm64). 0: all.
	AddressMask uint64

	// MaxFrames is where a walk is truncated; 0: bpf.MaxUserFrames.
	MaxFrames int

	arch *arch
}

// NewWalker makes a Walker for a machine, amd64's or arm64's.
func NewWalker(machine elf.Machine, lookup func(addr uint64) (table *Region, offset uint64, ok bool)) (*Walker, error) {
	a := archOf(uint16(machine))
	if a == nil {
		return nil, fmt.Errorf("%w: %v", ErrUnsupported, machine)
	}
	return &Walker{Lookup: lookup, arch: a}, nil
}

// Rule is the rule for an offset in the file, which must be in the table's region.
func (r *Region) Rule(offset uint64) Rule {
	bucket := int(offset&(RegionSize-1))>>BucketShift - int(r.FirstBucket)
	buckets := r.Buckets()
	if bucket < 0 || bucket >= buckets {
		return 0
	}
	rows := r.Words[buckets+1:]
	lo, hi := int(r.Words[bucket]), int(r.Words[bucket+1])
	at := lo + sort.Search(hi-lo, func(i int) bool { return rows[(lo+i)*rowWords] > uint16(offset) }) - 1
	if at < 0 {
		return 0
	}
	word := func(i int) Rule { return Rule(rows[i*rowWords+1]) | Rule(rows[i*rowWords+2])<<16 }
	rule := word(at)
	if rule.Kind() == KindWide && at > 0 {
		rule |= word(at-1) << 32
	}
	return rule
}

// walk is the state of one.
type walk struct {
	*Walker
	bpf.Frame
	memory  func(addr uint64) (uint64, bpf.Outcome) // 0: it is there
	frames  int                                     // so far, those of the kernel's walk included
	outcome bpf.Outcome
	mask    uint64
	addrs   []uint64
}

// Walk goes on from a frame with a copy of the stack that begins at address start. before
// is how many frames lie below it. The first address is the frame's own. The addresses are
// as in bpf.Sample.User; they are appended to addrs. OutcomeTruncated is also that of a
// stack that goes on beyond its copy.
func (w *Walker) Walk(addrs []uint64, from bpf.Frame, before int, stack []byte, start uint64) ([]uint64, bpf.Outcome) {
	return w.walk(addrs, from, before, func(addr uint64) (uint64, bpf.Outcome) {
		switch at := addr - start; {
		case addr < start:
			return 0, bpf.OutcomeBadStack
		case at >= uint64(len(stack)) || uint64(len(stack))-at < 8:
			return 0, bpf.OutcomeTruncated
		default:
			return binary.LittleEndian.Uint64(stack[at:]), 0
		}
	})
}

func (w *Walker) walk(addrs []uint64, from bpf.Frame, before int, memory func(uint64) (uint64, bpf.Outcome)) ([]uint64, bpf.Outcome) {
	s := walk{Walker: w, Frame: from, memory: memory, frames: before, mask: w.AddressMask, addrs: addrs}
	if s.mask == 0 {
		s.mask = ^uint64(0)
	}
	limit := w.MaxFrames
	if limit <= 0 {
		limit = bpf.MaxUserFrames
	}
	for s.outcome == 0 {
		s.step(limit)
	}
	return s.addrs, s.outcome
}

// lookup is the address by which the row of a frame is found: that of the call, where it
// was one.
func (w *walk) lookupAddr() uint64 {
	if w.Exact {
		return w.IP
	}
	return w.IP - 1
}

// step notes a frame and goes to its caller.
func (w *walk) step(limit int) {
	if w.arch == &arm64 {
		w.IP &= w.mask
	}
	if w.IP == 0 && w.frames > 0 {
		w.outcome = bpf.OutcomeComplete
		return
	}
	if w.frames >= limit {
		w.outcome = bpf.OutcomeTruncated
		return
	}
	table, offset, ok := w.Lookup(w.lookupAddr())
	addr := w.IP
	if w.Exact {
		addr |= bpf.ExactAddr
	}
	if !ok {
		w.outcome = bpf.OutcomeBadAddress
		if w.frames == 0 {
			w.addrs = append(w.addrs, addr)
		}
		return
	}
	w.addrs = append(w.addrs, addr)
	w.frames++
	rule := Rule(0)
	if table != nil {
		rule = table.Rule(offset)
	}
	switch rule.Kind() {
	case KindEnd:
		w.outcome = bpf.OutcomeComplete
	case KindNone:
		w.pointer()
	case KindSignal:
		w.signal()
	default:
		w.rule(rule)
	}
}

// read reads a word of the stack.
func (w *walk) read(addr uint64) (uint64, bool) {
	v, outcome := w.memory(addr)
	w.outcome = outcome
	return v, outcome == 0
}

const maxPointer = 8 << 20 // from the stack pointer to a frame pointer that holds

// pointer follows the frame pointer, which must look like one.
func (w *walk) pointer() {
	below := uint64(0)
	if w.arch == &arm64 {
		below = 8 // Go keeps the frame record below the stack pointer
	}
	switch fp := w.FP; {
	case fp == 0 && w.frames > 1:
		w.outcome = bpf.OutcomeComplete // the ABI's mark of the outermost frame
	case fp+below < w.SP || fp%8 != 0 || fp+below-w.SP > maxPointer:
		w.outcome = bpf.OutcomeNoRule
	default:
		next, ok := w.read(fp)
		ip := uint64(0)
		if ok {
			ip, ok = w.read(fp + 8)
		}
		switch {
		case ok:
			w.caller(ip, fp+16, next, 0)
		case w.outcome == bpf.OutcomeBadStack:
			w.outcome = bpf.OutcomeNoRule
		}
	}
}

func (w *walk) caller(ip, sp, fp, second uint64) {
	w.IP, w.SP, w.FP, w.Second = ip, sp, fp, second
	w.Exact, w.Leaf = false, false
}

// returnAddress is on the stack, or, by some wide rules, in a register.
func (w *walk) returnAddress(r Rule, cfa uint64) (uint64, bool) {
	if wide := r.wide(); r.Kind() == KindWide && !wide.deref && wide.add > 0 {
		ip, ok := w.register(uint8(wide.add - 1))
		if !ok {
			w.outcome = bpf.OutcomeRegister
		}
		return ip, ok
	}
	return w.read(cfa - 8)
}

// signal takes all registers from the frame that the kernel made for a signal handler.
func (w *walk) signal() {
	a := w.arch
	at := func(n uint8) uint64 {
		off, _ := a.signalReg(n)
		return w.SP + off
	}
	var regs [4]uint64
	for i, addr := range [...]uint64{w.SP + a.signalIP, w.SP + a.signalSP, at(a.fp), at(a.second)} {
		v, ok := w.read(addr)
		if !ok {
			return
		}
		regs[i] = v
	}
	w.caller(regs[0], regs[1], regs[2], regs[3])
	w.Exact = true
}

// register is the value of a register of this frame.
func (w *walk) register(n uint8) (uint64, bool) {
	switch {
	case n == w.arch.sp:
		return w.SP, true
	case n == w.arch.fp:
		return w.FP, true
	case n == w.arch.second:
		return w.Second, true
	case w.Leaf && int(n) < len(w.Registers):
		return w.Registers[n], true
	}
	return 0, false
}

// saved is the value of a caller's register. base is that of a wide rule.
func (w *walk) saved(s slot, cfa, base, as uint64) (uint64, bool) {
	switch s.saved {
	case savedCFA:
		at := cfa - 8*uint64(s.words)
		// An epilogue has popped it, so it is as it is; what lies below the stack pointer
		// the kernel still reads, but it is in no copy.
		if at < w.SP && cfa >= w.SP {
			return as, true
		}
		return w.read(at)
	case savedNear:
		if w.arch == &amd64 {
			return w.read(w.FP - 8*uint64(s.words))
		}
		return w.read(base + 8*uint64(s.words))
	case savedLost:
		return 0, true
	}
	return as, true
}

// cfa is the CFA of a rule, and where it finds the registers.
func (w *walk) cfa(r Rule) (cfa uint64, fp, second slot, ok bool) {
	fp, second = narrowSlot(r.fp()), narrowSlot(r.second())
	switch r.Kind() {
	case KindSP:
		return w.SP + 8*uint64(r.a()), fp, second, true
	case KindPLT:
		cfa = w.SP + 8
		if w.IP&15 >= uint64(r.a()) {
			cfa += 8
		}
		return cfa, slot{}, slot{}, true
	case KindGo:
		if fp.saved == savedNot {
			old, ok := w.goStack()
			return old + 8*uint64(r.a()), slot{savedCFA, second.words + 1}, second, ok
		}
		return w.FP + 8*uint64(r.a()), fp, second, true
	case KindFP:
		return w.FP + 8*uint64(r.a()), fp, second, true
	}
	wide := r.wide()
	base, ok := w.register(wide.base)
	if !ok {
		w.outcome = bpf.OutcomeRegister
		return 0, fp, second, false
	}
	cfa = base + 8*uint64(wide.offset)
	if wide.deref {
		if cfa, ok = w.read(cfa); !ok {
			return 0, fp, second, false
		}
		cfa += 8 * uint64(wide.add)
	}
	return cfa, wide.fp, wide.second, true
}

// goStack is the stack pointer that arm64's asmcgocall had before it switched: see golang.go.
func (w *walk) goStack() (uint64, bool) {
	g, ok := w.read(w.SP)
	if !ok {
		return 0, false
	}
	depth, ok := w.read(w.SP + 8)
	if !ok || g == 0 {
		return depth, ok
	}
	high, ok := w.read(g + 8)
	return high - depth, ok
}

// rule goes to the caller by a rule that has a CFA.
func (w *walk) rule(r Rule) {
	cfa, fpSlot, secondSlot, ok := w.cfa(r)
	if !ok {
		return
	}
	// Callers lie higher; only a leaf of arm64 has no frame at all. Go changes stacks.
	if r.Kind() != KindGo && (cfa < w.SP || cfa == w.SP && !w.Exact) {
		w.outcome = bpf.OutcomeBadStack
		return
	}
	base, _ := w.register(r.wide().base)
	second, ok := w.saved(secondSlot, cfa, base, w.Second)
	if !ok {
		return
	}
	fp, ok := w.saved(fpSlot, cfa, base, w.FP)
	if !ok {
		return
	}
	if w.arch.ra != w.arch.second {
		if ip, ok := w.returnAddress(r, cfa); ok {
			w.caller(ip, cfa, fp, second)
		}
		return
	}
	// A function that has called another has saved its return address.
	if secondSlot.saved == savedNot && !w.Exact {
		w.outcome = bpf.OutcomeRegister
		return
	}
	w.caller(second, cfa, fp, 0)
}
