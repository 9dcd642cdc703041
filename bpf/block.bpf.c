//go:build ignore

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Block I/O of request-based devices, by whole disk and operation, from stamps of our
 * own: block_io_start, block_rq_issue, and block_rq_complete of the last byte. */
#include "kernel.bpf.h"
#include "counters.bpf.h"
#include "histogram.bpf.h"
#include "block_place.bpf.h"
#include "block_sample.bpf.h"

enum {
	HF_RAN_START = 0,
	HF_RAN_ISSUE = 1,
	HF_RAN_DONE = 2,
	HF_RAN_DISK = 3,
	HF_RAN_REQUEUE = 4,
	HF_RAN_ABSORB = 5,
	HF_RAN_BACK = 6,
	HF_RAN_FRONT = 7,
	HF_RAN_SPLIT = 8,
	HF_RAN_BIO = 9,
};

/* The kernel has no block_io_start: starts are the kernel's own stamps. */
const volatile bool hf_kernel_start = false;
/* Flags of request.rq_flags, whose bits have changed: user space finds them. */
const volatile __u32 hf_flush_seq = 0;
const volatile __u32 hf_io_stat = 0;

enum hf_block_error *hf_export_error __attribute__((unused));
enum hf_block_flag *hf_export_flag __attribute__((unused));

/* By device slot * HF_OPERATIONS + operation. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HF_OPERATIONS); /* sized by user space */
	__type(key, __u32);
	__type(value, struct hf_block_io);
} hf_block_cells SEC(".maps");

static __always_inline struct hf_block_io *cells_of(__u32 device, enum hf_operation op)
{
	__u32 i = (device - 1) * HF_OPERATIONS + op;

	return bpf_map_lookup_elem(&hf_block_cells, &i);
}

/* The request that the flush machinery sends to the device: its own request structure on
 * a tag borrowed from one of the requests that wait for it. */
static __always_inline bool is_flush_rq(__u32 rq_flags, __u32 op)
{
	return op == OP(FLUSH) && (rq_flags & hf_flush_seq);
}

/* What the device has of the request is one less. */
static __always_inline void give_back(struct hf_block_places *e, struct request *rq)
{
	struct hf_block_request *c = find_context(e, rq);

	if (c)
		__sync_fetch_and_add(&c->issued, -1);
}

/* Whether the device has the request that s is of, as far as was seen. */
static __always_inline bool at_device(struct hf_block_request *s)
{
	return s->rq && s->issue && !s->data_done;
}

/* The device gets the request. */
static __always_inline void to_device(struct hf_block_places *e, struct hf_block_request *s, struct request *rq, __u64 now)
{
	struct hf_block_request *c = find_context(e, rq);

	if (c) {
		__u32 depth = __sync_fetch_and_add(&c->issued, 1) + 1;

		s->depth = depth < HF_MAX_DEPTH ? depth : HF_MAX_DEPTH;
	}
	s->issue = now;
}

/* The key of the sample that is to be taken, 0: none. now is 0 where the kernel's stamp will do. */
static __always_inline __u64 start(struct hf_block_places *e, struct hf_block_request *s, struct request *rq,
				   struct task_struct *task, __u64 now)
{
	/* The tag is free again, so the request before has ended. Its end ran no program: some
	 * virtual machines hide process 1 from BPF, and with it the interrupts that come while it
	 * is current. */
	if (unlikely(at_device(s))) {
		give_back(e, rq);
		drop(HF_DROP_NO_END);
	}
	s->rq = (__u64)rq;
	s->issue = 0;
	s->bytes = rq->__data_len;
	s->start = now;
	s->word = hf_by_container ? attribute(rq, task) : 0;
	if (!hf_stack_rate || !draw(e, s, operation(rq->cmd_flags & REQ_OP_MASK)))
		return 0;
	if (!now)
		s->start = bpf_ktime_get_ns() | HF_COMPARE;
	return sample_key(s);
}

static __noinline __u64 slow_start(struct request *rq)
{
	struct request_queue *q = queue_of(rq);
	struct hf_block_places *e = learn_queue(q);
	struct hf_block_request *s;

	if (!e)
		return 0;
	s = find_state(e, rq);
	if (!s && !e->full) {
		/* The scheduler or the depth was changed. */
		learn(e, q);
		s = find_state(e, rq);
	}
	/* What has no place is counted when it completes. */
	return s ? start(e, s, rq, (struct task_struct *)bpf_get_current_task_btf(), bpf_ktime_get_ns() & ~HF_COMPARE) : 0;
}

/* Whether the kernel is about to read the same clock for a stamp of its own: with a plug it does
 * so once, and all that come into it have that (blk_time_get_ns). */
