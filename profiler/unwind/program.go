// SPDX-License-Identifier: Apache-2.0

package unwind

// Call frame instructions (DWARF 5, 6.4.2; LSB and vendor extensions).
const (
	cfaNop                 = 0x00
	cfaSetLoc              = 0x01
	cfaAdvanceLoc1         = 0x02
	cfaAdvanceLoc2         = 0x03
	cfaAdvanceLoc4         = 0x04
	cfaOffsetExtended      = 0x05
	cfaRestoreExtended     = 0x06
	cfaUndefined           = 0x07
	cfaSameValue           = 0x08
	cfaRegister            = 0x09
	cfaRememberState       = 0x0a
	cfaRestoreState        = 0x0b
	cfaDefCFA              = 0x0c
	cfaDefCFARegister      = 0x0d
	cfaDefCFAOffset        = 0x0e
	cfaDefCFAExpression    = 0x0f
	cfaExpression          = 0x10
	cfaOffsetExtendedSF    = 0x11
	cfaDefCFASF            = 0x12
	cfaDefCFAOffsetSF      = 0x13
	cfaValOffset           = 0x14
	cfaValOffsetSF         = 0x15
	cfaValExpression       = 0x16
	cfaAdvanceLoc8         = 0x1d // MIPS
	cfaNegateRAStateWithPC = 0x2c // AArch64
	cfaNegateRAState       = 0x2d // AArch64; SPARC's window_save
	cfaGNUArgsSize         = 0x2e
	cfaGNUNegOffset        = 0x2f
	cfaAdvanceLoc          = 0x40 // delta in the low six bits
	cfaOffset              = 0x80 // register in the low six bits
	cfaRestore             = 0xc0
)

const maxRemembered = 64

// How a register of the caller is found.
type regKind uint8

const (
	regUnset = regKind(iota)
	regUndefined
	regSame
	regCFA      // saved at CFA + off
	regValue    // is CFA + off
	regRegister // in another register, off
	regAddress  // saved at base + off
	regOther    // no rule stands for it
)

type regRule struct {
	kind regKind
	base uint8
	off  int64
}

type cfaKind uint8

const (
	cfaUnset = cfaKind(iota)
	cfaReg   // base + off
	cfaDeref // [base + off] + add
	cfaPLT   // sp + 8, and 8 more from byte off of each 16 on
	cfaOther
)

type cfaRule struct {
	kind     cfaKind
	base     uint8
	off, add int64
}

// state is the rules at an address, of the registers that walking needs.
type state struct {
	cfa                cfaRule
	fp, second, ra, sp regRule
}

func (s *state) reset() { *s = state{} }

// program runs the instructions of a CIE or FDE.
type program struct {
	arch       *arch
	cie        *cie
	state      state
	loc        uint64 // from where on state holds
	remembered []state
}

// reg is where the state keeps a register's rule, or nil.
func (p *program) reg(n uint64) *regRule {
	switch n {
	case uint64(p.arch.fp):
		return &p.state.fp
	case uint64(p.arch.second): // on arm64 it is the return address
		return &p.state.second
	case uint64(p.arch.ra):
		return &p.state.ra
	case uint64(p.arch.sp):
		return &p.state.sp
	}
	return nil
}

func (p *program) initial(n uint64) regRule {
	saved := p.state
	p.state = p.cie.initial
	var r regRule
	if q := p.reg(n); q != nil {
		r = *q
	}
	p.state = saved
	return r
}

func (p *program) set(n uint64, r regRule) {
	if q := p.reg(n); q != nil {
		*q = r
	}
}

