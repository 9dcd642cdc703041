/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Takes the stacks of the current task and puts a sample into this CPU's ring. */
#ifndef HF_SAMPLE_BPF_H
#define HF_SAMPLE_BPF_H

#include "abi.h"
#include "cgroup.bpf.h"
#include "kernel.bpf.h"
#include "counters.bpf.h"
#include "unwind.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

struct hf_ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 128 * 1024); /* inner template; sized by user space */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1); /* the possible CPUs; sized by user space */
	__type(key, __u32);
	__array(values, struct hf_ring);
} hf_rings SEC(".maps");

struct hf_scratch {
	struct hf_sample head;
	__u8 rest[8 * (HF_MAX_KERNEL_FRAMES + HF_MAX_USER_FRAMES) + sizeof(struct hf_area) * HF_MAX_AREAS +
		  sizeof(struct hf_frame) + HF_STACK_COPY];
};
_Static_assert(sizeof(struct hf_scratch) + 8 <= 32768, "limit of a per-CPU map value");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_scratch);
} hf_scratch SEC(".maps");

/* Wakes the reader when the ring is half full, else leaves the sample to the timer. */
const volatile __u64 hf_ring_half = 64 * 1024;

/* Where the kernel's walker stops: HF_MAX_KERNEL_FRAMES, or what kernel.perf_event_max_stack
 * allows if that is less. */
const volatile __u32 hf_max_frames = HF_MAX_KERNEL_FRAMES;

/* For tests: every user stack comes with the registers of its leaf and a copy. */
const volatile bool hf_copy_stacks = false;

static __always_inline __u8 hf_outcome_of(long bytes)
{
	if (bytes <= 0)
		return HF_OUTCOME_FAILED;
	if (bytes >= hf_max_frames * 8)
		return HF_OUTCOME_TRUNCATED;
	return HF_OUTCOME_COMPLETE;
}

/* Appends size bytes, at most max, at used, where there is room for max at all times.
 * Returns what is used then. */
static __always_inline __u32 hf_append(struct hf_scratch *s, __u32 used, const void *from, __u32 size, __u32 max)
{
	if (used > sizeof(s->rest) - max || size > max)
		return used;
	if (bpf_probe_read_kernel(s->rest + used, size, from))
		return used;
	return used + size;
}

/* Appends the frame at hand and the stack from its sp, less the red zone, to the end of its
 * mapping, or so much of that as there is room for and as was ever touched: a stack that Go
 * has made lies between other memory. */
static __always_inline __u32 hf_append_stack(struct hf_scratch *s, struct hf_walk *w, __u32 used)
{
	struct vm_area_struct *vma = (struct vm_area_struct *)hf_find_vma((__u64)w->mm, w->at.sp);
	__u64 size = HF_STACK_COPY, start = w->at.sp - HF_RED_ZONE, end;
	__u32 at;

	if (!vma || (__u64)vma & 3)
		return used;
	end = BPF_CORE_READ(vma, vm_end);
	if (end - start < size)
		size = (end - start) & ~7ULL;
	at = hf_append(s, used, &w->at, sizeof(w->at), sizeof(w->at));
	if (at == used || at > sizeof(s->rest) - HF_STACK_COPY)
		return used;
	for (int i = 0; i < 4; i++) {
		if (size > HF_STACK_COPY)
			return used;
		if (!bpf_probe_read_user(s->rest + at, size, (void *)start)) {
			s->head.stack_bytes = size;
			return at + size;
		}
		size = i < 2 ? HF_STACK_COPY >> (i + 1) : 4096 - (start & 4095);
	}
	return used;
}

/* Walks the user stack of the current task; appends it, the areas that it lies in and, for
 * user space to go on where a table was missing, the stack itself. */
static __always_inline __u32 hf_append_user(struct hf_scratch *s, struct task_struct *task, void *ring, __u32 used,
					    __u32 most)
{
	struct hf_walk *w = hf_walk_state();

	s->head.user_outcome = HF_OUTCOME_BAD_STACK;
	if (!w || !hf_walk_begin(w, task))
		return used;
	bpf_loop(most ? most : HF_MAX_USER_FRAMES + 1, hf_step, NULL, 0);
	s->head.user_outcome = w->outcome ? w->outcome : HF_OUTCOME_TRUNCATED;
	s->head.user_frames = w->frames;
	s->head.areas = w->areas;
	used = hf_append(s, used, w->ips, 8 * w->frames, sizeof(w->ips));
	used = hf_append(s, used, w->area, sizeof(w->area[0]) * w->areas, sizeof(w->area));
	if (hf_copy_stacks && !hf_walk_begin(w, task))
		return used;
	/* A stack that can not be finished is better than no sample. */
	if ((hf_copy_stacks || (!most && w->outcome == HF_OUTCOME_NO_TABLE)) &&
	    bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA) < hf_ring_half + hf_ring_half / 2)
		used = hf_append_stack(s, w, used);
	return used;
}

