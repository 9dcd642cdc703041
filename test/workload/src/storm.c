/* SPDX-License-Identifier: Apache-2.0
 *
 * storm PARALLEL COUNT: COUNT short-lived processes, PARALLEL at a time. Each is a fresh
 * exec of this program under the name storm-N, burns 0 to 8 ms of CPU in brief() and
 * exits. Prints how many there were and the CPU time they took:
 *
 *	processes 499 cpu_ns 2012345678
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile unsigned long sink;

__attribute__((noinline)) static void brief(long long nanos)
{
	struct timespec t;
	unsigned long x = 1;

	do {
		for (int i = 0; i < 20000; i++)
			x = x * 6364136223846793005UL + 1;
		sink = x;
		clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	} while (t.tv_sec * 1000000000LL + t.tv_nsec < nanos);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "brief")) {
		int n = atoi(argv[2]);
		char name[16];

		snprintf(name, sizeof(name), "storm-%d", n);
		prctl(PR_SET_NAME, name);
		brief(n * 7919LL % 8 * 1000000);
		return 0;
	}
	if (argc != 3) {
		fprintf(stderr, "usage: storm PARALLEL COUNT\n");
		return 2;
	}
	int parallel = atoi(argv[1]), count = atoi(argv[2]), running = 0;
	char self[4096] = {0};

	if (readlink("/proc/self/exe", self, sizeof(self) - 1) < 0) {
		perror("/proc/self/exe");
		return 1;
	}
	for (int i = 0; i < count; i++) {
		if (running == parallel && wait(NULL) > 0)
			running--;
		pid_t pid = fork();
		if (pid < 0) {
			perror("fork");
			return 1;
		}
		if (pid == 0) {
			char n[16];

			snprintf(n, sizeof(n), "%d", i);
			execl(self, "storm", "brief", n, NULL);
			_exit(127);
		}
		running++;
	}
	while (wait(NULL) > 0 || errno == EINTR)
		;
	struct rusage r;
	getrusage(RUSAGE_CHILDREN, &r);
	printf("processes %d cpu_ns %lld\n", count,
	       (r.ru_utime.tv_sec + r.ru_stime.tv_sec) * 1000000000LL +
		       (r.ru_utime.tv_usec + r.ru_stime.tv_usec) * 1000LL);
	return 0;
}
