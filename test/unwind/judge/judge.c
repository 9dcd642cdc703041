/* SPDX-License-Identifier: Apache-2.0
 *
 * judge: unwinds copies of stacks with elfutils, independently of hostflame. It reads
 * records from standard input, until its end, and writes an answer for each stack to
 * standard output. All numbers are little-endian, as the machine's.
 *
 *	'M' u32 set, u32 count, count times:        the mappings of a process; a set that
 *	    u64 start, end, offset, u16 n, n bytes   is given again replaces the old one
 *	'S' u32 set, u32 registers, u64 each,       by DWARF number, the IP behind them
 *	    u64 address, u32 n, n bytes              the copy, and where it was taken
 *
 * An answer:
 *
 *	u8 ended            1: at an outermost frame by the CFI
 *	u8 missed           1: it had to stop for want of memory that is not in the copy, at
 *	u64 address         this address
 *	u32 count, u64 each the frames' addresses, leaf first, those of callers return
 *	                    addresses; bit 63: exact (the leaf, an interrupted frame)
 *	u16 n, n bytes      the error, empty if there is none
 *
 * Memory other than the copy is read from the mapped files alone, by elfutils itself for
 * CFI; a read of the process's memory outside the copy fails.
 */
#include <elfutils/libdwfl.h>
#include <fcntl.h>
#include <gelf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_FRAMES 600
#define MAX_REGISTERS 40
#define EXACT (1ULL << 63)

struct mapping {
	uint64_t start, end, offset;
	char *path;
};

struct set {
	Dwfl *dwfl;
	int attached;
};

static struct set *sets;
static uint32_t nsets;

/* The stack at hand. */
static struct {
	uint32_t nregs;
	Dwarf_Word regs[MAX_REGISTERS];
	uint64_t address;
	uint32_t size, room;
	unsigned char *copy;
	uint64_t frames[MAX_FRAMES];
	uint32_t nframes;
	/* Since the last frame. */
	int missed, reads;
	uint64_t missed_at, last;
} now;

static void die(const char *what)
{
	fprintf(stderr, "judge: %s\n", what);
	exit(1);
}

static void get(void *to, size_t n)
{
	if (n && fread(to, n, 1, stdin) != 1)
		die("the input ends within a record");
}

static uint32_t get32(void)
{
	uint32_t v;

	get(&v, sizeof(v));
	return v;
}

static uint64_t get64(void)
{
	uint64_t v;

	get(&v, sizeof(v));
	return v;
}

static void put(const void *from, size_t n)
{
	if (n && fwrite(from, n, 1, stdout) != 1)
		die("can not write");
}

/* What elfutils asks for. */

static bool memory_read(Dwfl *dwfl, Dwarf_Addr addr, Dwarf_Word *result, void *arg)
{
	(void)dwfl, (void)arg;
	if (addr < now.address || addr - now.address + 8 > now.size) {
		if (!now.missed)
			now.missed_at = addr;
		now.missed = 1;
		return false;
	}
	memcpy(result, now.copy + (addr - now.address), 8);
	now.reads++;
	now.last = *result;
	return true;
}

static bool set_initial_registers(Dwfl_Thread *thread, void *arg)
{
	(void)arg;
	/* The IP is no register of DWARF on arm64; on amd64 it is number 16. */
	dwfl_thread_state_register_pc(thread, now.regs[now.nregs - 1]);
#ifdef __x86_64__
	return dwfl_thread_state_registers(thread, 0, now.nregs, now.regs);
#else
	return dwfl_thread_state_registers(thread, 0, now.nregs - 1, now.regs);
#endif
}

static bool get_thread(Dwfl *dwfl, pid_t tid, void *dwfl_arg, void **thread_arg)
{
	(void)dwfl, (void)tid;
	*thread_arg = dwfl_arg;
	return true;
}

