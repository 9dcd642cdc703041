/* SPDX-License-Identifier: Apache-2.0
 *
 * fft THREADS SECONDS: fast Fourier transforms, over and over: shallow stacks,
 *
 *	main > work > transform
 *
 * and caches full of the program's own data.
 */
#include <complex.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define NOIPA __attribute__((noipa))
#define BITS 14

static time_t end;

/* Cooley-Tukey, in place, the order of the result reversed. */
NOIPA static void transform(double complex *v, const double complex *roots)
{
	for (int half = 1 << (BITS - 1); half > 0; half /= 2)
		for (int at = 0; at < 1 << BITS; at += 2 * half)
			for (int i = 0; i < half; i++) {
				double complex a = v[at + i], b = v[at + i + half];

				v[at + i] = a + b;
				v[at + i + half] = (a - b) * roots[i * ((1 << (BITS - 1)) / half)];
			}
}

NOIPA static void *work(void *arg)
{
	double complex *v = malloc(sizeof(*v) << BITS), *roots = malloc(sizeof(*roots) << (BITS - 1));

	for (int i = 0; i < 1 << (BITS - 1); i++)
		roots[i] = cexp(-2 * M_PI * I * i / (1 << BITS));
	while (time(NULL) < end) {
		for (int i = 0; i < 1 << BITS; i++)
			v[i] = i % 127;
		transform(v, roots);
	}
	free(v);
	free(roots);
	return arg;
}

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: fft THREADS SECONDS\n");
		return 2;
	}
	end = time(NULL) + atoi(argv[2]);
	puts("ready");
	fflush(stdout);
	for (int i = 1; i < atoi(argv[1]); i++) {
		pthread_t thread;

		pthread_create(&thread, NULL, work, NULL);
	}
	work(NULL);
	return 0;
}
