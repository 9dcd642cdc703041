/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Stacks of those who submit block I/O: a sample at the start of a request, in the
 * submitter's context, and a record at its end that says how long it took. */
#ifndef HF_BLOCK_SAMPLE_BPF_H
#define HF_BLOCK_SAMPLE_BPF_H

#include "block_place.bpf.h"
#include "block_container.bpf.h"
#include "sample.bpf.h"

HF_EXPORT_ENUMS;
struct hf_block_end *hf_export_end __attribute__((unused));

/* How many samples a second each CPU takes of the requests of one device and operation,
 * before it leaves some out; 0: none at all. */
const volatile __u32 hf_stack_rate = 0;

#define HF_MAX_WEIGHT_LOG2 31

/* User space adds one each second: to read the clock would cost more than the draw. */
__u32 hf_stack_second = 0;

/* Of one device and operation on one CPU. Of each 2^period requests that follow each other
 * one is taken, at a place that was drawn before, and has that weight: how many there are
 * comes out exact, and what they have in common with their neighbours as well. When the period
 * changes, and where a run is left, depends on earlier requests and the time only, not on the
 * place, so the weights are unbiased. A device that is slow shares its budget with no fast one. */
struct hf_block_rate {
	__u64 random; /* state of the draws, Knuth's MMIX; a helper would cost more */
	__u32 second; /* hf_stack_second */
	__u32 seen;   /* requests in it */
	__u32 period; /* log2 */
	__u32 left;   /* of the run */
	__u32 take;   /* the one with so many left behind it */
};

/* By device slot * HF_OPERATIONS + operation. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HF_OPERATIONS); /* sized by user space */
	__type(key, __u32);
	__type(value, struct hf_block_rate);
} hf_block_rates SEC(".maps");

/* Stacks are taken at block_getrq, where the kernel has no block_io_start: there only the bio
 * is known, and which request it is the first of shows when that is issued, goes into another
 * or ends. */
const volatile bool hf_bio_start = false;

/* A bio whose stack was taken. */
struct hf_drawn {
	__u64 start;
	__u32 weight; /* log2 */
	__u32 pad;
};

/* By bio; of those whose request did not show yet. What never does makes room by its age. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192); /* 1 where it is not used, by user space */
	__type(key, __u64);
	__type(value, struct hf_drawn);
} hf_block_drawn SEC(".maps");

/* How many there are in it, or more: mostly none, and then nobody need look. */
__u32 hf_drawn = 0;

/* Names the use of a request for as long as it takes. */
static __always_inline __u64 sample_key(struct hf_block_request *s)
{
	/* Read again: the pointer that is known to equal it may not be shifted. */
	__u64 rq = hf_bio_start ? 0 : *(volatile __u64 *)&s->rq;

	return s->start << 25 | (rq >> 7 & 0xfffff) << 5 | s->weight;
}

static __always_inline void forget_drawn(__u64 bio)
{
	if (!bpf_map_delete_elem(&hf_block_drawn, &bio))
		__sync_fetch_and_add(&hf_drawn, -1);
}

/* Notes in s the sample of the request's bio, if there is one. Bios that were merged in
 * before it stand in front of it. */
static __always_inline void adopt(struct hf_block_request *s, struct request *rq)
{
	struct bio *at = bio_of(rq);
	struct hf_drawn *d;

	if (!hf_bio_start || !hf_drawn)
		return;
	for (int i = 0; i < 8 && at; i++) {
		__u64 bio = (__u64)at;

		d = bpf_map_lookup_elem(&hf_block_drawn, &bio);
		if (d) {
			s->start = d->start;
			s->sampled = 1;
			s->weight = d->weight;
			forget_drawn(bio);
			return;
		}
		at = at->bi_next;
	}
}

/* Draws whether the request's stack is taken, and if so notes it in s. */
static __always_inline bool draw(struct hf_block_places *e, struct hf_block_request *s, enum hf_operation op)
{
	__u32 second = hf_stack_second;
	__u32 i = (e->device - 1) * HF_OPERATIONS + op;
	struct hf_block_rate *r = bpf_map_lookup_elem(&hf_block_rates, &i);

	if (!r)
		return false;
	if (unlikely(r->second != second)) {
		/* As many as the last interval had would have been right; never more than twice as
		 * many as at its end, for what comes in bursts. */
		if (r->period && (__u64)r->seen < (__u64)hf_stack_rate << (r->period - 1))
			r->period--;
		r->second = second;
		r->random += bpf_get_prandom_u32(); /* so that no two CPUs draw alike */
		r->seen = 0;
		r->left = 0;
	} else if (unlikely(r->seen >= (__u64)hf_stack_rate << r->period && r->period < HF_MAX_WEIGHT_LOG2)) {
		r->period++;
		r->left = 0;
	}
	if (!r->left) {
		r->random = r->random * 6364136223846793005ULL + 1442695040888963407ULL;
		r->left = 1U << r->period;
		r->take = r->random >> 33 & (r->left - 1);
	}
	r->seen++;
	if (--r->left != r->take)
		return false;
	s->sampled = 1;
	s->weight = r->period;
	return true;
}

/* Draws whether the stack of the bio's submitter is taken; its key then, else 0. */
static __always_inline __u64 draw_bio(struct hf_block_places *e, struct bio *bio)
{
	struct hf_block_request s = {};
	struct hf_drawn d = {};
	__u64 key = (__u64)bio;

	/* What was not met again is of an earlier use of the bio. */
	if (unlikely(hf_drawn))
		forget_drawn(key);
	if (!draw(e, &s, operation(bio->bi_opf & REQ_OP_MASK)))
		return 0;
	d.start = s.start = bpf_ktime_get_ns();
	d.weight = s.weight;
	if (bpf_map_update_elem(&hf_block_drawn, &key, &d, BPF_NOEXIST)) {
		struct hf_counters *c = hf_counters();

		if (c)
			c->dropped[HF_DROP_RING_FULL] += 1U << s.weight;
		return 0;
	}
	__sync_fetch_and_add(&hf_drawn, 1);
	return sample_key(&s);
}

/* Takes the stack of the current task for a request that was drawn. */
static __noinline int take(void *ctx, __u64 key)
{
	struct hf_moment at = {
		.profile = HF_PROFILE_BLOCKIO,
		.value = key,
		.weight = 1U << (key & 31),
	};

	return hf_emit(ctx, &at);
}


/* Tells user space of the end of a request whose stack was taken. */
static __always_inline void send_end(struct hf_block_end *end)
{
	__u32 cpu = bpf_get_smp_processor_id();
	void *ring = bpf_map_lookup_elem(&hf_rings, &cpu);

	/* Where there is no room the sample has no end, and is counted so. */
	if (ring)
		bpf_ringbuf_output(ring, end, sizeof(*end), BPF_RB_NO_WAKEUP);
}

#endif
