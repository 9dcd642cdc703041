//go:build ignore
/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Stacks of waits and of blocked time. sched_switch has drawn (draw.bpf.h, in sched.bpf.c),
 * but there the task that waited is not current yet, and only a current task's user stack
 * can be walked: so it is walked a moment later, when it runs again and has not left
 * schedule(). What tells of that moment is an interrupt that the draw asks for, where the
 * kernel traces those: a hook in schedule() costs each switch, and few are drawn. A thread
 * that stays blocked never gets there: the walk over all threads (hf_blocked_iter) draws from
 * its time up to now. */

#include "kernel.bpf.h"
#include "regs.bpf.h"
#include "sample.bpf.h"
#include "draw.bpf.h"
#include "task.bpf.h"
#include <bpf/bpf_tracing.h>

/* Positions in the program list, for hf_ran. */
enum {
	HF_WAIT_EXIT,
	HF_BLOCKED_ITER,
	HF_WAIT_CULPRIT,
};

/* User frames of a task that is being switched out: some ten us of walking. */
#define HF_CULPRIT_FRAMES 64

/* A program of a tracepoint, and what calls those. */
#define HF_TRACEPOINT_FRAMES 2

/* Kernel frames above schedule(), how the hook is called. */
const volatile __u32 hf_skip_frames = 0;

/* The same for the interrupt: learnt from the address of __schedule, 0 where that is not known. */
__u64 hf_schedule;
__u32 hf_kick_frames;
#define HF_SCHEDULE_BYTES 8192 /* __schedule and schedule() behind it, at most */
#define HF_KICK_FRAMES 16

/* Of the walk over the threads, of which there is one at a time; it can be preempted. */
struct hf_walked {
	struct hf_draw draw;
	struct hf_regs regs;
	struct hf_scratch scratch;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_walked);
} hf_walked SEC(".maps");

HF_EXPORT_ENUMS;

/* What a thread that is in futex waits for. There is one call for all: but a lock's word is 2
 * in glibc, in Rust and in Go while somebody waits for it, and priority inheritance is for
 * locks only. */
static __always_inline __u8 hf_futex_state(struct task_struct *task)
{
	const __u64 regs = (__u64)bpf_task_pt_regs(task);
	__u64 operation = 0, expected = 0;
#if defined(__TARGET_ARCH_x86)
	const __u32 futex = 202, at_number = 15 * 8, at_operation = 13 * 8, at_expected = 12 * 8;
	__s64 number = -1;
#else
	const __u32 futex = 98, at_number = 35 * 8, at_operation = 1 * 8, at_expected = 2 * 8;
	__s32 number = -1;
#endif
	bpf_probe_read_kernel(&number, sizeof(number), (void *)(regs + at_number));
	if (number != futex)
		return HF_STATE_OTHER;
	bpf_probe_read_kernel(&operation, sizeof(operation), (void *)(regs + at_operation));
	bpf_probe_read_kernel(&expected, sizeof(expected), (void *)(regs + at_expected));
	switch (operation & 127) {
	case 0: /* FUTEX_WAIT */
	case 9: /* FUTEX_WAIT_BITSET */
		return (__u32)expected == 2 ? HF_STATE_LOCK : HF_STATE_CONDITION;
	case 6:  /* FUTEX_LOCK_PI */
	case 13: /* FUTEX_LOCK_PI2 */
		return HF_STATE_LOCK;
	}
	return HF_STATE_CONDITION;
}

/* Whether a thread that does not run waits for a lock of the kernel: a mutex, semaphore or rwsem, as
 * far as the kernel notes it down. In the stack of such a thread there is nothing of it: the kernel
 * leaves out what is part of the scheduler, and takes the locks for that. */
static __always_inline bool hf_waits_for_lock(struct task_struct *task)
{
	if (bpf_core_field_exists(task->pi_blocked_on) && BPF_CORE_READ(task, pi_blocked_on))
		return true;
	if (bpf_core_field_exists(task->blocked_on) && BPF_CORE_READ(task, blocked_on))
		return true;
	return bpf_core_field_exists(task->blocker) && BPF_CORE_READ(task, blocker);
}

/* Samples the current task, which is being switched out, for the wait of the one that comes:
 * the run queue is locked, so what others wait for that is bounded. */