// run executes b from address loc to end. It calls emit, if not nil, with each address at
// which other rules begin, in order; the last one's rules hold until end. When it returns
// a reason, the rules from loc on are not known.
func (p *program) run(b []byte, loc, end uint64, emit func(addr uint64)) Skip {
	d := cursor{b: b}
	p.loc = loc
	dirty := true
	advance := func(to uint64) bool {
		if emit == nil {
			return true // in a CIE there is no location
		}
		if dirty && to > loc {
			emit(loc)
			dirty = false
		}
		if to < loc || to >= end {
			return false
		}
		loc, p.loc = to, to
		return true
	}
	c := p.cie
	for d.left() > 0 {
		op := d.u8()
		low := uint64(op & 0x3f)
		switch op & 0xc0 {
		case cfaAdvanceLoc:
			if !advance(loc + low*c.codeAlign) {
				return ""
			}
			continue
		case cfaOffset:
			off := int64(d.uleb()) * c.dataAlign
			p.set(low, regRule{kind: regCFA, off: off})
			dirty = true
			continue
		case cfaRestore:
			p.set(low, p.initial(low))
			dirty = true
			continue
		}
		var delta uint64
		switch op {
		case cfaNop:
			continue
		case cfaAdvanceLoc1:
			delta = uint64(d.u8())
		case cfaAdvanceLoc2:
			delta = uint64(d.u16())
		case cfaAdvanceLoc4:
			delta = uint64(d.u32())
		case cfaAdvanceLoc8:
			delta = d.u64()
			if delta > 1<<40 {
				return SkipMalformed
			}
		case cfaSetLoc:
			if c.encoding != peAbsptr {
				return SkipInstruction // nobody emits it
			}
			to := d.u64()
			if d.bad || to < loc {
				return SkipMalformed
			}
			if !advance(to) {
				return ""
			}
			continue
		case cfaGNUArgsSize:
			d.uleb()
			continue
		case cfaNegateRAState, cfaNegateRAStateWithPC:
			// The walker strips signatures wherever it sees them.
			if p.arch != &arm64 {
				return SkipInstruction
			}
			continue
		default:
			if skip := p.rule(op, &d); skip != "" {
				return skip
			}
			dirty = true
			if d.bad {
				return SkipMalformed
			}
			continue
		}
		if d.bad {
			return SkipMalformed
		}
		if !advance(loc + delta*c.codeAlign) {
			return ""
		}
	}
	if d.bad {
		return SkipMalformed
	}
	if emit != nil && dirty && loc < end {
		emit(loc)
	}
	return ""
}

// rule executes an instruction that changes a rule.
func (p *program) rule(op byte, d *cursor) Skip {
	c, s := p.cie, &p.state
	switch op {
	case cfaOffsetExtended:
		n := d.uleb()
		p.set(n, regRule{kind: regCFA, off: int64(d.uleb()) * c.dataAlign})
	case cfaOffsetExtendedSF:
		n := d.uleb()
		p.set(n, regRule{kind: regCFA, off: d.sleb() * c.dataAlign})
	case cfaGNUNegOffset:
		n := d.uleb()
		p.set(n, regRule{kind: regCFA, off: -int64(d.uleb()) * c.dataAlign})
	case cfaRestoreExtended:
		n := d.uleb()
		p.set(n, p.initial(n))
	case cfaUndefined:
		p.set(d.uleb(), regRule{kind: regUndefined})
	case cfaSameValue:
		p.set(d.uleb(), regRule{kind: regSame})
	case cfaRegister:
		n := d.uleb()
		p.set(n, regRule{kind: regRegister, off: int64(d.uleb())})
	case cfaRememberState:
		if len(p.remembered) >= maxRemembered {
			return SkipLimit
		}
		p.remembered = append(p.remembered, *s)
	case cfaRestoreState:
		n := len(p.remembered)
		if n == 0 {
			return SkipMalformed
		}
		*s = p.remembered[n-1]
		p.remembered = p.remembered[:n-1]
	case cfaDefCFA:
		s.cfa = cfaAt(d.uleb(), int64(d.uleb()))
	case cfaDefCFASF:
		s.cfa = cfaAt(d.uleb(), d.sleb()*c.dataAlign)
	case cfaDefCFARegister:
		if s.cfa.kind != cfaReg {
			return SkipMalformed
		}
		s.cfa = cfaAt(d.uleb(), s.cfa.off)
	case cfaDefCFAOffset:
		if s.cfa.kind != cfaReg {
			return SkipMalformed
		}
		s.cfa.off = int64(d.uleb())
	case cfaDefCFAOffsetSF:
		if s.cfa.kind != cfaReg {
			return SkipMalformed
		}
		s.cfa.off = d.sleb() * c.dataAlign
	case cfaDefCFAExpression:
		s.cfa = cfaExpressionRule(p.arch, d.take(d.uleb()))
	case cfaExpression:
		n := d.uleb()
		p.set(n, addressRule(d.take(d.uleb())))
	case cfaValOffset:
		n := d.uleb()
		p.set(n, regRule{kind: regValue, off: int64(d.uleb()) * c.dataAlign})
	case cfaValOffsetSF:
		n := d.uleb()
		p.set(n, regRule{kind: regValue, off: d.sleb() * c.dataAlign})
	case cfaValExpression:
		n := d.uleb()
		d.take(d.uleb())
		p.set(n, regRule{kind: regOther})
	default:
		return SkipInstruction
	}
	return ""
}

