//go:build ignore

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Block I/O of devices that have no requests (zram, dm, md): their bios, from
 * block_bio_queue to block_bio_complete. What they do to other devices are bios and requests
 * of those. */
#include "kernel.bpf.h"
#include "counters.bpf.h"
#include "histogram.bpf.h"
#include "block_device.bpf.h"

#include <bpf/bpf_tracing.h>

/* blk_status_t of a bio that must not wait (REQ_NOWAIT) and would: no error of the device,
 * who sent it sends it again. The number is the same since 4.13. */
#define BLK_STS_AGAIN 12

enum {
	HF_RAN_QUEUE = 0,
	HF_RAN_COMPLETE = 1,
};

/* One bio in flight. The device is that which it was queued to: some send it on to another. */
struct hf_bio_state {
	__u64 start; /* ns */
	__u32 bytes;
	__u32 cells; /* index in hf_bio_cells */
};

/* By bio. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384); /* bios in flight */
	__type(key, __u64);
	__type(value, struct hf_bio_state);
} hf_bio_state SEC(".maps");

/* By device slot * HF_OPERATIONS + operation. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HF_OPERATIONS * HF_MAX_DEVICES); /* lowered by user space */
	__type(key, __u32);
	__type(value, struct hf_bio_io);
} hf_bio_cells SEC(".maps");

static __always_inline void count_error(struct hf_bio_io *io, __u8 status)
{
	__u32 class;

	if (!status || status == BLK_STS_AGAIN)
		return;
	class = error_class(status);
	bpf_barrier(class);
	io->errors[class & 15]++;
}

static __always_inline int handle_queue(struct bio *bio)
{
	struct gendisk *disk = bio->bi_bdev->bd_disk;
	__u64 key = (__u64)bio;
	struct hf_bio_state s;
	__u32 device;

	if (disk->queue->tag_set)
		return 0;
	hf_ran(HF_RAN_QUEUE);
	device = device_slot(disk);
	if (!device) {
		drop(HF_DROP_NO_SLOT);
		return 0;
	}
	s.bytes = bio->bi_iter.bi_size;
	s.cells = (device - 1) * HF_OPERATIONS + operation(bio->bi_opf & REQ_OP_MASK);
	s.start = bpf_ktime_get_ns();
	if (bpf_map_update_elem(&hf_bio_state, &key, &s, BPF_ANY))
		drop(HF_DROP_NO_SLOT);
	return 0;
}

static __always_inline int handle_complete(struct bio *bio)
{
	__u64 key = (__u64)bio, total;
	struct hf_bio_state *s = bpf_map_lookup_elem(&hf_bio_state, &key);
	struct hf_bio_io *io;

	if (!s)
		return 0;
	hf_ran(HF_RAN_COMPLETE);
	io = bpf_map_lookup_elem(&hf_bio_cells, &s->cells);
	if (io) {
		total = bpf_ktime_get_ns() - s->start;
		io->total_ns += total;
		io->times[hf_time_cell(total) & 255]++;
		if (s->bytes) {
			io->bytes += s->bytes;
			io->sizes[hf_size_cell(s->bytes)]++;
		}
		count_error(io, bio->bi_status);
	}
	bpf_map_delete_elem(&hf_bio_state, &key);
	return 0;
}

SEC("tp_btf/block_bio_queue")
int BPF_PROG(hf_bio_queue, struct bio *bio)
{
	return handle_queue(bio);
}

SEC("tp_btf/block_bio_complete")
int BPF_PROG(hf_bio_complete, struct request_queue *q, struct bio *bio)
{
	return handle_complete(bio);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
