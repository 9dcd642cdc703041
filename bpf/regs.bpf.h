/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The interrupted registers, as the uapi lays them out for perf_event programs. */
#ifndef HF_REGS_BPF_H
#define HF_REGS_BPF_H

#include <linux/types.h>

#if defined(__TARGET_ARCH_x86)
struct hf_regs { /* struct pt_regs */
	__u64 general[16];
	__u64 ip, cs, flags, sp, ss;
};

static __always_inline bool hf_user_mode(const struct hf_regs *regs)
{
	return regs->cs & 3;
}
#elif defined(__TARGET_ARCH_arm64)
struct hf_regs { /* struct user_pt_regs */
	__u64 general[31];
	__u64 sp, ip, pstate;
};

static __always_inline bool hf_user_mode(const struct hf_regs *regs)
{
	return !(regs->pstate & 15); /* PSR_MODE_MASK, PSR_MODE_EL0t */
}
#else
#error "no registers for this architecture"
#endif

struct bpf_perf_event_data {
	struct hf_regs regs;
	__u64 sample_period;
	__u64 addr;
};

#endif
