/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Walks the user stack of the current task, by unwind tables (unwind.h), and by frame
 * pointers where there are no rules. It needs nothing of user space but the tables: in
 * which file an address lies is looked up at the task itself, so a process that nobody
 * has heard of is walked like any other. */
#ifndef HF_UNWIND_BPF_H
#define HF_UNWIND_BPF_H

#include "abi.h"
#include "kernel.bpf.h"
#include "regs.bpf.h"
#include "vma.bpf.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#if defined(__TARGET_ARCH_x86)
#define HF_DWARF_FP 6
#define HF_DWARF_SP 7
#define HF_DWARF_SECOND 3 /* rbx */
#define HF_RECORD_BELOW 0
#define HF_RED_ZONE 128 /* below the stack pointer, and in use */
#elif defined(__TARGET_ARCH_arm64)
#define HF_DWARF_FP 29
#define HF_DWARF_SP 31
#define HF_DWARF_SECOND 30 /* the link register */
#define HF_RECORD_BELOW 8
#define HF_RED_ZONE 0
#endif

/* User addresses without the bits that pointer authentication and tags use. */
const volatile __u64 hf_address_mask = (1ULL << 47) - 1;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1); /* sized by user space */
	__type(key, struct hf_table_key);
	__type(value, struct hf_table);
} hf_tables SEC(".maps");

struct hf_chunk {
	__u16 words[HF_CHUNK_WORDS];
};

struct hf_chunk_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__uint(value_size, sizeof(struct hf_chunk)); /* its BTF has no size: only pointers reach it */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1); /* sized by user space */
	__type(key, __u32);
	__array(values, struct hf_chunk_map);
} hf_chunks SEC(".maps");

/* Bytes of the stack that are read at once: at first, and at most. */
#define HF_FIRST_WINDOW 256
#define HF_WINDOW 2048

enum hf_table_state {
	HF_TABLE_MISSING,
	HF_TABLE_FOUND,
};

/* Where an address lies: a region of a file, as far as it is mapped, and its table. */
struct hf_place {
	__u64 lo, hi; /* addresses that this holds for */
	struct hf_area area;
	__u32 chunk;
	__u32 word;
	__u16 first_bucket;
	__u16 buckets;
	__u32 state; /* enum hf_table_state */
};

/* A place as it was found lately. Looking one up costs some thirty cache and TLB misses (the
 * maple tree, the mapping, its file, the hash of tables), most of what a walk costs; this
 * costs two. It is good while the mappings of the process have not changed, which the
 * mm's own count of them tells, and no table has; and not for long, as tables are to show
 * that they are in use. */
struct hf_known_place {
	struct hf_place place;
	struct mm_struct *mm;
	__u64 start_ns; /* of the process: an mm can be another's soon */
	__u64 until_ns;
	__u64 mm_changes;
	__u32 table_changes;
	__u32 pad;
};

/* Functions that are not static are verified once, not for each path that calls them: they
 * keep loading fast, and check pointers that are never NULL. */

#define HF_KNOWN_PLACES 64
#define HF_KNOWN_NS 1000000000ULL

struct hf_walk {
	struct hf_frame at;
	struct hf_place place; /* of the last frame */
	struct mm_struct *mm;
	__u64 now;
	__u64 start_ns;
	__u64 mm_changes; /* 0: not counted */
	__u32 table_changes;
	__u32 frames; /* so far */
	__u32 areas;
	__u32 outcome; /* enum hf_outcome; 0: goes on */
	__u32 word;    /* bytes of an address: 4 for 32-bit programs, which have no tables */
	__u32 pad;
	__u64 window_at; /* address of window[0] */
	__u64 window_size;
	__u64 window_next; /* size of the next one */
	struct hf_area area[HF_MAX_AREAS];
	__u64 ips[HF_MAX_USER_FRAMES];
	__u8 window[HF_WINDOW + 8];
};

struct hf_known_places {
	struct hf_known_place at[HF_KNOWN_PLACES];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_known_places);
} hf_places SEC(".maps");

