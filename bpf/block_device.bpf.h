/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the layers of block I/O have in common: the slots of the devices, the operations,
 * and the classes of errors. */
#ifndef HF_BLOCK_DEVICE_BPF_H
#define HF_BLOCK_DEVICE_BPF_H

#include "abi.h"
#include "kernel.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#define REQ_OP_MASK 255
#define HF_MAX_DEVICES 64

enum hf_operation *hf_export_operation __attribute__((unused));

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HF_MAX_DEVICES); /* lowered by user space */
	__type(key, __u32);
	__type(value, struct hf_block_device);
} hf_block_dev SEC(".maps");

#define OP(name) bpf_core_enum_value(enum req_op, REQ_OP_##name)

static __always_inline enum hf_operation operation(__u32 op)
{
	if (op == OP(READ))
		return HF_OPERATION_READ;
	if (op == OP(WRITE) || op == OP(ZONE_APPEND))
		return HF_OPERATION_WRITE;
	if (op == OP(WRITE_ZEROES))
		return HF_OPERATION_WRITE_ZEROES;
	if (op == OP(FLUSH))
		return HF_OPERATION_FLUSH;
	if (op == OP(DISCARD))
		return HF_OPERATION_DISCARD;
	return HF_OPERATION_OTHER;
}

/* blk_status_t to what it is counted as. */
static __always_inline enum hf_block_error error_class(__u8 status)
{
	if (status == 10)
		return HF_BLOCK_ERROR_IO;
	return status && status < HF_BLOCK_ERROR_OTHER ? status : HF_BLOCK_ERROR_OTHER;
}

struct hf_claim {
	__u64 key;
	__u32 slot; /* + 1; 0: none */
};

static long hf_try_slot(__u32 slot, struct hf_claim *c)
{
	struct hf_block_device *d = bpf_map_lookup_elem(&hf_block_dev, &slot);
	__u64 seen;

	if (!d)
		return 1;
	seen = d->key;
	if (!seen)
		seen = __sync_val_compare_and_swap(&d->key, 0, c->key);
	if (seen && seen != c->key)
		return 0;
	c->slot = slot + 1;
	return 1;
}

/* The slot + 1 of the device whose name has this hash, one more if there is none yet;
 * 0 when all are taken. */
static __always_inline __u32 hf_claim_slot(__u64 key)
{
	struct hf_claim c = { .key = key };

	bpf_loop(HF_MAX_DEVICES, hf_try_slot, &c, 0);
	return c.slot;
}

/* The device's slot + 1, or 0 when all are taken. A name has one slot for good, so that
 * a device that comes back continues its series. */
static __noinline __u32 device_slot(struct gendisk *disk)
{
	union {
		char name[32];
		__u64 words[4];
	} u = {};
	struct hf_block_device *d;
	__u32 i, device;
	__u64 key = 0;

	bpf_probe_read_kernel_str(u.name, sizeof(u.name), &disk->disk_name);
	for (i = 0; i < 4; i++) {
		key = (key ^ u.words[i]) * 0x9e3779b97f4a7c15ULL;
		key ^= key >> 32;
	}
	if (!key)
		key = 1;
	device = hf_claim_slot(key);
	i = device - 1;
	d = bpf_map_lookup_elem(&hf_block_dev, &i);
	if (!d)
		return 0;
	/* Whoever else writes now writes the same. */
	d->major = disk->major;
	d->minor = disk->first_minor;
	__builtin_memcpy(d->name, u.name, sizeof(d->name));
	__sync_lock_test_and_set(&d->ready, 1);
	return device;
}

#endif
