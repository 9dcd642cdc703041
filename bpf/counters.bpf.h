/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Loss counters and run counters. Each object has its own maps of these names. */
#ifndef HF_COUNTERS_BPF_H
#define HF_COUNTERS_BPF_H

#include "abi.h"
#include <bpf/bpf_helpers.h>

#define HF_MAX_PROGRAMS 16

struct hf_counters {
	__u64 dropped[HF_DROP_REASONS];
	__u64 runs[HF_MAX_PROGRAMS]; /* by position in the object's program list */
	__u64 delivered;             /* samples put into a ring */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_counters);
} hf_count SEC(".maps");

static __always_inline struct hf_counters *hf_counters(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&hf_count, &zero);
}

static __always_inline void drop(enum hf_drop reason)
{
	struct hf_counters *c = hf_counters();

	if (c && reason < HF_DROP_REASONS)
		c->dropped[reason]++;
}

static __always_inline void hf_ran(__u32 program)
{
	struct hf_counters *c = hf_counters();

	if (c && program < HF_MAX_PROGRAMS)
		c->runs[program]++;
}

#endif
