/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Whose block I/O it is: the cgroup that a request is charged to, by its first bio. For
 * writeback that is who dirtied the pages. Bios of several cgroups are never merged into one
 * request (blk_cgroup_mergeable). Where the kernel charges the root, it is the submitter. */
#ifndef HF_BLOCK_CONTAINER_BPF_H
#define HF_BLOCK_CONTAINER_BPF_H

#include "block_place.bpf.h"
#include "cgroup.bpf.h"
#include "container.bpf.h"

/* Requests are counted by container. */
const volatile bool hf_by_container = false;
/* The blkio controller is on a v1 hierarchy, which is then the one of block I/O. */
const volatile bool hf_blkio_v1 = false;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct css_set___many {
	struct cgroup_subsys_state *subsys[5]; /* by enum cgroup_subsys_id */
};
#pragma clang attribute pop

/* What is counted by container has fewer operations: reads, writes with write-zeroes, and
 * the rest. */
enum hf_slot_operation {
	HF_SLOT_READ = 0,
	HF_SLOT_WRITE = 1,
	HF_SLOT_REST = 2,
	HF_SLOT_OPERATIONS = 3,
};
enum hf_slot_operation *hf_export_slot_operation __attribute__((unused));

/* By slot * HF_SLOT_OPERATIONS + operation. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HF_SLOT_OPERATIONS); /* sized by user space */
	__type(key, __u32);
	__type(value, struct hf_block_io);
} hf_slot_cells SEC(".maps");

/* The slot of the blkcg or cgroup that a CPU looked for last: often it is the next one's too. */
struct hf_last_slot {
	__u64 whose;
	__u32 slot;
	__u32 epoch;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_last_slot);
} hf_last_slot SEC(".maps");

/* The blkcg of the root cgroup, 0 until it had I/O. It is static, and so never another one. */
__u64 hf_blkcg_root = 0;

/* What the request is charged to, NULL where there is no such thing. */
static __always_inline struct blkcg *charge_of(struct request *rq)
{
	struct bio *bio = bio_of(rq);

	if (!bio || !bpf_core_field_exists(bio->bi_blkg) || !bio->bi_blkg)
		return NULL;
	return bio->bi_blkg->blkcg;
}

/* The cgroup of it, NULL for the root. */
static __always_inline struct cgroup *charged_to(struct request *rq)
{
	struct blkcg *blkcg = charge_of(rq);

	return blkcg && blkcg->css.parent ? blkcg->css.cgroup : NULL;
}

static __always_inline __u64 charged_id(struct request *rq)
{
	struct cgroup *cgroup = charged_to(rq);

	return cgroup ? cgroup->kn->id : 0;
}

/* Of blkio, where that is on v1. */
static __always_inline struct cgroup_subsys_state *blkio_v1(struct task_struct *task)
{
	struct css_set___many *set = (struct css_set___many *)task->cgroups;

	/* One of them is left when the program is loaded: a fixed offset needs no helper. */
	switch (bpf_core_enum_value(enum cgroup_subsys_id, io_cgrp_id)) {
	case 0: return set->subsys[0];
	case 1: return set->subsys[1];
	case 2: return set->subsys[2];
	case 3: return set->subsys[3];
	}
	return set->subsys[4];
}

/* attribute, for what is not the last one's, which it becomes. */
static __noinline __u32 attribute_anew(struct hf_last_slot *last, struct request *rq, struct task_struct *submitter)
{
	struct blkcg *blkcg = charge_of(rq);
	bool charged = blkcg && blkcg->css.parent;
	struct cgroup *cgroup;
	__u64 whose = (__u64)blkcg;

	if (blkcg && !charged)
		hf_blkcg_root = (__u64)blkcg;
	if (charged || !submitter) {
		if (!blkcg)
			return 0;
		cgroup = blkcg->css.cgroup;
	} else if (hf_blkio_v1) {
		struct cgroup_subsys_state *css = blkio_v1(submitter);

		cgroup = css->cgroup;
		whose = (__u64)css;
	} else {
		cgroup = submitter->cgroups->dfl_cgrp;
		whose = (__u64)cgroup;
	}
	last->epoch = hf_slot_epoch;
	last->slot = hf_slot_of(cgroup);
	last->whose = whose;
	return last->slot << HF_SLOT_SHIFT | (charged ? HF_CHARGED : 0);
}

/* Whose the request is: the slot and charged of hf_block_request.word. Where its start is
 * not seen that is not known (NULL): then what is charged to the root is the root's. */
static __always_inline __u32 attribute(struct request *rq, struct task_struct *submitter)
{
	__u64 whose = (__u64)charge_of(rq), root = hf_blkcg_root;
	struct hf_last_slot *last;
	__u32 charged = HF_CHARGED, zero = 0;

	last = bpf_map_lookup_elem(&hf_last_slot, &zero);
	if (!last)
		return 0;
	if (!whose || whose == root) {
		charged = 0;
		if (submitter)
			whose = hf_blkio_v1 ? (__u64)blkio_v1(submitter) : (__u64)submitter->cgroups->dfl_cgrp;
	}
	if (unlikely(!root || last->whose != whose || last->epoch != hf_slot_epoch || last->slot == HF_SLOT_OTHER))
		return attribute_anew(last, rq, submitter);
	return last->slot << HF_SLOT_SHIFT | charged;
}

static __always_inline struct hf_block_io *cells_of_slot(__u32 slot, __u32 op)
{
	__u32 i = slot * HF_SLOT_OPERATIONS;

	if (op == HF_OPERATION_WRITE || op == HF_OPERATION_WRITE_ZEROES)
		i += HF_SLOT_WRITE;
	else if (op != HF_OPERATION_READ)
		i += HF_SLOT_REST;
	return bpf_map_lookup_elem(&hf_slot_cells, &i);
}

#endif
