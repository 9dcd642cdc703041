/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the kernel's books of block I/O have of a request's time beyond the hooks: they are
 * from rq->start_time_ns, which is one stamp for all requests of a plug, to block_io_done, when
 * the bios have been ended. Programs before and after the hooks' own enclose their stamps. */

#include "kernel.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define REQ_OP_MASK 255
#define OP(name) bpf_core_enum_value(enum req_op, REQ_OP_##name)

const volatile __u32 flush_seq = 0;
const volatile __u32 io_stat = 0;

/* Of reads, writes and discards, as /proc/diskstats has them. */
enum books_group {
	BOOKS_READ = 0,
	BOOKS_WRITE = 1,
	BOOKS_DISCARD = 2,
	BOOKS_GROUPS = 3,
};

struct books_outside {
	__u64 before_ns; /* from start_time_ns to block_io_start, where that is later */
	__u64 after_ns;  /* from block_rq_complete to block_io_done */
	__u64 least_ns;  /* of both together */
	__u64 most_ns;
};
enum books_group *export_group __attribute__((unused));
struct books_outside *export_outside __attribute__((unused));

/* By disk number << 32 | group. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, __u64);
	__type(value, struct books_outside);
} outside SEC(".maps");

struct stamps {
	__u64 start[2], complete[2]; /* before and after the hooks */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct stamps);
} requests SEC(".maps");

SEC("tp_btf/block_io_start")
int BPF_PROG(books_start, struct request *rq)
{
	struct stamps s = {.start = {bpf_ktime_get_ns()}};
	__u64 key = (__u64)rq;

	bpf_map_update_elem(&requests, &key, &s, BPF_ANY);
	return 0;
}

SEC("tp_btf/block_io_start")
int BPF_PROG(books_started, struct request *rq)
{
	__u64 key = (__u64)rq;
	struct stamps *s = bpf_map_lookup_elem(&requests, &key);

	if (s)
		s->start[1] = bpf_ktime_get_ns();
	return 0;
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(books_complete, struct request *rq)
{
	__u64 key = (__u64)rq, now = bpf_ktime_get_ns();
	struct stamps *s = bpf_map_lookup_elem(&requests, &key);

	if (s)
		s->complete[0] = now;
	return 0;
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(books_completed, struct request *rq)
{
	__u64 key = (__u64)rq;
	struct stamps *s = bpf_map_lookup_elem(&requests, &key);

	if (s)
		s->complete[1] = bpf_ktime_get_ns();
	return 0;
}

SEC("tp_btf/block_io_done")
int BPF_PROG(books_done, struct request *rq)
{
	__u64 key = (__u64)rq, now = bpf_ktime_get_ns(), begin = rq->start_time_ns, at;
	struct stamps *s = bpf_map_lookup_elem(&requests, &key);
	__u32 op = rq->cmd_flags & REQ_OP_MASK;
	struct books_outside *o, zero = {};
	struct gendisk *disk = rq->q->disk;
	__u64 before[2];

	if (!s || !disk || (rq->rq_flags & (flush_seq | io_stat)) != io_stat)
		return 0;
	at = (__u64)disk->major << 52 | (__u64)disk->first_minor << 32;
	at |= op == OP(READ) ? BOOKS_READ : op == OP(DISCARD) ? BOOKS_DISCARD : BOOKS_WRITE;
	bpf_map_update_elem(&outside, &at, &zero, BPF_NOEXIST);
	o = bpf_map_lookup_elem(&outside, &at);
	if (o && s->complete[1]) {
		before[0] = s->start[0] > begin ? s->start[0] - begin : 0;
		before[1] = s->start[1] > begin ? s->start[1] - begin : 0;
		__sync_fetch_and_add(&o->before_ns, before[0]);
		__sync_fetch_and_add(&o->after_ns, now - s->complete[0]);
		__sync_fetch_and_add(&o->least_ns, before[0] + now - s->complete[1]);
		__sync_fetch_and_add(&o->most_ns, before[1] + now - s->complete[0]);
	}
	bpf_map_delete_elem(&requests, &key);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
