//go:build ignore
/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Run-queue latency and blocked time of every switch-in, by container, and because of whom
 * it waited, from one hook: sched_switch. The kernel's sched_info says when a task that woke
 * was queued, and it is still set when sched_switch fires (sched_info_arrive runs after it,
 * in prepare_task_switch). */

#include "kernel.bpf.h"
#include "cgroup.bpf.h"
#include "container.bpf.h"
#include "counters.bpf.h"
#include "draw.bpf.h"
#include "histogram.bpf.h"
#include "rqclock.bpf.h"
#include "sched_runs.bpf.h"
#include "task.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

/* Where there is no sched_info: wakeups are stamped, by hooks of their own. */
const volatile bool hf_stamp_wakeups = false;

/* Positions in the program list, for hf_ran. */
enum {
	HF_SCHED_SWITCH, /* counts in hf_sched_cpu, which it has at hand */
	HF_TASK_NEWTASK,
	HF_TASK_ITER,
	HF_SCHED_MOVE,
	HF_SCHED_WAKEUP,
	HF_SCHED_WAKENEW,
};

enum hf_runner *hf_export_runner __attribute__((unused));
enum hf_blocked *hf_export_blocked __attribute__((unused));
enum hf_preemptor *hf_export_preemptor __attribute__((unused));
struct hf_sched_cpu *hf_export_sched_cpu __attribute__((unused));

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_sched_cpu);
} hf_sched_cpus SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HF_SLOTS); /* less where there are many CPUs */
	__type(key, __u32);
	__type(value, struct hf_sched_slot);
} hf_sched_cells SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_accounting);
} hf_accounts SEC(".maps");

/* What goes on with a switch whose wait was drawn: hf_wait_culprit, where there is waits.bpf.c. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} hf_sched_tail SEC(".maps");

/* Makes a task known that was born just now, or whatever it did before. What the kernel booked
 * before stays out. */
static __always_inline struct hf_task *know(struct task_struct *task, bool born)
{
	struct hf_task first = { .task = HF_SEAT_TAKEN, .tid = task->pid, .fresh = true }, *t;

	/* One that is born where another died can not be it. */
	if (!born && (t = known(task)))
		return t;
	if (!born && task->__state && !task->on_rq)
		first.out_ns = bpf_ktime_get_ns();
	if (!hf_stamp_wakeups) {
		/* In this order: an arrival in between then shows as a missing one. */
		first.arrivals = task->sched_info.pcount;
		barrier();
		first.run_delay_ns = task->sched_info.run_delay;
		first.known_ns = first.run_delay_ns;
	}
	t = hf_seat_of(task);
	if (t && ((born && t->task == (__u64)task) || !__sync_val_compare_and_swap(&t->task, 0, HF_SEAT_TAKEN))) {
		*t = first;
		__sync_lock_test_and_set(&t->task, (__u64)task); /* after the rest */
		return t;
	}
	first.unseated = true;
	return bpf_task_storage_get(&hf_tasks, task, &first, BPF_LOCAL_STORAGE_GET_F_CREATE);
}

/* What is known of the task, copied if it has no seat: one of the two on this CPU that are switched.
 * Not inline, because it is rare. */
static __noinline struct hf_task *hf_borrow(struct task_struct *task, __u32 which)
{
	struct hf_task *stored = bpf_task_storage_get(&hf_tasks, task, NULL, 0), *t;
	__u32 seat = (1 << hf_seat_bits) + 2 * bpf_get_smp_processor_id() + which;

	t = bpf_map_lookup_elem(&hf_seats, &seat);
	if (!stored || !t)
		return NULL;
	*t = *stored;
	return t;
}

static __noinline int hf_give_back(struct task_struct *task, struct hf_task *t)
{
	struct hf_task *stored = bpf_task_storage_get(&hf_tasks, task, NULL, 0);

	if (stored)
		*stored = *t;
	return 0;
}

/* Ends with hf_done. */
static __always_inline struct hf_task *hf_switched(struct task_struct *task, __u32 which)
{
	struct hf_task *t = hf_seated(task);

	return t ? t : hf_borrow(task, which);
}

