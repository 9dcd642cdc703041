//go:build ignore

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Block I/O of request-based devices, by whole disk and operation, from stamps of our
 * own: block_io_start, block_rq_issue, and block_rq_complete of the last byte. */
#include "kernel.bpf.h"
#include "counters.bpf.h"
#include "histogram.bpf.h"

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define REQ_OP_MASK 255
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define HF_MAX_DEVICES 64

enum {
	HF_RAN_START = 0,
	HF_RAN_ISSUE = 1,
	HF_RAN_DONE = 2,
	HF_RAN_DISK = 3,
};

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
/* The kernel has no block_io_start: starts are the kernel's own stamps. */
const volatile bool hf_kernel_start = false;
/* hf_block_disk is attached. */
const volatile bool hf_disk_seen = false;
/* Flags of request.rq_flags, whose bits have changed: user space finds them. */
const volatile __u32 hf_flush_seq = 0;
const volatile __u32 hf_io_stat = 0;

enum hf_operation *hf_export_operation __attribute__((unused));

enum {
	HF_FAILED = 1,    /* a part of it failed */
	HF_DATA_DONE = 2, /* data step of a flush sequence: the device is through with it */
};

/* One request in flight. A place belongs to a tag, and the request is stored with it: one
 * that was merged away, or whose end was not seen, is overwritten by the next. */
struct hf_block_state {
	__u64 rq;    /* the request, 0: none */
	__u64 start; /* ns, 0: not seen */
	__u64 issue; /* of the last issue, ns, 0: not seen; with HF_DATA_DONE the device time */
	__u32 bytes; /* the most seen: bios merge in after the start, parts complete before the end */
	__u32 flags;
};
_Static_assert(sizeof(struct hf_block_state) == 32, "half a cache line");

/* Where the requests of one request_queue have their places: base + hardware context *
 * depth + tag, then one for the flush request of each hardware context. */
struct hf_block_queue {
	__u64 queue;   /* the request_queue, 0: none, or about to change */
	__u64 diskseq; /* tells a new disk at the address of an old one */
	__u64 disks;   /* hf_disks when the diskseq was looked at, 0: look every time */
	__u32 base, places, depth, hctxs;
	__u32 device; /* slot + 1, 0: none */
	__u32 busy;   /* being written */
	__u32 full;   /* no places left for it */
	__u32 pad[3];
};
_Static_assert(sizeof(struct hf_block_queue) == 64, "a cache line");

/* Values of a map that can be mapped are aligned to pages, and so to cache lines. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* hf_states */
	__type(key, __u32);
	__type(value, struct hf_block_state);
} hf_block_state SEC(".maps");

/* By request_queue.id, which the kernel keeps small and dense. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* sized by user space */
	__type(key, __u32);
	__type(value, struct hf_block_queue);
} hf_block_queue SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HF_MAX_DEVICES); /* lowered by user space */
	__type(key, __u32);
	__type(value, struct hf_block_device);
} hf_block_dev SEC(".maps");

/* By device slot * HF_OPERATIONS + operation. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HF_OPERATIONS); /* sized by user space */
	__type(key, __u32);
	__type(value, struct hf_block_io);
} hf_block_cells SEC(".maps");

/* Places handed out. */
__u64 hf_places = 0;
/* Grows with each disk that is added: until then every queue has the disk that it had. */
__u64 hf_disks = 1;

#define OP(name) bpf_core_enum_value(enum req_op, REQ_OP_##name)

static __always_inline enum hf_operation operation(__u32 op)
{
	if (op == OP(READ))
		return HF_OPERATION_READ;
	if (op == OP(WRITE) || op == OP(ZONE_APPEND) || op == OP(WRITE_ZEROES))
		return HF_OPERATION_WRITE;
	if (op == OP(FLUSH))
		return HF_OPERATION_FLUSH;
	if (op == OP(DISCARD))
		return HF_OPERATION_DISCARD;
	return HF_OPERATION_OTHER;
}

/* The request that the flush machinery sends to the device: its own request structure on
 * a tag borrowed from one of the requests that wait for it. */
static __always_inline bool is_flush_rq(__u32 rq_flags, __u32 op)
{
	return op == OP(FLUSH) && (rq_flags & hf_flush_seq);
}

/* The slot + 1 of the device whose name has this hash, one more if there is none yet;
 * 0 when all are taken. Not static: the verifier then looks at the loop only once. */
