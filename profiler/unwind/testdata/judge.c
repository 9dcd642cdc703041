// SPDX-License-Identifier: Apache-2.0

// Prints the call frame information of ELF files as elfutils evaluates it, a line for each
// range of addresses with one set of rules, in order of address:
//
//     start end signal cfa fp second ra sp
//
// in hex, and rules as DWARF operations (atom:operand:operand, joined by commas), "same"
// or "undefined". A line "error address" where elfutils finds no information ends what
// went before. With -d first, .debug_frame is read instead of .eh_frame. A file begins with
// a line "file machine path".
#include <dwarf.h>
#include <elfutils/libdw.h>
#include <elfutils/version.h>
#include <fcntl.h>
#include <gelf.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void print_ops(Dwarf_Op *ops, size_t n)
{
	for (size_t i = 0; i < n; i++)
		printf("%s%x:%" PRIx64 ":%" PRIx64, i ? "," : " ", ops[i].atom, ops[i].number, ops[i].number2);
}

static void print_register(Dwarf_Frame *frame, int reg)
{
	Dwarf_Op mem[3], *ops = mem;
	size_t n = 0;

	if (dwarf_frame_register(frame, reg, mem, &ops, &n))
		printf(" error");
	else if (n)
		print_ops(ops, n);
	else
		printf(ops == mem ? " undefined" : " same");
}

static void judge(const char *path, int debug)
{
	int fd = open(path, O_RDONLY);
	Elf *elf = elf_begin(fd, ELF_C_READ_MMAP, NULL);
	GElf_Ehdr header;
	size_t segments = 0;
	Dwarf *dwarf = NULL;
	Dwarf_CFI *cfi;

	if (!gelf_getehdr(elf, &header) || elf_getphdrnum(elf, &segments))
		goto out;
	printf("file %d %s\n", header.e_machine, path);
	int arm = header.e_machine == EM_AARCH64;
	if (debug) {
		dwarf = dwarf_begin_elf(elf, DWARF_C_READ, NULL);
		cfi = dwarf ? dwarf_getcfi(dwarf) : NULL;
	} else {
		cfi = dwarf_getcfi_elf(elf);
	}
	for (size_t i = 0; cfi && i < segments; i++) {
		GElf_Phdr p;

		if (!gelf_getphdr(elf, i, &p) || p.p_type != PT_LOAD || !(p.p_flags & PF_X))
			continue;
		int known = 1;
		for (Dwarf_Addr at = p.p_vaddr, start, end; at < p.p_vaddr + p.p_filesz;) {
			Dwarf_Frame *frame = NULL;
			Dwarf_Op *ops = NULL;
			size_t n = 0;
			bool signal = false;

			if (dwarf_cfi_addrframe(cfi, at, &frame)) {
				if (known)
					printf("error %" PRIx64 "\n", (uint64_t)at);
				known = 0;
				at++;
				continue;
			}
			known = 1;
			int ra = dwarf_frame_info(frame, &start, &end, &signal);
			if (ra < 0 || end <= at)
				end = at + 1;
			printf("%" PRIx64 " %" PRIx64 " %d", (uint64_t)at, (uint64_t)end, signal);
			if (dwarf_frame_cfa(frame, &ops, &n) || !n)
				printf(" error");
			else
				print_ops(ops, n);
			print_register(frame, arm ? 29 : 6);
			print_register(frame, arm ? 30 : 3);
			print_register(frame, ra);
			print_register(frame, arm ? 31 : 7);
			putchar('\n');
			free(frame);
			at = end;
		}
	}
	if (!debug && cfi)
		dwarf_cfi_end(cfi);
	if (dwarf)
		dwarf_end(dwarf);
out:
	elf_end(elf);
	close(fd);
}

int main(int argc, char **argv)
{
	int debug = argc > 1 && !strcmp(argv[1], "-d");

	elf_version(EV_CURRENT);
	for (int i = 1 + debug; i < argc; i++)
		judge(argv[i], debug);
	return 0;
}
