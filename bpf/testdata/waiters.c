/* SPDX-License-Identifier: Apache-2.0 */
/* A load of threads that wait for CPUs in many ways, and live until standard input
 * closes. Prints "ready" once all run. */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SLEEPERS 12
#define HOGS 3
#define PAIRS 2
#define THREADS (SLEEPERS + HOGS + 2 + 2 * PAIRS + 1)

static pthread_barrier_t all;
static pid_t sleepers[SLEEPERS];
static int pipes[PAIRS][2][2];

static void spin(long ns)
{
	struct timespec a, b;

	clock_gettime(CLOCK_MONOTONIC, &a);
	do
		clock_gettime(CLOCK_MONOTONIC, &b);
	while ((b.tv_sec - a.tv_sec) * 1000000000L + b.tv_nsec - a.tv_nsec < ns);
}

static void nap(long ns)
{
	struct timespec t = { ns / 1000000000L, ns % 1000000000L };

	nanosleep(&t, NULL);
}

static void pin(pid_t tid, int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(tid, sizeof(set), &set))
		err(1, "pin to CPU %d", cpu);
}

static void nice_to(int nice)
{
	if (setpriority(PRIO_PROCESS, 0, nice))
		err(1, "set nice %d", nice);
}

/* Runs up to 0.4 ms, sleeps up to 3 ms. */
static void *sleeper(void *arg)
{
	long i = (long)arg;
	unsigned seed = i + 1;

	sleepers[i] = syscall(SYS_gettid);
	nice_to(i * 3 - 18);
	pthread_barrier_wait(&all);
	for (;;) {
		spin(rand_r(&seed) % 400000);
		nap(rand_r(&seed) % 3000000);
	}
	return NULL;
}

static void *hog(void *arg)
{
	long i = (long)arg;

	if (i >= HOGS) {
		pin(0, i - HOGS);
		nice_to(5);
	}
	pthread_barrier_wait(&all);
	for (;;)
		spin(1000000);
	return NULL;
}

/* One of two that wake each other on one CPU, a hundred times in a row. */
static void *pingpong(void *arg)
{
	long i = (long)arg, pair = i / 2, side = i % 2;
	char c = 0;

	pin(0, pair);
	pthread_barrier_wait(&all);
	for (;;) {
		for (int n = 0; n < 100; n++) {
			if (side == 0 && write(pipes[pair][0][1], &c, 1) != 1)
				err(1, "write");
			if (read(pipes[pair][side ? 0 : 1][0], &c, 1) != 1)
				err(1, "read");
			if (side == 1 && write(pipes[pair][1][1], &c, 1) != 1)
				err(1, "write");
		}
		if (side == 0)
			nap(20000000);
	}
	return NULL;
}

/* The real-time class: wakes every 5 ms and runs for 0.1 ms. */
static void *realtime(void *arg)
{
	struct sched_param p = { .sched_priority = 1 };

	errno = pthread_setschedparam(pthread_self(), SCHED_FIFO, &p);
	if (errno)
		err(1, "become real-time");
	pthread_barrier_wait(&all);
	for (;;) {
		spin(100000);
		nap(5000000);
	}
	return arg;
}

static void start(void *(*body)(void *), long arg)
{
	pthread_t t;

	errno = pthread_create(&t, NULL, body, (void *)arg);
	if (errno)
		err(1, "create thread");
}

/* Moves a sleeper to another CPU four times a second. */
static void *mover(void *arg)
{
	for (unsigned i = 0;; i++) {
		nap(250000000);
		pin(sleepers[i % SLEEPERS], i / SLEEPERS % 2);
	}
	return arg;
}

int main(void)
{
	char c;

	nice_to(0);
	pthread_barrier_init(&all, NULL, THREADS + 1);
	for (int p = 0; p < PAIRS; p++)
		if (pipe(pipes[p][0]) || pipe(pipes[p][1]))
			err(1, "pipe");
	for (long i = 0; i < SLEEPERS; i++)
		start(sleeper, i);
	for (long i = 0; i < HOGS + 2; i++)
		start(hog, i);
	for (long i = 0; i < 2 * PAIRS; i++)
		start(pingpong, i);
	start(realtime, 0);
	pthread_barrier_wait(&all);
	start(mover, 0);
	if (puts("ready") < 0 || fflush(stdout))
		err(1, "print");
	while (read(0, &c, 1) > 0)
		;
	return 0;
}