/* Counts the changes that user space makes to the tables. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} hf_changes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_walk);
} hf_walks SEC(".maps");

static __always_inline struct hf_walk *hf_walk_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&hf_walks, &zero);
}

/* Reads a word of the stack. What lies around it is read along, as the next frames will
 * want it: a little at first, as every line that is not used is a cache miss for nothing,
 * and then more each time. */
__noinline bool hf_read(struct hf_walk *w, __u64 address, __u64 *value)
{
	__u64 at, size;

	if (!w || !value)
		return false;
	at = address - w->window_at;
	if (at + 8 > w->window_size || at > HF_WINDOW) {
		size = w->window_next;
		w->window_at = address;
		/* From the frame's own end on, if that is near. */
		if (address - w->at.sp < size / 2)
			w->window_at = w->at.sp;
		if (size > HF_WINDOW)
			size = HF_WINDOW;
		if (bpf_probe_read_user(w->window, size, (void *)w->window_at)) {
			/* The stack ends, or was never touched, beyond this page. */
			if (size > 4096 - (w->window_at & 4095))
				size = 4096 - (w->window_at & 4095);
			bpf_barrier(size);
			if (size > HF_WINDOW || bpf_probe_read_user(w->window, size, (void *)w->window_at))
				size = 0;
		}
		w->window_size = size;
		if (w->window_next < HF_WINDOW)
			w->window_next *= 2;
		at = address - w->window_at;
		if (at + 8 > size) {
			w->window_size = 0;
			return !bpf_probe_read_user(value, 8, (void *)address);
		}
	}
	*value = *(__u64 *)(w->window + (at & (HF_WINDOW - 1)));
	return true;
}

/* The rule for an offset, given as bucket of the table and low 16 bits: that of the last
 * row that is not beyond it. 0, which is HF_RULE_NONE, where the table does not hold
 * what it should. */
__noinline __u64 hf_find_rule(__u32 chunk, __u32 word, __u32 buckets, __u32 bucket, __u32 offset)
{
	__u32 zero = 0, first, row;
	__u64 lo, hi, mid, beyond, rule;
	struct hf_chunk *c;
	__u16 *at;
	void *map;

	map = bpf_map_lookup_elem(&hf_chunks, &chunk);
	if (!map)
		return 0;
	c = bpf_map_lookup_elem(map, &zero);
	row = word + bucket;
	if (!c || bucket >= buckets || row >= HF_CHUNK_WORDS - 1)
		return 0;
	lo = c->words[row];
	hi = c->words[row + 1];
	first = word + buckets + 1;
	for (int i = 0; i < 12; i++) {
		if (lo >= hi)
			break;
		mid = (lo + hi) / 2;
		row = first + HF_ROW_WORDS * mid;
		if (row >= HF_CHUNK_WORDS)
			return 0;
		/* All ones where the row is beyond offset. Without a branch, which neither the
		 * CPU nor the verifier can foresee. */
		beyond = (__u64)offset - c->words[row];
		bpf_barrier(beyond);
		beyond = (__s64)beyond >> 63;
		lo = (lo & beyond) | ((mid + 1) & ~beyond);
		hi = (hi & ~beyond) | (mid & beyond);
	}
	/* lo is the first row beyond it. User space leaves the first words of a chunk free, so
	 * that there is a row before every row. */
	row = first + HF_ROW_WORDS * lo - 2 * HF_ROW_WORDS;
	bpf_barrier(row);
	if (!lo || row > HF_CHUNK_WORDS - 2 * HF_ROW_WORDS)
		return 0;
	at = &c->words[row];
	rule = at[4] | (__u32)at[5] << 16;
	if ((rule & 7) == HF_RULE_WIDE)
		rule |= (__u64)(at[1] | (__u32)at[2] << 16) << 32;
	return rule;
}

/* Notes an area that a frame lies in, once. */
static __always_inline void hf_add_area(struct hf_walk *w)
{
	__u64 start = w->place.area.start;
	__u32 i;

	for (i = 0; i < HF_MAX_AREAS; i++) {
		if (i >= w->areas)
			break;
		if (w->area[i].start == start)
			return;
	}
	/* Frames in areas beyond the limit have none. */
	if (i >= HF_MAX_AREAS)
		return;
	w->area[i] = w->place.area;
	w->areas = i + 1;
}

