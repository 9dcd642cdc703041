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

#define HF_INTERVAL_NS 1000000000ULL
#define HF_MAX_WEIGHT_LOG2 31

/* Of one device and operation on one CPU. One in 2^period requests is taken, by a draw, and
 * has that weight: what the period is depends on earlier requests only, so the weights are
 * unbiased whatever it is. A device that is slow shares its budget with no fast one. */
struct hf_block_rate {
	__u64 since;  /* start of the interval */
	__u64 random; /* state of the draws, Knuth's MMIX; a helper would cost more */
	__u32 seen;   /* requests in it */
	__u32 period; /* log2 */
};

/* By device slot * HF_OPERATIONS + operation. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HF_OPERATIONS); /* sized by user space */
	__type(key, __u32);
	__type(value, struct hf_block_rate);
} hf_block_rates SEC(".maps");

/* Names the use of a request for as long as it takes. */
static __always_inline __u64 sample_key(struct hf_block_request *s)
{
	/* Read again: the pointer that is known to equal it may not be shifted. */
	__u64 rq = *(volatile __u64 *)&s->rq;

	return s->start << 25 | (rq >> 7 & 0xfffff) << 5 | s->weight;
}

/* Draws whether the request's stack is taken, and if so notes it in s. */
static __always_inline void draw(struct hf_block_places *e, struct hf_block_request *s, enum hf_operation op)
{
	__u32 i = (e->device - 1) * HF_OPERATIONS + op;
	struct hf_block_rate *r = bpf_map_lookup_elem(&hf_block_rates, &i);

	if (!r)
		return;
	if (s->start - r->since > HF_INTERVAL_NS) {
		/* As many as the last interval had would have been right; never more than twice as
		 * many as at its end, for what comes in bursts. */
		if (r->period && (__u64)r->seen < (__u64)hf_stack_rate << (r->period - 1))
			r->period--;
		r->since = s->start;
		r->random += s->start; /* so that no two CPUs draw alike */
		r->seen = 0;
	} else if (r->seen >= (__u64)hf_stack_rate << r->period && r->period < HF_MAX_WEIGHT_LOG2) {
		r->period++;
	}
	r->seen++;
	r->random = r->random * 6364136223846793005ULL + 1442695040888963407ULL;
	if (!(r->random >> 33 & ((1ULL << r->period) - 1))) {
		s->sampled = 1;
		s->weight = r->period;
	}
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
