/* SPDX-License-Identifier: Apache-2.0
 *
 * phases SECONDS DIRECTORY: spends its time in six ways, one after the other and over and over,
 * each in a function of its own: computing, waiting for a mutex, reading a pipe, in
 * nanosleep, in fsync and in page faults. Another thread holds the mutex and writes to the
 * pipe, each when it is time. At the end (time is up, or SIGTERM) it prints what the
 * functions really took, in nanoseconds, and what the thread's own CPU time was meanwhile:
 *
 *	compute wall 4999871234 cpu 4989871234
 *	lock wall 4999871234 cpu 171234
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define MILLISECOND 1000000LL
#define FILE_SIZE (4 << 20)

static volatile sig_atomic_t ended;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static sem_t held;
static int pipes[2], ask[2], file = -1;
static char *mapped;

static int64_t now(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void nap(int64_t ns)
{
	struct timespec t = {ns / 1000000000, ns % 1000000000};

	nanosleep(&t, NULL);
}

/* The other thread: takes the mutex when asked, and writes when asked, a while later. */
static void *helper(void *unused)
{
	char what;

	while (read(ask[0], &what, 1) == 1) {
		if (what == 'm') {
			pthread_mutex_lock(&mutex);
			sem_post(&held);
			nap(10 * MILLISECOND);
			pthread_mutex_unlock(&mutex);
		} else {
			nap(10 * MILLISECOND);
			if (write(pipes[1], "x", 1) != 1)
				break;
		}
	}
	return unused;
}

__attribute__((noinline)) static void compute(void)
{
	int64_t until = now(CLOCK_THREAD_CPUTIME_ID) + 10 * MILLISECOND;

	while (now(CLOCK_THREAD_CPUTIME_ID) < until)
		for (volatile int i = 0; i < 10000; i++)
			;
}

__attribute__((noinline)) static void wait_for_mutex(void)
{
	pthread_mutex_lock(&mutex);
	pthread_mutex_unlock(&mutex);
	__asm__ volatile("");
}

__attribute__((noinline)) static void read_pipe(void)
{
	char c;

	if (read(pipes[0], &c, 1) != 1)
		abort();
	__asm__ volatile("");
}

__attribute__((noinline)) static void sleep_a_while(void)
{
	nap(10 * MILLISECOND);
	__asm__ volatile("");
}

__attribute__((noinline)) static void sync_file(void)
{
	static int64_t n;
	int64_t until = now(CLOCK_MONOTONIC) + 10 * MILLISECOND;

	do {
		n++;
		if (pwrite(file, &n, sizeof n, (n * 4096) % FILE_SIZE) < 0 || fsync(file))
			abort();
	} while (now(CLOCK_MONOTONIC) < until);
}

static int touched = FILE_SIZE;

/* Each page is read from the disk again. */
__attribute__((noinline)) static void touch_pages(void)
{
	int64_t until = now(CLOCK_MONOTONIC) + 10 * MILLISECOND;
	volatile char sum = 0;

	for (; touched < FILE_SIZE && now(CLOCK_MONOTONIC) < until; touched += 4096)
		sum += mapped[touched];
}

/* Part of no phase: it waits for a worker of the kernel. */
static void forget_pages(void)
{
	madvise(mapped, FILE_SIZE, MADV_DONTNEED);
	posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
	touched = 0;
}

static struct phase {
	const char *name;
	void (*run)(void);
	int64_t wall, cpu;
} phases[] = {
	{"compute", compute, 0, 0},	  {"lock", wait_for_mutex, 0, 0}, {"pipe", read_pipe, 0, 0},
	{"sleep", sleep_a_while, 0, 0}, {"fsync", sync_file, 0, 0},	  {"fault", touch_pages, 0, 0},
};

static void on_term(int signal)
{
	(void)signal;
	ended = 1;
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = on_term, .sa_flags = SA_RESTART};
	char path[4096], page[4096];
	pthread_t thread;
	int64_t until;

	if (argc != 3) {
		fprintf(stderr, "usage: phases SECONDS DIRECTORY\n");
		return 2;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sigaction(SIGTERM, &action, NULL);
	snprintf(path, sizeof path, "%s/phases.%d", argv[2], getpid());
	file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (file < 0 || unlink(path)) {
		perror(path);
		return 1;
	}
	memset(page, 1, sizeof page);
	for (int i = 0; i < FILE_SIZE / 4096; i++)
		if (write(file, page, sizeof page) != sizeof page)
			return 1;
	fsync(file);
	mapped = mmap(NULL, FILE_SIZE, PROT_READ, MAP_SHARED, file, 0);
	if (mapped == MAP_FAILED || madvise(mapped, FILE_SIZE, MADV_RANDOM) || pipe(pipes) || pipe(ask) ||
	    sem_init(&held, 0, 0))
		return 1;
	if (pthread_create(&thread, NULL, helper, NULL))
		return 1;
	pthread_setname_np(thread, "helper");
	until = now(CLOCK_MONOTONIC) + atoll(argv[1]) * 1000000000LL;
	while (!ended && now(CLOCK_MONOTONIC) < until) {
		if (touched > FILE_SIZE / 2)
			forget_pages();
		for (unsigned i = 0; i < sizeof phases / sizeof *phases; i++) {
			struct phase *p = &phases[i];
			int64_t wall, cpu;

			if (p->run == wait_for_mutex) {
				if (write(ask[1], "m", 1) != 1)
					return 1;
				while (sem_wait(&held))
					;
			} else if (p->run == read_pipe && write(ask[1], "p", 1) != 1) {
				return 1;
			}
			wall = now(CLOCK_MONOTONIC);
			cpu = now(CLOCK_THREAD_CPUTIME_ID);
			p->run();
			p->wall += now(CLOCK_MONOTONIC) - wall;
			p->cpu += now(CLOCK_THREAD_CPUTIME_ID) - cpu;
		}
	}
	for (unsigned i = 0; i < sizeof phases / sizeof *phases; i++)
		printf("%s wall %lld cpu %lld\n", phases[i].name, (long long)phases[i].wall, (long long)phases[i].cpu);
	return 0;
}