static __always_inline void hf_done(struct task_struct *task, struct hf_task *t)
{
	if (t->unseated)
		hf_give_back(task, t);
}

/* How long tasks in a queue have been throttled, in ns that only grow. */
static __always_inline __u64 hf_throttled_ns(struct cfs_rq *queue)
{
	if (bpf_core_field_exists(queue->throttled_clock_self_time))
		return queue->throttled_clock_self_time;
	if (bpf_core_field_exists(queue->throttled_clock_pelt_time))
		return queue->throttled_clock_pelt_time;
	return 0;
}

/* Whether real-time tasks may not run in the queue of this one until the next period. */
static __always_inline bool hf_rt_throttled(struct task_struct *task, struct cfs_rq *queue)
{
	if (!bpf_core_field_exists(((struct rt_rq *)0)->rt_throttled))
		return false;
	if (bpf_core_field_exists(task->rt.rt_rq))
		return task->rt.rt_rq->rt_throttled;
	return queue->rq->rt.rt_throttled;
}

/* For how long that is at most: a period less what may run in it. */
static __always_inline __u64 hf_rt_throttled_most(struct task_struct *task, struct cfs_rq *queue)
{
	__u64 period = 1000000000, runtime = 0;

	if (!bpf_core_field_exists(((struct rt_rq *)0)->rt_runtime))
		return 0;
	if (bpf_core_field_exists(task->rt.rt_rq)) {
		runtime = task->rt.rt_rq->rt_runtime;
		period = task->rt.rt_rq->tg->rt_bandwidth.rt_period;
	} else {
		runtime = queue->rq->rt.rt_runtime;
	}
	return runtime < period ? period - runtime : 0;
}

static __always_inline __u32 hf_slot_of_task(struct css_set *cgroups, struct hf_task *t)
{
	if (t->cgroups != (__u64)cgroups || t->epoch != hf_slot_epoch) {
		t->epoch = hf_slot_epoch;
		t->slot = hf_slot_of(hf_cgroup_of(cgroups));
		t->cgroups = t->slot == HF_SLOT_OTHER ? 0 : (__u64)cgroups;
	}
	return t->slot;
}

static __always_inline __u32 hf_runner_of(struct task_struct *task, __u32 slot)
{
	if (!task->pid)
		return HF_RUNNER_NOBODY;
	return task->flags & PF_KTHREAD ? HF_RUNNER_KERNEL : slot;
}

/* The wait that ends now, less than 0 when it is not known; reason says why. grown gets what
 * run_delay grew by. */
static __always_inline __s64 hf_waited(struct task_struct *task, struct hf_task *t, __u64 ktime, __u64 now,
				       __u64 clock, __u64 *grown, enum hf_drop *reason)
{
	__u64 queued, run_delay, arrivals, missed;
	struct hf_counters *counters;
	__s64 wait;

	*reason = HF_DROP_NO_START;
	if (hf_stamp_wakeups) {
		if (!t->runnable && !t->woken_ns)
			return -1;
		return ktime - (t->runnable ? t->out_ns : t->woken_ns);
	}
	queued = task->sched_info.last_queued;
	run_delay = task->sched_info.run_delay;
	arrivals = task->sched_info.pcount;
	missed = arrivals - t->arrivals;
	t->arrivals = arrivals + !!queued;
	if (missed) {
		if (t->fresh)
			t->known_ns = t->run_delay_ns = run_delay;
		else if ((counters = hf_counters()))
			counters->dropped[HF_DROP_SWITCH_UNSEEN] += missed;
	}
	*grown = run_delay - t->run_delay_ns;
	if (missed) {
		/* What grew are the waits of the switch-ins that were not seen, too, and
		 * out_ns can be older than they. */
		wait = now - queued;
		t->out_ns = t->runnable = 0;
	} else if (t->runnable) {
		/* Our own stamp, because the clock can be late at the switch-out too, and
		 * sched_info knows nothing of a task preempted on its way to sleep. */
		wait = ktime - t->out_ns;
	} else {
		/* Moves between run queues have put earlier legs of the wait into run_delay. */
		wait = now - queued + *grown;
	}
	if (queued)
		*grown += clock - queued;
	t->run_delay_ns += *grown;
	if (!queued && !t->runnable)
		return -1;
	if (t->moved_asleep) {
		*reason = HF_DROP_DELAYED;
		return -1;
	}
	*reason = HF_DROP_NEGATIVE;
	return wait;
}