static __always_inline int handle_culprit(void *ctx, struct task_struct *victim)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct hf_moment at = { .profile = HF_PROFILE_CULPRIT, .weight = 1,
				.skip = HF_TRACEPOINT_FRAMES, .user_frames = HF_CULPRIT_FRAMES };
	__u32 cpu = bpf_get_smp_processor_id(), zero = 0, used;
	struct hf_waiting *p;
	struct hf_scratch *s;
	void *ring;

	p = bpf_map_lookup_elem(&hf_waitings, &zero);
	s = bpf_map_lookup_elem(&hf_scratch, &zero);
	if (!p || !s || p->by_task != (__u64)task)
		return 0;
	ring = hf_ring_of(cpu, 1);
	if (!ring)
		return 0;
	used = hf_take(ctx, s, task, ring, &at);
	hf_head(&s->head, task, cpu);
	s->head.cause = p->by_cause;
	s->head.by_pid = victim->tgid;
	BPF_CORE_READ_STR_INTO(&s->head.by, victim, group_leader, comm);
	s->head.by_ns = p->by_ns < p->wait_ns ? p->by_ns : p->wait_ns;
	at.value = p->wait_ns;
	at.mean_ns = p->wait_mean_ns;
	hf_put(s, used, ring, &at);
	return 0;
}

/* Called by hf_sched_switch. */
SEC("tp_btf/sched_switch")
int BPF_PROG(hf_wait_culprit, bool preempt, struct task_struct *prev, struct task_struct *next)
{
	hf_ran(HF_WAIT_CULPRIT);
	return handle_culprit(ctx, next);
}

/* Run once by user space. */
SEC("syscall")
int hf_find_schedule(void *ctx)
{
	char name[] = "__schedule";

	return bpf_kallsyms_lookup_name(name, sizeof(name), 0, &hf_schedule);
}

/* Shows user space whether hf_wait_kick runs: not all hypervisors' interrupts are traced. */
SEC("syscall")
int hf_try_kick(void *ctx)
{
	__u32 cpu = bpf_get_smp_processor_id();
	void *ring = bpf_map_lookup_elem(&hf_kicks, &cpu);
	__u8 kick = 0;

	return ring ? bpf_ringbuf_output(ring, &kick, sizeof(kick), BPF_RB_FORCE_WAKEUP) : -1;
}

/* How many frames are above __schedule, which is the same for all that are kicked. */
static __always_inline __u32 hf_learn_kick(void *ctx, struct hf_scratch *s)
{
	__u64 *ips = (__u64 *)s->rest;
	long bytes;

	if (hf_kick_frames || !hf_schedule)
		return hf_kick_frames;
	bytes = bpf_get_stack(ctx, ips, HF_KICK_FRAMES * 8, 0);
	for (int i = 1; i < HF_KICK_FRAMES && i * 8 < bytes; i++) {
		if (ips[i] - hf_schedule < HF_SCHEDULE_BYTES) {
			hf_kick_frames = i;
			break;
		}
	}
	return hf_kick_frames;
}

/* Samples the current task for what is pending. */
static __always_inline int handle_exit(void *ctx, bool kicked)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct hf_moment at = { .profile = HF_PROFILE_RUNQUEUE, .weight = 1, .skip = hf_skip_frames };
	__u32 cpu = bpf_get_smp_processor_id(), zero = 0, used;
	struct hf_counters *counters;
	struct hf_waiting *p;
	struct hf_scratch *s;
	void *ring;

	p = bpf_map_lookup_elem(&hf_waitings, &zero);
	if (!p || !p->tid)
		return 0;
	used = p->tid;
	p->tid = 0;
	if (used != (__u32)task->pid)
		p->lost += p->drawn;
	counters = hf_counters();
	if (counters && p->lost) {
		counters->dropped[HF_DROP_SWITCH_UNSEEN] += p->lost;
		p->lost = 0;
	}
	if (used != (__u32)task->pid)
		return 0;
	s = bpf_map_lookup_elem(&hf_scratch, &zero);
	ring = hf_ring_of(cpu, !!p->wait_ns + !!p->blocked_ns);
	if (!s || !ring)
		return 0;
	if (kicked)
		at.skip = hf_learn_kick(ctx, s);
	used = hf_take(ctx, s, task, ring, &at);
	hf_head(&s->head, task, cpu);
	if (p->wait_ns) {
		s->head.cause = p->cause;
		s->head.by_pid = p->by_cause == p->cause ? p->by_pid : 0;
		__builtin_memcpy(s->head.by, p->by, sizeof(p->by));
		at.value = p->wait_ns;
		at.mean_ns = p->wait_mean_ns;
		hf_put(s, used, ring, &at);
	}
	if (p->blocked_ns) {
		s->head.cause = s->head.by_pid = 0;
		s->head.state = p->iowait ? HF_STATE_BLOCK_IO : hf_futex_state(task);
		at.profile = HF_PROFILE_OFFCPU;
		s->head.lasted_ns = p->lasted_ns;
		at.value = p->blocked_ns;
		at.mean_ns = p->blocked_mean_ns;
		hf_put(s, used, ring, &at);
	}
	return 0;
}

/* The interrupt that hf_draw_waits asked for, or another of the kind (x86). */
SEC("tp_btf/irq_work_entry")
int BPF_PROG(hf_wait_kick)
{
	hf_ran(HF_WAIT_EXIT);
	return handle_exit(ctx, true);
}

