/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Sampling by time. Waits and blocked times of a thread are pieces of time, and those that
 * points fall into are sampled that a Poisson process strews, one in mean_ns on average: a
 * piece of d ns is taken with probability 1 - exp(-d / mean_ns), whatever was taken before.
 * Weighed with the inverse of that the samples add up to the exact sums, without bias.
 *
 * What is left to the next point is counted down, so a piece that is not taken costs a
 * subtraction. With each point that was reached the mean may change: it grows when there
 * are more samples than is meant to be walked for.
 */
#ifndef HF_DRAW_BPF_H
#define HF_DRAW_BPF_H

#include "abi.h"
#include "kernel.bpf.h"
#include "histogram.bpf.h"
#include <bpf/bpf_helpers.h>

#define HF_DRAW_PERIOD_NS 250000000ULL
#define HF_DRAW_MAX_MEAN_NS (1ULL << 40)

/* The least means, in ns; 0: nothing is sampled. */
const volatile __u64 hf_wait_mean_ns = 0;
const volatile __u64 hf_blocked_mean_ns = 0;
/* Samples of one kind that a CPU takes in a second, on average, at most. */
const volatile __u64 hf_draw_per_second = 100;

/* log2(1 + i / 256) << 20 */
const volatile __u32 hf_log2_fraction[512] = {};

struct hf_draw {
	__u64 left_ns; /* to the next point; 0: not begun */
	__u64 mean_ns; /* of the way to it */
	__u64 since_ns; /* ktime since when it counts in taken */
	__u64 taken;
};

/* Draws of one kind on one CPU. A process with many threads that sleep shortly would take all
 * stacks that there may be, and one with a single thread would have none: so processes are
 * in strata, by their ids, with a mean each, and the strata that have samples share the rate. */
#define HF_STRATA 16
#define HF_STRATA_PERIOD_NS 1000000000ULL

struct hf_draws {
	__u64 since_ns;    /* ktime when the current period began */
	__u32 seen;        /* those that have had samples in it, by bits */
	__u32 seen_before; /* and in the one before */
	struct hf_draw of[HF_STRATA];
};

/* What the task that is being switched in is sampled for, when it runs. */
struct hf_waiting {
	__u64 wait_ns;      /* 0: not sampled */
	__u64 wait_mean_ns;
	__u64 blocked_ns;
	__u64 blocked_mean_ns;
	__u64 lasted_ns;    /* all of the blocked time, of which blocked_ns is the newest part */
	__u64 task;         /* addresses: of the task, and of the one it waited for, 0 where that is */
	__u64 by_task;      /* not known */
	__u64 by_ns;        /* of the wait, in which by_task ran before the switch */
	__u32 tid;          /* 0: nothing is pending */
	__u32 by_pid;
	__u32 drawn;        /* samples that are pending */
	__u32 lost;         /* samples that no program came for */
	char by[HF_COMM_LEN];
	__u8 cause;         /* enum hf_cause, of a moment of the wait */
	__u8 by_cause;      /* likewise, of by_task */
	__u8 iowait;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_waiting);
} hf_waitings SEC(".maps");

/* A record in the ring of a CPU makes the CPU interrupt itself (irq_work): once interrupts are on
 * again, which is when the switch is over, hf_wait_kick runs in the task that was switched in.
 * Nobody reads the rings, user space empties them. Filled where that is how samples are taken. */
struct hf_kick_ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536); /* a page, whatever that is */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1); /* the possible CPUs; sized by user space */
	__type(key, __u32);
	__array(values, struct hf_kick_ring);
} hf_kicks SEC(".maps");

/* -ln of a random number between 0 and 1, << 40: the way to the next point in means. */
static __always_inline __u64 hf_draw_distance(void)
{
	__u64 r = bpf_get_prandom_u32() | 1, log, fraction, from, to;
	__u32 exponent = hf_log2(r), i;

	fraction = r << (31 - (exponent & 31)) & 0x7fffffff;
	i = fraction >> 23;
	bpf_barrier(i);
	from = hf_log2_fraction[i & 511];
	to = hf_log2_fraction[(i + 1) & 511];
	log = ((__u64)exponent << 20) + from + ((to - from) * (fraction & 0x7fffff) >> 23);
	/* ln 2 << 32; the low bits are as random as those of r. */
	return (((32ULL << 20) - log) * 2977044472ULL >> 32) << 20 | (bpf_get_prandom_u32() & 0xfffff);
}