/* How much of a wait that began at since was for lack of quota. *until gets the end of the
 * newest throttling. */
static __always_inline __u64 hf_throttled(struct task_struct *task, struct cfs_rq *queue, struct hf_task *t,
					  struct hf_sched_slot *cells, __u64 ktime, __u64 since, __u64 *until)
{
	__u64 ns = hf_throttled_ns(queue), past;

	*until = ktime;
	if (t->runnable && t->rt_throttled) {
		past = hf_rt_throttled_most(task, queue);
		if (past < ktime - since)
			*until = since + past;
		return *until - since;
	}
	if (!ns && !(t->moved && t->quota_ns))
		return 0;
	/* The first to be switched in after a throttling, in its container and on this CPU,
	 * learns of it. */
	if (cells->throttled_queue == (__u64)queue && ns != cells->throttled_ns) {
		past = ns - cells->throttled_ns;
		cells->throttled_from = ktime - past;
		cells->throttled_until = ktime;
	} else if (cells->throttled_queue != (__u64)queue) {
		cells->throttled_from = cells->throttled_until = 0;
	}
	cells->throttled_queue = (__u64)queue;
	cells->throttled_ns = ns;
	if (task->prio < MAX_RT_PRIO)
		return 0;
	if (cells->throttled_until)
		*until = cells->throttled_until;
	if (t->runnable)
		return (t->moved ? t->quota_ns : 0) + (t->queue == (__u64)queue ? ns - t->throttled_ns : 0);
	if (since >= cells->throttled_until)
		return 0;
	return cells->throttled_until - (since > cells->throttled_from ? since : cells->throttled_from);
}

/* Accounts for a wait of ns in parts, which add up to it. */
static __always_inline void hf_account(struct task_struct *task, struct cfs_rq *queue, struct hf_task *t,
				       struct hf_sched_cpu *cpu, struct hf_sched_slot *cells, __u32 slot, __u64 ktime,
				       __u64 ns, struct hf_wait *w)
{
	__u64 until, quota = hf_throttled(task, queue, t, cells, ktime, ktime - ns, &until);

	if (!quota && !t->moved && (__s64)ns <= hf_age(ktime, cpu->runs[cpu->newest % HF_RUNS])) {
		if (cpu->runner < HF_RUNNERS)
			cells->waited_for[cpu->runner] += ns;
		w->culprit = cpu->runner;
		w->end = 0;
		return;
	}
	if (quota > ns)
		quota = ns;
	w->now = ktime;
	w->age = w->culprit_ns = 0;
	__builtin_memset(w->cause_ns, 0, sizeof(w->cause_ns));
	w->quota_ns = quota;
	w->quota_age = ktime - until;
	w->slot = slot;
	w->end = ns;
	if (t->moved && ktime - t->moved_ns < ns) {
		w->end = ktime - t->moved_ns;
		hf_blame_runs(cpu, cells, w);
		w->end = ns;
		__u32 zero = 0;
		cpu = bpf_map_lookup_percpu_elem(&hf_sched_cpus, &zero, t->moved_from);
	}
	hf_blame_runs(cpu, cells, w);
	hf_blame(cells, w, HF_RUNNER_UNKNOWN, ns);
	if (quota > w->culprit_ns)
		w->culprit = HF_RUNNER_QUOTA;
}

/* Draws from the wait and the blocked time that p has, those that are not 0; what is not taken
 * becomes 0 there. waits.bpf.c takes the samples when the task runs. Not static, so that the
 * verifier sees it once: its paths times those of the switch are too many for Linux 6.1. */