/* Where that is not: the end of schedule(), in the task that was switched in (6.16). */
SEC("tp_btf/sched_exit_tp")
int BPF_PROG(hf_wait_exit)
{
	hf_ran(HF_WAIT_EXIT);
	return handle_exit(ctx, false);
}

/* Where that is not either: finish_task_switch, likewise. */
SEC("kprobe/finish_task_switch")
int hf_wait_finish(struct pt_regs *ctx)
{
	hf_ran(HF_WAIT_EXIT);
	return handle_exit(ctx, false);
}

/* The stack copy of a thread that does not run; user space walks it. */
static __always_inline __u32 hf_append_blocked(struct hf_walked *w, struct task_struct *task, __u32 used)
{
	struct hf_scratch *s = &w->scratch;
	struct vm_area_struct *vma;
	struct hf_frame *at;
	__u64 start, end, size = HF_STACK_COPY;

	s->head.user_outcome = HF_OUTCOME_BAD_STACK;
	if (bpf_probe_read_kernel(&w->regs, sizeof(w->regs), (void *)bpf_task_pt_regs(task)))
		return used;
	if (used > sizeof(s->rest) - sizeof(*at) - HF_STACK_COPY)
		return used;
	at = (void *)(s->rest + used);
	if (hf_leaf(at, &w->regs))
		return used;
	used += sizeof(*at);
	if (used > sizeof(s->rest) - HF_STACK_COPY)
		return used;
	start = at->sp - HF_RED_ZONE;
	/* What lies behind the end of the stack's mapping can not be read. The mapping can go
	 * away, or its node be overwritten by a walk that interrupts this one. */
	vma = (struct vm_area_struct *)hf_find_vma((__u64)BPF_CORE_READ(task, mm), at->sp);
	if (vma && BPF_CORE_READ(vma, vm_start) <= at->sp) {
		end = BPF_CORE_READ(vma, vm_end);
		if (end > at->sp && end - start < size)
			size = (end - start) & ~7ULL;
	}
	for (int i = 0; i < 4; i++) {
		if (!bpf_copy_from_user_task(s->rest + used, size & (2 * HF_STACK_COPY - 1), (void *)start, task, 0)) {
			s->head.user_outcome = HF_OUTCOME_NO_TABLE;
			s->head.stack_bytes = size;
			return used + size;
		}
		size = i < 2 ? HF_STACK_COPY >> (2 * (i + 1)) : 4096 - (start & 4095);
	}
	return used - sizeof(*at);
}

/* Draws from what the threads that are blocked have been blocked for since the last walk. */
SEC("iter.s/task")
int hf_blocked_iter(struct bpf_iter__task *ctx)
{
	struct hf_moment at = { .profile = HF_PROFILE_OFFCPU, .weight = 1 };
	__u32 zero = 0, cpu = bpf_get_smp_processor_id(), used;
	struct task_struct *task = ctx->task;
	struct hf_walked *w;
	struct hf_task *t;
	__u64 now, since;
	void *ring;
	long kernel;

	hf_ran(HF_BLOCKED_ITER);
	if (!task || task->on_rq || !task->__state || task->flags & PF_EXITING)
		return 0;
	w = bpf_map_lookup_elem(&hf_walked, &zero);
	t = known(task);
	if (!w || !t || !t->out_ns || t->runnable)
		return 0;
	now = bpf_ktime_get_ns();
	since = t->drawn_ns > t->out_ns ? t->drawn_ns : t->out_ns;
	if (now <= since)
		return 0;
	t->drawn_ns = now;
	at.value = now - since;
	if (!hf_drawn(&w->draw, at.value, hf_blocked_mean_ns, now, 0, &at.mean_ns))
		return 0;
	ring = hf_ring_of(cpu, 1);
	if (!ring)
		return 0;

	struct hf_scratch *s = &w->scratch;

	s->head.kernel_frames = s->head.user_frames = s->head.areas = s->head.stack_bytes = 0;
	kernel = bpf_get_task_stack(task, s->rest, HF_MAX_KERNEL_FRAMES * 8, 0);
	s->head.kernel_outcome = hf_outcome_of(kernel);
	used = kernel > 0 ? kernel & 1023 : 0;
	if (used > HF_MAX_KERNEL_FRAMES * 8)
		used = HF_MAX_KERNEL_FRAMES * 8;
	s->head.kernel_frames = used / 8;
	if (task->flags & PF_KTHREAD)
		s->head.user_outcome = HF_OUTCOME_NONE;
	else
		used = hf_append_blocked(w, task, used);
	hf_head(&s->head, task, cpu);
	s->head.lasted_ns = now - t->out_ns;
	s->head.state = BPF_CORE_READ_BITFIELD(task, in_iowait) ? HF_STATE_BLOCK_IO :
			hf_waits_for_lock(task) ? HF_STATE_LOCK : hf_futex_state(task);
	hf_put(s, used, ring, &at);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
