/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Every struct and enum that crosses from the kernel to Go. bpf2go generates the Go
 * side from the BTF of these types; nothing is decoded by hand-counted offsets. */
#ifndef HF_ABI_H
#define HF_ABI_H

#include "unwind.h"
#include <linux/types.h>

#define HF_COMM_LEN 16
/* kernel.perf_event_max_stack is 127 by default; bpf_get_stack cuts there. */
#define HF_MAX_KERNEL_FRAMES 127
#define HF_MAX_USER_FRAMES 512
/* Mappings that the addresses of one user stack may lie in. */
#define HF_MAX_AREAS 32
/* Bytes of a user stack that are kept where the walk needs a table that is not there yet. */
#define HF_STACK_COPY 16384
/* Cells of a time histogram, padded: internal/histogram has 233. */
#define HF_TIME_CELLS 240
#define HF_SIZE_CELLS 24
/* internal/histogram has 15. */
#define HF_DEPTH_CELLS 15
/* Cells of a histogram of run-queue lengths: up to 1, 2, 4 ... 1,024, and more. */
#define HF_LENGTH_CELLS 12

/* What a sample is a sample of. */
enum hf_profile {
	HF_PROFILE_CPU = 0,
	HF_PROFILE_RUNQUEUE = 1,
	HF_PROFILE_OFFCPU = 2,
	HF_PROFILE_BLOCKIO = 3,
	HF_PROFILE_CULPRIT = 4, /* of who was waited for in a wait that was sampled */
};

/* How the walk of one stack ended. */
enum hf_outcome {
	HF_OUTCOME_NONE = 0,        /* there is no such stack: kernel thread, or user mode */
	HF_OUTCOME_COMPLETE = 1,    /* the outermost frame was reached */
	HF_OUTCOME_TRUNCATED = 2,   /* the limit of frames was reached */
	HF_OUTCOME_FAILED = 3,      /* kernel stacks: the helper returned an error */
	HF_OUTCOME_EXITING = 4,     /* the address space is already gone */
	HF_OUTCOME_EXEC = 5,        /* in execve: the address space is being replaced */
	HF_OUTCOME_NO_TABLE = 6,    /* the unwind table of the last frame is not there yet */
	HF_OUTCOME_NO_RULE = 7,     /* no unwind information, and no frame pointer that holds */
	HF_OUTCOME_BAD_STACK = 8,   /* stack memory could not be read */
	HF_OUTCOME_BAD_ADDRESS = 9, /* the last frame is not in executable memory */
	HF_OUTCOME_REGISTER = 10,   /* the rule needs a register that is not known any more */
};

/* Why something that was due was not delivered. One enum for all programs, one
 * metric label: hostflame_samples_lost_total{reason}. */
enum hf_drop {
	HF_DROP_RING_FULL = 0,     /* the per-CPU ring had no room */
	HF_DROP_NO_RING = 1,       /* no ring for this CPU */
	HF_DROP_NO_STORAGE = 2,    /* sched: a task of which nothing is known */
	HF_DROP_SWITCH_UNSEEN = 3, /* sched: a switch-in that emitted no sched_switch, or whose end ran no program */
	HF_DROP_NEGATIVE = 4,      /* a duration came out negative and was not counted */
	HF_DROP_NO_SLOT = 5,       /* block: no room for a queue, device or tag */
	HF_DROP_NO_START = 6,      /* block: completed, sched: switched in, but the start was not seen */
	HF_DROP_DELAYED = 7,       /* sched: run_delay inflated by delayed dequeue, wait not counted */
	HF_DROP_NO_END = 8,        /* block: issued, but its completion was not seen */
	HF_DROP_REASONS = 9,
};

/* An executable mapping that frames of a sample lie in, as it was at that moment. */
struct hf_area {
	__u64 start, end;
	__u64 offset; /* of start, in the file */
	struct hf_file file;
};

