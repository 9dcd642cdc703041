// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What compilers do not write, or seldom. Each function has its rules at offset 1 on.
const rareSource = `
	.text
	.macro func name
	.globl \name
	.type \name,@function
	\name:
	.cfi_startproc
	nop
	.endm
	.macro done
	ret
	.cfi_endproc
	.p2align 4
	.endm

	func remember
	.cfi_remember_state
	.cfi_def_cfa_offset 16
	nop
	.cfi_remember_state
	.cfi_def_cfa_offset 24
	nop
	.cfi_restore_state
	nop
	.cfi_restore_state
	nop
	done

	func register_names
	.cfi_def_cfa rbp, 16
	.cfi_offset rbp, -16
	.cfi_offset rbx, -24
	nop
	.cfi_restore rbp
	.cfi_same_value rbx
	nop
	.cfi_def_cfa_register rbx
	nop
	.cfi_def_cfa r12, 40
	.cfi_undefined rbx
	nop
	.cfi_register rbp, r13
	nop
	done

	func extended
	.cfi_escape 0x05, 6, 2 # offset_extended
	nop
	.cfi_escape 0x06, 6 # restore_extended
	nop
	.cfi_escape 0x11, 3, 0x03 # offset_extended_sf
	nop
	.cfi_escape 0x12, 7, 0x7e # def_cfa_sf
	nop
	.cfi_escape 0x13, 0x7d # def_cfa_offset_sf
	nop
	.cfi_escape 0x2e, 16 # GNU_args_size
	nop
	done

	func values
	.cfi_escape 0x14, 3, 2 # val_offset
	nop
	.cfi_escape 0x15, 6, 0x7e # val_offset_sf
	nop
	.cfi_escape 0x16, 3, 2, 0x77, 8 # val_expression
	nop
	done

	func addresses
	.cfi_def_cfa rbp, 16
	.cfi_escape 0x10, 3, 2, 0x76, 0x78 # rbx at rbp - 8
	nop
	.cfi_def_cfa rsp, 64
	.cfi_escape 0x10, 6, 2, 0x77, 0x10 # rbp at rsp + 16
	nop
	.cfi_escape 0x10, 6, 3, 0x92, 7, 0x18 # the same by bregx, rsp + 24
	nop
	done

	func dereferences
	.cfi_escape 0x0f, 3, 0x76, 0x70, 0x06 # cfa = [rbp - 16]
	nop
	.cfi_escape 0x0f, 6, 0x77, 0xa8, 0x01, 0x06, 0x23, 0x08 # cfa = [rsp + 168] + 8
	nop
	.cfi_escape 0x0f, 2, 0x77, 0x20 # cfa = rsp + 32
	nop
	.cfi_escape 0x0f, 4, 0x75, 0x00, 0x06, 0x06 # cfa = [[rdi]]
	nop
	.cfi_escape 0x0f, 5, 0x7a, 0x00, 0x06, 0x38, 0x22 # cfa = [r10] + 8
	nop
	done

	func outermost
	.cfi_undefined rip
	nop
	done

	func return_address
	.cfi_register rip, rcx
	nop
	.cfi_offset rip, -16
	nop
	.cfi_offset rip, -8
	nop
	done

	func large
	.cfi_def_cfa_offset 262136
	nop
	.cfi_def_cfa_offset 262144
	nop
	.cfi_def_cfa_offset 4194296
	nop
	.cfi_def_cfa_offset 16
	.cfi_offset rbp, -1016
	nop
	.cfi_offset rbp, -1024
	nop
	.cfi_offset rbx, -32760
	nop
	done
`

// TestRareInstructions compares what compilers seldom write, and some of what nobody does.
func TestRareInstructions(t *testing.T) {
	dir := t.TempDir()
	src, out := filepath.Join(dir, "rare.s"), filepath.Join(dir, "rare.so")
	if err := os.WriteFile(src, []byte(rareSource), 0o644); err != nil {
		t.Fatal(err)
	}
	if machine != 62 {
		t.Skip("assembly of amd64")
	}
	run(t, "gcc", "-shared", "-nostdlib", "-o", out, src)
	for _, flags := range [][]string{nil, {"-Wl,--no-eh-frame-hdr"}} {
		run(t, "gcc", append([]string{"-shared", "-nostdlib", "-o", out, src}, flags...)...)
		ts := build(t, openFile(t, out, nil))
		c := compare(ts, judgeFile(t, out), nil)
		if c.different > 0 {
			t.Errorf("%d of %d points differ:\n\t%s", c.different, c.points, strings.Join(c.examples, "\n\t"))
		}
		var want = []string{
			"no: cfa 75:0:0,6:0:0,6:0:0", // [[rdi]]
			"no: ra c-16",
		}
		for _, s := range want {
			if c.shapes[s] == 0 {
				t.Errorf("%q is not among what no rule expresses: %v", s, c.shapes)
			}
		}
		if len(c.shapes) != len(want) || ts.skipped[SkipReturn] != 1 || ts.skipped[SkipExpression] != 1 || len(ts.skipped) != 2 {
			t.Errorf("no rule for %v; skipped %v", c.shapes, ts.skipped)
		}
	}
}
