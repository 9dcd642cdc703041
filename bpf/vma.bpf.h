/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Finds the mapping of an address in an mm, without a lock: bpf_find_vma takes mmap_lock,
 * costs four times as much and works once an interrupt. The nodes of the maple tree are
 * freed by RCU, and every read is a probe read, so what a concurrent change can do is to
 * hide a mapping or to show an old one; the bounds and the mm of what is found are
 * checked. */
#ifndef HF_VMA_BPF_H
#define HF_VMA_BPF_H

#include "abi.h"
#include "kernel.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#define HF_PAGE_SHIFT 12

/* include/linux/maple_tree.h (54a611b60590, 6.1): a node is 256 bytes, aligned to that; the
 * low bits of a pointer to one say what it is. words[0] is the parent. */
struct hf_maple_node {
	__u64 words[32];
};

enum {
	HF_MAPLE_LEAF_64 = 1,   /* 15 pivots, 16 slots */
	HF_MAPLE_ARANGE_64 = 3, /* 9 pivots, 10 slots; others as a leaf */
	HF_MAPLE_DEPTH = 8,     /* a node of this tree has 5 entries at least */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_maple_node);
} hf_maple SEC(".maps");

/* The mapping that holds address, or 0. */
__noinline __u64 hf_find_vma(__u64 mm_address, __u64 address)
{
	struct mm_struct *mm = (struct mm_struct *)mm_address;
	struct hf_maple_node *n;
	__u32 zero = 0;
	__u64 entry;

	n = bpf_map_lookup_elem(&hf_maple, &zero);
	if (!n || !mm)
		return 0;
	entry = (__u64)BPF_CORE_READ(mm, mm_mt.ma_root);
	if ((entry & 3) != 2) /* no node: no or one mapping */
		return 0;
	for (int depth = 0; depth < HF_MAPLE_DEPTH; depth++) {
		__u64 type = entry >> 3 & 15, arange = (type ^ HF_MAPLE_ARANGE_64) - 1;
		__u64 goes_on = 1, slot = 0;

		if (entry < 4096 || bpf_probe_read_kernel(n, sizeof(*n), (void *)(entry & ~255ULL)))
			return 0;
		bpf_barrier(arange);
		arange >>= 63;
		/* The first pivot that is not below address; those after the last are 0. No
		 * branch depends on the data, so the verifier has one path to follow.
		 * Addresses are halved, to compare by the sign of the difference. */
#pragma unroll
		for (int i = 0; i < 15; i++) {
			__u64 pivot = n->words[1 + i];
			__u64 below = (pivot >> 1) - (address >> 1);
			__u64 used = i ? pivot | -pivot : 1ULL << 63;

			bpf_barrier(below);
			bpf_barrier(used);
			if (i >= 9)
				used &= (arange ^ 1) << 63;
			goes_on &= (below & used) >> 63;
			slot += goes_on;
		}
		entry = n->words[(16 - 6 * arange + slot) & 31];
		if (type == HF_MAPLE_LEAF_64)
			return entry;
	}
	return 0;
}

/* Counts the changes of an mm's mappings: it differs after each release of the lock that
 * they take (CONFIG_PER_VMA_LOCK). 0 where the kernel does not count. */
static __always_inline __u64 hf_mm_changes(struct mm_struct *mm)
{
	struct mm_struct___6_4 *old = (void *)mm;

	if (bpf_core_field_exists(mm->mm_lock_seq))
		return BPF_CORE_READ(mm, mm_lock_seq.sequence) + 1ULL;
	if (bpf_core_field_exists(old->mm_lock_seq))
		return (__u32)BPF_CORE_READ(old, mm_lock_seq) + 1ULL;
	return 0;
}

static __always_inline __u64 hf_mtime(struct inode *inode)
{
	if (bpf_core_field_exists(inode->i_mtime_sec))
		return BPF_CORE_READ(inode, i_mtime_sec) * 1000000000ULL + BPF_CORE_READ(inode, i_mtime_nsec);
	if (bpf_core_field_exists(((struct inode___6_7 *)inode)->__i_mtime)) {
		struct inode___6_7 *old = (struct inode___6_7 *)inode;

		return BPF_CORE_READ(old, __i_mtime.tv_sec) * 1000000000ULL + BPF_CORE_READ(old, __i_mtime.tv_nsec);
	}
	struct inode___6_1 *old = (struct inode___6_1 *)inode;

	return BPF_CORE_READ(old, i_mtime.tv_sec) * 1000000000ULL + BPF_CORE_READ(old, i_mtime.tv_nsec);
}

/* Finds the executable mapping of address and tells what it maps. */
static __always_inline bool hf_vma_area(struct mm_struct *mm, __u64 address, struct hf_area *area)
{
	struct vm_area_struct *vma = (struct vm_area_struct *)hf_find_vma((__u64)mm, address);
	struct inode *inode;
	struct file *file;

	if (!vma || (__u64)vma & 3)
		return false;
	area->start = BPF_CORE_READ(vma, vm_start);
	area->end = BPF_CORE_READ(vma, vm_end);
	if (address < area->start || address >= area->end || BPF_CORE_READ(vma, vm_mm) != mm ||
	    !(BPF_CORE_READ(vma, vm_flags) & VM_EXEC))
		return false;
	area->offset = BPF_CORE_READ(vma, vm_pgoff) << HF_PAGE_SHIFT;
	__builtin_memset(&area->file, 0, sizeof(area->file));
	file = BPF_CORE_READ(vma, vm_file);
	if (file) {
		inode = BPF_CORE_READ(file, f_inode);
		area->file.inode = BPF_CORE_READ(inode, i_ino);
		area->file.device = BPF_CORE_READ(inode, i_sb, s_dev);
		area->file.mtime_ns = hf_mtime(inode);
	} else if (area->start == (__u64)BPF_CORE_READ(mm, context.vdso)) {
		area->file.inode = 1;
		area->offset = 0;
	} else {
		area->offset = 0;
	}
	return true;
}

#endif
