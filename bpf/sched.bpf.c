//go:build ignore
/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Run-queue latency of every switch-in, from one hook: sched_switch. The kernel's
 * sched_info says when a task that woke was queued, and it is still set when sched_switch
 * fires (sched_info_arrive runs after it, in prepare_task_switch). */

#include "kernel.bpf.h"
#include "cgroup.bpf.h"
#include "container.bpf.h"
#include "counters.bpf.h"
#include "histogram.bpf.h"
#include "rqclock.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

/* Positions in the program list, for hf_ran. */
enum {
	HF_SCHED_SWITCH,
	HF_TASK_NEWTASK,
	HF_TASK_ITER,
	HF_SCHED_MOVE,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_rqclock);
} hf_rqclocks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_runqueue);
} hf_runqueues SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct hf_task);
} hf_tasks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_accounting);
} hf_accounts SEC(".maps");

/* Makes the storage of a task, or finds it. What the kernel booked before stays out. */
static __always_inline struct hf_task *know(struct task_struct *task)
{
	struct hf_task first = { .fresh = true };

	/* In this order: an arrival in between then shows as a missing one. */
	first.arrivals = task->sched_info.pcount;
	barrier();
	first.run_delay_ns = task->sched_info.run_delay;
	first.known_ns = first.run_delay_ns;
	return bpf_task_storage_get(&hf_tasks, task, &first, BPF_LOCAL_STORAGE_GET_F_CREATE);
}

static __always_inline void handle_switch_in(struct task_struct *task, __u64 ktime, __u64 now, __u64 clock)
{
	__u64 queued = task->sched_info.last_queued;
	__u64 run_delay = task->sched_info.run_delay;
	__u64 arrivals = task->sched_info.pcount;
	struct hf_counters *counters = hf_counters();
	__u64 grown, wait, missed;
	struct hf_runqueue *rq;
	struct hf_task *t;
	__u32 zero = 0;

	t = bpf_task_storage_get(&hf_tasks, task, NULL, 0);
	if (!t) {
		drop(HF_DROP_NO_STORAGE);
		return;
	}
	rq = bpf_map_lookup_elem(&hf_runqueues, &zero);
	if (!rq)
		return;

	missed = arrivals - t->arrivals;
	if (missed && t->fresh)
		t->known_ns = t->run_delay_ns = run_delay;
	grown = run_delay - t->run_delay_ns;

	if (missed) {
		/* What grew are the waits of the switch-ins that were not seen, too, and
		 * queued_ns can be older than they. */
		wait = now - queued;
	} else if (t->queued_ns) {
		/* Our own stamp, because the clock can be late at the switch-out too, and
		 * sched_info knows nothing of a task preempted on its way to sleep. */
		wait = ktime - t->queued_ns;
	} else {
		/* Moves between run queues have put earlier legs of the wait into run_delay. */
		wait = now - queued + grown;
	}
	if (queued)
		grown += clock - queued;

	if (missed && !t->fresh && counters)
		counters->dropped[HF_DROP_SWITCH_UNSEEN] += missed;
	if (!queued && (missed || !t->queued_ns))
		drop(HF_DROP_NO_START);
	else if (t->moved_asleep)
		drop(HF_DROP_DELAYED);
	else if ((__s64)wait < 0)
		drop(HF_DROP_NEGATIVE);
	else
		hf_time_add(&rq->wait, wait);

	rq->run_delay_ns += grown;
	t->run_delay_ns += grown;
	t->arrivals = arrivals + !!queued;
	t->queued_ns = 0;
	t->fresh = t->moved_asleep = false;
}

static __always_inline int handle_switch(bool preempt, struct task_struct *prev, struct task_struct *next)
{
	__u64 ktime = bpf_ktime_get_ns(), clock, now;
	struct hf_rqclock *c;
	struct hf_task *t;
	__u32 zero = 0;

	c = bpf_map_lookup_elem(&hf_rqclocks, &zero);
	if (!c)
		return 0;
	clock = next->se.cfs_rq->rq->clock;
	now = hf_rqclock_now(c, ktime, clock);

	/* The kernel keeps a preempted task queued whatever its state. One that sleeps needs
	 * nothing: its switch-in has left queued_ns at 0. */
	if (prev->pid && (preempt || prev->__state == 0)) {
		t = bpf_task_storage_get(&hf_tasks, prev, NULL, 0);
		if (t)
			t->queued_ns = ktime;
	}
	if (next->pid)
		handle_switch_in(next, ktime, now, clock);
	return 0;
}

SEC("tp_btf/sched_switch")
int BPF_PROG(hf_sched_switch, bool preempt, struct task_struct *prev, struct task_struct *next)
{
	hf_ran(HF_SCHED_SWITCH);
	return handle_switch(preempt, prev, next);
}

/* In the parent, before the child can run. */
SEC("tp_btf/task_newtask")
int BPF_PROG(hf_task_newtask, struct task_struct *task)
{
	hf_ran(HF_TASK_NEWTASK);
	if (task->pid)
		know(task);
	return 0;
}

/* Delayed dequeue (152e11f6df29, 6.12) leaves a sleeping task on its run queue. Moving it
 * to another queues it there as if it waited: sched_info counts the rest of its sleep. */
SEC("tp_btf/sched_migrate_task")
int BPF_PROG(hf_sched_move, struct task_struct *task)
{
	struct hf_task *t;

	hf_ran(HF_SCHED_MOVE);
	if (!task->on_rq || !task->se.sched_delayed)
		return 0;
	t = bpf_task_storage_get(&hf_tasks, task, NULL, 0);
	if (t)
		t->moved_asleep = true;
	return 0;
}

/* Walks the tasks: makes the storage that is missing, and sums the books. */
SEC("iter/task")
int hf_task_iter(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct hf_accounting *sum;
	struct hf_task *t;
	__u64 run_delay;
	__u32 zero = 0;

	hf_ran(HF_TASK_ITER);
	if (!task)
		return 0;
	sum = bpf_map_lookup_elem(&hf_accounts, &zero);
	t = know(task);
	if (!sum || !t)
		return 0;
	run_delay = task->sched_info.run_delay;
	/* Legs of a wait that has not ended are not due yet. */
	if (task->sched_info.last_queued && task->sched_info.pcount == t->arrivals)
		run_delay = t->run_delay_ns;
	sum->counted_ns += t->run_delay_ns - t->known_ns;
	sum->kernel_ns += run_delay - t->known_ns;
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