static pid_t next_thread(Dwfl *dwfl, void *dwfl_arg, void **thread_arg)
{
	(void)dwfl;
	if (*thread_arg)
		return 0;
	*thread_arg = dwfl_arg;
	return 1;
}

static const Dwfl_Thread_Callbacks threads = {
	.next_thread = next_thread,
	.get_thread = get_thread,
	.memory_read = memory_read,
	.set_initial_registers = set_initial_registers,
};

static char *debuginfo_path = "-:.debug:/usr/lib/debug";

static const Dwfl_Callbacks callbacks = {
	.find_elf = dwfl_build_id_find_elf,
	.find_debuginfo = dwfl_standard_find_debuginfo,
	.debuginfo_path = &debuginfo_path,
};

static int on_frame(Dwfl_Frame *frame, void *arg)
{
	Dwarf_Addr pc;
	bool exact;

	(void)arg;
	/* The question below, or the return, unwinds this frame. */
	now.missed = 0;
	now.reads = 0;
	if (!dwfl_frame_pc(frame, &pc, &exact) || now.nframes == MAX_FRAMES)
		return DWARF_CB_ABORT;
	now.frames[now.nframes++] = pc | (exact ? EXACT : 0);
	return DWARF_CB_OK;
}

/* Tells whether the CFI of the last frame says that it has no caller, or the caller's
 * address was zero. elfutils says that of more: of a frame whose CFA it does not know. On
 * amd64 it knows rbx of no frame above one that does not save it (its x86_64_cfi.c takes
 * register 0 for rbx, which is 3), so it ends at functions with their CFA there. */
static int outermost(Dwfl *dwfl)
{
	Dwarf_Addr pc, bias, start, end;
	Dwarf_Op memory[3], *ops;
	Dwarf_Frame *frame;
	Dwfl_Module *module;
	Dwarf_CFI *cfi;
	size_t nops;
	bool signal;
	int ra, is;

	if (!now.nframes)
		return 0;
	if (now.reads && !now.last)
		return 1;
	pc = now.frames[now.nframes - 1];
	pc = pc & EXACT ? pc & ~EXACT : pc - 1;
	module = dwfl_addrmodule(dwfl, pc);
	if (!module)
		return 0;
	cfi = dwfl_module_eh_cfi(module, &bias);
	if (!cfi || dwarf_cfi_addrframe(cfi, pc - bias, &frame)) {
		cfi = dwfl_module_dwarf_cfi(module, &bias);
		if (!cfi || dwarf_cfi_addrframe(cfi, pc - bias, &frame))
			return 0;
	}
	ra = dwarf_frame_info(frame, &start, &end, &signal);
	is = ra >= 0 && !dwarf_frame_register(frame, ra, memory, &ops, &nops) && nops == 0 && ops == memory;
	free(frame);
	return is;
}

/* Where the file's addresses are in the process: by the segment that the mapping shows. */
static int bias_of(Elf *elf, const struct mapping *m, GElf_Addr *bias)
{
	size_t n;

	if (elf_getphdrnum(elf, &n))
		return -1;
	for (size_t i = 0; i < n; i++) {
		GElf_Phdr p;

		if (!gelf_getphdr(elf, (int)i, &p) || p.p_type != PT_LOAD || !(p.p_flags & PF_X))
			continue;
		/* A mapping begins with the page where the segment does, or later, when split. */
		if (m->offset + 4095 >= p.p_offset && m->offset < p.p_offset + p.p_filesz) {
			*bias = m->start - m->offset - (p.p_vaddr - p.p_offset);
			return 0;
		}
	}
	return -1;
}