/* A piece of ns was sampled: draws the next point, and lets the mean follow the rate of
 * samples, one in strata of what a CPU may take. ns can be 0: then the mean grows by
 * doubling only. */
static __noinline int hf_draw_again(struct hf_draw *d, __u64 ns, __u64 least_ns, __u64 now, __u64 strata)
{
	__u64 past, want, mean;

	if (!d)
		return 0;
	mean = d->mean_ns;
	if (!mean) {
		mean = least_ns;
		d->since_ns = now;
	}
	if (!strata)
		strata = 1;
	d->taken++;
	past = (now - d->since_ns) / strata;
	want = hf_draw_per_second * (past >> 10) / 976563 + 1;
	if (past > HF_DRAW_PERIOD_NS) {
		/* Down by half at most: a pause says little of what comes. */
		mean = d->taken * 2 < want ? mean / 2 : mean * d->taken / want;
		d->since_ns = now;
		d->taken = 0;
	} else if (d->taken > 2 * want + hf_draw_per_second / (2 * strata)) {
		mean *= 2;
		/* Where it is far below the pieces, more of it changes nothing. */
		if (mean < ns)
			mean = ns;
		d->since_ns = now;
		d->taken = 0;
	}
	if (mean < least_ns)
		mean = least_ns;
	if (mean > HF_DRAW_MAX_MEAN_NS)
		mean = HF_DRAW_MAX_MEAN_NS;
	if (!mean)
		mean = 1;
	d->mean_ns = mean;
	/* Less than 2^23 times 2^40. */
	d->left_ns = ((hf_draw_distance() >> 22) * mean >> 18) + 1;
	return 0;
}

/* Whether a piece of ns ends before the next point, as most do: it is not sampled. */
static __always_inline bool hf_passed(struct hf_draw *d, __u64 ns)
{
	if (ns >= d->left_ns)
		return false;
	d->left_ns -= ns;
	return true;
}

/* Whether a piece of ns is sampled; then *mean_ns gets the mean that this was decided by.
 * strata is 0 for those that come in bursts, many of one length: the threads of a walk. */
static __always_inline bool hf_drawn(struct hf_draw *d, __u64 ns, __u64 least_ns, __u64 now, __u64 strata,
				     __u64 *mean_ns)
{
	if (!d->left_ns) {
		hf_draw_again(d, 0, least_ns, now, strata);
		d->taken = 0;
	}
	if (hf_passed(d, ns))
		return false;
	*mean_ns = d->mean_ns;
	hf_draw_again(d, strata ? ns : 0, least_ns, now, strata);
	return true;
}

static __always_inline struct hf_draw *hf_stratum(struct hf_draws *all, struct task_struct *task)
{
	return &all->of[task->tgid & (HF_STRATA - 1)];
}

static __always_inline __u32 hf_bits16(__u32 v)
{
	v -= v >> 1 & 0x5555;
	v = (v & 0x3333) + (v >> 2 & 0x3333);
	v = (v + (v >> 4)) & 0x0f0f;
	return (v + (v >> 8)) & 31;
}

/* The same, for a piece of a process. */
static __always_inline bool hf_drawn_of(struct hf_draws *all, __u32 tgid, __u64 ns, __u64 least_ns, __u64 now,
					__u64 *mean_ns)
{
	__u32 stratum = tgid & (HF_STRATA - 1);

	if (now - all->since_ns > HF_STRATA_PERIOD_NS) {
		all->seen_before = all->seen;
		all->seen = 0;
		all->since_ns = now;
	}
	all->seen |= 1U << stratum;
	return hf_drawn(&all->of[stratum], ns, least_ns, now, hf_bits16(all->seen | all->seen_before), mean_ns);
}

#endif
