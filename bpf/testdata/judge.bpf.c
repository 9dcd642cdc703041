/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The judge of the run-queue latency tests: the classic method, which stamps every
 * wakeup and every switch-out. It knows nothing of sched_info, but sums the kernel's books
 * of it beside. */

#include "kernel.bpf.h"
#include "abi.h"
#include "cgroup.bpf.h"
#include "histogram.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#define TASK_DEAD 0x80

struct judge_cells {
	__u64 switching; /* ktime of the last switch, by judge_switching */
	__u64 wait_ns;
	__u64 wait[HF_TIME_CELLS];
	__u64 unknown;  /* switch-ins without a stamp */
	__u64 unbooked; /* switch-ins that sched_info does not count: preempted on the way to sleep */
};

/* The kernel's own books, sched_info, summed. */
struct judge_books {
	__u64 run_delay_ns;
	__u64 arrivals;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct judge_cells);
} cells SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct judge_books); /* of tasks at their last switch-out */
} dead SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct judge_books); /* of the tasks that judge_alive saw */
} alive SEC(".maps");

/* What the tasks of one cgroup waited and slept. */
struct judge_cgroup {
	__u64 waits, wait_ns;
	__u64 sleeps, sleep_ns;
	/* The same from the last stamp of the switch to that of sched_waking, and from the first to
	 * that of sched_wakeup: the hook's and the kernel's own lie between. Sleeps whose end was
	 * not seen count up to the switch-in, in the latter. */
	__u64 least_sleep_ns, most_sleep_ns;
	__u64 dead_ns; /* run_delay of tasks at their last switch-out */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, struct judge_cgroup);
} cgroups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, __u64); /* run_delay of the tasks that judge_alive saw */
} living SEC(".maps");

struct judge_task {
	__u64 queued;    /* ktime since when it waits, else 0 */
	__u64 woken;     /* that is from a wakeup */
	__u64 slept;     /* ktime since when it sleeps, else 0 */
	__u64 switching; /* the same by judge_switching */
	__u64 waking;    /* ktime of the sched_waking that ends that, else 0 */
};

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct judge_task);
} tasks SEC(".maps");

static __always_inline struct judge_cgroup *cgroup_of(struct task_struct *task)
{
	struct judge_cgroup none = {}, *c;
	__u64 id = hf_cgroup_id(task);

	c = bpf_map_lookup_elem(&cgroups, &id);
	if (c)
		return c;
	bpf_map_update_elem(&cgroups, &id, &none, BPF_NOEXIST);
	return bpf_map_lookup_elem(&cgroups, &id);
}

static __always_inline void add(__u64 *to, __u64 n)
{
	__sync_fetch_and_add(to, n);
}

static __always_inline void add_books(void *map, struct task_struct *task)
{
	struct judge_books *b;
	__u32 zero = 0;

	b = bpf_map_lookup_elem(map, &zero);
	if (b) {
		b->run_delay_ns += task->sched_info.run_delay;
		b->arrivals += task->sched_info.pcount;
	}
}

static __always_inline void stamp(struct task_struct *task, __u64 now)
{
	struct judge_cgroup *c;
	struct judge_task *t;

	if (!task->pid)
		return;
	t = bpf_task_storage_get(&tasks, task, NULL, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!t)
		return;
	/* A task that was preempted on its way to sleep waits since then. One that is woken
	 * twice has run meanwhile, unseen, as process 1 does where it is hidden. */
	if (!t->queued || t->woken) {
		t->queued = now;
		t->woken = 1;
	}
	if (t->slept) {
		c = cgroup_of(task);
		if (c) {
			add(&c->sleeps, 1);
			add(&c->sleep_ns, now - t->slept);
			add(&c->least_sleep_ns, (t->waking ?: now) - t->slept);
			add(&c->most_sleep_ns, now - t->switching);
		}
		t->slept = 0;
	}
}

SEC("tp_btf/sched_waking")
int BPF_PROG(judge_waking, struct task_struct *task)
{
	struct judge_task *t = bpf_task_storage_get(&tasks, task, NULL, 0);

	if (t && t->slept)
		t->waking = bpf_ktime_get_ns();
	return 0;
}

SEC("tp_btf/sched_wakeup")
int BPF_PROG(judge_wakeup, struct task_struct *task)
{
	if (!task->on_cpu)
		stamp(task, bpf_ktime_get_ns());
	return 0;
}

SEC("tp_btf/sched_wakeup_new")
int BPF_PROG(judge_birth, struct task_struct *task)
{
	stamp(task, bpf_ktime_get_ns());
	return 0;
}

/* Runs before the hook, judge_switch after it. */
SEC("tp_btf/sched_switch")
int BPF_PROG(judge_switching)
{
	struct judge_cells *c;
	__u32 zero = 0;

	c = bpf_map_lookup_elem(&cells, &zero);
	if (c)
		c->switching = bpf_ktime_get_ns();
	return 0;
}

SEC("tp_btf/sched_switch")
int BPF_PROG(judge_switch, bool preempt, struct task_struct *prev, struct task_struct *next)
{
	__u64 now = bpf_ktime_get_ns();
	struct judge_cgroup *group;
	struct judge_cells *c;
	struct judge_task *t;
	__u32 zero = 0;

	c = bpf_map_lookup_elem(&cells, &zero);
	if (!c)
		return 0;
	if (prev->__state & TASK_DEAD) {
		add_books(&dead, prev);
		group = cgroup_of(prev);
		if (group)
			add(&group->dead_ns, prev->sched_info.run_delay);
	}
	if (prev->pid) {
		t = bpf_task_storage_get(&tasks, prev, NULL, BPF_LOCAL_STORAGE_GET_F_CREATE);
		if (t) {
			t->queued = preempt || prev->__state == 0 ? now : 0;
			t->woken = 0;
			t->slept = t->queued ? 0 : now;
			t->switching = c->switching;
			t->waking = 0;
		}
	}
	if (next->pid) {
		if (!next->sched_info.last_queued)
			c->unbooked++;
		t = bpf_task_storage_get(&tasks, next, NULL, 0);
		if (t && t->queued) {
			c->wait_ns += now - t->queued;
			hf_time_count(c->wait, now - t->queued);
			group = cgroup_of(next);
			if (group) {
				add(&group->waits, 1);
				add(&group->wait_ns, now - t->queued);
			}
			t->queued = t->woken = 0;
		} else {
			c->unknown++;
			group = t && t->slept ? cgroup_of(next) : NULL;
			if (group)
				add(&group->most_sleep_ns, now - t->switching);
		}
	}
	return 0;
}

SEC("iter/task")
int judge_alive(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	__u64 id, none = 0, *sum;

	/* What is dead has been counted at its last switch-out. */
	if (!task || task->__state & TASK_DEAD)
		return 0;
	add_books(&alive, task);
	id = hf_cgroup_id(task);
	bpf_map_update_elem(&living, &id, &none, BPF_NOEXIST);
	sum = bpf_map_lookup_elem(&living, &id);
	if (sum)
		*sum += task->sched_info.run_delay;
	return 0;
}

static int past(__u32 i, __u64 *end)
{
	return bpf_ktime_get_ns() > *end;
}

/* Keeps the CPU for as many ns as *ctx says: where the kernel is not preemptible, no
 * switch happens before it ends. */
SEC("syscall")
int judge_occupy(__u64 *ctx)
{
	__u64 end = bpf_ktime_get_ns() + *ctx;

	bpf_loop(1 << 23, past, &end, 0);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
