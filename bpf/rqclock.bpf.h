/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The run queue's clock, the time base of sched_info, as it would show now.
 *
 * It can be late when sched_switch fires: a wakeup that preempts makes the switch skip
 * the update (rq_clock_skip_update), so the wait that ends would read 0 and the one that
 * begins would be as much too long. What BPF can read is ktime. How far that is ahead of
 * the clock is least right after an update, so the least of two windows, the current and
 * the one before, tells what the clock would show. The two drift apart by what NTP steers
 * and by calibration, some ten us a second: the rate is measured too, for CPUs that were
 * idle since the last window.
 *
 * The other way round, a clock that was just updated tells ktime without reading it, which
 * waits for all loads and is the dearest part of a switch (60 ns of 200 here). */
#ifndef HF_RQCLOCK_BPF_H
#define HF_RQCLOCK_BPF_H

#include "kernel.bpf.h"
#include <bpf/bpf_helpers.h>

#define HF_RQCLOCK_WINDOW_NS 4000000ULL
/* One in two windows may have seen late clocks only, by some us: measure the rate over
 * so long that this is about 1 ppm. */
#define HF_RQCLOCK_RATE_NS 4000000000ULL
/* After so long the error of the rate is larger than that of a late clock. */
#define HF_RQCLOCK_IDLE_NS 16000000000ULL
/* So often ktime is read in a window although the clock is up to date. How far it is ahead
 * then is not always the same: it is some 100 ns from the update to the hook. */
#define HF_RQCLOCK_FRESH 16
/* The rate is in ns a 2^24 ns. */
#define HF_RQCLOCK_RATE_SHIFT 24

struct hf_rqclock {
	__u64 since;    /* ktime at which the current window began, 0 before the first */
	__u64 current;  /* least ktime - clock of the current window */
	__u64 previous; /* of the one before, carried on to the beginning of the current */
	__s64 rate;
	__u64 rate_since; /* the window that the rate is measured from: its beginning */
	__u64 rate_from;  /* and its least ktime - clock */
	__u64 fresh;      /* clocks in the current window that were up to date */
};

static __always_inline __s64 hf_rqclock_rate(__u64 drift, __u64 span)
{
	/* Beyond about 1,000 ppm it is a step. */
	return drift < span >> 10 ? (drift << HF_RQCLOCK_RATE_SHIFT) / span : 0;
}

static __always_inline void hf_rqclock_turn(struct hf_rqclock *c, __u64 ktime, __u64 ahead)
{
	__u64 past = ktime - c->since, span, drift;

	if (!c->since || past > HF_RQCLOCK_IDLE_NS) {
		c->previous = ahead;
		c->rate = 0;
		c->rate_since = ktime;
		c->rate_from = ahead;
	} else {
		span = c->since - c->rate_since;
		if (span > HF_RQCLOCK_RATE_NS) {
			drift = c->current - c->rate_from;
			/* BPF divides without sign only. */
			c->rate = hf_rqclock_rate((__s64)drift < 0 ? -drift : drift, span);
			if ((__s64)drift < 0)
				c->rate = -c->rate;
			c->rate_since = c->since;
			c->rate_from = c->current;
		}
		c->previous = c->current + ((__s64)past * c->rate >> HF_RQCLOCK_RATE_SHIFT);
	}
	c->current = ahead;
	c->since = ktime;
	c->fresh = 0;
}

static __always_inline __u64 hf_rqclock_ahead(struct hf_rqclock *c)
{
	return (__s64)(c->previous - c->current) < 0 ? c->previous : c->current;
}

/* Whether *ktime is good without reading it, where clock is up to date. */
static __always_inline bool hf_rqclock_guess(struct hf_rqclock *c, __u64 clock, __u64 *ktime)
{
	*ktime = clock + hf_rqclock_ahead(c);
	return c->fresh >= HF_RQCLOCK_FRESH && *ktime - c->since <= HF_RQCLOCK_WINDOW_NS;
}

/* What the run queue's clock would show at ktime, where it shows clock, which is known to be
 * up to date if fresh. */
static __always_inline __u64 hf_rqclock_now(struct hf_rqclock *c, __u64 ktime, __u64 clock, bool fresh)
{
	__u64 ahead = ktime - clock;

	if (ktime - c->since > HF_RQCLOCK_WINDOW_NS)
		hf_rqclock_turn(c, ktime, ahead);
	else if ((__s64)(ahead - c->current) < 0)
		c->current = ahead;
	c->fresh += fresh;
	return ktime - hf_rqclock_ahead(c);
}

#endif
