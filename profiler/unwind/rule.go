// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"fmt"
	"strings"
)

// Rule is what a row says: how the caller's registers are found. Its low half is the word
// of the table's row. A wide rule (KindWide) has 64 bits, and two rows: first the high
// half, then the low one. The fields are those of bpf/unwind.h.
type Rule uint64

// Kind is what a rule does.
type Kind uint8

// The kinds of rules.
const (
	KindNone   = Kind(iota) // no unwind information: frame pointers, if they hold
	KindSP                  // CFA = sp + 8 * a
	KindFP                  // CFA = fp + 8 * a
	KindEnd                 // the outermost frame
	KindSignal              // the kernel's signal frame is at sp
	KindPLT                 // amd64: CFA = sp + 8 + ((ip & 15) >= a ? 8 : 0)
	KindGo                  // Go's switch between stacks; see golang.go
	KindWide
)

const (
	maxCFA  = 1<<15 - 1 // words
	maxSlot = 1<<7 - 1  // words below the CFA of a saved register
)

// saved is how a wide rule finds a register of the caller.
type saved uint8

const (
	savedNot  = saved(iota) // as it is
	savedCFA                // at CFA - 8 * offset
	savedNear               // amd64: at fp - 8 * offset; arm64: at the CFA's base register + 8 * offset
	savedLost               // not known any more
)

// slot is where a register of the caller is.
type slot struct {
	saved saved
	words int64
}

// narrow makes a rule of 32 bits. Slots are words below the CFA, 0: as it is.
func narrow(k Kind, a, fp, second int64) Rule {
	return Rule(k) | Rule(a)<<3 | Rule(fp)<<18 | Rule(second)<<25
}

// Kind is the rule's kind.
func (r Rule) Kind() Kind { return Kind(r & 7) }

func (r Rule) a() int64      { return int64(r >> 3 & maxCFA) }
func (r Rule) fp() int64     { return int64(r >> 18 & maxSlot) }
func (r Rule) second() int64 { return int64(r >> 25 & maxSlot) }

// wideRule is a wide rule's fields.
type wideRule struct {
	base       uint8 // DWARF number
	deref      bool
	offset     int64 // words
	add        int64 // words; without deref 0, or 1 more than the register that holds the return address
	fp, second slot
}

// rule is false where a field does not fit.
func (w wideRule) rule() (Rule, bool) {
	if w.base > 31 || w.offset < -1<<19 || w.offset >= 1<<19 || w.add < -128 || w.add > 127 ||
		w.fp.words < 0 || w.fp.words >= 1<<11 || w.second.words < 0 || w.second.words >= 1<<12 {
		return 0, false
	}
	r := Rule(KindWide) | Rule(w.base)<<3 | Rule(w.fp.saved)<<9 | Rule(w.second.saved)<<11 |
		Rule(uint8(w.add))<<13 | Rule(w.fp.words)<<21 | Rule(w.offset)&(1<<20-1)<<32 | Rule(w.second.words)<<52
	if w.deref {
		r |= 1 << 8
	}
	return r, true
}

func (r Rule) wide() wideRule {
	return wideRule{
		base:   uint8(r >> 3 & 31),
		deref:  r>>8&1 != 0,
		offset: int64(r) << 12 >> 44,
		add:    int64(int8(r >> 13)),
		fp:     slot{saved(r >> 9 & 3), int64(r >> 21 & (1<<11 - 1))},
		second: slot{saved(r >> 11 & 3), int64(r >> 52)},
	}
}

// String is the rule as dumps show it: the CFA, then what is saved.
func (r Rule) String() string {
	var b strings.Builder
	slots := func(fp, second slot) {
		for _, s := range []struct {
			name string
			slot slot
		}{{"fp", fp}, {"second", second}} {
			switch s.slot.saved {
			case savedCFA:
				fmt.Fprintf(&b, " %s=c-%d", s.name, 8*s.slot.words)
			case savedNear:
				fmt.Fprintf(&b, " %s=near %d", s.name, 8*s.slot.words)
			case savedLost:
				fmt.Fprintf(&b, " %s=?", s.name)
			}
		}
	}
	switch r.Kind() {
	case KindNone:
		return "none"
	case KindEnd:
		return "end"
	case KindSignal:
		return "signal"
	case KindPLT:
		return fmt.Sprintf("plt %d", r.a())
	case KindSP, KindFP:
		fmt.Fprintf(&b, "%s+%d", map[Kind]string{KindSP: "sp", KindFP: "fp"}[r.Kind()], 8*r.a())
	case KindGo:
		fmt.Fprintf(&b, "go %d", 8*r.a())
	case KindWide:
		w := r.wide()
		fmt.Fprintf(&b, "r%d%+d", w.base, 8*w.offset)
		if w.deref {
			b.Reset()
			fmt.Fprintf(&b, "[r%d%+d]%+d", w.base, 8*w.offset, 8*w.add)
		}
		slots(w.fp, w.second)
		return b.String()
	}
	slots(narrowSlot(r.fp()), narrowSlot(r.second()))
	return b.String()
}

func narrowSlot(words int64) slot {
	if words == 0 {
		return slot{}
	}
	return slot{savedCFA, words}
}
