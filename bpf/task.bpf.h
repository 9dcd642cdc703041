/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the scheduler hooks know of each task.
 *
 * A task has a seat in an array, by its address: that is found without a call, and in one cache line
 * of its own. To find its task storage is a call that touches three, and a switch is about two
 * tasks: seats make the hook a fifth cheaper. A task whose seat is taken keeps what is known of it
 * in task storage. For the hook it is copied to the end of the array meanwhile, because to the
 * verifier a pointer into another map is another path through all that follows.
 *
 * A seat is free again when its task is seen to be switched out for the last time. */
#ifndef HF_TASK_BPF_H
#define HF_TASK_BPF_H

#include "abi.h"
#include "kernel.bpf.h"
#include <bpf/bpf_helpers.h>

/* The array's size is 2 to the power of it, and two for each CPU. */
const volatile __u32 hf_seat_bits = 1;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE); /* which begins on a page, so no value is in a line more */
	__uint(max_entries, 1);            /* sized by user space */
	__type(key, __u32);
	__type(value, struct hf_task);
} hf_seats SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct hf_task);
} hf_tasks SEC(".maps");

/* All that the verifier lets one compute from a pointer is how far it is from another: from here, in
 * both objects. */
__u64 hf_origin SEC(".data.origin") = 0;

/* In hf_task.task while the rest is written. */
#define HF_SEAT_TAKEN 1

/* Its seat, whoever has it. */
static __always_inline struct hf_task *hf_seat_of(struct task_struct *task)
{
	__u64 distance = (__u64)task;
	__u32 seat;

	asm volatile("%0 -= %1" : "+r"(distance) : "r"(&hf_origin));
	/* There is a stride in addresses of tasks, so they are hashed (Knuth's multiplicative hash). */
	seat = (__u32)(distance >> 6) * 2654435769U >> (32 - hf_seat_bits);
	return bpf_map_lookup_elem(&hf_seats, &seat);
}

static __always_inline struct hf_task *hf_seated(struct task_struct *task)
{
	struct hf_task *t = hf_seat_of(task);

	return t && t->task == (__u64)task ? t : NULL;
}

/* What is known of a task, NULL if nothing is. */
static __always_inline struct hf_task *known(struct task_struct *task)
{
	struct hf_task *t = hf_seated(task);

	return t ? t : bpf_task_storage_get(&hf_tasks, task, NULL, 0);
}

#endif