/* What a hook knows of the moment of its sample. */
struct hf_moment {
	enum hf_profile profile;
	__u64 value;
	__u32 weight;
	bool user_mode; /* the CPU was in user mode: there is no kernel stack */
	__u64 ip;       /* the interrupted instruction, what is left when a walk fails; 0: not known */
	__u32 skip;     /* kernel frames that are how the hook is called */
	__u64 mean_ns;  /* of the draw that decided for the sample; 0: none did */
	__u32 user_frames; /* at most; 0: HF_MAX_USER_FRAMES */
};

/* Fills the header but for what the moment has. */
static __always_inline void hf_head(struct hf_sample *head, struct task_struct *task, __u32 cpu)
{
	head->time_ns = bpf_ktime_get_boot_ns();
	head->cgroup_id = hf_cgroup_id(task);
	head->start_ns = BPF_CORE_READ(task, group_leader, start_boottime);
	head->exec_id = task->self_exec_id;
	head->pid = task->tgid;
	head->tid = task->pid;
	head->cpu = cpu;
	head->user_mode = head->cause = head->state = 0;
	head->by_pid = 0;
	head->lasted_ns = 0;
	BPF_CORE_READ_STR_INTO(&head->thread, task, comm);
	BPF_CORE_READ_STR_INTO(&head->comm, task, group_leader, comm);
}

/* Takes the stacks of the current task into s. Returns the bytes of them. */
static __always_inline __u32 hf_take(void *ctx, struct hf_scratch *s, struct task_struct *task, void *ring,
				     const struct hf_moment *at)
{
	__u32 used = 0;
	long kernel;

	s->head.kernel_outcome = HF_OUTCOME_NONE;
	s->head.kernel_frames = s->head.user_frames = s->head.areas = s->head.stack_bytes = 0;
	if (!at->user_mode) {
		kernel = bpf_get_stack(ctx, s->rest, HF_MAX_KERNEL_FRAMES * 8, at->skip);
		s->head.kernel_outcome = hf_outcome_of(kernel);
		if (kernel <= 0) {
			*(__u64 *)s->rest = at->ip;
			kernel = at->ip ? 8 : 0;
		}
		used = kernel & 1023;
		if (used > HF_MAX_KERNEL_FRAMES * 8)
			used = HF_MAX_KERNEL_FRAMES * 8;
		s->head.kernel_frames = used / 8;
	}

	if (task->flags & PF_KTHREAD)
		s->head.user_outcome = HF_OUTCOME_NONE;
	else if (!task->mm)
		s->head.user_outcome = HF_OUTCOME_EXITING;
	else if (bpf_core_field_exists(task->in_execve) && BPF_CORE_READ_BITFIELD(task, in_execve))
		s->head.user_outcome = HF_OUTCOME_EXEC;
	else
		used = hf_append_user(s, task, ring, used, at->user_frames);
	return used;
}

/* Puts s with the rest of its header, and used bytes of stacks, into a ring. */
static __always_inline void hf_put(struct hf_scratch *s, __u32 used, void *ring, const struct hf_moment *at)
{
	struct hf_counters *counters = hf_counters();
	__u64 size = sizeof(s->head) + used, flags;

	if (!counters)
		return;
	s->head.profile = at->profile;
	s->head.value = at->value;
	s->head.weight = at->weight;
	s->head.mean_ns = at->mean_ns;
	if (size > sizeof(*s))
		size = sizeof(*s);
	flags = bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA) + size > hf_ring_half ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;
	if (bpf_ringbuf_output(ring, s, size, flags))
		counters->dropped[HF_DROP_RING_FULL] += at->weight;
	else
		counters->delivered += at->weight;
}

static __always_inline void *hf_ring_of(__u32 cpu, __u32 weight)
{
	struct hf_counters *counters = hf_counters();
	void *ring = bpf_map_lookup_elem(&hf_rings, &cpu);

	if (!ring && counters)
		counters->dropped[HF_DROP_NO_RING] += weight;
	return ring;
}

/* Samples the current task. */
static __always_inline int hf_emit(void *ctx, const struct hf_moment *at)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	__u32 cpu = bpf_get_smp_processor_id(), zero = 0, used;
	struct hf_scratch *s;
	void *ring;

	s = bpf_map_lookup_elem(&hf_scratch, &zero);
	ring = hf_ring_of(cpu, at->weight);
	if (!s || !ring)
		return 0;
	used = hf_take(ctx, s, task, ring, at);
	hf_head(&s->head, task, cpu);
	s->head.user_mode = at->user_mode;
	hf_put(s, used, ring, at);
	return 0;
}

#endif
