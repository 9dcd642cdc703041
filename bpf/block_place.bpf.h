/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where the state of a request in flight is, found without a hash: queue slot, hardware
 * context and tag index a dense array. */
#ifndef HF_BLOCK_PLACE_BPF_H
#define HF_BLOCK_PLACE_BPF_H

#include "abi.h"
#include "block_device.bpf.h"
#include "kernel.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct backing_dev_info {
	struct device *dev;
};

struct gendisk___bdi {
	struct backing_dev_info *bdi;
};
#pragma clang attribute pop

/* How many requests have a place in hf_block_state. */
const volatile __u64 hf_states = 0;
/* hf_block_disk is attached. */
const volatile bool hf_disk_seen = false;

/* One request in flight. A place belongs to a tag, and the request is stored with it: one
 * whose end was not seen is overwritten by the next. */
struct hf_block_request {
	__u64 rq;    /* the request, 0: none */
	__u64 start; /* ns, 0: not seen, or the kernel's; with HF_COMPARE the kernel's is to be like it */
	__u64 issue; /* of the last issue, ns, 0: not with the device; with data_done the device time */
	union {
		__u32 bytes;  /* the most seen: bios merge in after the start, parts complete before the end */
		__u32 issued; /* in a hardware context's own place: requests that its device has */
	};
	union {
		__u32 word;
		struct {
			__u32 depth : 13;    /* requests that the device had at the last issue, this one included; or more */
			__u32 slot : 7;      /* of the container */
			__u32 charged : 1;   /* which is that of the bio, else of the submitter */
			__u32 failed : 4;    /* enum hf_block_error + 1 of the first part that failed, 0: none did */
			__u32 data_done : 1; /* data step of a flush sequence: the device is through with it */
			__u32 sampled : 1;   /* its stack was taken */
			__u32 weight : 5;    /* log2, of the sample */
		};
	};
};
#define HF_COMPARE 1ULL
#define HF_STAMPS 64
#define HF_STAMP_NS 20000 /* from our stamp to the kernel's: an interrupt can come between */
#define HF_SLOT_SHIFT 13
#define HF_CHARGED (1U << 20)
#define HF_MAX_DEPTH 8191
_Static_assert(HF_SLOTS <= 128 && HF_SLOT_OTHER == 0, "a slot has 7 bits, and word 0 says nothing");
_Static_assert(sizeof(struct hf_block_request) == 32, "half a cache line");

static __always_inline __u64 started(struct hf_block_request *s)
{
	return s->start & ~HF_COMPARE;
}

/* Where the requests of one request_queue have their places: from base on one for each
 * hardware context itself, one for the flush request of each, then hardware context *
 * depth + tag. */
struct hf_block_places {
	__u64 queue;   /* the request_queue, 0: none, or about to change */
	__u64 diskseq; /* tells a new disk at the address of an old one */
	__u64 disks;   /* hf_disks when the diskseq was looked at, 0: look every time */
	__u32 base, places;
	__u32 depth;    /* tags of a context */
	__u32 contexts; /* that have tags of their own: shared tags are unique over all */
	__u32 hardware; /* contexts that there are */
	__u32 device;   /* slot + 1, 0: none */
	__u32 busy;     /* being written */
	__u32 full;     /* no places left for it */
	__u32 stamped;  /* starts in a row that the kernel stamped as we did, up to HF_STAMPS */
	__u32 pad;
};
_Static_assert(sizeof(struct hf_block_places) == 64, "a cache line");

/* Values of a map that can be mapped are aligned to pages, and so to cache lines. User
 * space counts in these two what is in flight. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* hf_states */
	__type(key, __u32);
	__type(value, struct hf_block_request);
} hf_block_state SEC(".maps");

/* By request_queue.id, which the kernel keeps small and dense. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* sized by user space */
	__type(key, __u32);
	__type(value, struct hf_block_places);
} hf_block_queue SEC(".maps");

/* Places handed out. */
__u64 hf_reserved = 0;
/* Grows with each disk that is added: until then every queue has the disk that it had. */
__u64 hf_disks = 1;

/* Gives the queue its places, the old ones if they suffice. */
static __always_inline bool reserve(struct hf_block_places *e, struct request_queue *q)
{
	struct blk_mq_tag_set *set = q->tag_set;
	__u64 depth, contexts, hardware = q->nr_hw_queues, need, base;

	/* With a scheduler a request is named by its scheduler tag, else by the device's. */
	depth = q->elevator ? q->nr_requests : set->queue_depth;
	contexts = set->shared_tags ? 1 : hardware;
	need = 2 * hardware + contexts * depth;
	if (need > e->places || hardware != e->hardware) {
		if (need > hf_states)
			return false;
		base = __sync_fetch_and_add(&hf_reserved, need);
		if (base + need > hf_states) {
			__sync_fetch_and_add(&hf_reserved, -need);
			return false;
		}
		e->base = base;
		e->places = need;
	}
	e->depth = depth;
	e->contexts = contexts;
	e->hardware = hardware;
	return true;
}