static __always_inline bool kernel_stamps(struct request *rq, struct task_struct *task)
{
	__u32 op = rq->cmd_flags & REQ_OP_MASK;
	struct blk_plug *plug = NULL;

	if (!bpf_core_field_exists(plug->cur_ktime) || (op != OP(READ) && op != OP(WRITE)))
		return false;
	plug = task->plug;
	return !plug || !plug->cur_ktime;
}

/* Our stamp of a start, 0 where the kernel's is as good: it was, for all of the last ones of the
 * queue that were compared. */
static __always_inline __u64 stamp(struct hf_block_places *e, struct request *rq, struct task_struct *task)
{
	bool kernels = kernel_stamps(rq, task);

	if (likely(kernels && e->stamped >= HF_STAMPS))
		return 0;
	return (bpf_ktime_get_ns() & ~HF_COMPARE) | (kernels ? HF_COMPARE : 0);
}

/* Compares a stamp of ours with the kernel's, which is right after it or is something else. */
static __always_inline void compare(struct hf_block_places *e, struct hf_block_request *s, struct request *rq)
{
	bool stamped = rq->rq_flags & hf_io_stat;

	__s64 behind;

	if (s->start ? !(s->start & HF_COMPARE) : stamped)
		return;
	behind = rq->start_time_ns - started(s);
	/* Where a stack is taken, that comes between them. */
	if (stamped && behind >= 0 && (behind <= HF_STAMP_NS || s->sampled)) {
		if (e->stamped < HF_STAMPS)
			e->stamped++;
	} else if (e->stamped) {
		e->stamped = 0;
	}
}

static __always_inline __u64 handle_start(struct request *rq)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct hf_block_places *e = find_queue(queue_of(rq));
	struct hf_block_request *s = NULL;

	hf_ran(HF_RAN_START);
	if (likely(e && e->disks == hf_disks))
		s = find_state(e, rq);
	if (unlikely(!s))
		return slow_start(rq);
	return start(e, s, rq, task, stamp(e, rq, task));
}

/* True when what is stored is of an earlier use of the same request: its end and the
 * start of this use were both missed, as when a program would have nested in itself. */
static __always_inline bool is_stale(struct hf_block_request *s, struct request *rq)
{
	return (rq->rq_flags & hf_io_stat) && rq->start_time_ns > s->issue;
}

/* The issue of a flush request, of one whose start was not seen, or one more issue. */
static __noinline int slow_issue(struct request *rq)
{
	bool flush = is_flush_rq(rq->rq_flags, rq->cmd_flags & REQ_OP_MASK);
	struct hf_block_places *e = learn_queue(queue_of(rq));
	struct hf_block_request *s;

	if (!e)
		return 0;
	s = flush ? find_flush_state(e, rq) : find_state(e, rq);
	if (!s)
		return 0;
	if (s->rq != (__u64)rq || flush || is_stale(s, rq)) {
		if (at_device(s))
			give_back(e, rq);
		s->rq = (__u64)rq;
		/* A flush request passes no start tracepoint, but is initialized, and
		 * stamped, for each use. */
		s->start = flush ? rq->start_time_ns : 0;
		s->bytes = rq->__data_len;
		s->word = hf_by_container && !flush ? attribute(rq, NULL) : 0;
		if (!flush)
			adopt(s, rq);
	} else if (at_device(s)) {
		/* It was sent back where no requeue was seen. */
		give_back(e, rq);
	}
	to_device(e, s, rq, bpf_ktime_get_ns());
	return 0;
}

static __always_inline int handle_issue(struct request *rq)
{
	__u64 now = bpf_ktime_get_ns();
	struct hf_block_places *e = find_queue(queue_of(rq));
	struct hf_block_request *s = NULL;
	__u32 bytes = rq->__data_len;

	hf_ran(HF_RAN_ISSUE);
	if (likely(e))
		s = find_state(e, rq);
	if (unlikely(!s || s->rq != (__u64)rq || s->issue))
		return slow_issue(rq);
	if (bytes > s->bytes)
		s->bytes = bytes;
	to_device(e, s, rq, now);
	return 0;
}

/* What the new disk is shows at its first request. */
static __always_inline int handle_disk(void)
{
	hf_ran(HF_RAN_DISK);
	__sync_fetch_and_add(&hf_disks, 1);
	return 0;
}

#define TIME_CELL(io, ns) (&(io)->times[hf_time_cell(ns) & 255])

/* Depth cells are upper-inclusive powers of two from 1 (internal/histogram, Depth). */
static __always_inline __u32 depth_cell(__u32 depth)
{
	__u32 cell = depth <= 1 ? 0 : hf_log2(depth - 1) + 1;

	return cell > 14 ? 14 : cell;
}