static __always_inline struct hf_known_place *hf_known(struct hf_walk *w, __u64 address)
{
	struct hf_known_places *known;
	__u32 zero = 0;
	__u64 slot;

	known = bpf_map_lookup_elem(&hf_places, &zero);
	if (!known)
		return NULL;
	slot = ((__u64)w->mm >> 6 ^ address >> HF_REGION_SHIFT) * 0x9e3779b97f4a7c15ULL >> 58;
	return &known->at[slot & (HF_KNOWN_PLACES - 1)];
}

/* Finds the place of address. False where there is no executable memory. */
__noinline bool hf_find_place(struct hf_walk *w, __u64 address)
{
	struct hf_table_key key = {};
	struct hf_known_place *known;
	struct hf_table *table;
	struct hf_place *p;
	__u64 offset;

	if (!w)
		return false;
	known = hf_known(w, address);
	p = &w->place;
	if (known && known->mm == w->mm && address >= known->place.lo && address < known->place.hi &&
	    known->start_ns == w->start_ns && known->until_ns > w->now &&
	    known->mm_changes == w->mm_changes && known->table_changes == w->table_changes) {
		*p = known->place;
		hf_add_area(w);
		return true;
	}
	if (!hf_vma_area(w->mm, address, &p->area)) {
		p->lo = p->hi = 0;
		return false;
	}
	p->lo = p->area.start;
	p->hi = p->area.end;
	p->chunk = p->word = 0;
	p->first_bucket = p->buckets = 0;
	p->state = HF_TABLE_FOUND;
	if (p->area.file.inode && w->word == 8) {
		offset = address - p->area.start + p->area.offset;
		key.file = p->area.file;
		key.region = offset >> HF_REGION_SHIFT;
		/* The region's ends, if they lie within the mapping. */
		if ((offset & HF_REGION_MASK) <= address - p->lo)
			p->lo = address - (offset & HF_REGION_MASK);
		if (p->hi - address > HF_REGION_MASK + 1 - (offset & HF_REGION_MASK))
			p->hi = address + HF_REGION_MASK + 1 - (offset & HF_REGION_MASK);
		table = bpf_map_lookup_elem(&hf_tables, &key);
		if (table) {
			p->chunk = table->chunk;
			p->word = table->word;
			p->first_bucket = table->first_bucket;
			p->buckets = table->buckets;
			table->used_ns = w->now;
		} else {
			p->state = HF_TABLE_MISSING;
		}
	}
	hf_add_area(w);
	if (known && w->mm_changes && p->state == HF_TABLE_FOUND) {
		known->place = *p;
		known->mm = w->mm;
		known->start_ns = w->start_ns;
		known->until_ns = w->now + HF_KNOWN_NS;
		known->mm_changes = w->mm_changes;
		known->table_changes = w->table_changes;
	}
	return true;
}

/* The rule for address, which lies in the walk's place. */
static __always_inline __u64 hf_rule(struct hf_walk *w, __u64 address)
{
	struct hf_place *p = &w->place;
	__u64 offset = address - p->area.start + p->area.offset;
	__u32 bucket = (offset & HF_REGION_MASK) >> HF_BUCKET_SHIFT;

	if (p->state == HF_TABLE_MISSING) {
		w->outcome = HF_OUTCOME_NO_TABLE;
		return HF_RULE_NONE;
	}
	if (!p->buckets || bucket < p->first_bucket)
		return HF_RULE_NONE;
	return hf_find_rule(p->chunk, p->word, p->buckets, bucket - p->first_bucket, offset & 0xffff);
}