__noinline int hf_draw_waits(struct hf_sched_cpu *cpu, struct hf_waiting *p, __u64 ktime)
{
	struct task_struct *by, *task;
	__u32 tgid, id = bpf_get_smp_processor_id();
	__u8 kick = 0;
	void *ring;

	if (!cpu || !p)
		return 0;
	ring = bpf_map_lookup_elem(&hf_kicks, &id);
	if (ring && p->tid) /* nothing came for it */
		p->lost += p->drawn;
	if (cpu->wait.end)
		p->cause = hf_cause_at_random(&cpu->wait);
	task = (struct task_struct *)p->task;
	tgid = BPF_CORE_READ(task, tgid);
	by = (struct task_struct *)p->by_task;
	p->by_pid = 0;
	if (!p->wait_ns ||
	    !hf_drawn_of(&cpu->wait_draws, tgid, p->wait_ns, hf_wait_mean_ns, ktime, &p->wait_mean_ns)) {
		p->wait_ns = 0;
	} else if (by) {
		p->by_pid = BPF_CORE_READ(by, tgid);
		BPF_CORE_READ_STR_INTO(&p->by, by, group_leader, comm);
	}
	if (!p->blocked_ns ||
	    !hf_drawn_of(&cpu->blocked_draws, tgid, p->blocked_ns, hf_blocked_mean_ns, ktime, &p->blocked_mean_ns))
		p->blocked_ns = 0;
	else
		p->iowait = BPF_CORE_READ_BITFIELD_PROBED(task, in_iowait);
	p->tid = p->wait_ns || p->blocked_ns ? BPF_CORE_READ(task, pid) : 0;
	if (!p->tid)
		return 0;
	p->drawn = !!p->wait_ns + !!p->blocked_ns;
	if (ring && bpf_ringbuf_output(ring, &kick, sizeof(kick), BPF_RB_FORCE_WAKEUP)) {
		/* Else a later interrupt would be taken for this one. */
		p->tid = 0;
		p->lost += p->drawn;
	}
	return 0;
}

/* Returns whether the wait was drawn, and prev is who was waited for. */
static __always_inline bool handle_switch_in(struct task_struct *prev, struct task_struct *task, struct cfs_rq *queue,
					     struct hf_task *t, struct hf_sched_cpu *cpu, __u32 slot, __u64 ktime,
					     __u64 now, __u64 clock)
{
	__u64 grown = 0, blocked = 0;
	struct hf_sched_slot *cells;
	struct hf_wait *w = &cpu->wait;
	struct hf_waiting *p;
	enum hf_drop reason;
	__u32 state, zero = 0;
	bool blamed = false;
	__u64 lasted;
	__s64 wait;

	cells = bpf_map_lookup_elem(&hf_sched_cells, &slot);
	if (!cells)
		return false;
	wait = hf_waited(task, t, ktime, now, clock, &grown, &reason);
	cells->run_delay_ns += grown;
	if (wait >= 0) {
		if (t->out_ns && !t->runnable) {
			/* Either can have been told by a clock that is some us off while ktime is steered. */
			blocked = ktime > t->out_ns ? ktime - t->out_ns : 0;
			/* The clock is right to a us, and sleeps can be shorter. */
			if (wait > (__s64)blocked)
				wait = blocked;
			blocked -= wait;
			/* io_schedule clears it when the task goes on. */
			state = BPF_CORE_READ_BITFIELD(task, in_iowait) ? HF_BLOCKED_IO : HF_BLOCKED_OTHER;
			cells->blocked_ns[state] += blocked;
			hf_time_count(cells->blocked[state], blocked);
		}
		cells->wait_ns += wait;
		hf_time_count(cells->wait, wait);
		hf_account(task, queue, t, cpu, cells, slot, ktime, wait, w);
		lasted = blocked;
		if (t->drawn_ns > t->out_ns)
			blocked = blocked + t->out_ns > t->drawn_ns ? blocked + t->out_ns - t->drawn_ns : 0;
		/* Most end before the next point of either. */
		if (!hf_wait_mean_ns || hf_passed(hf_stratum(&cpu->wait_draws, task), wait))
			wait = 0;
		if (!hf_blocked_mean_ns || hf_passed(hf_stratum(&cpu->blocked_draws, task), blocked))
			blocked = 0;
		if ((wait || blocked) && (p = bpf_map_lookup_elem(&hf_waitings, &zero))) {
			p->wait_ns = wait;
			p->blocked_ns = blocked;
			p->lasted_ns = lasted;
			p->cause = p->by_cause = hf_cause_of(w->culprit, slot);
			p->task = (__u64)task;
			p->by_task = w->culprit == cpu->runner && prev->pid ? (__u64)prev : 0;
			p->by_ns = ktime - cpu->switch_ns;
			hf_draw_waits(cpu, p, ktime);
			blamed = p->wait_ns && p->by_pid;
		}
	} else {
		drop(reason);
	}
	t->runnable = t->fresh = t->moved = t->moved_asleep = false;
	if (hf_stamp_wakeups)
		t->woken_ns = 0;
	return blamed;
}

