/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Cell of a duration, without a search: see internal/histogram/index.go, which fills
 * the two tables at load time. */
#ifndef HF_HISTOGRAM_BPF_H
#define HF_HISTOGRAM_BPF_H

#include "abi.h"
#include "kernel.bpf.h"
#include <bpf/bpf_helpers.h>

const volatile __u8 hf_time_first[1024] = {};
const volatile __u64 hf_time_cuts[256] = {};

#define HF_TWICE(x) x, x
#define HF_4(x) HF_TWICE(x), HF_TWICE(x)
#define HF_16(x) HF_4(x), HF_4(x), HF_4(x), HF_4(x)
const volatile __u8 hf_log2_byte[256] = {
	0, 0, HF_TWICE(1), HF_4(2), HF_4(3), HF_4(3), HF_16(4), HF_16(5), HF_16(5),
	HF_16(6), HF_16(6), HF_16(6), HF_16(6), HF_16(7), HF_16(7), HF_16(7), HF_16(7),
	HF_16(7), HF_16(7), HF_16(7), HF_16(7),
};

/* Keeps clang from dropping a mask whose need only the verifier sees. */
static __always_inline __u32 hf_log2_of_byte(__u64 v)
{
	asm volatile("" : "+r"(v));
	return hf_log2_byte[v & 255];
}

/* 1 << shift if v is above max, else 0, without a branch. Values spread, so one would
 * often be mispredicted, which costs more than this. Neither may have the highest bit. */
#define HF_ABOVE(v, max, shift) (((max) - (v)) >> (63 - (shift)) & 1 << (shift))

/* floor(log2(v)), 0 < v < 2^63 */
static __always_inline __u32 hf_log2(__u64 v)
{
	__u32 r = HF_ABOVE(v, 0xffffffffULL, 5), by;

	v >>= r;
	by = HF_ABOVE(v, 0xffffULL, 4);
	v >>= by;
	r += by;
	by = HF_ABOVE(v, 0xffULL, 3);
	v >>= by;
	return r + by + hf_log2_of_byte(v);
}

/* ns < 2^63 */
static __always_inline __u32 hf_time_cell(__u64 ns)
{
	__u32 slot, exp, cell;

	if (ns < 16) {
		slot = ns;
	} else {
		exp = hf_log2(ns);
		slot = exp << 4 | (ns >> (exp - 4) & 15);
	}
	cell = hf_time_first[slot & 1023];
	/* If not above the first, it is not above the second, which is the same then. */
	cell += HF_ABOVE(ns, hf_time_cuts[cell & 255], 0);
	cell += HF_ABOVE(ns, hf_time_cuts[cell & 255], 0);
	/* So that to the verifier all that come here have the same. */
	bpf_barrier(cell);
	return cell & 255;
}

/* The cells are per CPU, and programs of one map do not interrupt each other on a CPU, so
 * plain adds do. */
static __always_inline void hf_time_count(__u64 *cells, __u64 ns)
{
	__u32 cell = hf_time_cell(ns);

	if (cell < HF_TIME_CELLS)
		cells[cell]++;
}

/* Size cells are upper-inclusive powers of two from 512 (internal/histogram, Size). */
static __always_inline __u32 hf_size_cell(__u32 bytes)
{
	__u32 cell = bytes <= 512 ? 0 : hf_log2(bytes - 1) - 8;

	return cell > 18 ? 18 : cell;
}

#endif