#define HF_MAX_FORGOTTEN 128

static long hf_forget_one(__u32 i, __u32 *base)
{
	__u32 at = *base + i;
	struct hf_block_request *s = bpf_map_lookup_elem(&hf_block_state, &at);

	if (s)
		s->issued = 0;
	return 0;
}

/* A disk that is new here has nothing in flight: what is left is of one before, whose ends
 * ran no program. */
static __always_inline void forget_issued(struct hf_block_places *e)
{
	__u32 base = e->base, n = e->hardware;

	bpf_loop(n < HF_MAX_FORGOTTEN ? n : HF_MAX_FORGOTTEN, hf_forget_one, &base, 0);
}

/* A disk's backing_dev_info is registered before its first request, which hf_block_disk sees;
 * but that of a hidden disk (a path of NVMe multipath) never is. */
static __always_inline __u64 looked_at(struct gendisk *disk, __u64 disks)
{
	return hf_disk_seen && ((struct gendisk___bdi *)disk)->bdi->dev ? disks : 0;
}

/* Fills the entry of a queue that was not seen yet, whose disk is another one, or that
 * grew. Of several CPUs one does it; for the others the queue is not there yet. */
static __noinline int learn(struct hf_block_places *e, struct request_queue *q)
{
	struct gendisk *disk = q->disk;
	__u64 disks = hf_disks;

	if (!disk || __sync_val_compare_and_swap(&e->busy, 0, 1))
		return 0;
	__sync_lock_test_and_set(&e->queue, 0);
	e->full = !reserve(e, q);
	e->stamped = 0;
	if (e->diskseq != disk->diskseq)
		forget_issued(e);
	e->diskseq = disk->diskseq;
	e->disks = looked_at(disk, disks);
	e->device = device_slot(disk);
	__sync_lock_test_and_set(&e->queue, (__u64)q);
	__sync_lock_test_and_set(&e->busy, 0);
	return 0;
}

/* Loads of pointers from a request that a hook was given; those of numbers are cheaper
 * without the cast, which makes the kernel check the address of each. */
static __always_inline struct request_queue *queue_of(struct request *rq)
{
	rq = hf_untrusted(rq);
	return rq->q;
}

static __always_inline struct bio *bio_of(struct request *rq)
{
	rq = hf_untrusted(rq);
	return rq->bio;
}

static __always_inline __u32 context_of(struct request *rq)
{
	rq = hf_untrusted(rq);
	return rq->mq_hctx->queue_num;
}

/* The queue's entry, if it is known. That its disk is still the same is looked at where
 * requests start. */
static __always_inline struct hf_block_places *find_queue(struct request_queue *q)
{
	__u32 id = q->id;
	struct hf_block_places *e = bpf_map_lookup_elem(&hf_block_queue, &id);

	return e && e->queue == (__u64)q ? e : NULL;
}

static __always_inline struct hf_block_request *state_at(struct hf_block_places *e, __u32 i)
{
	if (i >= e->places)
		return NULL;
	i += e->base;
	return bpf_map_lookup_elem(&hf_block_state, &i);
}

static __always_inline struct hf_block_request *find_state(struct hf_block_places *e, struct request *rq)
{
	__u32 i = 2 * e->hardware;
	int tag = rq->internal_tag;

	if (tag < 0)
		tag = rq->tag;
	if ((__u32)tag >= e->depth)
		return NULL;
	if (e->contexts > 1)
		i += context_of(rq) * e->depth;
	return state_at(e, i + tag);
}

static __always_inline struct hf_block_request *find_flush_state(struct hf_block_places *e, struct request *rq)
{
	return state_at(e, e->hardware + context_of(rq));
}

/* The place of the hardware context that rq goes through. */
static __always_inline struct hf_block_request *find_context(struct hf_block_places *e, struct request *rq)
{
	return state_at(e, e->hardware > 1 ? context_of(rq) : 0);
}

/* find_queue for all that is not known yet or not any more. */
static __always_inline struct hf_block_places *learn_queue(struct request_queue *q)
{
	__u32 id = q->id;
	struct hf_block_places *e = bpf_map_lookup_elem(&hf_block_queue, &id);
	__u64 disks = hf_disks;

	if (!e)
		return NULL;
	if (e->queue != (__u64)q || e->diskseq != q->disk->diskseq)
		learn(e, q);
	else if (e->disks != disks)
		e->disks = looked_at(q->disk, disks);
	return e->queue == (__u64)q ? e : NULL;
}

#endif
