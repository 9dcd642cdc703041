/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The kernel types and fields that the programs use, no more: CO-RE finds the real
 * offsets at load. One struct for all hook families, so that each field is named once. */
#ifndef HF_KERNEL_BPF_H
#define HF_KERNEL_BPF_H

#include <linux/bpf.h>
#include <linux/types.h>

#ifndef __ksym
#define __ksym __attribute__((section(".ksyms")))
#endif

extern void *bpf_rdonly_cast(const void *p, __u32 type) __ksym __attribute__((weak));

/* p for many paths to many loads of pointers: for each of them that is from what a hook was
 * given, Linux from 6.4 on goes through all of its types when it verifies (type_is_rcu in
 * kernel/bpf/verifier.c), but not from this. The cast itself is nothing at run time, but each load through it has its
 * address checked first. */
#define hf_untrusted(p) (bpf_rdonly_cast ? bpf_rdonly_cast(p, bpf_core_type_id_kernel(typeof(*(p)))) : (void *)(p))

typedef _Bool bool;
#define true 1
#define false 0
#ifndef NULL
#define NULL ((void *)0)
#endif

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct kernfs_node {
	__u64 id;
};

struct cgroup;

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	unsigned int flags;
	struct cgroup_subsys_state *parent;
};

struct cgroup {
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
};

struct css_set {
	struct cgroup_subsys_state *subsys[1]; /* by enum cgroup_subsys_id */
	struct cgroup *dfl_cgrp;
};

enum cgroup_subsys_id {
	cpu_cgrp_id = 1,
	io_cgrp_id = 3,
};

struct maple_tree {
	void *ma_root;
};

typedef struct {
	void *vdso;
} mm_context_t;

struct seqcount {
	unsigned int sequence;
};

struct mm_struct {
	struct maple_tree mm_mt; /* since d4af56c5c7c6 (6.1) */
	struct seqcount mm_lock_seq; /* since eb449bd96954 (6.13) */
	mm_context_t context;
};

struct mm_struct___6_4 {
	int mm_lock_seq; /* since 5e31275cc997 (6.4) */
};

struct super_block {
	__u32 s_dev;
};

struct timespec64 {
	__s64 tv_sec;
	long tv_nsec;
};

struct inode {
	struct super_block *i_sb;
	unsigned long i_ino;
	__s64 i_mtime_sec; /* since 3aa63a569c64 (6.11) */
	__u32 i_mtime_nsec;
};

struct inode___6_7 {
	struct timespec64 __i_mtime; /* since 12cd44023651 (6.7) */
};

struct inode___6_1 {
	struct timespec64 i_mtime;
};

struct file {
	struct inode *f_inode;
};

struct vm_area_struct {
	unsigned long vm_start;
	unsigned long vm_end;
	struct mm_struct *vm_mm;
	unsigned long vm_flags;
	unsigned long vm_pgoff;
	struct file *vm_file;
};

struct rq;

struct cfs_rq {
	/* Delayed dequeue (152e11f6df29, 6.12) leaves sleepers among those that are queued. */
	unsigned int h_nr_delayed;  /* 6.13, and 6.12 by backport */
	unsigned int h_nr_queued;
	unsigned int h_nr_runnable; /* since 6.14: without them */
	struct rq *rq; /* CONFIG_FAIR_GROUP_SCHED */
	/* CONFIG_CFS_BANDWIDTH: how long tasks in it could not run for lack of quota, ns of
	 * the run queue's clock; up to the end of the last throttling. */
	__u64 throttled_clock_self_time; /* since 6.6 */
	__u64 throttled_clock_pelt_time; /* the queue's own time, by a clock that slow CPUs slow down */
};

struct rt_bandwidth {
	__s64 rt_period; /* ns */
};

struct task_group {
	struct rt_bandwidth rt_bandwidth; /* CONFIG_RT_GROUP_SCHED */
};

struct rt_rq {
	int rt_throttled; /* until fcc77b5ba3e8 (6.12), since then with CONFIG_RT_GROUP_SCHED */
	__u64 rt_runtime; /* likewise; ns a period */
	struct task_group *tg; /* CONFIG_RT_GROUP_SCHED */
};

struct rq {
	int cpu;
	unsigned int nr_running; /* of all classes, the one that runs included */
	struct cfs_rq cfs;
	struct rt_rq rt;
	__u64 clock;
	__u64 clock_task;    /* clock without the time that is no task's */
	__u64 prev_irq_time; /* CONFIG_IRQ_TIME_ACCOUNTING; what of that was interrupts */
	__u64 clock_idle;    /* clock when the CPU became idle last; since e2f3e35f1f5a (5.19) */
};

struct sched_entity {
	unsigned char sched_delayed; /* since 152e11f6df29 (6.12) */
	struct cfs_rq *cfs_rq;       /* CONFIG_FAIR_GROUP_SCHED; of tasks of all classes */
};

