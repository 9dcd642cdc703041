// SPDX-License-Identifier: Apache-2.0

package unwind

import "slices"

// Operations of DWARF expressions (DWARF 5, 7.7.1).
const (
	opDeref      = 0x06
	opConst1u    = 0x08
	opConst1s    = 0x09
	opConst2u    = 0x0a
	opConst2s    = 0x0b
	opConst4u    = 0x0c
	opConst4s    = 0x0d
	opConst8u    = 0x0e
	opConst8s    = 0x0f
	opConstu     = 0x10
	opConsts     = 0x11
	opDup        = 0x12
	opAnd        = 0x1a
	opMinus      = 0x1c
	opPlus       = 0x22
	opPlusUconst = 0x23
	opShl        = 0x24
	opGe         = 0x2a
	opLit0       = 0x30
	opBreg0      = 0x70
	opBregx      = 0x92
	opNop        = 0x96
)

const maxExpression = 64 // values on its stack

// value is what an expression has on its stack: a constant, base + off, or
// [base + off] + add.
type value struct {
	kind     valueKind
	base     uint8
	off, add int64
}

type valueKind uint8

const (
	valueConst = valueKind(iota) // add
	valueReg                     // base + off
	valueDeref                   // [base + off] + add
)

// plus is v + n.
func (v value) plus(n int64) value {
	if v.kind == valueReg {
		v.off += n
	} else {
		v.add += n
	}
	return v
}

// evaluate runs an expression without the registers' values. It is false where the result
// is none of the values.
func evaluate(expr []byte) (value, bool) {
	d := cursor{b: expr}
	var stack []value
	push := func(v value) bool {
		stack = append(stack, v)
		return len(stack) <= maxExpression
	}
	constant := func(n int64) bool { return push(value{add: n}) }
	for d.left() > 0 {
		ok := true
		switch op := d.u8(); {
		case op >= opLit0 && op < opLit0+32:
			ok = constant(int64(op - opLit0))
		case op >= opBreg0 && op < opBreg0+32:
			ok = push(value{kind: valueReg, base: op - opBreg0, off: d.sleb()})
		case op == opBregx:
			n := d.uleb()
			ok = n < 32 && push(value{kind: valueReg, base: uint8(n), off: d.sleb()})
		case op == opConst1u:
			ok = constant(int64(d.u8()))
		case op == opConst1s:
			ok = constant(int64(int8(d.u8())))
		case op == opConst2u:
			ok = constant(int64(d.u16()))
		case op == opConst2s:
			ok = constant(int64(int16(d.u16())))
		case op == opConst4u:
			ok = constant(int64(d.u32()))
		case op == opConst4s:
			ok = constant(int64(int32(d.u32())))
		case op == opConst8u, op == opConst8s:
			ok = constant(int64(d.u64()))
		case op == opConstu:
			ok = constant(int64(d.uleb()))
		case op == opConsts:
			ok = constant(d.sleb())
		case op == opNop:
		default:
			ok = operate(op, &d, &stack)
		}
		if !ok || d.bad {
			return value{}, false
		}
	}
	if len(stack) == 0 {
		return value{}, false
	}
	return stack[len(stack)-1], true
}

// operate runs an operation that takes values off the stack.
func operate(op byte, d *cursor, stack *[]value) bool {
	s := *stack
	n := len(s)
	if n == 0 {
		return false
	}
	top := &s[n-1]
	switch op {
	case opDeref:
		if top.kind != valueReg {
			return false
		}
		top.kind = valueDeref
		return true
	case opPlusUconst:
		*top = top.plus(int64(d.uleb()))
		return true
	case opDup:
		*stack = append(s, *top)
		return n < maxExpression
	}
	if n < 2 {
		return false
	}
	under := &s[n-2]
	switch {
	case op == opPlus && top.kind == valueConst:
		*under = under.plus(top.add)
	case op == opPlus && under.kind == valueConst:
		*under = top.plus(under.add)
	case op == opMinus && top.kind == valueConst:
		*under = under.plus(-top.add)
	default:
		return false
	}
	*stack = s[:n-1]
	return true
}

// addressRule is the rule of a register that is saved where an expression says.
func addressRule(expr []byte) regRule {
	v, ok := evaluate(expr)
	if !ok || v.kind != valueReg {
		return regRule{kind: regOther}
	}
	return regRule{kind: regAddress, base: v.base, off: v.off}
}

// cfaExpressionRule is the rule of a CFA that an expression computes.
func cfaExpressionRule(a *arch, expr []byte) cfaRule {
	if n, ok := pltExpression(a, expr); ok {
		return cfaRule{kind: cfaPLT, off: n}
	}
	v, ok := evaluate(expr)
	switch {
	case ok && v.kind == valueReg:
		return cfaRule{kind: cfaReg, base: v.base, off: v.off}
	case ok && v.kind == valueDeref:
		return cfaRule{kind: cfaDeref, base: v.base, off: v.off, add: v.add}
	}
	return cfaRule{kind: cfaOther}
}

// pltExpression recognises what linkers write for a PLT, whose entries of 16 bytes push
// one word: rsp + 8 + (((rip & 15) >= n) << 3).
func pltExpression(a *arch, expr []byte) (n int64, ok bool) {
	if a != &amd64 || len(expr) != 11 {
		return 0, false
	}
	want := []byte{
		opBreg0 + 7, 8, opBreg0 + 16, 0, opLit0 + 15, opAnd, expr[6], opGe, opLit0 + 3, opShl, opPlus,
	}
	if n = int64(expr[6]) - opLit0; n < 0 || n > 16 {
		return 0, false
	}
	return n, slices.Equal(expr, want)
}
