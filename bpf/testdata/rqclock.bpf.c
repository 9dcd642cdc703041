/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Runs rqclock.bpf.h on made-up clocks, one switch a run. */

#include "rqclock.bpf.h"

struct rqclock_switch {
	__u64 ktime;
	__u64 clock;
	__u64 now; /* result */
};

struct hf_rqclock rqclock = {};

SEC("syscall")
int rqclock_step(struct rqclock_switch *s)
{
	s->now = hf_rqclock_now(&rqclock, s->ktime, s->clock);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