#define FLAG(name) (1U << bpf_core_enum_value(enum req_flag_bits, __REQ_##name))

static __always_inline void count_flags(struct hf_block_io *io, __u32 op, __u32 flags)
{
	if (op == OP(READ) || (flags & (FLAG(SYNC) | FLAG(FUA) | FLAG(PREFLUSH))))
		io->flagged[HF_BLOCK_SYNC]++;
	if (flags & FLAG(RAHEAD))
		io->flagged[HF_BLOCK_READAHEAD]++;
	if (flags & FLAG(META))
		io->flagged[HF_BLOCK_METADATA]++;
}

/* A request: how long it took, and how much of that on the device, or HF_BLOCK_NEVER or
 * HF_BLOCK_UNKNOWN. Not static: the verifier then looks at the branches only once. */
__noinline int hf_count_slowly(struct hf_block_io *io, __u64 total, __u64 on_device, __u32 bytes)
{
	__u64 queued = on_device == HF_BLOCK_NEVER ? total : total - on_device;

	if (!io)
		return 0;
	TIME_CELL(io, total)->total++;
	io->total_ns += total;
	if (on_device <= total) {
		TIME_CELL(io, on_device)->device++;
		io->device_ns += on_device;
	}
	if (queued <= total) {
		TIME_CELL(io, queued)->queue++;
		io->queue_ns += queued;
	}
	if (bytes) {
		io->sizes[hf_size_cell(bytes)]++;
		io->bytes += bytes;
	}
	return 0;
}

