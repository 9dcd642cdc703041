/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Slots: small numbers for the containers, so that what is counted by container lies in
 * arrays. A cgroup gets a free slot with its first event, by this side, so that none of
 * its events is anywhere else; user space names it, and makes slots free again
 * (container.go). Each object has its own slots. */
#ifndef HF_CONTAINER_BPF_H
#define HF_CONTAINER_BPF_H

#include "abi.h"
#include "kernel.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

enum hf_slot *hf_export_slot __attribute__((unused));

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096); /* cgroups that are known; what is beyond is HF_SLOT_OTHER */
	__type(key, __u64);        /* kernfs id */
	__type(value, struct hf_container);
} hf_containers SEC(".maps");

/* A queue of free slots. User space appends and counts in given, this side counts what it
 * took of it in hf_slots_taken. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_free_slots);
} hf_slots_free SEC(".maps");

__u32 hf_slots_taken = 0;

/* Grows when cgroups have other slots than before: what was remembered by then is void. */
__u32 hf_slot_epoch = 0;

static __noinline __u32 hf_slot_new(__u64 id, __u64 cgroup)
{
	struct hf_container first = { .cgroup = cgroup }, *c;
	struct hf_free_slots *free;
	__u32 zero = 0, at;

	/* Fails where another CPU was faster, and where there is no room. */
	if (bpf_map_update_elem(&hf_containers, &id, &first, BPF_NOEXIST))
		return HF_SLOT_OTHER;
	c = bpf_map_lookup_elem(&hf_containers, &id);
	free = bpf_map_lookup_elem(&hf_slots_free, &zero);
	if (!c || !free)
		return HF_SLOT_OTHER;
	for (int i = 0; i < 8; i++) {
		at = *(volatile __u32 *)&hf_slots_taken;
		if (at == free->given)
			break;
		if (__sync_val_compare_and_swap(&hf_slots_taken, at, at + 1) == at) {
			c->slot = free->slots[at % HF_SLOTS];
			break;
		}
	}
	return c->slot;
}

/* The slot of a cgroup now, below HF_SLOTS; HF_SLOT_OTHER is shared by all that have none.
 * It may be remembered while hf_slot_epoch stays as it was, except for HF_SLOT_OTHER: how
 * often that is asked for decides which cgroup gets a slot when one is free. */
static __always_inline __u32 hf_slot_of(struct cgroup *cgroup)
{
	__u64 id = BPF_CORE_READ(cgroup, kn, id);
	struct hf_container *c = bpf_map_lookup_elem(&hf_containers, &id);

	if (!c) {
		/* The last threads of one that was removed can outlive its entry. */
		if (!(BPF_CORE_READ(cgroup, self.flags) & CSS_ONLINE))
			return HF_SLOT_OTHER;
		return hf_slot_new(id, (__u64)cgroup);
	}
	if (c->slot == HF_SLOT_OTHER)
		c->without++;
	return c->slot;
}

/* On v1 hosts each hierarchy counts its ids for itself, hence the address. */
SEC("tp_btf/cgroup_rmdir")
int BPF_PROG(hf_cgroup_rmdir, struct cgroup *cgroup)
{
	__u64 id = cgroup->kn->id;
	struct hf_container *c = bpf_map_lookup_elem(&hf_containers, &id);

	if (c && c->cgroup == (__u64)cgroup)
		c->gone = true;
	return 0;
}

#endif
