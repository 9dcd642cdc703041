/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Who ran on a CPU lately, and so because of whom a task waited.
 *
 * When a task is switched in it is known since when it waited, and there is no hook when a
 * wait begins. So each CPU remembers who ran since when, one entry for each change between
 * containers, and a wait is divided up by walking back. Changes can be fast and waits long:
 * behind the newest HF_RUNS changes there is a sample of them, who ran each time that a
 * grid of about 1 ms was passed. */
#ifndef HF_SCHED_RUNS_BPF_H
#define HF_SCHED_RUNS_BPF_H

#include "abi.h"
#include "draw.bpf.h"
#include "kernel.bpf.h"
#include "rqclock.bpf.h"

#define HF_RUNS 32
#define HF_GRID_RUNS 64
#define HF_GRID_SHIFT 20
/* Time that was stolen is remembered when it comes to so much. */
#define HF_STOLEN_NS 10000

/* ktime of the begin << 8 | enum hf_runner; it lasts to the next entry. 56 bits of ktime
 * are two years: only differences are taken of it. */
typedef __u64 hf_run;

/* A wait, or the end of it that was spent on one CPU. Ages are ns before now. */
struct hf_wait {
	__u64 now;         /* ktime */
	__u64 age;         /* up to which it has been accounted for */
	__u64 end;         /* when it began; 0: one run was all of it, nothing here is right but the culprit */
	__u64 quota_ns;    /* for lack of quota, and not accounted for yet */
	__u64 quota_age;   /* of the end of the newest throttling */
	__u64 culprit_ns;  /* the longest run that was waited for */
	__u64 cause_ns[HF_CAUSES];
	__u32 culprit;     /* enum hf_runner */
	__u32 slot;
};

struct hf_sched_cpu {
	struct hf_rqclock clock;
	__u64 switches;   /* that were seen */
	__u64 switch_ns;  /* ktime of the newest switch that was seen */
	__u64 not_task;   /* time that was no task's, by the run queue's clock, up to then */
	__u64 stolen_ns;  /* of that, what is not in runs yet */
	__u32 runner;     /* of the newest entry of runs */
	__u32 newest;     /* its place in runs */
	__u32 grid_newest;
	struct hf_wait wait; /* not on the stack, where the verifier would follow every value */
	hf_run runs[HF_RUNS];
	struct hf_draws wait_draws;
	struct hf_draws blocked_draws;
	hf_run grid[HF_GRID_RUNS];
};

/* Of another CPU's it can have begun after now: less than 0 then. */
static __always_inline __s64 hf_age(__u64 now, hf_run run)
{
	return (__s64)((now << 8) - (run & ~255ULL)) >> 8;
}

static __always_inline __u8 hf_cause_of(__u32 runner, __u32 slot)
{
	switch (runner) {
	case HF_RUNNER_QUOTA:
		return HF_CAUSE_QUOTA;
	case HF_RUNNER_KERNEL:
		return HF_CAUSE_KERNEL;
	case HF_RUNNER_NOBODY:
		return HF_CAUSE_IDLE;
	case HF_RUNNER_STOLEN:
		return HF_CAUSE_STOLEN;
	case HF_RUNNER_UNKNOWN:
		return HF_CAUSE_UNKNOWN;
	}
	return runner == slot ? HF_CAUSE_OWN : HF_CAUSE_OTHER;
}

/* Why it waited at one moment of the wait, each as likely: so sums of samples by cause are right. */
static __always_inline __u8 hf_cause_at_random(struct hf_wait *w)
{
	__u64 random = bpf_get_prandom_u32() & 0xfffff;
	__u64 at = (w->end >> 20) * random + ((w->end & 0xfffff) * random >> 20);

	for (int i = 0; i < HF_CAUSES - 1; i++) {
		if (at < w->cause_ns[i])
			return i;
		at -= w->cause_ns[i];
	}
	return HF_CAUSE_UNKNOWN;
}