/* Where a walk stands: the registers of the frame that is next. */
struct hf_frame {
	__u64 ip;
	__u64 sp;
	__u64 fp;     /* rbp, x29 */
	__u64 second; /* rbx; x30, the return address, while it is in there */
	__u8 exact;   /* ip is an instruction that was interrupted, not a return address */
	__u8 leaf;    /* registers has what it stands for */
	__u8 pad[6];
	__u64 registers[32]; /* all of the leaf's, by DWARF number; 0 elsewhere */
};

/* Header of a sample. After it come, in this order and as many as it says: the addresses of
 * kernel_frames and user_frames (u64, leaf first), areas (struct hf_area), and, where
 * stack_bytes is not 0, a struct hf_frame and so much of the stack from its sp, less
 * HF_RED_ZONE, on.
 * HF_EXACT is set in the user addresses that are no return addresses.
 * start_ns and exec_id together with pid name one program image: an id that was reused
 * has another start, an execve another exec_id. */
#define HF_EXACT (1ULL << 63)
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
	__u16 areas;
	__u16 stack_bytes;
	__u8 profile;        /* enum hf_profile */
	__u8 kernel_outcome; /* enum hf_outcome */
	__u8 user_outcome;   /* enum hf_outcome */
	__u8 user_mode;      /* 1 when the CPU was in user mode */
	__u8 cause;          /* enum hf_cause, of a wait */
	__u8 state;          /* enum hf_state, of blocked time */
	__u8 pad[2];
	char comm[HF_COMM_LEN];   /* of the thread group leader */
	char thread[HF_COMM_LEN]; /* of the thread */
	/* Of samples drawn by time (draw.bpf.h): value is what was observed, and it was taken with
	 * probability 1 - exp(-value / mean_ns). 0 for others. */
	__u64 mean_ns;
	char by[HF_COMM_LEN]; /* the process that was waited for, as far as that is known; of a */
	__u32 by_pid;         /* culprit: the one that waited. Its tgid, 0: not known */
	__u32 pad2;
	__u64 by_ns; /* of a culprit: the part of the wait in which it ran */
	__u64 lasted_ns; /* of blocked time: all of it so far, of which value is the newest part */
};
_Static_assert(sizeof(struct hf_sample) == 152, "hf_sample is packed by hand");
_Static_assert(sizeof(struct hf_sample) % 8 == 0, "frames follow, aligned");

/* Why a thread did not run although it was runnable. Names: bpf/sched_read.go. */
enum hf_cause {
	HF_CAUSE_QUOTA = 0,
	HF_CAUSE_OWN = 1,
	HF_CAUSE_OTHER = 2,
	HF_CAUSE_KERNEL = 3,
	HF_CAUSE_IDLE = 4,
	HF_CAUSE_STOLEN = 5,
	HF_CAUSE_UNKNOWN = 6,
	HF_CAUSES = 7,
};

/* What a thread was blocked for, as far as its kernel stack does not tell. */
enum hf_state {
	HF_STATE_OTHER = 0,
	HF_STATE_BLOCK_IO = 1,  /* in_iowait */
	HF_STATE_LOCK = 2,      /* in futex, for what looks like a lock */
	HF_STATE_CONDITION = 3, /* in futex, for something else */
};

/* Places for what is counted by container. */
enum hf_slot {
	HF_SLOT_OTHER = 0, /* all containers without one of their own */
	HF_SLOTS = 128,
};

/* A cgroup that has had events. */
struct hf_container {
	__u64 cgroup;  /* address of its struct cgroup */
	__u64 without; /* how often its slot was asked for while it had none; CPUs race for it */
	__u32 slot;
	__u32 gone;    /* 1 once the cgroup was removed */
};

struct hf_free_slots {
	__u32 given; /* slots ever written into the ring */
	__u32 slots[HF_SLOTS];
};

struct hf_size_hist {
	__u64 sum_bytes;
	__u64 cells[HF_SIZE_CELLS];
};

/* Who had the CPU, or what it was, that a task waited for: a slot, or one of these. */
enum hf_runner {
	HF_RUNNER_KERNEL = HF_SLOTS, /* kernel threads */
	HF_RUNNER_NOBODY = 129,      /* the idle task */
	HF_RUNNER_STOLEN = 130,      /* interrupts, the hypervisor */
	HF_RUNNER_UNKNOWN = 131,     /* longer ago than is known */
	HF_RUNNER_QUOTA = 132,       /* whoever it was: the waiting container had no quota left */
	HF_RUNNERS = 133,
};