struct sched_rt_entity {
	struct rt_rq *rt_rq; /* CONFIG_RT_GROUP_SCHED */
};

/* CONFIG_SCHED_INFO; ns of the run queue's clock */
struct sched_info {
	unsigned long pcount;            /* arrivals on a CPU */
	unsigned long long run_delay;    /* waits up to the newest arrival or move */
	unsigned long long last_queued;  /* 0 when not waiting */
};

struct blk_plug {
	__u64 cur_ktime; /* since da4c8c3d0975 (6.9) */
};

struct task_struct {
	unsigned int __state;
	int on_rq;
	int on_cpu;
	struct sched_entity se;
	struct sched_rt_entity rt;
	struct sched_info sched_info;
	int pid;
	int tgid;
	unsigned int flags;
	int prio;
	unsigned int in_execve : 1;
	unsigned int in_iowait : 1;
	struct mm_struct *mm;
	struct task_struct *group_leader;
	__u64 start_boottime; /* since cf25e24db61c (5.5) */
	__u64 self_exec_id;   /* 64 bits since d1e7fd6462ca (5.7) */
	struct css_set *cgroups;
	struct blk_plug *plug;
	struct rt_mutex_waiter *pi_blocked_on;
	struct mutex *blocked_on; /* before 6.17 with CONFIG_DEBUG_MUTEXES only */
	unsigned long blocker;    /* with CONFIG_DETECT_HUNG_TASK_BLOCKER */
	char comm[16];
};

struct timerqueue_node {
	__s64 expires; /* ns of the timer's clock */
};

struct hrtimer {
	struct timerqueue_node node;
};

struct hw_perf_event {
	struct hrtimer hrtimer;
};

struct perf_event {
	struct hw_perf_event hw;
};

/* What a perf_event program's context really points to. */
struct bpf_perf_event_data_kern {
	struct perf_event *event;
};

struct bpf_iter_meta;

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};

enum mq_rq_state {
	MQ_RQ_IDLE = 0,
};

struct blk_mq_hw_ctx {
	unsigned int queue_num;
};

struct blk_mq_tags;
struct elevator_queue;

struct blk_mq_tag_set {
	unsigned int queue_depth;
	struct blk_mq_tags *shared_tags;
};

struct request_queue;

struct gendisk {
	int major;
	int first_minor;
	char disk_name[32];
	struct request_queue *queue;
	__u64 diskseq;
};

struct block_device {
	struct gendisk *bd_disk;
};

struct blkcg {
	struct cgroup_subsys_state css;
};

struct blkcg_gq {
	struct blkcg *blkcg;
};

struct bvec_iter {
	unsigned int bi_size;
};

struct bio {
	struct bio *bi_next; /* of a request */
	struct block_device *bi_bdev;
	__u32 bi_opf;
	__u8 bi_status;
	struct bvec_iter bi_iter;
	struct blkcg_gq *bi_blkg; /* CONFIG_BLK_CGROUP */
};

struct request_queue {
	struct elevator_queue *elevator;
	unsigned int nr_hw_queues;
	struct gendisk *disk;
	int id;
	unsigned long nr_requests;
	struct blk_mq_tag_set *tag_set;
};

struct request {
	struct request_queue *q;
	struct blk_mq_hw_ctx *mq_hctx;
	__u32 cmd_flags;
	__u32 rq_flags;
	int tag;
	int internal_tag;
	unsigned int __data_len;
	struct bio *bio;
	__u64 start_time_ns;
	enum mq_rq_state state;
};

/* Renumbered over versions, so only their names are used. */
enum req_op {
	REQ_OP_READ = 0,
	REQ_OP_WRITE = 1,
	REQ_OP_FLUSH = 2,
	REQ_OP_DISCARD = 3,
	REQ_OP_ZONE_APPEND = 7,
	REQ_OP_WRITE_ZEROES = 9,
	REQ_OP_DRV_IN = 34,
	REQ_OP_DRV_OUT = 35,
};

enum req_flag_bits {
	__REQ_SYNC = 11,
	__REQ_META = 12,
	__REQ_FUA = 17,
	__REQ_PREFLUSH = 18,
	__REQ_RAHEAD = 19,
};

enum rqf_flags {
	__RQF_FLUSH_SEQ = 1,
	__RQF_IO_STAT = 8,
};

#pragma clang attribute pop

/* Keeps the compiler from looking through the value: the verifier has bounds of it, or is to
 * see no branch. */
#define bpf_barrier(value) asm volatile("" : "+r"(value))

#define CSS_ONLINE (1 << 1)
#define MAX_RT_PRIO 100
/* Of __state, the first and the last: these in all kernels since 4.15. */
#define TASK_NEW 0x800
#define TASK_DEAD 0x80
#define VM_EXEC 0x00000004
#define PF_EXITING 0x00000004
#define PF_KTHREAD 0x00200000

#endif
