/* SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>

#define NOIPA __attribute__((noipa))

extern uint64_t goCallback(uint64_t n);

NOIPA uint64_t leaf_c(uint64_t n)
{
	for (uint64_t i = n; i > 0; i--)
		n = n * 4768777513237032717 + 1;
	return n;
}

NOIPA uint64_t c_inner(uint64_t n)
{
	volatile uint64_t local[10];

	local[n % 10] = n;
	return leaf_c(n) + local[n % 10];
}

NOIPA uint64_t c_outer(uint64_t n) { return c_inner(n) + 1; }

NOIPA uint64_t c_back_inner(uint64_t n)
{
	volatile uint64_t local[6];

	local[n % 6] = n;
	return goCallback(n) + local[n % 6];
}

NOIPA uint64_t c_back(uint64_t n) { return c_back_inner(n) + 1; }