__noinline __u32 hf_claim_slot(__u64 key)
{
	struct hf_block_device *d;
	__u32 i, slot;
	__u64 seen;

	for (i = 0; i < HF_MAX_DEVICES; i++) {
		slot = i;
		d = bpf_map_lookup_elem(&hf_block_dev, &slot);
		if (!d)
			break;
		seen = d->key;
		if (!seen)
			seen = __sync_val_compare_and_swap(&d->key, 0, key);
		if (!seen || seen == key)
			return i + 1;
	}
	return 0;
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

/* Gives the queue its places, the old ones if they suffice. */
static __always_inline bool reserve(struct hf_block_queue *e, struct request_queue *q)
{
	struct blk_mq_tag_set *set = q->tag_set;
	__u64 depth, hctxs, need, base;

	/* With a scheduler a request is named by its scheduler tag, else by the device's.
	 * Shared tags are unique over all hardware contexts. */
	depth = q->elevator ? q->nr_requests : set->queue_depth;
	hctxs = set->shared_tags ? 1 : q->nr_hw_queues;
	need = hctxs * depth + q->nr_hw_queues;
	if (need > e->places) {
		if (need > hf_states)
			return false;
		base = __sync_fetch_and_add(&hf_places, need);
		if (base + need > hf_states) {
			__sync_fetch_and_add(&hf_places, -need);
			return false;
		}
		e->base = base;
		e->places = need;
	}
	e->depth = depth;
	e->hctxs = hctxs;
	return true;
}

/* A disk's backing_dev_info is registered before its first request, which hf_block_disk sees;
 * but that of a hidden disk (a path of NVMe multipath) never is. */
static __always_inline __u64 looked_at(struct gendisk *disk, __u64 disks)
{
	return hf_disk_seen && ((struct gendisk___bdi *)disk)->bdi->dev ? disks : 0;
}

/* Fills the entry of a queue that was not seen yet, whose disk is another one, or that
 * grew. Of several CPUs one does it; for the others the queue is not there yet. */
static __noinline int learn(struct hf_block_queue *e, struct request_queue *q)
{
	struct gendisk *disk = q->disk;
	__u64 disks = hf_disks;

	if (!disk || __sync_val_compare_and_swap(&e->busy, 0, 1))
		return 0;
	__sync_lock_test_and_set(&e->queue, 0);
	e->full = !reserve(e, q);
	e->diskseq = disk->diskseq;
	e->disks = looked_at(disk, disks);
	e->device = device_slot(disk);
	__sync_lock_test_and_set(&e->queue, (__u64)q);
	__sync_lock_test_and_set(&e->busy, 0);
	return 0;
}

/* The queue's entry, if it is known. That its disk is still the same is looked at where
 * requests start. */
static __always_inline struct hf_block_queue *find_queue(struct request_queue *q)
{
	__u32 id = q->id;
	struct hf_block_queue *e = bpf_map_lookup_elem(&hf_block_queue, &id);

	return e && e->queue == (__u64)q ? e : NULL;
}

static __always_inline struct hf_block_state *find_state(struct hf_block_queue *e, struct request *rq)
{
	__u32 i = 0;
	int tag = rq->internal_tag;

	if (tag < 0)
		tag = rq->tag;
	if ((__u32)tag >= e->depth)
		return NULL;
	if (e->hctxs > 1)
		i = rq->mq_hctx->queue_num * e->depth;
	i += tag;
	if (i >= e->places)
		return NULL;
	i += e->base;
	return bpf_map_lookup_elem(&hf_block_state, &i);
}

static __always_inline struct hf_block_state *find_flush_state(struct hf_block_queue *e, struct request *rq)
{
	__u32 i = e->hctxs * e->depth + rq->mq_hctx->queue_num;

	if (i >= e->places)
		return NULL;
	i += e->base;
	return bpf_map_lookup_elem(&hf_block_state, &i);
}

/* find_queue for all that is not known yet or not any more. */
static __always_inline struct hf_block_queue *learn_queue(struct request_queue *q)
{
	__u32 id = q->id;
	struct hf_block_queue *e = bpf_map_lookup_elem(&hf_block_queue, &id);
	__u64 disks = hf_disks;

	if (!e)
		return NULL;
	if (e->queue != (__u64)q || e->diskseq != q->disk->diskseq)
		learn(e, q);
	else if (e->disks != disks)
		e->disks = looked_at(q->disk, disks);
	return e->queue == (__u64)q ? e : NULL;
}

static __always_inline int start(struct hf_block_state *s, struct request *rq)
{
	/* The tag is free again, so the request before has ended; one that was merged away was
	 * never issued. Its end ran no program: some virtual machines hide process 1 from BPF, and
	 * with it the interrupts that come while it is current. */
	if (unlikely(s->rq && s->issue))
		drop(HF_DROP_NO_END);
	s->rq = (__u64)rq;
	s->issue = 0;
	s->bytes = rq->__data_len;
	s->flags = 0;
	s->start = bpf_ktime_get_ns();
	return 0;
}

static __noinline int slow_start(struct request *rq)
{
	struct request_queue *q = rq->q;
	struct hf_block_queue *e = learn_queue(q);
	struct hf_block_state *s;

	if (!e)
		return 0;
	s = find_state(e, rq);
	if (!s && !e->full) {
		/* The scheduler or the depth was changed. */
		learn(e, q);
		s = find_state(e, rq);
	}
	/* What has no place is counted when it completes. */
	return s ? start(s, rq) : 0;
}

static __always_inline int handle_start(struct request *rq)
{
	struct hf_block_queue *e = find_queue(rq->q);
	struct hf_block_state *s = NULL;

	hf_ran(HF_RAN_START);
	if (likely(e && e->disks == hf_disks))
		s = find_state(e, rq);
	if (unlikely(!s))
		return slow_start(rq);
	return start(s, rq);
}

/* True when what is stored is of an earlier use of the same request: its end and the
 * start of this use were both missed, as when a program would have nested in itself. */
static __always_inline bool is_stale(struct hf_block_state *s, struct request *rq)
{
	return (rq->rq_flags & hf_io_stat) && rq->start_time_ns > s->issue;
}

/* The issue of a flush request, of one whose start was not seen, or one more issue. */
static __noinline int slow_issue(struct request *rq)
{
	bool flush = is_flush_rq(rq->rq_flags, rq->cmd_flags & REQ_OP_MASK);
	struct hf_block_queue *e = learn_queue(rq->q);
	struct hf_block_state *s;

	if (!e)
		return 0;
	s = flush ? find_flush_state(e, rq) : find_state(e, rq);
	if (!s)
		return 0;
	if (s->rq != (__u64)rq || flush || is_stale(s, rq)) {
		s->rq = (__u64)rq;
		/* A flush request passes no start tracepoint, but is initialized, and
		 * stamped, for each use. */
		s->start = flush ? rq->start_time_ns : 0;
		s->bytes = rq->__data_len;
		s->flags = 0;
	}
	s->issue = bpf_ktime_get_ns();
	return 0;
}

static __always_inline int handle_issue(struct request *rq)
{
	struct hf_block_queue *e = find_queue(rq->q);
	struct hf_block_state *s = NULL;
	__u32 bytes = rq->__data_len;

	hf_ran(HF_RAN_ISSUE);
	if (likely(e))
		s = find_state(e, rq);
	if (unlikely(!s || s->rq != (__u64)rq || s->issue))
		return slow_issue(rq);
	if (bytes > s->bytes)
		s->bytes = bytes;
	s->issue = bpf_ktime_get_ns();
	return 0;
}

/* What the new disk is shows at its first request. */
static __always_inline int handle_disk(void)
{
	hf_ran(HF_RAN_DISK);
	__sync_fetch_and_add(&hf_disks, 1);
	return 0;
}

/* Size cells are upper-inclusive powers of two from 512 (internal/histogram, Size). */
static __always_inline __u32 size_cell(__u32 bytes)
{
	__u32 cell = bytes <= 512 ? 0 : hf_log2(bytes - 1) - 8;

	return cell > 18 ? 18 : cell;
}

#define TIME_CELL(io, ns) (&(io)->times[hf_time_cell(ns) & 255])

/* Every way that a completion can go. */
static __noinline int slow_done(struct request *rq, bool failed, __u32 bytes)
{
	__u32 rq_flags = rq->rq_flags, op = rq->cmd_flags & REQ_OP_MASK, device, flags = 0, i;
	__u64 now = bpf_ktime_get_ns(), start = 0, issue = 0, total, on_device;
	bool flush = is_flush_rq(rq_flags, op);
	struct request_queue *q = rq->q;
	struct hf_block_state *s = NULL;
	struct hf_block_queue *e;
	struct hf_block_io *io;

	e = learn_queue(q);
	if (e)
		s = flush ? find_flush_state(e, rq) : find_state(e, rq);
	if (bytes < rq->__data_len || (!flush && (rq_flags & hf_flush_seq))) {
		/* A part, or the data step of a flush sequence, which completes once more. */
		if (s && s->rq == (__u64)rq) {
			if (failed)
				s->flags |= HF_FAILED;
			if (bytes >= rq->__data_len && s->issue) {
				s->issue = now - s->issue;
				s->flags |= HF_DATA_DONE;
			}
		}
		return 0;
	}
	if (e) {
		device = e->device;
	} else {
		/* Admin queues have no disk. */
		if (!q->disk)
			return 0;
		device = device_slot(q->disk);
	}
	if (!device || (e && !s)) {
		drop(HF_DROP_NO_SLOT);
		return 0;
	}
	if (s && s->rq == (__u64)rq) {
		start = s->start;
		issue = s->issue;
		flags = s->flags;
		bytes = s->bytes;
		s->rq = 0;
	}
	/* The kernel's stamp is of this use of the request only where it keeps the books.
	 * It is later than ours by next to nothing, unless ours is missing, as in what was
	 * in flight when the programs were attached, or is of an earlier use. */
	if ((rq_flags & hf_io_stat) && rq->start_time_ns > start)
		start = rq->start_time_ns;
	if (!start && hf_kernel_start)
		start = issue;
	if (!start) {
		drop(HF_DROP_NO_START);
		return 0;
	}
	total = now - start;
	if ((__s64)total < 0) {
		drop(HF_DROP_NEGATIVE);
		return 0;
	}
	i = (device - 1) * HF_OPERATIONS + operation(op);
	io = bpf_map_lookup_elem(&hf_block_cells, &i);
	if (!io) {
		drop(HF_DROP_NO_SLOT);
		return 0;
	}
	TIME_CELL(io, total)->total++;
	io->total_ns += total;
	on_device = flags & HF_DATA_DONE ? issue : now - issue;
	if (!issue) {
		/* An empty flush, or a device that is gone: all its time was before the
		 * device. Else the issue was not seen, and only the total is known. */
		if (rq->state == MQ_RQ_IDLE) {
			TIME_CELL(io, total)->queue++;
			io->queue_ns += total;
		}
	} else if (on_device <= total) {
		TIME_CELL(io, on_device)->device++;
		io->device_ns += on_device;
		TIME_CELL(io, total - on_device)->queue++;
		io->queue_ns += total - on_device;
	}
	if (bytes) {
		io->sizes[size_cell(bytes)]++;
		io->bytes += bytes;
	}
	if (failed || (flags & HF_FAILED))
		io->errors++;
	/* blk_account_io_done and, for the flush request, blk_account_io_flush */
	if (!flush && (!(rq_flags & hf_io_stat) || op == OP(DRV_IN) || op == OP(DRV_OUT)))
		io->unbooked++;
	return 0;
}

/* Reads and writes of which all was seen, and went well; slow_done has the rest. Apart,
 * because what counts here is the size of the code. */
static __always_inline int handle_done(struct request *rq, bool failed, __u32 bytes)
{
	__u64 now = bpf_ktime_get_ns(), start, total, on_device;
	struct hf_block_queue *e = find_queue(rq->q);
	__u32 rq_flags = rq->rq_flags, op = rq->cmd_flags & REQ_OP_MASK, i, cell;
	struct hf_block_state *s = NULL;
	struct hf_block_io *io;

	hf_ran(HF_RAN_DONE);
	if (likely(e))
		s = find_state(e, rq);
	if (unlikely(!s || s->rq != (__u64)rq || s->flags || failed || bytes < rq->__data_len ||
		     (rq_flags & (hf_flush_seq | hf_io_stat)) != hf_io_stat))
		return slow_done(rq, failed, bytes);
	/* As in slow_done. */
	start = rq->start_time_ns;
	if (s->start > start)
		start = s->start;
	if (unlikely(s->issue < start))
		return slow_done(rq, failed, bytes);
	i = (e->device - 1) * HF_OPERATIONS;
	if (op == OP(READ))
		i += HF_OPERATION_READ;
	else if (op == OP(WRITE))
		i += HF_OPERATION_WRITE;
	else
		return slow_done(rq, failed, bytes);
	io = bpf_map_lookup_elem(&hf_block_cells, &i);
	if (unlikely(!io))
		return slow_done(rq, failed, bytes);
	total = now - start;
	on_device = now - s->issue;
	bytes = s->bytes;
	s->rq = 0;
	io->total_ns += total;
	io->queue_ns += total - on_device;
	io->device_ns += on_device;
	io->bytes += bytes;
	io->sizes[size_cell(bytes)]++;
	cell = hf_time_cell(total);
	io->times[cell & 255].total++;
	/* Mostly all but nothing of it. */
	if (cell && on_device <= hf_time_cuts[(cell - 1) & 255])
		cell = hf_time_cell(on_device);
	io->times[cell & 255].device++;
	TIME_CELL(io, total - on_device)->queue++;
	return 0;
}

SEC("tp_btf/block_io_start")
int BPF_PROG(hf_block_start, struct request *rq)
{
	return handle_start(rq);
}

SEC("tp_btf/block_rq_issue")
int BPF_PROG(hf_block_issue, struct request *rq)
{
	return handle_issue(rq);
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(hf_block_done, struct request *rq, __u8 error, unsigned int bytes)
{
	return handle_done(rq, error != 0, bytes);
}

SEC("tp_btf/writeback_bdi_register")
int BPF_PROG(hf_block_disk)
{
	return handle_disk();
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
