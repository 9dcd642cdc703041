//go:build ignore
/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* On-CPU stacks: one perf event a CPU, every tick of it a sample. */

#include "kernel.bpf.h"
#include "regs.bpf.h"
#include "sample.bpf.h"

/* Nanoseconds of CPU time that one tick stands for. */
const volatile __u64 hf_period_ns = 0;

/* The event is a timer (cpu-clock), so ticks can be late. */
const volatile bool hf_timer = false;

/* The timer ticks of one CPU. */
struct hf_ticks {
	__u64 last_ns;      /* the point of the timer's grid that the last tick was for */
	__u64 steal_ns;     /* rq->prev_steal_time_rq at the last tick */
	__u64 owed_ns;      /* stolen time that no tick has paid for yet */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_ticks);
} hf_ticks SEC(".maps");

HF_EXPORT_ENUMS;

/* Time that the hypervisor took from this CPU. The scheduler does not charge it to the
 * task (update_rq_clock_task), so samples must not either. */
static __always_inline __u64 hf_steal_ns(void)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct rq *rq = BPF_CORE_READ(task, se.cfs_rq, rq);

	if (!bpf_core_field_exists(rq->prev_steal_time_rq))
		return 0;
	return BPF_CORE_READ(rq, prev_steal_time_rq);
}

/* How many periods of the timer this tick stands for; 0 when all of them were stolen.
 *
 * A tick that is late by whole periods, because interrupts were off or the hypervisor ran
 * something else, is the only one for all of them: hrtimer_forward_now skips the rest. The
 * task that is current now ran through them all, as nothing could switch. The lateness is
 * exact: the callback runs before the timer is forwarded, and perf's timers are on the
 * clock that bpf_ktime_get_ns reads. */
static __always_inline __u32 hf_periods(void *ctx)
{
	struct perf_event *event = NULL;
	__u64 now = bpf_ktime_get_ns(), expires, periods = 1, gap, steal, stolen;
	struct hf_ticks *ticks;
	__u32 zero = 0;

	bpf_probe_read_kernel(&event, sizeof(event),
			      ctx + bpf_core_field_offset(struct bpf_perf_event_data_kern, event));
	expires = BPF_CORE_READ(event, hw.hrtimer.node.expires);
	ticks = bpf_map_lookup_elem(&hf_ticks, &zero);
	if (!expires || expires > now || !ticks)
		return 1;
	periods += (now - expires) / hf_period_ns;

	/* Stolen time is paid for in whole periods. What was stolen while the CPU was idle
	 * in between is no task's: only this tick's share of the gap counts. */
	steal = hf_steal_ns();
	if (ticks->last_ns && steal > ticks->steal_ns && expires > ticks->last_ns) {
		stolen = steal - ticks->steal_ns;
		gap = (expires - ticks->last_ns + hf_period_ns / 2) / hf_period_ns + periods - 1;
		if (gap > periods)
			stolen = stolen * periods / gap;
		ticks->owed_ns += stolen;
	}
	ticks->steal_ns = steal;
	ticks->last_ns = expires + (periods - 1) * hf_period_ns;
	if (ticks->owed_ns >= hf_period_ns) {
		stolen = ticks->owed_ns / hf_period_ns;
		if (stolen > periods)
			stolen = periods;
		ticks->owed_ns -= stolen * hf_period_ns;
		periods -= stolen;
	}
	return periods;
}

SEC("perf_event")
int hf_cpu(struct bpf_perf_event_data *ctx)
{
	__u32 periods = 1;

	hf_ran(0);
	if (hf_timer)
		periods = hf_periods(ctx);
	if (!periods)
		return 0;
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