func cfaAt(base uint64, off int64) cfaRule {
	if base > 31 {
		return cfaRule{kind: cfaOther}
	}
	return cfaRule{kind: cfaReg, base: uint8(base), off: off}
}

// compile makes the rule that stands for a state. Without one it says why.
func (s *state) compile(a *arch, signal bool) (Rule, Skip) {
	ra := s.ra
	if a.ra == a.second {
		ra = s.second
	}
	switch {
	case signal && (a == &arm64 || s.cfa.kind == cfaDeref && s.cfa.base == a.sp && s.cfa.off == int64(a.signalSP) && s.cfa.add == 0):
		return Rule(KindSignal), ""
	case ra.kind == regUndefined:
		return Rule(KindEnd), ""
	case s.sp.kind != regUnset && s.sp.kind != regUndefined && (s.sp.kind != regValue || s.sp.off != 0):
		return 0, SkipStack
	}
	fp, second := s.slot(a, s.fp, a.fp), s.slot(a, s.second, a.second)
	if a.ra == a.second {
		if second.saved == savedLost {
			return 0, SkipReturn
		}
	} else if s.ra.kind == regRegister && s.ra.off < 32 && s.cfa.kind == cfaReg && s.cfa.off%8 == 0 {
		// glibc's vfork keeps it there while parent and child share the stack.
		w := wideRule{base: s.cfa.base, offset: s.cfa.off / 8, add: s.ra.off + 1, fp: fp, second: second}
		if r, ok := w.rule(); ok {
			return r, ""
		}
		return 0, SkipReturn
	} else if at := s.slot(a, s.ra, a.ra); at != (slot{savedCFA, 1}) {
		return 0, SkipReturn
	}
	if s.cfa.kind == cfaPLT {
		if a != &amd64 || fp.saved != savedNot || second.saved != savedNot {
			return 0, SkipExpression
		}
		return narrow(KindPLT, s.cfa.off, 0, 0), ""
	}
	if s.cfa.kind == cfaOther {
		return 0, SkipExpression
	}
	if s.cfa.kind == cfaUnset || s.cfa.off%8 != 0 || s.cfa.add%8 != 0 {
		return 0, SkipCFA
	}
	if s.cfa.kind == cfaReg && (s.cfa.base == a.sp || s.cfa.base == a.fp) &&
		s.cfa.off >= 0 && s.cfa.off/8 <= maxCFA && fp.isNarrow() && second.isNarrow() {
		kind := KindSP
		if s.cfa.base == a.fp {
			kind = KindFP
		}
		return narrow(kind, s.cfa.off/8, fp.words, second.words), ""
	}
	w := wideRule{base: s.cfa.base, deref: s.cfa.kind == cfaDeref, offset: s.cfa.off / 8, add: s.cfa.add / 8, fp: fp, second: second}
	r, ok := w.rule()
	if !ok {
		return 0, SkipCFA
	}
	return r, ""
}

func (s slot) isNarrow() bool {
	return s.saved == savedNot || s.saved == savedCFA && s.words > 0 && s.words <= maxSlot
}

// slot is where a register's rule says that it is: lost where no slot says so.
func (s *state) slot(a *arch, r regRule, n uint8) slot {
	fits := int64(1 << 11)
	if n == a.second {
		fits = 1 << 12
	}
	near := func(off int64) slot {
		if off < 0 || off%8 != 0 || off/8 >= fits {
			return slot{saved: savedLost}
		}
		return slot{savedNear, off / 8}
	}
	off := r.off // from the CFA
	switch r.kind {
	case regUnset, regSame:
		return slot{}
	case regRegister:
		if r.off == int64(n) {
			return slot{}
		}
		return slot{saved: savedLost}
	case regCFA:
	case regAddress:
		switch {
		case s.cfa.kind == cfaReg && r.base == s.cfa.base:
			off -= s.cfa.off
		case a == &amd64 && r.base == a.fp:
			return near(-off)
		case a == &arm64 && s.cfa.kind == cfaDeref && r.base == s.cfa.base:
			return near(off)
		default:
			return slot{saved: savedLost}
		}
	default:
		return slot{saved: savedLost}
	}
	if off <= 0 && off%8 == 0 && -off/8 < fits {
		return slot{savedCFA, -off / 8}
	}
	// arm64 keeps the registers at the lower end of frames, however large these are.
	if a == &arm64 && s.cfa.kind == cfaReg {
		return near(off + s.cfa.off)
	}
	return slot{saved: savedLost}
}
