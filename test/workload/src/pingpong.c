/* SPDX-License-Identifier: Apache-2.0
 *
 * pingpong CPU ROUNDS: two processes on one CPU pass a byte to and fro through two
 * pipes. Each pass wakes one process and soon blocks the other, or is preempted by it, so
 * that ROUNDS rounds make 2 x ROUNDS context switches. ROUNDS 0: until SIGTERM, or 10
 * minutes.
 *
 * Prints what the kernel counted for both processes and the time of a round:
 *
 *	rounds 10007 switches 20015 ns_per_round 6120
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t stop;

static void on_signal(int sig)
{
	(void)sig;
	stop = 1;
}

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
	int there[2], back[2];
	cpu_set_t set;
	char c = 0;

	if (argc != 3) {
		fprintf(stderr, "usage: pingpong CPU ROUNDS\n");
		return 2;
	}
	CPU_ZERO(&set);
	CPU_SET(atoi(argv[1]), &set);
	if (sched_setaffinity(0, sizeof(set), &set) || pipe(there) || pipe(back)) {
		perror("pingpong");
		return 1;
	}
	long rounds = atol(argv[2]);
	long long limit = now() + 600 * 1000000000LL;

	pid_t child = fork();
	if (child == 0) {
		prctl(PR_SET_NAME, "pong");
		close(there[1]);
		close(back[0]);
		while (read(there[0], &c, 1) == 1)
			if (write(back[1], &c, 1) != 1)
				break;
		_exit(0);
	}
	close(there[0]);
	close(back[1]);

	struct sigaction sa = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
	sigaction(SIGTERM, &sa, NULL);
	alarm(700);

	long n = 0;
	long long start = now();
	while (!stop && (rounds ? n < rounds : (n % 1024 || now() < limit))) {
		if (write(there[1], &c, 1) != 1 || read(back[0], &c, 1) != 1) {
			perror("pingpong");
			return 1;
		}
		n++;
	}
	long long took = now() - start;

	close(there[1]);
	waitpid(child, NULL, 0);
	struct rusage self, kid;
	getrusage(RUSAGE_SELF, &self);
	getrusage(RUSAGE_CHILDREN, &kid);
	printf("rounds %ld switches %ld ns_per_round %lld\n", n,
	       self.ru_nvcsw + self.ru_nivcsw + kid.ru_nvcsw + kid.ru_nivcsw,
	       n ? took / n : 0);
	return 0;
}