/* What a task did while it did not run and was not runnable. */
enum hf_blocked {
	HF_BLOCKED_IO = 0, /* waited for block I/O: in_iowait */
	HF_BLOCKED_OTHER = 1,
	HF_BLOCKED = 2,
};

/* Whose task takes the CPU from one that would have gone on. */
enum hf_preemptor {
	HF_PREEMPTOR_OWN = 0,
	HF_PREEMPTOR_OTHER = 1,
	HF_PREEMPTOR_KERNEL = 2,
	HF_PREEMPTORS = 3,
};

/* What the switch-ins of one slot's tasks on one CPU waited. Counts are sums of cells. What
 * every switch touches comes first. */
struct hf_sched_slot {
	__u64 wait_ns;
	__u64 run_delay_ns; /* growth of the tasks' own sched_info.run_delay */
	__u64 blocked_ns[HF_BLOCKED];
	/* The newest throttling by quota, boot of ktime, and the queue and its books that it is
	 * from. */
	__u64 throttled_queue;
	__u64 throttled_ns;
	__u64 throttled_from;
	__u64 throttled_until;
	__u64 preempted[HF_PREEMPTORS];
	__u64 waited_for[HF_RUNNERS]; /* the parts of wait_ns */
	__u64 wait[HF_TIME_CELLS];
	__u64 blocked[HF_BLOCKED][HF_TIME_CELLS];
};

/* Lengths of one CPU's run queue. */
struct hf_rqlength {
	__u64 sum;
	__u64 cells[HF_LENGTH_CELLS];
};

/* What the scheduler hooks know of a task. What every switch touches is in the first 64 bytes. */
struct hf_task {
	__u64 task;         /* its address; 0: nobody has the seat */
	__u64 out_ns;       /* ktime of its last switch-out, 0 if none was seen */
	__u64 run_delay_ns; /* run_delay up to which the hook has counted */
	__u64 arrivals;     /* sched_info.pcount, likewise */
	__u64 cgroups;      /* address of the css_set that slot is for */
	__u32 epoch;        /* hf_slot_epoch, likewise */
	__u8 slot;
	__u8 runnable;      /* at the last switch-out */
	__u8 fresh;         /* no switch-in counted yet */
	__u8 moved;         /* to another CPU, while it waited */
	__u64 drawn_ns;     /* ktime up to which its blocked time has been drawn from */
	__u32 tid;          /* in the initial pid namespace, when it became known */
	__u8 moved_asleep;  /* queued elsewhere while it slept: see hf_sched_move */
	__u8 unseated;      /* in task storage */
	__u8 pad[2];
	/* If runnable: */
	__u64 queue;        /* address of the cfs_rq that it waits in, and how long that had */
	__u64 throttled_ns; /* been throttled when it began to */
	__u32 rt_throttled; /* at the switch-out: real-time tasks had used up their time */
	/* If moved: */
	__u32 moved_from;   /* CPU */
	__u64 moved_ns;     /* ktime of the last move */
	__u64 quota_ns;     /* of the wait, what it was throttled in queues before */
	__u64 woken_ns;     /* ktime; only where there is no sched_info */
	__u64 known_ns;     /* run_delay when the task became known */
	__u64 pad2;
};
_Static_assert(sizeof(struct hf_task) == 128, "of two cache lines, the second seldom");

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
	HF_OPERATION_WRITE_ZEROES = 4,
	HF_OPERATION_OTHER = 5,
	HF_OPERATIONS = 6,
};

/* Why a request or bio failed: its blk_status_t (include/linux/blk_types.h), of which the first
 * ten are the same in all kernels since 4.13. */
