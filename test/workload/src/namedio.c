/* SPDX-License-Identifier: Apache-2.0
 *
 * namedio DEVICE COUNT: COUNT direct reads of 16 KiB in readKnown, and as many times 8 KiB
 * that are written to the page cache and synced in syncKnown, a millisecond apart. Prints
 * how many bytes that was and how long pread and fsync took:
 *
 *	reads 211 readbytes 3457024 readns 12345678 syncs 211 syncbytes 1728512 syncns 23456789
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define READ 16384
#define SYNC 8192

static int direct, cached;
static char *buf;
static long long read_ns, sync_ns;

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

__attribute__((noinline)) int readKnown(long i)
{
	long long start = now();
	int ok = pread(direct, buf, READ, i * READ) == READ;

	read_ns += now() - start;
	return ok;
}

__attribute__((noinline)) int syncKnown(long i)
{
	/* Pages that differ each time, and are no neighbours. */
	memset(buf, (int)i, SYNC);
	int ok = pwrite(cached, buf, SYNC, (i + 1) * 4 * SYNC) == SYNC;
	long long start = now();

	ok = ok && !fsync(cached);
	sync_ns += now() - start;
	return ok;
}

int main(int argc, char **argv)
{
	struct timespec pause = {.tv_nsec = 1000000};
	long count = argc == 3 ? atol(argv[2]) : 0;

	if (!count) {
		fprintf(stderr, "usage: namedio DEVICE COUNT\n");
		return 2;
	}
	direct = open(argv[1], O_RDONLY | O_DIRECT);
	cached = open(argv[1], O_RDWR);
	if (direct < 0 || cached < 0 || posix_memalign((void **)&buf, 4096, READ)) {
		perror(argv[1]);
		return 1;
	}
	for (long i = 0; i < count; i++) {
		if (!readKnown(i) || !syncKnown(i)) {
			perror(argv[1]);
			return 1;
		}
		nanosleep(&pause, NULL);
	}
	printf("reads %ld readbytes %ld readns %lld syncs %ld syncbytes %ld syncns %lld\n",
	       count, count * READ, read_ns, count, count * SYNC, sync_ns);
	return 0;
}