/* Follows the frame pointer. As nothing says that there is one, it must look like one. */
static __always_inline void hf_step_pointer(struct hf_walk *w)
{
	__u64 fp = w->at.fp, ip = 0, next = 0;

	if (w->word == 4)
		fp &= 0xffffffff;
	if (!fp && w->frames > 1) {
		w->outcome = HF_OUTCOME_COMPLETE; /* the ABI's mark of the outermost frame */
		return;
	}
	/* Go on arm64 keeps the frame record below the stack pointer. */
	if (fp + HF_RECORD_BELOW < w->at.sp || fp & (w->word - 1) || fp + HF_RECORD_BELOW - w->at.sp > (1 << 23)) {
		w->outcome = HF_OUTCOME_NO_RULE;
		return;
	}
	if (!hf_read(w, fp, &next) || !hf_read(w, fp + w->word, &ip)) {
		w->outcome = HF_OUTCOME_NO_RULE;
		return;
	}
	if (w->word == 4) {
		ip &= 0xffffffff;
		next &= 0xffffffff;
	}
	w->at.sp = fp + 2 * w->word;
	w->at.fp = next;
	w->at.ip = ip;
	w->at.second = 0;
	w->at.exact = w->at.leaf = false;
}

/* Takes all registers from the frame that the kernel made for a signal handler. */
static __always_inline void hf_step_signal(struct hf_walk *w)
{
	__u64 sp = w->at.sp, ip = 0, fp = 0, second = 0, next = 0;
#if defined(__TARGET_ARCH_x86)
	/* struct ucontext: uc_mcontext after flags, link and stack; struct sigcontext_64 */
	const __u64 regs = sp + 40, at_fp = 80, at_second = 88, at_sp = 120, at_ip = 128;
#else
	/* struct rt_sigframe: siginfo of 128 bytes, then struct ucontext with sigcontext at 176 */
	const __u64 regs = sp + 128 + 176 + 8, at_fp = 232, at_second = 240, at_sp = 248, at_ip = 256;
#endif
	if (!hf_read(w, regs + at_ip, &ip) || !hf_read(w, regs + at_sp, &next) ||
	    !hf_read(w, regs + at_fp, &fp) || !hf_read(w, regs + at_second, &second)) {
		w->outcome = HF_OUTCOME_BAD_STACK;
		return;
	}
	w->at.sp = next;
	w->at.fp = fp;
	w->at.second = second;
	w->at.ip = ip;
	w->at.exact = true;
	w->at.leaf = false;
}

/* The value of a register of the frame, by DWARF number. */
static __always_inline bool hf_register(struct hf_walk *w, __u32 number, __u64 *value)
{
	if (number == HF_DWARF_SP)
		*value = w->at.sp;
	else if (number == HF_DWARF_FP)
		*value = w->at.fp;
	else if (number == HF_DWARF_SECOND)
		*value = w->at.second;
	else if (w->at.leaf)
		*value = w->at.registers[number & 31];
	else
		return false;
	return true;
}

/* One register of the caller. kind is enum hf_saved, base the CFA's register. */
static __always_inline bool hf_saved(struct hf_walk *w, __u32 kind, __u64 offset, __u64 cfa, __u64 base, __u64 *value)
{
	if (kind == HF_SAVED_CFA)
		return hf_read(w, cfa - 8 * offset, value);
	if (kind == HF_SAVED_FP)
#if defined(__TARGET_ARCH_x86)
		return hf_read(w, w->at.fp - 8 * offset, value);
#else
		return hf_read(w, base + 8 * offset, value);
#endif
	if (kind == HF_SAVED_LOST)
		*value = 0;
	return true;
}

#if defined(__TARGET_ARCH_arm64)
/* The stack pointer before Go's asmcgocall switched stacks: see unwind.h. */
static __always_inline bool hf_go_stack(struct hf_walk *w, __u64 *old)
{
	__u64 g = 0, high = 0;

	if (!hf_read(w, w->at.sp, &g) || !hf_read(w, w->at.sp + 8, old))
		return false;
	if (!g)
		return true;
	if (!hf_read(w, g + 8, &high))
		return false;
	*old = high - *old;
	return true;
}
#endif

