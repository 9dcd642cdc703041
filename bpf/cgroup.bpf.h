/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The cgroup that a task's container is known by. */
#ifndef HF_CGROUP_BPF_H
#define HF_CGROUP_BPF_H

#include "kernel.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

/* True where the cpu controller is on a v1 hierarchy: then that is where the container
 * of scheduling is, and the unified hierarchy knows nothing of it. */
const volatile bool hf_cgroup_v1 = false;

static __always_inline struct cgroup *hf_cgroup_of(struct css_set *cgroups)
{
	if (hf_cgroup_v1) {
		/* Not sched_task_group: under autogroup that is a group without a cgroup. */
		struct cgroup_subsys_state **subsys = &cgroups->subsys[0], *css = NULL;

		bpf_probe_read_kernel(&css, sizeof(css), subsys + bpf_core_enum_value(enum cgroup_subsys_id, cpu_cgrp_id));
		return BPF_CORE_READ(css, cgroup);
	}
	return BPF_CORE_READ(cgroups, dfl_cgrp);
}

static __always_inline __u64 hf_cgroup_id(struct task_struct *task)
{
	struct cgroup *cgroup = hf_cgroup_of(task->cgroups);

	return BPF_CORE_READ(cgroup, kn, id);
}

#endif
