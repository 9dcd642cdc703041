/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Runs rqclock.bpf.h on made-up clocks, one switch a run. */

#include "rqclock.bpf.h"

struct rqclock_switch {
	__u64 ktime;
	__u64 clock;
	__u64 fresh;
	__u64 now;     /* results */
	__u64 guessed; /* 0: ktime has to be read */
};

struct hf_rqclock rqclock = {};

SEC("syscall")
int rqclock_step(struct rqclock_switch *s)
{
	if (!s->fresh || !hf_rqclock_guess(&rqclock, s->clock, &s->guessed))
		s->guessed = 0;
	s->now = s->guessed ? s->clock : hf_rqclock_now(&rqclock, s->ktime, s->clock, s->fresh);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