/* Goes to the caller by a rule that has a CFA. */
static __always_inline void hf_step_rule(struct hf_walk *w, __u64 rule)
{
	__u32 kind = rule & 7, fp_kind, second_kind, in_register = 0;
	__u64 fp_offset, second_offset, cfa, base = 0, fp = w->at.fp, second = w->at.second, ip = 0;

	if (kind == HF_RULE_WIDE) {
		__u64 top;

		if (!hf_register(w, rule >> 3 & 31, &base)) {
			w->outcome = HF_OUTCOME_REGISTER;
			return;
		}
		cfa = base + 8 * ((__s64)(rule << 12) >> 44);
		if (rule >> 8 & 1) {
			if (!hf_read(w, cfa, &top)) {
				w->outcome = HF_OUTCOME_BAD_STACK;
				return;
			}
			cfa = top + 8 * (__s64)(signed char)(rule >> 13);
		} else {
			in_register = rule >> 13 & 255;
		}
		fp_kind = rule >> 9 & 3;
		second_kind = rule >> 11 & 3;
		fp_offset = rule >> 21 & 2047;
		second_offset = rule >> 52;
	} else {
		cfa = 8 * (rule >> 3 & 0x7fff);
		if (kind == HF_RULE_PLT)
			cfa = w->at.sp + 8 + ((w->at.ip & 15) >= (rule >> 3 & 0x7fff) ? 8 : 0);
		else if (kind == HF_RULE_SP)
			cfa += w->at.sp;
		else
			cfa += w->at.fp;
		fp_offset = rule >> 18 & 127;
		second_offset = rule >> 25 & 127;
#if defined(__TARGET_ARCH_arm64)
		if (kind == HF_RULE_GO && !fp_offset) {
			if (!hf_go_stack(w, &cfa)) {
				w->outcome = HF_OUTCOME_BAD_STACK;
				return;
			}
			cfa += 8 * (rule >> 3 & 0x7fff);
			fp_offset = second_offset + 1;
		}
#endif
		fp_kind = fp_offset ? HF_SAVED_CFA : HF_SAVED_NOT;
		second_kind = second_offset ? HF_SAVED_CFA : HF_SAVED_NOT;
	}
	/* Callers lie higher; only a leaf of arm64 has no frame at all. Go changes stacks. */
	if (kind != HF_RULE_GO && (cfa < w->at.sp || (cfa == w->at.sp && !w->at.exact))) {
		w->outcome = HF_OUTCOME_BAD_STACK;
		return;
	}
	if (!hf_saved(w, second_kind, second_offset, cfa, base, &second) ||
	    !hf_saved(w, fp_kind, fp_offset, cfa, base, &fp)) {
		w->outcome = HF_OUTCOME_BAD_STACK;
		return;
	}
	if (in_register) {
		if (!hf_register(w, in_register - 1, &ip)) {
			w->outcome = HF_OUTCOME_REGISTER;
			return;
		}
	}
#if defined(__TARGET_ARCH_x86)
	else if (!hf_read(w, cfa - 8, &ip)) {
		w->outcome = HF_OUTCOME_BAD_STACK;
		return;
	}
	w->at.second = second;
#else
	/* A function that has called another has saved its return address. */
	else if (second_kind == HF_SAVED_NOT && !w->at.exact) {
		w->outcome = HF_OUTCOME_REGISTER;
		return;
	} else {
		ip = second;
	}
	w->at.second = 0;
#endif
	w->at.sp = cfa;
	w->at.fp = fp;
	w->at.ip = ip;
	w->at.exact = w->at.leaf = false;
}