enum hf_block_error {
	HF_BLOCK_ERROR_IO = 0, /* BLK_STS_IOERR */
	HF_BLOCK_ERROR_NOT_SUPPORTED = 1,
	HF_BLOCK_ERROR_TIMEOUT = 2,
	HF_BLOCK_ERROR_NO_SPACE = 3,
	HF_BLOCK_ERROR_TRANSPORT = 4,
	HF_BLOCK_ERROR_TARGET = 5,
	HF_BLOCK_ERROR_RESERVATION = 6,
	HF_BLOCK_ERROR_MEDIUM = 7,
	HF_BLOCK_ERROR_PROTECTION = 8,
	HF_BLOCK_ERROR_OTHER = 9,
	HF_BLOCK_ERRORS = 10,
};

/* What requests are flagged as. */
enum hf_block_flag {
	HF_BLOCK_SYNC = 0, /* somebody waits for it: reads, REQ_SYNC, REQ_FUA, REQ_PREFLUSH (op_is_sync) */
	HF_BLOCK_READAHEAD = 1,
	HF_BLOCK_METADATA = 2,
	HF_BLOCK_CHARGED = 3, /* by container: the bio's own, not its submitter's */
};

/* Requests of one device and operation on one CPU. What one request touches is close
 * together: counting it costs cache misses more than instructions. */
struct hf_block_io {
	__u64 total_ns;
	__u64 queue_ns;
	__u64 device_ns;
	__u64 bytes;
	__u64 flagged[4]; /* by enum hf_block_flag */
	__u64 sizes[HF_SIZE_CELLS];
	__u64 depths[HF_DEPTH_CELLS]; /* of requests that were issued */
	__u64 depth_sum;
	struct hf_block_times {
		__u64 total;  /* start to last byte */
		__u64 device; /* last issue to last byte */
		__u64 queue;  /* the rest */
	} times[256]; /* HF_TIME_CELLS, and a power of two */
	__u64 errors[16]; /* by enum hf_block_error; a power of two */
	__u64 unbooked; /* requests that /proc/diskstats does not count */
	__u64 merges;   /* bios and requests that went into a request that waited */
	__u64 requeues; /* issues that the driver sent back */
	__u64 splits;   /* bios cut in two because the device takes no larger ones */
};
_Static_assert(sizeof(struct hf_block_io) <= 32768, "limit of a per-CPU map value");

/* Bios of one device and operation on one CPU, of devices that have no requests. */
struct hf_bio_io {
	__u64 total_ns;
	__u64 bytes;
	__u64 errors[16]; /* by enum hf_block_error; a power of two */
	__u64 sizes[HF_SIZE_CELLS];
	__u64 times[256]; /* HF_TIME_CELLS, and a power of two */
};

/* Device time of a request whose issue was not seen, and of one that the device never got. */
#define HF_BLOCK_UNKNOWN (~0ULL)
#define HF_BLOCK_NEVER (~0ULL - 1)

/* A sampled request has ended. It follows the sample of its start, whose value is the key,
 * in a ring, perhaps another CPU's. */
struct hf_block_end {
	__u64 key;
	__u64 time_ns;   /* boot clock, as that of the sample, which is after the walk */
	__u64 total_ns;
	__u64 device_ns; /* HF_BLOCK_UNKNOWN: the issue was not seen */
	__u64 cgroup_id; /* of the bio's blkcg, 0: none; blkio hierarchy on v1 and hybrid hosts */
	__u32 bytes;
	__u32 device;    /* slot */
	__u8 operation;  /* enum hf_operation */
	__u8 absorbed;   /* it went into another request and has no end of its own */
	__u8 pad[6];
};
_Static_assert(sizeof(struct hf_block_end) < sizeof(struct hf_sample), "told apart by size");

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
	enum hf_unwind_size *hf_export_unwind_size __attribute__((unused));    \
	enum hf_rule_kind *hf_export_rule_kind __attribute__((unused));        \
	enum hf_saved *hf_export_saved __attribute__((unused));                \
	struct hf_frame *hf_export_frame __attribute__((unused));              \
	struct hf_area *hf_export_area __attribute__((unused));                \
	enum hf_cause *hf_export_cause __attribute__((unused));                \
	enum hf_state *hf_export_state __attribute__((unused));                \
	enum hf_drop *hf_export_drop __attribute__((unused))

#endif
