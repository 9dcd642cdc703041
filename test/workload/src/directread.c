/* SPDX-License-Identifier: Apache-2.0
 *
 * directread FILE SIZE COUNT: COUNT direct reads of SIZE bytes each, one at a time, at
 * offsets that jump over the file (whose length is a multiple of SIZE), so that neither
 * the page cache nor a merge takes one away. Prints the count, the bytes and the time:
 *
 *	reads 1009 bytes 4132864 ns 98765432
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: directread FILE SIZE COUNT\n");
		return 2;
	}
	size_t size = strtoul(argv[2], NULL, 0);
	long count = atol(argv[3]);
	int fd = open(argv[1], O_RDONLY | O_DIRECT);
	struct stat st;
	void *buf;

	if (fd < 0 || fstat(fd, &st)) {
		perror(argv[1]);
		return 1;
	}
	if (!size || (size_t)st.st_size < size || posix_memalign(&buf, 4096, size)) {
		fprintf(stderr, "directread: %s: no block of %zu bytes\n", argv[1], size);
		return 1;
	}
	unsigned long blocks = st.st_size / size, block = 0;
	long long bytes = 0, start = now();
	for (long i = 0; i < count; i++) {
		/* A prime stride: no block follows its neighbour. */
		block = (block + 7919) % blocks;
		ssize_t n = pread(fd, buf, size, (off_t)(block * size));
		if (n != (ssize_t)size) {
			perror("pread");
			return 1;
		}
		bytes += n;
	}
	printf("reads %ld bytes %lld ns %lld\n", count, bytes, now() - start);
	return 0;
}
