/* SPDX-License-Identifier: Apache-2.0
 *
 * threads SLEEPERS HOGS SECONDS: threads that all live from `ready` to the end, a mix of
 * ones that burn without a pause and ones that burn up to 0.4 ms and sleep up to 3 ms,
 * at different nice values. Says `ready` on standard output when every thread runs.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static atomic_int running, stop;

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

__attribute__((noinline)) static void spin(long nanos)
{
	long long end = now() + nanos;

	while (now() < end)
		;
}

static void start(const char *name, int nice)
{
	prctl(PR_SET_NAME, name);
	/* Of this thread alone, in Linux. */
	setpriority(PRIO_PROCESS, syscall(SYS_gettid), nice);
	running++;
}

static void *sleeper(void *arg)
{
	long i = (long)arg;
	unsigned seed = i * 7919 + 1;

	start("sleeper", i % 20);
	while (!stop) {
		seed = seed * 1103515245 + 12345;
		spin((seed >> 8) % 400000);
		seed = seed * 1103515245 + 12345;
		nanosleep(&(struct timespec){0, (seed >> 8) % 3000000}, NULL);
	}
	return NULL;
}

static void *hog(void *arg)
{
	start("hog", (long)arg * 5 % 20);
	while (!stop)
		spin(1000000);
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: threads SLEEPERS HOGS SECONDS\n");
		return 2;
	}
	long sleepers = atol(argv[1]), hogs = atol(argv[2]);
	pthread_t thread;

	for (long i = 0; i < sleepers + hogs; i++) {
		void *arg = (void *)(i < sleepers ? i : i - sleepers);
		if (pthread_create(&thread, NULL, i < sleepers ? sleeper : hog, arg)) {
			fprintf(stderr, "threads: no thread %ld\n", i);
			return 1;
		}
	}
	while (running < sleepers + hogs)
		usleep(1000);
	puts("ready");
	fflush(stdout);
	usleep((useconds_t)(atof(argv[3]) * 1e6));
	/* The threads live until the process ends, so whoever read their /proc files
	 * just before this sees them whole. */
	_exit(0);
}
