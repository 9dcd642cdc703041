/* SPDX-License-Identifier: Apache-2.0
 *
 * shellstorm SECONDS PARALLEL DIRECTORY [CGROUP]: a storm of short-lived processes, as
 * builds and scripts make it: rounds of sh, ls, expr, sed and gcc -O2 -c, PARALLEL at a
 * time, in a process group of their own, which SIGTERM to this program ends. DIRECTORY
 * takes the files of the compiler. With CGROUP, a path of a cgroup.procs, it joins that
 * first. At the end it prints what the kernel says that all of them took, itself
 * included:
 *
 *	rounds 411 cpu_ns 20012345678 user_ns 14012345678 system_ns 6000000000
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char code[] =
	"#include <stdio.h>\n"
	"#include <stdlib.h>\n"
	"static int compare(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }\n"
	"int main(int argc, char **argv)\n"
	"{\n"
	"	int v[100];\n"
	"	for (int i = 0; i < 100; i++) v[i] = argc * i % 37;\n"
	"	qsort(v, 100, sizeof v[0], compare);\n"
	"	for (int i = 0; i < 100; i++) printf(\"%d %s\\n\", v[i], argv[0]);\n"
	"	return 0;\n"
	"}\n";

static const char script[] =
	"ls -l /usr/bin >/dev/null\n"
	"i=0\n"
	"while [ $i -lt 5 ]; do i=$(expr $i + 1); done\n"
	"sed -n 's/\\(.*\\):x:/\\1 /p' /etc/passwd | sed 's/a/b/g' >/dev/null\n"
	"ls /etc | sed 's/^/x/' >/dev/null\n"
	"exec gcc -O2 -c -o \"$1.o\" \"$1.c\"\n";

static volatile sig_atomic_t stopped;

static void on_term(int signal) { stopped = signal; }

static void die(const char *what)
{
	fprintf(stderr, "shellstorm: %s: %s\n", what, strerror(errno));
	exit(1);
}

static pid_t start(const char *directory, int n, pid_t group)
{
	char file[4096];
	pid_t child;

	snprintf(file, sizeof(file), "%s/storm-%d", directory, n);
	child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		setpgid(0, group);
		execl("/bin/sh", "sh", "-c", script, "sh", file, NULL);
		_exit(127);
	}
	setpgid(child, group); /* whoever is first */
	return child;
}

static long long nanos(struct timeval t) { return t.tv_sec * 1000000000LL + t.tv_usec * 1000LL; }

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = on_term};
	struct timespec now, end;
	struct rusage self, children;
	int parallel, running = 0;
	long rounds = 0;
	pid_t group;

	if (argc < 4) {
		fprintf(stderr, "usage: shellstorm SECONDS PARALLEL DIRECTORY [CGROUP]\n");
		return 2;
	}
	if (argc > 4) {
		FILE *f = fopen(argv[4], "w");

		if (!f || fprintf(f, "%d\n", getpid()) < 0 || fclose(f))
			die(argv[4]);
	}
	parallel = atoi(argv[2]);
	for (int i = 0; i < parallel; i++) {
		char file[4096];
		FILE *f;

		snprintf(file, sizeof(file), "%s/storm-%d.c", argv[3], i);
		f = fopen(file, "w");
		if (!f || fputs(code, f) < 0 || fclose(f))
			die(file);
	}
	sigaction(SIGTERM, &action, NULL);
	/* A process that lives throughout keeps the group's number from being used again. */
	group = fork();
	if (group < 0)
		die("fork");
	if (group == 0) {
		setpgid(0, 0);
		signal(SIGTERM, SIG_DFL);
		for (;;)
			pause();
	}
	setpgid(group, group);
	puts("ready");
	fflush(stdout);
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += atoi(argv[1]);
	for (pid_t *slot = calloc((size_t)parallel, sizeof(*slot));;) {
		int status;
		pid_t ended;

		clock_gettime(CLOCK_MONOTONIC, &now);
		if (!stopped && now.tv_sec < end.tv_sec)
			for (int i = 0; i < parallel; i++)
				if (!slot[i]) {
					slot[i] = start(argv[3], i, group);
					running++;
				}
		if (!running)
			break;
		ended = waitpid(-1, &status, 0);
		if (ended < 0) {
			if (errno != EINTR)
				die("wait");
			kill(-group, SIGTERM); /* the keeper too: it is not used again */
			continue;
		}
		for (int i = 0; i < parallel; i++)
			if (slot[i] == ended) {
				slot[i] = 0;
				running--;
				rounds++;
				if (status && !stopped) {
					fprintf(stderr, "shellstorm: a round ended with status %#x\n", (unsigned)status);
					kill(-group, SIGTERM);
					return 1;
				}
			}
	}
	kill(group, SIGKILL);
	waitpid(group, NULL, 0);
	getrusage(RUSAGE_SELF, &self);
	getrusage(RUSAGE_CHILDREN, &children);
	printf("rounds %ld cpu_ns %lld user_ns %lld system_ns %lld\n", rounds,
	       nanos(self.ru_utime) + nanos(self.ru_stime) + nanos(children.ru_utime) + nanos(children.ru_stime),
	       nanos(self.ru_utime) + nanos(children.ru_utime), nanos(self.ru_stime) + nanos(children.ru_stime));
	return 0;
}
