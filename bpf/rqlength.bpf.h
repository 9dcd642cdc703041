/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* How long a CPU's run queue is, looked at by the tick of the CPU profile. */
#ifndef HF_RQLENGTH_BPF_H
#define HF_RQLENGTH_BPF_H

#include "abi.h"
#include "kernel.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_rqlength);
} hf_rqlengths SEC(".maps");

/* Counts the run queue that current runs from: current, and who waits, without sleepers
 * whose dequeue is delayed. The tick stands for so many periods. */
static __always_inline void hf_rqlength_count(__u32 periods)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct hf_rqlength *l;
	struct rq *rq;
	__u64 length, cell = 0;
	__u32 zero = 0;

	if (!bpf_core_field_exists(task->se.cfs_rq) || !bpf_core_field_exists(((struct cfs_rq *)0)->rq))
		return;
	rq = BPF_CORE_READ(task, se.cfs_rq, rq);
	l = bpf_map_lookup_elem(&hf_rqlengths, &zero);
	if (!l)
		return;
	length = BPF_CORE_READ(rq, nr_running);
	if (bpf_core_field_exists(rq->cfs.h_nr_runnable))
		length -= BPF_CORE_READ(rq, cfs.h_nr_queued) - BPF_CORE_READ(rq, cfs.h_nr_runnable);
	else if (bpf_core_field_exists(rq->cfs.h_nr_delayed))
		length -= BPF_CORE_READ(rq, cfs.h_nr_delayed);
	/* One for each bound that is less, without a branch for the verifier to follow. */
	for (int i = 0; i < HF_LENGTH_CELLS - 1; i++)
		cell += ((1ULL << i) - length) >> 63;
	if (cell < HF_LENGTH_CELLS) {
		l->cells[cell] += periods;
		l->sum += length * periods;
	}
}

#endif