static __always_inline void handle_switch_out(struct task_struct *task, struct cfs_rq *queue, struct hf_task *t,
					      __u32 slot, __u64 ktime, bool runnable, __u32 runner)
{
	struct hf_sched_slot *cells;

	/* It still waits, as far as we know: its switch-in ran no program. */
	if (hf_stamp_wakeups && (t->runnable || t->woken_ns)) {
		drop(HF_DROP_SWITCH_UNSEEN);
		t->woken_ns = 0;
	}
	t->out_ns = ktime;
	t->runnable = runnable;
	if (!runnable) {
		if (task->__state == TASK_DEAD && !t->unseated)
			__sync_lock_test_and_set(&t->task, 0); /* after the rest */
		return;
	}
	t->queue = (__u64)queue;
	t->throttled_ns = hf_throttled_ns(queue);
	t->rt_throttled = task->prio < MAX_RT_PRIO && hf_rt_throttled(task, queue);
	if (runner == HF_RUNNER_NOBODY)
		return; /* its quota is used up */
	cells = bpf_map_lookup_elem(&hf_sched_cells, &slot);
	if (cells)
		cells->preempted[runner == HF_RUNNER_KERNEL ? HF_PREEMPTOR_KERNEL :
				 runner == slot ? HF_PREEMPTOR_OWN : HF_PREEMPTOR_OTHER]++;
}

/* Returns whether the stack of prev is wanted. */
static __always_inline bool handle_switch(bool preempt, struct task_struct *prev, struct task_struct *next)
{
	/* Before any branch: for each path to the load of a pointer from a task, Linux from 6.13 on
	 * goes through all types of the kernel three times when it verifies. */
	struct cfs_rq *from = prev->se.cfs_rq, *to = next->se.cfs_rq;
	struct css_set *cgroups = next->cgroups;
	struct rq *rq = to->rq;
	__u64 clock = rq->clock, ktime, now;
	struct hf_task *out = NULL, *in = NULL;
	__u32 zero = 0, slot = 0, runner;
	struct hf_sched_cpu *cpu;
	bool wanted = false, fresh;

	cpu = bpf_map_lookup_elem(&hf_sched_cpus, &zero);
	if (!cpu)
		return false;
	cpu->switches++;
	/* A task that goes to sleep for another is switched out with a clock that was just updated,
	 * unless it had been told before to let that one go first. That one was mostly queued with
	 * the last update; where there was one since, ktime comes out early by what the task took
	 * to go to sleep. Before the CPU goes idle it looks for work elsewhere, for long. */
	fresh = !preempt && prev->__state && next->pid && !hf_stamp_wakeups && next->sched_info.last_queued != clock;
	if (fresh && hf_rqclock_guess(&cpu->clock, clock, &ktime) && ktime > cpu->switch_ns) {
		now = clock;
	} else {
		ktime = bpf_ktime_get_ns();
		now = hf_rqclock_now(&cpu->clock, ktime, clock, fresh);
	}
	hf_run_ends(cpu, ktime, rq, !prev->pid);

	if (next->pid) {
		in = hf_switched(next, 0);
		if (in) {
			slot = hf_slot_of_task(cgroups, in);
		} else {
			slot = hf_slot_of(hf_cgroup_of(cgroups));
			drop(HF_DROP_NO_STORAGE);
		}
	}
	runner = hf_runner_of(next, slot);
	if (prev->pid)
		out = hf_switched(prev, 1);
	/* The kernel keeps a preempted task queued whatever its state. */
	if (out) {
		handle_switch_out(prev, from, out, out->slot, ktime, preempt || prev->__state == 0, runner);
		hf_done(prev, out);
	}
	if (in) {
		wanted = handle_switch_in(prev, next, to, in, cpu, slot, ktime, now, clock);
		hf_done(next, in);
	}

	if (runner != cpu->runner)
		hf_run_begins(cpu, ktime, runner);
	cpu->switch_ns = ktime;
	return wanted;
}

