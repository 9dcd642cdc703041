// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bytes"

	"github.com/hostflame/hostflame/internal/pclntab"
)

// Go has no CFI, but a table of how far each function has moved its stack pointer, and
// frame pointers throughout (src/runtime/traceback.go; the frame layouts: asm_amd64.s and
// cmd/internal/obj/x86/obj6.go, cmd/internal/obj/arm64/obj7.go).
//
// amd64, with delta the bytes pushed: CFA = sp + delta + 8, and a frame that is not empty
// keeps the caller's frame pointer at CFA - 16.
//
// arm64: CFA = sp + delta; a frame that is not empty keeps the return address at sp and
// the caller's frame pointer at sp - 8, where x29 points.
//
// Functions that write the stack pointer (FlagSPWrite) switch to another stack and call on
// there, with the frame pointer still that of the stack they left: systemstack, asmcgocall,
// cgocallback, the callers of the vDSO. Their frame is found by it (KindGo), which leads
// from the system stack back to the goroutine's, and from Go that C called back to C.
// arm64's asmcgocall alone drops it; there the goroutine's g is at sp, and at sp + 8 how
// far its stack pointer was below g.stack.hi, the second word of g (asm_arm64.s).
const (
	goFrameWords = 2 // CFA - 16: the saved frame pointer on amd64

	// goPrologue is how many bytes after the stack pointer moved the frame pointer is not
	// set yet: mov %rsp,%rbp; str x29 and sub x29.
	goPrologueAMD64, goPrologueARM64 = 3, 8

	maxGoName = 64
	maxGoRead = 1 << 18 // functions of a region
)

// The switches that do not follow the pattern, and Go's signal trampoline. mcall and
// morestack go on as the scheduler and never return to where they were called: they have
// cleared the frame pointer (Go 1.22), and before that the goroutine that it leads to may
// be another thread's by now. gogo is on its way to a goroutine.
var goSwitches = map[string]Rule{
	"runtime.mcall":                 Rule(KindEnd),
	"runtime.morestack":             Rule(KindEnd),
	"runtime.gogo":                  Rule(KindEnd),
	"gogo":                          Rule(KindEnd),
	"runtime.switchToCrashStack0":   Rule(KindEnd),
	"runtime.sigreturn__sigaction":  Rule(KindSignal),
	"runtime.sigreturn":             Rule(KindSignal),
	"runtime.rt0_go":                Rule(KindEnd),
	"_rt0_amd64":                    Rule(KindEnd),
	"_rt0_amd64_linux":              Rule(KindEnd),
	"_rt0_arm64_linux":              Rule(KindEnd),
	"runtime.sigtramp":              goBySP,
	"runtime.sigprofNonGoWrapper":   goBySP,
	"runtime.cgoSigtramp":           goBySP,
	"runtime.asmcgocall":            goCgocall,
	"runtime.systemstack":           goBySwitch,
	"runtime.cgocallback":           goBySwitch,
	"crosscall2":                    goCrosscall2,
	"runtime.asmcgocall_landingpad": goBySP,
}

// Not rules, but which ones apply. Their Kind is none, so that none passes for a rule.
const (
	goBySP     = Rule(1<<32 + iota<<3) // the deltas are right whatever the flags say
	goBySwitch                         // as of any function that writes SP
	goCgocall
	goCrosscall2
)

// golang appends the functions of Go in a part.
func (b *builder) golang(pieces []piece, p part) []piece {
	g := b.file.gotab
	if g == nil || p.hi <= g.Text || p.lo >= g.Text+g.TextEnd {
		return pieces
	}
	i := uint64(0)
	if p.lo > g.Text {
		var err error
		if i, err = g.IndexOf(uint32(p.lo - g.Text)); err != nil {
			b.skipped[SkipMalformed]++
			return pieces
		}
	}
	for ; i < g.Len; i++ {
		entry, record, err := g.Entry(i)
		next, _, err2 := g.Entry(i + 1)
		if err != nil || err2 != nil || len(b.functions) >= maxGoRead {
			b.skipped[SkipMalformed]++
			break
		}
		start, end := g.Text+uint64(entry), g.Text+uint64(next)
		if start > p.hi {
			break
		}
		if end <= start || end <= p.lo {
			continue
		}
		fn, err := g.Func(entry, record)
		if err != nil {
			b.skipped[SkipMalformed]++
			continue
		}
		if b.goSwitch(&fn) == Rule(KindSignal) && start > 0 {
			pieces = append(pieces, piece{start: start - 1, end: start, source: fromCode})
		}
		if start < p.hi {
			pieces = append(pieces, piece{start: start, end: end, source: fromGo, index: int32(len(b.functions))})
			b.functions = append(b.functions, fn)
		}
	}
	return pieces
}

