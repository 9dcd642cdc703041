/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Takes the stacks of the current task and puts a sample into this CPU's ring. */
#ifndef HF_SAMPLE_BPF_H
#define HF_SAMPLE_BPF_H

#include "abi.h"
#include "kernel.bpf.h"
#include "counters.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

/* True where the cpu controller is on a v1 hierarchy: then that is where the container
 * of scheduling is, and the unified hierarchy knows nothing of it. */
const volatile bool hf_cgroup_v1 = false;

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
	__u64 frames[2 * HF_MAX_FRAMES + 2];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_scratch);
} hf_scratch SEC(".maps");

/* Wakes the reader when the ring is half full, else leaves the sample to the timer. */
const volatile __u64 hf_ring_half = 64 * 1024;

static __always_inline __u64 hf_cgroup_id(struct task_struct *task)
{
	if (hf_cgroup_v1) {
		/* Not sched_task_group: under autogroup that is a group without a cgroup. */
		struct cgroup_subsys_state **subsys = &task->cgroups->subsys[0], *css = NULL;

		bpf_probe_read_kernel(&css, sizeof(css), subsys + bpf_core_enum_value(enum cgroup_subsys_id, cpu_cgrp_id));
		return BPF_CORE_READ(css, cgroup, kn, id);
	}
	return BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
}

/* Where the walkers stop: HF_MAX_FRAMES, or what kernel.perf_event_max_stack allows if
 * that is less. */
const volatile __u32 hf_max_frames = HF_MAX_FRAMES;

static __always_inline __u8 hf_outcome_of(long bytes)
{
	if (bytes <= 0)
		return HF_OUTCOME_FAILED;
	if (bytes >= hf_max_frames * 8)
		return HF_OUTCOME_TRUNCATED;
	return HF_OUTCOME_COMPLETE;
}

/* Walks the user stack of the current task into frames, and returns the bytes written
 * or a negative errno. This is the seam where another unwinder than frame pointers fits. */
static __always_inline long hf_walk_user(void *ctx, __u64 *frames)
{
	return bpf_get_stack(ctx, frames, HF_MAX_FRAMES * 8, BPF_F_USER_STACK);
}

/* What a hook knows of the moment of its sample. */
struct hf_moment {
	enum hf_profile profile;
	__u64 value;
	__u32 weight;
	bool user_mode; /* the CPU was in user mode: there is no kernel stack */
	__u64 ip;       /* the interrupted instruction, what is left when a walk fails; 0: not known */
};

static __always_inline int hf_emit(void *ctx, const struct hf_moment *at)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct hf_counters *counters = hf_counters();
	__u64 id = bpf_get_current_pid_tgid(), size, flags;
	__u32 cpu = bpf_get_smp_processor_id(), zero = 0;
	long kernel = 0, user = 0;
	struct hf_scratch *s;
	void *ring;

	s = bpf_map_lookup_elem(&hf_scratch, &zero);
	if (!s || !counters)
		return 0;
	ring = bpf_map_lookup_elem(&hf_rings, &cpu);
	if (!ring) {
		counters->dropped[HF_DROP_NO_RING] += at->weight;
		return 0;
	}

	s->head.kernel_outcome = HF_OUTCOME_NONE;
	if (!at->user_mode) {
		kernel = bpf_get_stack(ctx, s->frames, HF_MAX_FRAMES * 8, 0);
		s->head.kernel_outcome = hf_outcome_of(kernel);
		if (kernel <= 0) {
			s->frames[0] = at->ip;
			kernel = at->ip ? 8 : 0;
		}
		kernel &= 1023;
		if (kernel > HF_MAX_FRAMES * 8)
			kernel = HF_MAX_FRAMES * 8;
	}

	if (task->flags & PF_KTHREAD) {
		s->head.user_outcome = HF_OUTCOME_NONE;
	} else if (!task->mm) {
		s->head.user_outcome = HF_OUTCOME_EXITING;
	} else {
		user = hf_walk_user(ctx, (void *)s->frames + kernel);
		s->head.user_outcome = hf_outcome_of(user);
		if (user <= 0) {
			/* In user mode kernel is 0. */
			s->frames[0] = at->ip;
			user = at->user_mode && at->ip ? 8 : 0;
		}
		user &= 1023;
	}

	s->head.profile = at->profile;
	s->head.time_ns = bpf_ktime_get_boot_ns();
	s->head.cgroup_id = hf_cgroup_id(task);
	s->head.value = at->value;
	s->head.start_ns = BPF_CORE_READ(task, group_leader, start_boottime);
	s->head.exec_id = task->self_exec_id;
	s->head.pid = id >> 32;
	s->head.tid = (__u32)id;
	s->head.cpu = cpu;
	s->head.weight = at->weight;
	s->head.kernel_frames = kernel / 8;
	s->head.user_frames = user / 8;
	s->head.user_mode = at->user_mode;
	bpf_get_current_comm(s->head.thread, sizeof(s->head.thread));
	BPF_CORE_READ_STR_INTO(&s->head.comm, task, group_leader, comm);

	size = sizeof(s->head) + kernel + user;
	if (size > sizeof(*s))
		size = sizeof(*s);
	flags = bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA) + size > hf_ring_half ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;
	if (bpf_ringbuf_output(ring, s, size, flags))
		counters->dropped[HF_DROP_RING_FULL] += at->weight;
	else
		counters->delivered += at->weight;
	return 0;
}

#endif
