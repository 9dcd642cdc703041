/* SPDX-License-Identifier: Apache-2.0
 *
 * plugin LIBRARY SECONDS: loads a library again and again, which calls itself through its
 * PLT, lazily bound: the first calls go through the dynamic linker's resolver. With
 * -DPLUGIN this is the library. A known stack, below main > turn:
 *
 *	plug_entry > plug_0 > plug_1 > ... > plug_39 > leaf_plugin
 */
#include <stdint.h>

#define NOIPA __attribute__((noipa))

#define TENS(X) X(0, 1) X(1, 2) X(2, 3) X(3, 4) X(4, 5) X(5, 6) X(6, 7) X(7, 8) X(8, 9) X(9, 10) \
	X(10, 11) X(11, 12) X(12, 13) X(13, 14) X(14, 15) X(15, 16) X(16, 17) X(17, 18) X(18, 19) X(19, 20) \
	X(20, 21) X(21, 22) X(22, 23) X(23, 24) X(24, 25) X(25, 26) X(26, 27) X(27, 28) X(28, 29) X(29, 30) \
	X(30, 31) X(31, 32) X(32, 33) X(33, 34) X(34, 35) X(35, 36) X(36, 37) X(37, 38) X(38, 39) X(39, 40)

#ifdef PLUGIN

volatile uint64_t plug_sink;

NOIPA uint64_t leaf_plugin(uint64_t n)
{
	for (uint64_t i = 0; i < 20000; i++)
		n = n * 6364136223846793005 + 1;
	return plug_sink = n;
}

#define DECLARE(n, next) uint64_t plug_##n(uint64_t);
TENS(DECLARE)
uint64_t plug_40(uint64_t n);
#define DEFINE(n, next) NOIPA uint64_t plug_##n(uint64_t x) { return plug_##next(x + n) + 1; }
TENS(DEFINE)
NOIPA uint64_t plug_40(uint64_t n) { return leaf_plugin(n); } /* a tail call */

NOIPA uint64_t plug_entry(uint64_t n) { return plug_0(n) + 1; }

#else

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static volatile uint64_t sink;

NOIPA static void turn(const char *path)
{
	void *library = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
	uint64_t (*entry)(uint64_t);

	if (!library || !(entry = (uint64_t (*)(uint64_t))dlsym(library, "plug_entry"))) {
		fprintf(stderr, "plugin: %s\n", dlerror());
		exit(1);
	}
	for (int i = 0; i < 5; i++)
		sink = entry(7919);
	dlclose(library);
}

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: plugin LIBRARY SECONDS\n");
		return 2;
	}
	puts("ready");
	fflush(stdout);
	for (time_t end = time(NULL) + atoi(argv[2]); time(NULL) < end;)
		turn(argv[1]);
	return 0;
}

#endif