SEC("tp_btf/sched_switch")
int BPF_PROG(hf_sched_switch, bool preempt, struct task_struct *prev, struct task_struct *next)
{
	if (handle_switch(preempt, prev, next))
		bpf_tail_call(ctx, &hf_sched_tail, 0);
	return 0;
}

/* In the parent, before the child can run. */
SEC("tp_btf/task_newtask")
int BPF_PROG(hf_task_newtask, struct task_struct *task)
{
	hf_ran(HF_TASK_NEWTASK);
	if (task->pid)
		know(task, true);
	return 0;
}

/* Delayed dequeue (152e11f6df29, 6.12) leaves a sleeping task on its run queue. Moving it
 * to another queues it there as if it waited: sched_info counts the rest of its sleep. */
static __always_inline bool hf_dequeue_delayed(struct task_struct *task)
{
	return bpf_core_field_exists(task->se.sched_delayed) && task->se.sched_delayed;
}

/* Before the move. */
SEC("tp_btf/sched_migrate_task")
int BPF_PROG(hf_sched_move, struct task_struct *task)
{
	struct cfs_rq *queue;
	struct hf_task *t;

	hf_ran(HF_SCHED_MOVE);
	if (!task->on_rq) /* it is being woken */
		return 0;
	t = known(task);
	if (!t)
		return 0;
	if (hf_dequeue_delayed(task)) {
		t->moved_asleep = !hf_stamp_wakeups;
		return 0;
	}
	queue = task->se.cfs_rq;
	if (!t->moved)
		t->quota_ns = 0;
	if (t->runnable && t->queue == (__u64)queue)
		t->quota_ns += hf_throttled_ns(queue) - t->throttled_ns;
	t->queue = 0;
	t->moved = true;
	t->moved_ns = bpf_ktime_get_ns();
	t->moved_from = queue->rq->cpu;
	return 0;
}

static __always_inline int handle_wakeup(struct task_struct *task)
{
	struct hf_task *t;

	if (task->on_cpu)
		return 0; /* on its way to sleep, it goes on instead */
	t = known(task);
	if (t)
		t->woken_ns = bpf_ktime_get_ns();
	return 0;
}

SEC("tp_btf/sched_wakeup")
int BPF_PROG(hf_sched_wakeup, struct task_struct *task)
{
	hf_ran(HF_SCHED_WAKEUP);
	return handle_wakeup(task);
}

SEC("tp_btf/sched_wakeup_new")
int BPF_PROG(hf_sched_wakenew, struct task_struct *task)
{
	hf_ran(HF_SCHED_WAKENEW);
	return handle_wakeup(task);
}

/* Walks the tasks: makes known those that are not, and sums the books. */
SEC("iter/task")
int hf_task_iter(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct hf_accounting *sum;
	struct hf_task *t;
	__u64 run_delay;
	__u32 zero = 0;

	hf_ran(HF_TASK_ITER);
	/* The one has left its seat, the other gets one by its birth. */
	if (!task || task->__state & (TASK_DEAD | TASK_NEW))
		return 0;
	sum = bpf_map_lookup_elem(&hf_accounts, &zero);
	t = know(task, false);
	if (t && task->__state == TASK_DEAD) { /* by now */
		__sync_val_compare_and_swap(&t->task, (__u64)task, 0);
		return 0;
	}
	if (!sum || !t || hf_stamp_wakeups)
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