/* One frame: notes it and goes to its caller. Returns 1 when the walk has ended. */
static long hf_step(__u32 i, void *unused)
{
	struct hf_walk *w = hf_walk_state();
	__u64 ip, rule, address;
	__u32 n;

	if (!w)
		return 1;
	ip = w->at.ip;
#if defined(__TARGET_ARCH_arm64)
	ip &= hf_address_mask;
	w->at.ip = ip;
#endif
	/* Zero where there is no caller, at the start of threads and programs without CFI. */
	if (!ip && w->frames) {
		w->outcome = HF_OUTCOME_COMPLETE;
		return 1;
	}
	n = w->frames;
	if (n >= HF_MAX_USER_FRAMES) {
		w->outcome = HF_OUTCOME_TRUNCATED;
		return 1;
	}
	address = w->at.exact ? ip : ip - 1;
	if ((address < w->place.lo || address >= w->place.hi) && !hf_find_place(w, address)) {
		w->outcome = HF_OUTCOME_BAD_ADDRESS;
		/* That of a leaf is what the CPU was at; others are no addresses of code. */
		if (!n) {
			w->ips[0] = ip | HF_EXACT;
			w->frames = 1;
		}
		return 1;
	}
	w->frames = n + 1;
	/* Linux 6.1 forgets the bound of what was kept on the stack meanwhile. */
	bpf_barrier(n);
	w->ips[n & (HF_MAX_USER_FRAMES - 1)] = w->at.exact ? ip | HF_EXACT : ip;

	rule = hf_rule(w, address);
	if (w->outcome)
		return 1;
	switch (rule & 7) {
	case HF_RULE_END:
		w->outcome = HF_OUTCOME_COMPLETE;
		break;
	case HF_RULE_NONE:
		hf_step_pointer(w);
		break;
	case HF_RULE_SIGNAL:
		hf_step_signal(w);
		break;
	default:
		hf_step_rule(w, rule);
	}
	return w->outcome != 0;
}

/* Fills the leaf from the registers with which its task entered the kernel. True for a
 * 32-bit program. */
static __always_inline bool hf_leaf(struct hf_frame *at, const struct hf_regs *regs)
{
	at->exact = at->leaf = true;
	at->ip = regs->ip;
#if defined(__TARGET_ARCH_x86)
	/* struct pt_regs: r15 ... */
	at->registers[0] = regs->general[10];
	at->registers[1] = regs->general[12];
	at->registers[2] = regs->general[11];
	at->registers[3] = regs->general[5];
	at->registers[4] = regs->general[13];
	at->registers[5] = regs->general[14];
	at->registers[6] = regs->general[4];
	at->registers[7] = regs->sp;
	at->registers[8] = regs->general[9];
	at->registers[9] = regs->general[8];
	at->registers[10] = regs->general[7];
	at->registers[11] = regs->general[6];
	at->registers[12] = regs->general[3];
	at->registers[13] = regs->general[2];
	at->registers[14] = regs->general[1];
	at->registers[15] = regs->general[0];
#else
	for (int i = 0; i < 31; i++)
		at->registers[i] = regs->general[i];
	at->registers[31] = regs->sp;
#endif
	at->sp = at->registers[HF_DWARF_SP];
	at->fp = at->registers[HF_DWARF_FP];
	at->second = at->registers[HF_DWARF_SECOND];
#if defined(__TARGET_ARCH_x86)
	return regs->cs == 0x23; /* __USER32_CS */
#else
	return regs->pstate & 0x10; /* PSR_MODE32_BIT */
#endif
}

/* Fills the leaf from the registers with which the task entered the kernel. */
static __always_inline bool hf_walk_begin(struct hf_walk *w, struct task_struct *task)
{
	void *user = (void *)bpf_task_pt_regs(task);
	__u32 *changes, zero = 0;

	changes = bpf_map_lookup_elem(&hf_changes, &zero);
	w->mm = task->mm;
	w->now = bpf_ktime_get_ns();
	w->start_ns = BPF_CORE_READ(task, group_leader, start_boottime);
	w->mm_changes = hf_mm_changes(w->mm);
	w->table_changes = changes ? *changes : 0;
	w->place.lo = w->place.hi = 0;
	w->frames = w->areas = w->outcome = 0;
	w->window_at = w->window_size = 0;
	w->window_next = HF_FIRST_WINDOW;
	w->word = 8;
	/* Not on the stack, which is short. */
	struct hf_regs *regs = (struct hf_regs *)w->window;

	if (bpf_probe_read_kernel(regs, sizeof(*regs), user))
		return false;
	if (hf_leaf(&w->at, regs))
		w->word = 4;
	return true;
}

#endif