// goSwitch is what goSwitches says of a function, 0 for most.
func (b *builder) goSwitch(fn *pclntab.Func) Rule {
	f := b.file
	if fn.Flags == 0 && fn.SP != 0 {
		return 0
	}
	if r, ok := f.goNames[fn.Name]; ok {
		return r
	}
	name, err := f.gotab.Pager.CString(f.gotab.Names+uint64(fn.Name), f.gotab.Units, maxGoName)
	if err != nil {
		return 0
	}
	r := goSwitches[string(bytes.TrimSuffix([]byte(name), []byte(".abi0")))]
	if len(f.goNames) < 1<<12 {
		f.goNames[fn.Name] = r
	}
	return r
}

// goRules adds the rows of a function.
func (b *builder) goRules(fn *pclntab.Func, hi uint64, add func(addr uint64, r Rule)) {
	g, a := b.file.gotab, b.file.arch
	text := g.Text
	special := b.goSwitch(fn)
	switch {
	case special.Kind() == KindEnd || special.Kind() == KindSignal:
		add(text+uint64(fn.Entry), special)
		return
	case special == 0 && fn.Flags&pclntab.FlagTopFrame != 0:
		add(text+uint64(fn.Entry), Rule(KindEnd))
		return
	}
	switches := special == goBySwitch || special == goCgocall || special == 0 && fn.Flags&pclntab.FlagSPWrite != 0
	if fn.SP == 0 {
		b.skipped[SkipGo]++
		return
	}
	frameless := a == &amd64 && (special == goBySwitch || special == goCgocall) && !b.goFrame(fn)
	prologue, was := uint64(goPrologueAMD64), int32(0)
	if a == &arm64 {
		prologue = goPrologueARM64
	}
	err := g.EachValue(fn.SP, fn.Entry, func(start, end uint64, delta int32) bool {
		at := text + start
		if at >= hi {
			return false
		}
		r, set := goRule(a, int64(delta))
		switch {
		case delta < 0 || delta%8 != 0:
			b.skipped[SkipGo]++
			r = 0
		case frameless:
			// Until Go 1.20 they have no frame of their own, and the frame pointer is that of
			// the function that called them: it is passed over.
			r = goSwitchRule(a, 1, special)
			set = r
		case delta > 0 && switches:
			set = goSwitchRule(a, int64(delta)/8, special)
		case delta > 0 && special == goCrosscall2 && a == &arm64:
			r = narrow(KindSP, int64(delta)/8, 2, 1) // it has a frame as C has
			set = r
		}
		add(at, r)
		if set != r && delta > 0 {
			// In a prologue the frame pointer is set a little later.
			if was == 0 {
				at += prologue
			}
			if at < text+end {
				add(at, set)
			}
		}
		was = delta
		return true
	})
	if err != nil {
		b.skipped[SkipMalformed]++
	}
}

// goFrame is whether a function has a frame anywhere.
func (b *builder) goFrame(fn *pclntab.Func) (frame bool) {
	err := b.file.gotab.EachValue(fn.SP, fn.Entry, func(_, _ uint64, delta int32) bool {
		frame = delta > 0
		return !frame
	})
	return frame || err != nil
}

// goSwitchRule is the rule of a frame of some words that is found by the frame pointer.
func goSwitchRule(a *arch, words int64, special Rule) Rule {
	switch {
	case a == &amd64:
		return narrow(KindGo, goFrameWords, goFrameWords, 0)
	case words+1 > maxSlot:
		return 0
	case special == goCgocall:
		return narrow(KindGo, words, 0, words)
	}
	return narrow(KindGo, words+1, words+1, words)
}

// goRule is the rule of a frame of delta bytes, before and after the frame pointer is set.
func goRule(a *arch, delta int64) (before, set Rule) {
	if delta < 0 || delta%8 != 0 {
		return 0, 0
	}
	words := delta / 8
	if a == &amd64 {
		if words+1 > maxCFA {
			return 0, narrow(KindFP, goFrameWords, goFrameWords, 0)
		}
		fp := int64(0)
		if words > 0 {
			fp = goFrameWords
		}
		r := narrow(KindSP, words+1, fp, 0)
		return r, r
	}
	if words+1 <= maxSlot {
		fp := int64(0)
		if words > 0 {
			fp = words + 1
		}
		r := narrow(KindSP, words, fp, words)
		return r, r
	}
	// Too large a frame for a narrow rule.
	w := wideRule{base: a.sp, offset: words, second: slot{savedNear, 0}}
	before, _ = w.rule()
	if w.fp = (slot{savedCFA, words + 1}); words+1 >= 1<<11 {
		w = wideRule{base: a.fp, offset: words + 1, fp: slot{savedNear, 0}, second: slot{savedNear, 1}}
	}
	set, _ = w.rule()
	return before, set
}
