/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The unwind tables that user space makes and the walker in the kernel reads.
 *
 * Addresses are file offsets, so that a table serves every process that maps the file,
 * wherever. A table covers one region of a file, 256 KiB of it (HF_REGION_SHIFT): only
 * regions that samples fall into take kernel memory. It is found by file and region
 * (hf_table_key -> hf_table) and lies, in one piece, in one chunk, the value of a map of
 * 16-bit words:
 *
 *     index[buckets + 1]     number of the first row of each bucket of 512 bytes
 *     rows[index[buckets]]   three words each: offset in the region's 64 KiB, rule
 *
 * The row of an address is the last one of its bucket that is not beyond it, else the one
 * before the bucket's first; the first row of a table begins with its first bucket. So a
 * look-up loads two neighbouring words of the index and the rows of a bucket, about ten,
 * which share one or two cache lines, and calls no helper a step. Rows say themselves
 * what to do (as the kernel's own ORC rows do).
 *
 * A rule is 32 bits, kind in the lowest three:
 *
 *     bits   3-17   CFA: the base register plus 8 times this (SP, FP); threshold (PLT)
 *     bits  18-24   the caller's frame pointer (rbp, x29): 0 as it is, else at CFA - 8 times this
 *     bits  25-31   second register (amd64: rbx, arm64: the return address, x30): the same
 *
 * amd64 has the return address at CFA - 8 always.
 *
 * HF_RULE_GO that saves no frame pointer is arm64's asmcgocall, which has dropped it: g is
 * at [sp], old = [g + 8] - [sp + 8], or without a g old = [sp + 8]; CFA = old + 8 * a, the
 * return address as usual, the frame pointer in the word below it.
 */
#ifndef HF_UNWIND_H
#define HF_UNWIND_H

#include <linux/types.h>

enum hf_unwind_size {
	HF_REGION_SHIFT = 18,
	HF_REGION_MASK = (1 << HF_REGION_SHIFT) - 1,
	HF_BUCKET_SHIFT = 9,
	HF_REGION_BUCKETS = 1 << (HF_REGION_SHIFT - HF_BUCKET_SHIFT),
	HF_CHUNK_WORDS = 1 << 17,
	HF_ROW_WORDS = 3,
};

enum hf_rule_kind {
	HF_RULE_NONE = 0,   /* no unwind information: frame pointers, if they hold */
	HF_RULE_SP = 1,     /* CFA = sp + 8 * a */
	HF_RULE_FP = 2,     /* CFA = fp + 8 * a */
	HF_RULE_END = 3,    /* the outermost frame */
	HF_RULE_SIGNAL = 4, /* the kernel's signal frame is at sp */
	HF_RULE_PLT = 5,    /* amd64: CFA = sp + 8 + ((ip & 15) >= a ? 8 : 0) */
	HF_RULE_GO = 6,     /* Go's switch between stacks: as HF_RULE_FP, without the checks of order */
	HF_RULE_WIDE = 7,   /* the row before, at the same offset, has 32 bits more */
};

/* A wide rule is two rows at one offset, the second one with kind HF_RULE_WIDE. Its
 * 64 bits, that row's rule the low half:
 *
 *     bits   3-7    base register of the CFA, by DWARF number
 *     bit    8      CFA = [base + 8 * offset] + 8 * add, else CFA = base + 8 * offset
 *     bits   9-10   frame pointer: enum hf_saved
 *     bits  11-12   second register: enum hf_saved
 *     bits  13-20   add, signed; without bit 8: 0, or 1 more than the number of the register
 *                   that holds the return address
 *     bits  21-31   frame pointer: offset, unsigned
 *     bits  32-51   CFA: offset, signed
 *     bits  52-63   second register: offset, unsigned
 */
enum hf_saved {
	HF_SAVED_NOT = 0,    /* as it is */
	HF_SAVED_CFA = 1,    /* at CFA - 8 * offset */
	HF_SAVED_FP = 2,     /* amd64: at fp - 8 * offset, with the fp of this frame;
			      * arm64: at the CFA's base register + 8 * offset */
	HF_SAVED_LOST = 3,   /* not known any more */
};

/* One version of a file, as the kernel knows it. The vDSO has inode 1 of device 0, and
 * memory without a file is all zero. */
struct hf_file {
	__u64 inode;
	__u64 mtime_ns; /* last change of the contents, wall clock */
	__u32 device;   /* the kernel's dev_t: major << 20 | minor */
	__u32 pad;
};

struct hf_table_key {
	struct hf_file file;
	__u32 region; /* file offset >> HF_REGION_SHIFT */
	__u32 pad;
};

/* Where a table is. Without buckets: nothing is known of this region, frame pointers. */
struct hf_table {
	__u32 chunk;
	__u32 word;         /* of index[0], in the chunk */
	__u16 first_bucket; /* of the region */
	__u16 buckets;
	__u32 pad;
	__u64 used_ns;      /* ktime of the last sample that needed it */
};

#endif
