/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Every struct and enum that crosses from the kernel to Go. bpf2go generates the Go
 * side from the BTF of these types; nothing is decoded by hand-counted offsets. */
#ifndef HF_ABI_H
#define HF_ABI_H

#include <linux/types.h>

#define HF_COMM_LEN 16
/* kernel.perf_event_max_stack is 127 by default; bpf_get_stack cuts there. */
#define HF_MAX_FRAMES 127
/* Cells of a time histogram, padded: internal/histogram has 233. */
#define HF_TIME_CELLS 240
#define HF_SIZE_CELLS 24

/* What a sample is a sample of. */
enum hf_profile {
	HF_PROFILE_CPU = 0,
	HF_PROFILE_RUNQUEUE = 1,
	HF_PROFILE_OFFCPU = 2,
	HF_PROFILE_BLOCKIO = 3,
};

/* How the walk of one stack ended. */
enum hf_outcome {
	HF_OUTCOME_NONE = 0,      /* there is no such stack: kernel thread, or user mode */
	HF_OUTCOME_COMPLETE = 1,  /* walked until the walker found an end */
	HF_OUTCOME_TRUNCATED = 2, /* HF_MAX_FRAMES reached */
	HF_OUTCOME_FAILED = 3,    /* the helper returned an error */
	HF_OUTCOME_EXITING = 4,   /* the address space is already gone */
};

/* Why something that was due was not delivered. One enum for all programs, one
 * metric label: hostflame_samples_lost_total{reason}. */
enum hf_drop {
	HF_DROP_RING_FULL = 0,     /* the per-CPU ring had no room */
	HF_DROP_NO_RING = 1,       /* no ring for this CPU */
	HF_DROP_NO_STORAGE = 2,    /* sched: a task without task storage */
	HF_DROP_SWITCH_UNSEEN = 3, /* sched: a switch-in that emitted no sched_switch */
	HF_DROP_NEGATIVE = 4,      /* a duration came out negative and was not counted */
	HF_DROP_NO_SLOT = 5,       /* block: no room for a queue, device or tag */
	HF_DROP_NO_START = 6,      /* block: completed, sched: switched in, but the start was not seen */
	HF_DROP_DELAYED = 7,       /* sched: run_delay inflated by delayed dequeue, wait not counted */
	HF_DROP_NO_END = 8,        /* block: issued, but its completion was not seen */
	HF_DROP_REASONS = 9,
};

/* Header of a sample; kernel_frames then user_frames addresses (u64, leaf first) follow.
 * start_ns and exec_id together with pid name one program image: an id that was reused
 * has another start, an execve another exec_id. */
struct hf_sample {
	__u64 time_ns;   /* boot clock (bpf_ktime_get_boot_ns) */
	__u64 cgroup_id; /* kernfs id; cpu hierarchy on v1 and hybrid hosts */
	__u64 value;     /* what the profile type measures, ns (cpu: the period times the weight) */
	__u64 start_ns;  /* birth of the thread group leader, boot clock */
	__u64 exec_id;   /* counts the execve calls of the task and of those it was forked from */
	__u32 pid;       /* tgid in the initial pid namespace */
	__u32 tid;
	__u32 cpu;
	__u32 weight;        /* how many observations this one stands for */
	__u16 kernel_frames;
	__u16 user_frames;
	__u8 profile;        /* enum hf_profile */
	__u8 kernel_outcome; /* enum hf_outcome */
	__u8 user_outcome;   /* enum hf_outcome */
	__u8 user_mode;      /* 1 when the CPU was in user mode */
	char comm[HF_COMM_LEN];   /* of the thread group leader */
	char thread[HF_COMM_LEN]; /* of the thread */
};
_Static_assert(sizeof(struct hf_sample) == 96, "hf_sample is packed by hand");
_Static_assert(sizeof(struct hf_sample) % 8 == 0, "frames follow, aligned");

/* A time histogram of one series on one CPU. The count is the sum of the cells. */
struct hf_time_hist {
	__u64 sum_ns;
	__u64 cells[HF_TIME_CELLS];
};

struct hf_size_hist {
	__u64 sum_bytes;
	__u64 cells[HF_SIZE_CELLS];
};

/* Run-queue latency on one CPU: what the switch-ins there waited. */
struct hf_runqueue {
	__u64 run_delay_ns; /* growth of the tasks' own sched_info.run_delay */
	struct hf_time_hist wait;
};

/* What the scheduler hook knows of a task. */
struct hf_task {
	__u64 known_ns;     /* run_delay when the task became known */
	__u64 run_delay_ns; /* run_delay up to which the hook has counted */
	__u64 arrivals;     /* sched_info.pcount, likewise */
	__u64 queued_ns;    /* ktime of a switch-out that left it runnable, else 0 */
	__u8 fresh;         /* no switch-in counted yet */
	__u8 moved_asleep;  /* queued elsewhere while it slept: see hf_sched_move */
	__u8 pad[6];
};

/* The hook's books and the kernel's, over the tasks alive. */
struct hf_accounting {
	__u64 counted_ns;
	__u64 kernel_ns;
};

/* What a block request does. Names and rules: bpf/block.go. */
enum hf_operation {
	HF_OPERATION_READ = 0,
	HF_OPERATION_WRITE = 1,
	HF_OPERATION_FLUSH = 2,
	HF_OPERATION_DISCARD = 3,
	HF_OPERATION_OTHER = 4,
	HF_OPERATIONS = 5,
};

/* Requests of one device and operation on one CPU. What one request touches is close
 * together: counting it costs cache misses more than instructions. */
struct hf_block_io {
	__u64 total_ns;
	__u64 queue_ns;
	__u64 device_ns;
	__u64 bytes;
	__u64 sizes[HF_SIZE_CELLS];
	struct hf_block_times {
		__u64 total;  /* start to last byte */
		__u64 device; /* last issue to last byte */
		__u64 queue;  /* the rest */
	} times[256]; /* HF_TIME_CELLS, and a power of two */
	__u64 errors;
	__u64 unbooked; /* requests that /proc/diskstats does not count */
};
_Static_assert(sizeof(struct hf_block_io) <= 32768, "limit of a per-CPU map value");

/* A whole disk that had I/O. */
struct hf_block_device {
	__u64 key; /* hash of the name, 0: free */
	__u32 major;
	__u32 minor;
	__u32 ready; /* 1 once the name is written */
	__u32 pad;
	char name[32]; /* DISK_NAME_LEN */
};

/* Keeps the enums in the BTF that bpf2go reads. */
#define HF_EXPORT_ENUMS                                                        \
	enum hf_profile *hf_export_profile __attribute__((unused));            \
	enum hf_outcome *hf_export_outcome __attribute__((unused));            \
	enum hf_drop *hf_export_drop __attribute__((unused))

#endif
