//go:build ignore
/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* On-CPU stacks: one perf event a CPU, every tick of it a sample. */

#include "kernel.bpf.h"
#include "sample.bpf.h"

/* Nanoseconds of CPU time that one sample stands for; 0 when the event counts cycles. */
const volatile __u64 hf_period_ns = 0;

HF_EXPORT_ENUMS;

SEC("perf_event")
int hf_cpu(void *ctx)
{
	hf_ran(0);
	return hf_emit(ctx, HF_PROFILE_CPU, hf_period_ns);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
