//go:build ignore
/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* On-CPU stacks: one perf event a CPU, every tick of it a sample. */

#include "kernel.bpf.h"
#include "regs.bpf.h"
#include "rqlength.bpf.h"
#include "sample.bpf.h"

/* Nanoseconds of CPU time that one tick stands for. */
const volatile __u64 hf_period_ns = 0;

/* The event is a timer (cpu-clock), so ticks can be late. */
const volatile bool hf_timer = false;

/* The timer of one CPU, as its last tick left it. */
struct hf_timer_state {
	__u64 last_ns;    /* the last point of its grid that was passed */
	__u64 clock_ns;   /* rq->clock */
	__u64 stolen_ns;  /* hf_stolen_ns */
	__s64 balance_ns; /* time without ticks, less stolen time, that no sample stands for yet */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_timer_state);
} hf_timer_state SEC(".maps");

HF_EXPORT_ENUMS;

/* Time that the hypervisor took from this CPU and that the scheduler therefore does not
 * charge to tasks (update_rq_clock_task). Not rq->prev_steal_time_rq: what of that could
 * not be subtracted from the clock was charged after all. */
static __always_inline __u64 hf_stolen_ns(struct rq *rq)
{
	__u64 ns = BPF_CORE_READ(rq, clock) - BPF_CORE_READ(rq, clock_task);

	if (bpf_core_field_exists(rq->prev_irq_time))
		ns -= BPF_CORE_READ(rq, prev_irq_time);
	return ns;
}

/* Whether the CPU was idle after the run queue's clock was at since. */
static __always_inline bool hf_was_idle(struct rq *rq, __u64 since)
{
	if (!bpf_core_field_exists(rq->clock_idle))
		return true;
	return BPF_CORE_READ(rq, clock_idle) > since;
}

/* What the weighing of ticks reads is there; else every tick stands for one period. */
static __always_inline bool hf_can_weigh(void)
{
	return bpf_core_field_exists(((struct perf_event *)0)->hw.hrtimer.node.expires) &&
	       bpf_core_field_exists(((struct bpf_perf_event_data_kern *)0)->event) &&
	       bpf_core_field_exists(((struct task_struct *)0)->se.cfs_rq) &&
	       bpf_core_field_exists(((struct cfs_rq *)0)->rq) &&
	       bpf_core_field_exists(((struct rq *)0)->clock_task);
}

/* How many periods of the timer this tick stands for, 0 when they were stolen.
 *
 * A tick that is late by whole periods is the only one for all of them, as
 * hrtimer_forward_now skips the rest. The lateness is exact: the callback runs before the
 * timer is forwarded, and perf's timers are on the clock that bpf_ktime_get_ns reads. If
 * interrupts were off, the task that is current now ran meanwhile. If the hypervisor ran
 * something else, nobody did, and that is known only once the run queue's clock is updated:
 * so what was skipped is left to the next tick.
 *
 * Points of the grid without a tick were idle, if the CPU was idle since the last tick;
 * what was stolen meanwhile was stolen from them first. If it was not, the ticks came while
 * another BPF program kept ours from running, and are made good now. */
static __always_inline __u32 hf_periods(void *ctx)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct rq *rq = BPF_CORE_READ(task, se.cfs_rq, rq);
	__u64 now = bpf_ktime_get_ns(), period = hf_period_ns, expires, clock, stolen, gap, since;
	struct perf_event *event = NULL;
	struct hf_timer_state *t;
	__u32 zero = 0, periods = 1;

	bpf_probe_read_kernel(&event, sizeof(event),
			      ctx + bpf_core_field_offset(struct bpf_perf_event_data_kern, event));
	expires = BPF_CORE_READ(event, hw.hrtimer.node.expires);
	t = bpf_map_lookup_elem(&hf_timer_state, &zero);
	if (!expires || expires > now || !t)
		return 1;

	clock = BPF_CORE_READ(rq, clock);
	stolen = hf_stolen_ns(rq);
	if (t->last_ns && expires > t->last_ns) {
		since = stolen - t->stolen_ns;
		gap = expires - t->last_ns;
		gap = gap > period ? gap - period : 0;
		if (!hf_was_idle(rq, t->clock_ns))
			t->balance_ns += gap - since;
		else if (since > gap)
			t->balance_ns -= since - gap;
	}
	if (clock != t->clock_ns) {
		if (t->balance_ns >= (__s64)period) {
			periods += (__u64)t->balance_ns / period;
			t->balance_ns -= (periods - 1) * period;
		} else if (t->balance_ns <= -(__s64)period) {
			periods = 0;
			t->balance_ns += period;
		}
	}
	t->clock_ns = clock;
	t->stolen_ns = stolen;
	since = (now - expires) / period * period;
	t->balance_ns += since;
	t->last_ns = expires + since;
	return periods;
}

SEC("perf_event")
int hf_cpu(struct bpf_perf_event_data *ctx)
{
	__u32 periods = 1;

	hf_ran(0);
	if (hf_timer && hf_can_weigh())
		periods = hf_periods(ctx);
	if (!periods)
		return 0;
	hf_rqlength_count(periods);
	struct hf_moment at = {
		.profile = HF_PROFILE_CPU,
		.value = hf_period_ns * periods,
		.weight = periods,
		.user_mode = hf_user_mode(&ctx->regs),
		.ip = ctx->regs.ip,
	};
	return hf_emit(ctx, &at);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