/* Every way that a completion can go. */
static __noinline int slow_done(struct request *rq, __u8 status, __u32 bytes)
{
	__u32 rq_flags = rq->rq_flags, cmd_flags = rq->cmd_flags, op = cmd_flags & REQ_OP_MASK, device;
	__u64 now = bpf_ktime_get_ns(), start = 0, issue = 0, key = 0, total, on_device;
	__u32 sampled = 0, data_done = 0, slot = HF_SLOT_OTHER, charged = 0, failed = status ? error_class(status) + 1 : 0, depth = 0;
	bool flush = is_flush_rq(rq_flags, op);
	struct request_queue *q = queue_of(rq);
	struct hf_block_request *s = NULL;
	struct hf_block_places *e;
	struct hf_block_io *io;

	e = learn_queue(q);
	if (e)
		s = flush ? find_flush_state(e, rq) : find_state(e, rq);
	if (bytes < rq->__data_len || (!flush && (rq_flags & hf_flush_seq))) {
		/* A part, or the data step of a flush sequence, which completes once more. */
		if (s && s->rq == (__u64)rq) {
			if (!s->failed)
				s->failed = failed;
			if (bytes >= rq->__data_len && at_device(s)) {
				give_back(e, rq);
				s->issue = now - s->issue;
				s->data_done = 1;
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
		if (at_device(s))
			give_back(e, rq);
		start = started(s);
		issue = s->issue;
		if (e && !flush)
			compare(e, s, rq);
		sampled = s->sampled;
		data_done = s->data_done;
		slot = s->slot;
		charged = s->charged;
		bytes = s->bytes;
		depth = s->depth;
		key = sample_key(s);
		if (s->failed)
			failed = s->failed;
		s->rq = 0;
	}
	if (hf_bio_start && !flush && !sampled && !issue) {
		/* An empty flush, which is never issued. */
		struct hf_block_request never = {};

		adopt(&never, rq);
		sampled = never.sampled;
		key = sample_key(&never);
	}
	/* The kernel's stamp is of this use of the request only where it keeps the books.
	 * It is later than ours by next to nothing, unless ours is missing, as in what was
	 * in flight when the programs were attached, or is of an earlier use. */
	if ((rq_flags & hf_io_stat) && (hf_kernel_start || rq->start_time_ns > start))
		start = rq->start_time_ns;
	/* The time of a drawn bio is known, but must not count more than that of others. */
	if (hf_kernel_start && !(rq_flags & hf_io_stat) && (!start || (hf_bio_start && sampled)))
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
	io = cells_of(device, operation(op));
	if (!io) {
		drop(HF_DROP_NO_SLOT);
		return 0;
	}
	if (issue)
		on_device = data_done ? issue : now - issue;
	else
		/* An empty flush, or a device that is gone: all its time was before the device.
		 * Else the issue was not seen, and only the total is known. */
		on_device = rq->state == MQ_RQ_IDLE ? HF_BLOCK_NEVER : HF_BLOCK_UNKNOWN;
	hf_count_slowly(io, total, on_device, bytes);
	if (depth) {
		io->depths[depth_cell(depth)]++;
		io->depth_sum += depth;
	}
	count_flags(io, op, cmd_flags);
	if (hf_by_container && !flush) {
		struct hf_block_io *slots = cells_of_slot(slot, operation(op));

		if (slots) {
			hf_count_slowly(slots, total, on_device, bytes);
			slots->flagged[HF_BLOCK_CHARGED] += charged;
		}
	}
	if (sampled) {
		struct hf_block_end end = {
			.key = key,
			.time_ns = bpf_ktime_get_boot_ns() - (bpf_ktime_get_ns() - now),
			.total_ns = total,
			.device_ns = on_device == HF_BLOCK_NEVER ? 0 : on_device,
			.cgroup_id = charged_id(rq),
			.bytes = bytes,
			.device = device - 1,
			.operation = operation(op),
		};

		send_end(&end);
	}
	if (failed) {
		failed--;
		bpf_barrier(failed);
		io->errors[failed & 15]++;
	}
	/* blk_account_io_done and, for the flush request, blk_account_io_flush */
	if (!flush && (!(rq_flags & hf_io_stat) || op == OP(DRV_IN) || op == OP(DRV_OUT)))
		io->unbooked++;
	return 0;
}

/* Where the four values of a request are counted. */
struct hf_request_cells {
	__u32 total, device, queue, size;
};

static __always_inline void add_cells(struct hf_block_io *io, struct hf_request_cells *c, __u64 total, __u64 on_device,
				      __u32 bytes)
{
	io->total_ns += total;
	io->queue_ns += total - on_device;
	io->device_ns += on_device;
	io->bytes += bytes;
	io->sizes[c->size]++;
	io->times[c->total & 255].total++;
	io->times[c->device & 255].device++;
	io->times[c->queue & 255].queue++;
}

/* Reads and writes of which all was seen, and went well; slow_done has the rest. Apart,
 * because what counts here is the size of the code. */
static __always_inline int handle_done(struct request *rq, __u8 status, __u32 bytes)
{
	__u64 now = bpf_ktime_get_ns(), start, total, on_device;
	struct hf_block_places *e = find_queue(queue_of(rq));
	__u32 rq_flags = rq->rq_flags, cmd_flags = rq->cmd_flags, op = cmd_flags & REQ_OP_MASK, device_cell;
	struct hf_block_request *s = NULL;
	enum hf_operation operation;
	struct hf_request_cells cells;
	struct hf_block_io *io;

	hf_ran(HF_RAN_DONE);
	if (likely(e))
		s = find_state(e, rq);
	if (unlikely(!s || s->rq != (__u64)rq || s->data_done || s->sampled || s->failed || status || bytes < rq->__data_len ||
		     (rq_flags & (hf_flush_seq | hf_io_stat)) != hf_io_stat))
		return slow_done(rq, status, bytes);
	/* As in slow_done. */
	start = rq->start_time_ns;
	if (started(s) > start)
		start = started(s);
	if (unlikely(s->issue < start))
		return slow_done(rq, status, bytes);
	if (op == OP(READ))
		operation = HF_OPERATION_READ;
	else if (op == OP(WRITE))
		operation = HF_OPERATION_WRITE;
	else
		return slow_done(rq, status, bytes);
	io = cells_of(e->device, operation);
	if (unlikely(!io))
		return slow_done(rq, status, bytes);
	if (unlikely(e->stamped < HF_STAMPS))
		compare(e, s, rq);
	total = now - start;
	on_device = now - s->issue;
	bytes = s->bytes;
	s->rq = 0;
	give_back(e, rq);
	cells.total = device_cell = hf_time_cell(total);
	/* Mostly all but nothing of it. */
	if (device_cell && on_device <= hf_time_cuts[(device_cell - 1) & 255])
		device_cell = hf_time_cell(on_device);
	cells.device = device_cell;
	cells.queue = hf_time_cell(total - on_device);
	cells.size = hf_size_cell(bytes);
	add_cells(io, &cells, total, on_device, bytes);
	count_flags(io, op, cmd_flags);
	io->depths[depth_cell(s->depth)]++;
	io->depth_sum += s->depth;
	if (hf_by_container) {
		io = cells_of_slot(s->slot, operation);
		if (io) {
			add_cells(io, &cells, total, on_device, bytes);
			io->flagged[HF_BLOCK_CHARGED] += s->charged;
		}
	}
	return 0;
}

/* The driver did not take it, or wants it again later. */
static __always_inline int handle_requeue(struct request *rq)
{
	__u32 op = rq->cmd_flags & REQ_OP_MASK;
	struct hf_block_places *e = learn_queue(queue_of(rq));
	struct hf_block_request *s;
	struct hf_block_io *io;

	hf_ran(HF_RAN_REQUEUE);
	if (!e)
		return 0;
	s = is_flush_rq(rq->rq_flags, op) ? find_flush_state(e, rq) : find_state(e, rq);
	if (s && s->rq == (__u64)rq && at_device(s)) {
		give_back(e, rq);
		s->issue = 0;
	}
	io = cells_of(e->device, operation(op));
	if (io)
		io->requeues++;
	return 0;
}

/* rq goes into another that waits, and will neither be issued nor complete. */
static __always_inline int handle_absorb(struct request *rq)
{
	struct hf_block_places *e = find_queue(queue_of(rq));
	struct hf_block_request *s;
	struct hf_block_io *io;

	hf_ran(HF_RAN_ABSORB);
	if (!e)
		return 0;
	s = find_state(e, rq);
	if (s && s->rq == (__u64)rq) {
		if (s->sampled) {
			struct hf_block_end end = {.key = sample_key(s), .absorbed = 1};

			send_end(&end);
		}
		s->rq = 0;
	} else if (hf_bio_start) {
		struct hf_block_request never = {};

		adopt(&never, rq);
		if (never.sampled) {
			struct hf_block_end end = {.key = sample_key(&never), .absorbed = 1};

			send_end(&end);
		}
	}
	io = cells_of(e->device, operation(rq->cmd_flags & REQ_OP_MASK));
	if (io)
		io->merges++;
	return 0;
}

/* The cells of bio, if it is of a device with requests. */
static __always_inline struct hf_block_io *cells_of_bio(struct bio *bio)
{
	struct request_queue *q = bio->bi_bdev->bd_disk->queue;
	struct hf_block_places *e;

	if (!q->tag_set)
		return NULL;
	e = find_queue(q);
	if (!e)
		e = learn_queue(q);
	return e ? cells_of(e->device, operation(bio->bi_opf & REQ_OP_MASK)) : NULL;
}

/* bio goes into a request that waits. */
static __always_inline int handle_merge(struct bio *bio, __u32 program)
{
	struct hf_block_io *io = cells_of_bio(bio);

	hf_ran(program);
	if (io)
		io->merges++;
	return 0;
}

static __always_inline int handle_split(struct bio *bio)
{
	struct hf_block_io *io = cells_of_bio(bio);

	hf_ran(HF_RAN_SPLIT);
	if (io)
		io->splits++;
	return 0;
}

/* A request was found for bio, which is not in it yet. */
static __always_inline __u64 handle_bio(struct bio *bio)
{
	struct hf_block_places *e = learn_queue(bio->bi_bdev->bd_disk->queue);

	hf_ran(HF_RAN_BIO);
	return e && !e->full ? draw_bio(e, bio) : 0;
}

SEC("tp_btf/block_io_start")
int BPF_PROG(hf_block_start, struct request *rq)
{
	__u64 key = handle_start(rq);

	return key ? take(ctx, key) : 0;
}

SEC("tp_btf/block_getrq")
int BPF_PROG(hf_block_bio, struct bio *bio)
{
	__u64 key = handle_bio(hf_untrusted(bio));

	return key ? take(ctx, key) : 0;
}

SEC("tp_btf/block_rq_issue")
int BPF_PROG(hf_block_issue, struct request *rq)
{
	return handle_issue(rq);
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(hf_block_done, struct request *rq, __u8 error, unsigned int bytes)
{
	return handle_done(rq, error, bytes);
}

SEC("tp_btf/writeback_bdi_register")
int BPF_PROG(hf_block_disk)
{
	return handle_disk();
}

SEC("tp_btf/block_rq_requeue")
int BPF_PROG(hf_block_requeue, struct request *rq)
{
	return handle_requeue(rq);
}

SEC("tp_btf/block_rq_merge")
int BPF_PROG(hf_block_absorb, struct request *rq)
{
	return handle_absorb(rq);
}

SEC("tp_btf/block_bio_backmerge")
int BPF_PROG(hf_block_back, struct bio *bio)
{
	return handle_merge(hf_untrusted(bio), HF_RAN_BACK);
}

SEC("tp_btf/block_bio_frontmerge")
int BPF_PROG(hf_block_front, struct bio *bio)
{
	return handle_merge(hf_untrusted(bio), HF_RAN_FRONT);
}

SEC("tp_btf/block_split")
int BPF_PROG(hf_block_split, struct bio *bio)
{
	return handle_split(hf_untrusted(bio));
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
