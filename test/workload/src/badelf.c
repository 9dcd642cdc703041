/* SPDX-License-Identifier: Apache-2.0
 *
 * badelf KIND FILE SECONDS: burns CPU in code that is mapped from a FILE that no ELF
 * reader can make sense of. It writes FILE, maps it executable, and runs in it.
 *
 *	garbage  not an ELF file at all
 *	header   an ELF header whose tables lie far outside of the file
 *	loop     program and section headers that point at the header itself
 *	short    a good-looking header; once it is mapped the file is cut right behind
 *	         the code, so that the page that runs is there and the tables are not
 */
#define _GNU_SOURCE
#include <elf.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* Position-independent, calls nothing: its bytes run wherever they are copied to. */
__attribute__((section("movable"), noinline, noclone, optimize("no-stack-protector")))
static unsigned long spin(unsigned long n)
{
	unsigned long x = n;

	while (n--)
		x = x * 2862933555777941757UL + 1;
	return x;
}
extern const char __start_movable[], __stop_movable[];

enum { PAGE = 65536 /* the largest page size of our machines */, CODE = 1024 };

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: badelf garbage|header|loop|short FILE SECONDS\n");
		return 2;
	}
	const char *kind = argv[1];
	static unsigned char image[2 * PAGE];
	Elf64_Ehdr h = {.e_type = ET_DYN, .e_machine = EM_X86_64, .e_version = EV_CURRENT,
			.e_ehsize = sizeof(h), .e_phentsize = sizeof(Elf64_Phdr),
			.e_shentsize = sizeof(Elf64_Shdr)};

	memcpy(h.e_ident, ELFMAG, SELFMAG);
	h.e_ident[EI_CLASS] = ELFCLASS64;
	h.e_ident[EI_DATA] = ELFDATA2LSB;
	h.e_ident[EI_VERSION] = EV_CURRENT;
	if (!strcmp(kind, "header")) {
		h.e_phoff = ~0UL - 7;
		h.e_shoff = 1UL << 62;
		h.e_phnum = h.e_shnum = h.e_shstrndx = 0xffff;
	} else if (!strcmp(kind, "loop")) {
		h.e_phnum = h.e_shnum = 64;
	} else if (!strcmp(kind, "short")) {
		h.e_phoff = sizeof(h);
		h.e_shoff = PAGE;
		h.e_phnum = 4;
		h.e_shnum = 32;
	} else if (!strcmp(kind, "garbage")) {
		memset(&h, 0xa5, sizeof(h));
	} else {
		fprintf(stderr, "badelf: no kind %s\n", kind);
		return 2;
	}
	memset(image, 0xa5, sizeof(image));
	memcpy(image, &h, sizeof(h));
	size_t size = __stop_movable - __start_movable;
	memcpy(image + CODE, __start_movable, size);

	int fd = open(argv[2], O_RDWR | O_CREAT | O_TRUNC, 0755);
	if (fd < 0 || write(fd, image, sizeof(image)) != sizeof(image)) {
		perror(argv[2]);
		return 1;
	}
	unsigned char *m = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
	if (m == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	if (!strcmp(kind, "short") && ftruncate(fd, CODE + size)) {
		perror("ftruncate");
		return 1;
	}
	size_t offset = (const char *)(void *)spin - __start_movable;
	unsigned long (*run)(unsigned long) = (void *)(m + CODE + offset);
	time_t end = time(NULL) + atol(argv[3]);
	puts("ready");
	fflush(stdout);
	while (time(NULL) < end)
		run(100000);
	return 0;
}