static void report(Dwfl *dwfl, const struct mapping *m)
{
	GElf_Addr bias;
	GElf_Ehdr header;
	Elf *elf;
	int fd, found;

	if (m->path[0] != '/')
		return;
	fd = open(m->path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	elf = elf_begin(fd, ELF_C_READ_MMAP, NULL);
	found = elf && gelf_getehdr(elf, &header) && !bias_of(elf, m, &bias);
	elf_end(elf);
	if (!found || dwfl_addrmodule(dwfl, m->start)) {
		close(fd); /* no ELF, or known by another of its mappings */
		return;
	}
	/* On success elfutils has the descriptor. */
	if (!dwfl_report_elf(dwfl, m->path, m->path, fd, header.e_type == ET_EXEC ? 0 : bias, true))
		close(fd);
}

static void read_mappings(void)
{
	uint32_t id = get32(), count = get32();
	struct set *s;

	if (id > 1 << 20 || count > 1 << 20)
		die("a number is too large");
	if (id >= nsets) {
		sets = realloc(sets, (id + 1) * sizeof(*sets));
		if (!sets)
			die("no memory");
		memset(sets + nsets, 0, (id + 1 - nsets) * sizeof(*sets));
		nsets = id + 1;
	}
	s = &sets[id];
	if (s->dwfl)
		dwfl_end(s->dwfl);
	s->attached = 0;
	s->dwfl = dwfl_begin(&callbacks);
	if (!s->dwfl)
		die(dwfl_errmsg(-1));
	dwfl_report_begin(s->dwfl);
	for (uint32_t i = 0; i < count; i++) {
		struct mapping m = {.start = get64(), .end = 0};
		char path[65536];
		uint16_t n;

		m.end = get64();
		m.offset = get64();
		get(&n, sizeof(n));
		get(path, n);
		path[n] = 0;
		m.path = path;
		report(s->dwfl, &m);
	}
	dwfl_report_end(s->dwfl, NULL, NULL);
}

static void unwind(void)
{
	uint32_t id = get32();
	const char *error = "";
	unsigned char ended = 0, missed;
	uint16_t length;

	now.nregs = get32();
	if (now.nregs < 1 || now.nregs > MAX_REGISTERS)
		die("too many registers");
	get(now.regs, now.nregs * 8);
	now.address = get64();
	now.size = get32();
	if (now.size > now.room) {
		now.room = now.size;
		now.copy = realloc(now.copy, now.room);
		if (!now.copy)
			die("no memory");
	}
	get(now.copy, now.size);
	now.nframes = 0;
	now.missed = 0;
	now.missed_at = 0;
	if (id >= nsets || !sets[id].dwfl) {
		error = "no such mappings";
	} else {
		struct set *s = &sets[id];

		if (!s->attached)
			s->attached = dwfl_attach_state(s->dwfl, NULL, 1, &threads, &now);
		dwfl_errno(); /* forget older ones */
		if (!s->attached)
			error = dwfl_errmsg(-1);
		else if (dwfl_getthread_frames(s->dwfl, 1, on_frame, NULL) == 0)
			/* A return address that it can not read is an end to elfutils too. */
			error = now.missed ? "" : (ended = outermost(s->dwfl)) ? "" : "a register is not known";
		else
			error = now.nframes == MAX_FRAMES ? "too many frames" : dwfl_errmsg(-1);
	}
	missed = (unsigned char)now.missed;
	put(&ended, 1);
	put(&missed, 1);
	put(&now.missed_at, 8);
	put(&now.nframes, 4);
	put(now.frames, now.nframes * 8);
	length = (uint16_t)strlen(error);
	put(&length, 2);
	put(error, length);
}

int main(void)
{
	static char in[1 << 20], out[1 << 20];

	setvbuf(stdin, in, _IOFBF, sizeof(in));
	setvbuf(stdout, out, _IOFBF, sizeof(out));
	elf_version(EV_CURRENT);
	for (;;) {
		int kind = getchar();

		if (kind == EOF)
			break;
		else if (kind == 'M')
			read_mappings();
		else if (kind == 'S')
			unwind();
		else
			die("a record of no known kind");
	}
	if (fflush(stdout))
		die("can not write");
	return 0;
}
