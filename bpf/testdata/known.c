/* SPDX-License-Identifier: Apache-2.0 */
/* Threads whose switches and waits are known, on one CPU:
 *
 *   known CPU pingpong N   two threads wake each other N times: 2 N switch-ins
 *   known CPU sleep N      one thread sleeps N times for 1 ms: N switch-ins
 *   known CPU alarm N      the same, in the real-time class
 *   known CPU deadline N   the same, in the deadline class, on any CPU
 *   known CPU fork N       N children are born, exit, and are waited for
 *   known CPU wait N MS    N waits of MS ms, behind a thread of higher priority
 *   known CPU delayed N    N sleeps of 200 ms, each moved to CPU 0 under way
 *   known CPU busy N       N threads that never sleep, from the start on
 *   known CPU crowd N      N processes of 5 threads that sleep for 2 s at a time, on all CPUs
 *   known CPU write N      N blocks of 4 KiB are written, each through to the disk
 *
 * Prints "ready", does it when a line comes in, prints "done", and ends when standard
 * input closes. "wait" does not wait for a line: it is ready when its first wait begins. */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int cpu, rounds, millis;
static int there[2], back[2];
static sem_t queued, turn;
static volatile pid_t sleeper_tid;
static volatile int asleep;

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

static void pin(pid_t tid, int to)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(to, &set);
	if (sched_setaffinity(tid, sizeof(set), &set))
		err(1, "pin to CPU %d", to);
}

static void realtime(int priority)
{
	struct sched_param p = { .sched_priority = priority };

	if (sched_setscheduler(0, SCHED_FIFO, &p))
		err(1, "become real-time");
}

static pthread_t start(void *(*body)(void *))
{
	pthread_t t;

	errno = pthread_create(&t, NULL, body, NULL);
	if (errno)
		err(1, "create thread");
	return t;
}

static void say(const char *what)
{
	if (puts(what) < 0 || fflush(stdout))
		err(1, "print");
}

static void await(void)
{
	char line[16];

	if (!fgets(line, sizeof(line), stdin))
		exit(0);
}

static void *echo(void *arg)
{
	char c;

	for (int i = 0; i < rounds; i++)
		if (read(there[0], &c, 1) != 1 || write(back[1], &c, 1) != 1)
			err(1, "echo");
	return arg;
}

static void pingpong(void)
{
	pthread_t t;
	char c = 0;

	if (pipe(there) || pipe(back))
		err(1, "pipe");
	t = start(echo);
	say("ready");
	await();
	for (int i = 0; i < rounds; i++)
		if (write(there[1], &c, 1) != 1 || read(back[0], &c, 1) != 1)
			err(1, "ping");
	pthread_join(t, NULL);
}

static void sleeps(void)
{
	say("ready");
	await();
	for (int i = 0; i < rounds; i++)
		nap(1000000);
}

static void alarms(void)
{
	realtime(1);
	sleeps();
}

/* struct sched_attr of the kernel, which glibc has from 2.41 on. */
struct attributes {
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime, deadline, period;
};

static void deadlines(void)
{
	struct attributes a = { .size = sizeof(a), .policy = 6 /* SCHED_DEADLINE */,
				.runtime = 10000000, .deadline = 100000000, .period = 100000000 };
	cpu_set_t all;

	memset(&all, 255, sizeof(all));
	if (sched_setaffinity(0, sizeof(all), &all))
		err(1, "run on all CPUs");
	if (syscall(SYS_sched_setattr, 0, &a, 0))
		err(1, "become a deadline task");
	sleeps();
}

static void forks(void)
{
	say("ready");
	await();
	for (int i = 0; i < rounds; i++) {
		pid_t pid = fork();

		if (pid < 0)
			err(1, "fork");
		if (pid == 0)
			_exit(0);
		waitpid(pid, NULL, 0);
	}
}

/* Woken by its elder, which then keeps the CPU. */
static void *younger(void *arg)
{
	realtime(1);
	for (;;) {
		sem_wait(&queued);
		sem_post(&turn);
	}
	return arg;
}

static void waits(void)
{
	realtime(2);
	start(younger);
	nap(10000000);
	for (int i = 0; i < rounds; i++) {
		sem_post(&queued);
		if (i == 0)
			say("ready");
		spin(millis * 1000000L);
		sem_wait(&turn);
		/* The younger is preempted in its sem_post: its next wait begins so, unless
		 * it gets time to block, and is woken. */
		if (i % 2)
			nap(1000000);
	}
}

static void *hog(void *arg)
{
	for (;;)
		spin(1000000);
	return arg;
}

/* Ends its run owing time to the hog, so that its dequeue is delayed. */
static void *sleeper(void *arg)
{
	sleeper_tid = syscall(SYS_gettid);
	if (setpriority(PRIO_PROCESS, 0, 10))
		err(1, "set nice");
	for (;;) {
		spin(3000000);
		asleep = 1;
		nap(200000000);
		asleep = 0;
	}
	return arg;
}

static void delayed(void)
{
	start(hog);
	start(sleeper);
	say("ready");
	await();
	pin(0, 0);
	/* The delay ends when the hog has had its due. */
	realtime(1);
	for (int i = 0; i < rounds; i++) {
		while (!asleep)
			nap(50000);
		pin(sleeper_tid, 0);
		while (asleep)
			nap(1000000);
		pin(sleeper_tid, cpu);
	}
}

static void *napper(void *arg)
{
	for (;;)
		nap(2000000000);
	return arg;
}

static void crowd(void)
{
	cpu_set_t all;

	memset(&all, 0xff, sizeof(all));
	if (sched_setaffinity(0, sizeof(all), &all))
		err(1, "be anywhere");
	for (int i = 0; i < rounds; i++) {
		pid_t pid = fork();

		if (pid < 0)
			err(1, "fork");
		if (pid)
			continue;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (int j = 0; j < 4; j++)
			start(napper);
		napper(NULL);
	}
	say("ready");
	await();
}

static void writes(void)
{
	static char block[4096];
	int fd = open("/var/tmp", O_TMPFILE | O_WRONLY | O_DSYNC, 0600);

	if (fd < 0)
		err(1, "make a file");
	say("ready");
	await();
	for (int i = 0; i < rounds; i++)
		if (pwrite(fd, block, sizeof(block), i % 1024 * sizeof(block)) != sizeof(block))
			err(1, "write");
}

static void busy(void)
{
	for (int i = 0; i < rounds; i++)
		start(hog);
	say("ready");
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} modes[] = {
		{ "pingpong", pingpong }, { "sleep", sleeps }, { "alarm", alarms }, { "deadline", deadlines },
		{ "fork", forks }, { "wait", waits }, { "delayed", delayed }, { "busy", busy }, { "write", writes },
		{ "crowd", crowd },
	};

	if (argc < 4)
		errx(1, "usage: known CPU MODE N [MS]");
	cpu = atoi(argv[1]);
	rounds = atoi(argv[3]);
	millis = argc > 4 ? atoi(argv[4]) : 0;
	sem_init(&queued, 0, 0);
	sem_init(&turn, 0, 0);
	pin(0, cpu);
	for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++)
		if (!strcmp(argv[2], modes[i].name)) {
			modes[i].run();
			say("done");
			await();
			return 0;
		}
	errx(1, "no mode %s", argv[2]);
}