/* Nobody of a throttled container runs, so what others ran meanwhile is not why it waits. */
static __always_inline void hf_blame(struct hf_sched_slot *cells, struct hf_wait *w, __u32 runner, __s64 age)
{
	__u64 ns, quota;

	if (age > (__s64)w->end)
		age = w->end;
	if ((__s64)(age - w->age) <= 0)
		return;
	ns = age - w->age;
	if (w->quota_ns && runner != w->slot && age > w->quota_age) {
		quota = w->age > w->quota_age ? ns : age - w->quota_age;
		if (quota > w->quota_ns)
			quota = w->quota_ns;
		cells->waited_for[HF_RUNNER_QUOTA] += quota;
		w->cause_ns[HF_CAUSE_QUOTA] += quota;
		w->quota_ns -= quota;
		ns -= quota;
	}
	if (runner < HF_RUNNERS)
		cells->waited_for[runner] += ns;
	w->cause_ns[hf_cause_of(runner, w->slot)] += ns;
	if (ns > w->culprit_ns) {
		w->culprit_ns = ns;
		w->culprit = runner;
	}
	w->age = age;
}

/* Accounts for the wait by what ran on cpu, as far back as that is known. */
__noinline int hf_blame_runs(struct hf_sched_cpu *cpu, struct hf_sched_slot *cells, struct hf_wait *w)
{
	hf_run run;

	if (!cpu || !cells || !w)
		return 0;
	for (__u32 i = 0; i < HF_RUNS && w->age < w->end; i++) {
		run = cpu->runs[(cpu->newest - i) % HF_RUNS];
		if (!run)
			break;
		hf_blame(cells, w, run & 255, hf_age(w->now, run));
	}
	for (__u32 i = 0; i < HF_GRID_RUNS && w->age < w->end; i++) {
		run = cpu->grid[(cpu->grid_newest - i) % HF_GRID_RUNS];
		if (!run)
			break;
		hf_blame(cells, w, run & 255, hf_age(w->now, run));
	}
	return 0;
}

static __always_inline void hf_run_begins(struct hf_sched_cpu *cpu, __u64 ktime, __u32 runner)
{
	cpu->newest++;
	cpu->runs[cpu->newest % HF_RUNS] = ktime << 8 | runner;
	cpu->runner = runner;
}

/* Called with every switch, before the wait that it ends is accounted for: what ran since
 * the one before has ended. */
static __always_inline void hf_run_ends(struct hf_sched_cpu *cpu, __u64 ktime, struct rq *rq, bool idle)
{
	__u64 not_task = rq->clock - rq->clock_task, stolen = not_task - cpu->not_task;

	cpu->not_task = not_task;
	if (!cpu->switch_ns) { /* the first that is seen */
		cpu->runner = HF_RUNNER_UNKNOWN;
		cpu->runs[cpu->newest % HF_RUNS] = HF_RUNNER_UNKNOWN; /* since the boot */
		return;
	}
	if ((ktime ^ cpu->switch_ns) >> HF_GRID_SHIFT && (cpu->grid[cpu->grid_newest % HF_GRID_RUNS] & 255) != cpu->runner) {
		cpu->grid_newest++;
		cpu->grid[cpu->grid_newest % HF_GRID_RUNS] =
			((cpu->switch_ns >> HF_GRID_SHIFT) + 1) << HF_GRID_SHIFT << 8 | cpu->runner;
	}
	if (!stolen || idle)
		return;
	cpu->stolen_ns += stolen;
	if (cpu->stolen_ns < HF_STOLEN_NS)
		return;
	/* When it was in that run is not known. */
	stolen = ktime - cpu->switch_ns;
	if (stolen > cpu->stolen_ns)
		stolen = cpu->stolen_ns;
	cpu->stolen_ns -= stolen;
	hf_run_begins(cpu, ktime - stolen, HF_RUNNER_STOLEN);
}

#endif
