// SPDX-License-Identifier: Apache-2.0
//
// frames SECONDS: C++ whose frames take all forms that the compiler has, burning CPU at
// the end of each: callbacks from std::sort, exceptions being thrown, caught and cleaned
// up after, alloca, arrays of variable length, locals of large alignment, functions that
// realign the stack, frames of 64 KiB, more arguments than registers. Known stacks,
// below main > turn:
//
//	sorted > std::... > less > leaf_sort
//	thrower > guarded > thrower_a > thrower_b > thrower_c (throws)
//	thrower > guarded > leaf_caught          (in the handler)
//	... > thrower_b > Guard::~Guard > leaf_cleanup (below the C++ run-time, unwinding)
//	allocas_a > allocas_b > allocas_c > leaf_alloca
//	vla_a > vla_b > leaf_vla
//	aligned_a > aligned_b > leaf_aligned
//	realigned_a > realigned_b > leaf_realigned
//	big_a > big_b > big_c > leaf_big
//	many_a > many_b > leaf_many
//	pushed_a > pushed_b > leaf_pushed

#include <alloca.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <stdexcept>
#include <vector>

#define NOIPA [[gnu::noipa]]

volatile uint64_t sink;
volatile int yes = 1;

[[gnu::always_inline]] static inline uint64_t spin(uint64_t turns, uint64_t factor) {
	uint64_t x = turns;
	for (uint64_t i = 0; i < turns; i++)
		x = x * factor + 1;
	sink = x;
	return x;
}

// One leaf a form, so that a sample's innermost function names its form.
#define LEAF(name, factor) \
	extern "C" NOIPA uint64_t name(uint64_t turns) { return spin(turns, factor); }
LEAF(leaf_sort, 6364136223846793005)
LEAF(leaf_caught, 2862933555777941757)
LEAF(leaf_cleanup, 3935559000370003845)
LEAF(leaf_alloca, 4768777513237032717)
LEAF(leaf_vla, 1181783497276652981)
LEAF(leaf_aligned, 2685821657736338717)
LEAF(leaf_realigned, 1865811235122147685)
LEAF(leaf_big, 1442695040888963407)
LEAF(leaf_many, 3202034522624059733)
LEAF(leaf_pushed, 7664345821815920749)

// Callbacks from the library's own frames.
extern "C" NOIPA bool less(uint32_t a, uint32_t b) { return a < b && leaf_sort(60) != 1; }
extern "C" NOIPA void sorted(uint64_t seed) {
	std::vector<uint32_t> v(400);
	for (auto &x : v)
		x = (seed = seed * 6364136223846793005 + 1) >> 32;
	std::sort(v.begin(), v.end(), less);
	sink = v[0];
}

// Exceptions.
struct Guard {
	uint64_t n;
	NOIPA ~Guard() { sink = leaf_cleanup(n); }
};
extern "C" NOIPA void thrower_c(uint64_t n) {
	spin(n, 3202034522624059733);
	if (yes)
		throw std::runtime_error("known");
	sink = n;
}
extern "C" NOIPA void thrower_b(uint64_t n) {
	Guard guard{n};
	thrower_c(n);
	sink = n;
}
extern "C" NOIPA void thrower_a(uint64_t n) {
	char text[200];
	snprintf(text, sizeof text, "%llu", (unsigned long long)n);
	thrower_b(n);
	sink = text[0];
}
extern "C" NOIPA void guarded(uint64_t n) {
	try {
		thrower_a(n);
	} catch (const std::runtime_error &e) {
		sink = e.what()[0] + leaf_caught(n);
	}
}
extern "C" NOIPA void thrower(uint64_t n) {
	for (int i = 0; i < 10; i++)
		guarded(n / 10);
}

// Frames whose size is known at run time only.
extern "C" NOIPA uint64_t allocas_c(uint64_t n) {
	volatile char *p = (char *)alloca(64 + n % 4096);
	p[0] = 1;
	return leaf_alloca(n) + p[0];
}
extern "C" NOIPA uint64_t allocas_b(uint64_t n) {
	uint64_t total = 0;
	for (int i = 0; i < 3; i++) { // grows within the function
		volatile char *p = (char *)alloca(16 + n % 100 * i);
		p[0] = i;
		total += allocas_c(n / 3) + p[0];
	}
	return total;
}
extern "C" NOIPA uint64_t allocas_a(uint64_t n) { return allocas_b(n) + 1; }

extern "C" NOIPA uint64_t vla_b(uint64_t n) {
	volatile uint32_t v[1 + n % 700];
	v[n % 700] = n;
	return leaf_vla(n) + v[n % 700];
}
extern "C" NOIPA uint64_t vla_a(uint64_t n) {
	volatile uint64_t v[1 + n % 31];
	v[n % 31] = n;
	return vla_b(n) + v[n % 31];
}

// Locals that are aligned beyond what the stack is: the CFA becomes an expression.
extern "C" NOIPA uint64_t aligned_b(uint64_t n) {
	alignas(64) volatile uint64_t v[16];
	v[n % 16] = n;
	return leaf_aligned(n) + v[n % 16];
}
extern "C" NOIPA uint64_t aligned_a(uint64_t n) {
	alignas(256) volatile uint64_t v[64];
	volatile char *p = (char *)alloca(64 + n % 256); // with alloca on top: two bases
	p[0] = 1;
	v[n % 64] = n;
	return aligned_b(n) + v[n % 64] + p[0];
}

#ifdef __x86_64__
#define REALIGN [[gnu::force_align_arg_pointer]]
#else
#define REALIGN
#endif
extern "C" NOIPA REALIGN uint64_t realigned_b(uint64_t n) {
	volatile uint64_t v[5];
	v[n % 5] = n;
	return leaf_realigned(n) + v[n % 5];
}
extern "C" NOIPA REALIGN uint64_t realigned_a(uint64_t n, ...) { return realigned_b(n) + 1; }

// Frames beyond what an offset of 16 bits holds.
extern "C" NOIPA uint64_t big_c(uint64_t n) {
	volatile char v[70001];
	memset((void *)v, 1, 100);
	return leaf_big(n) + v[n % 100];
}
extern "C" NOIPA uint64_t big_b(uint64_t n) {
	volatile char v[300007];
	v[n % 1000] = 1;
	return big_c(n) + v[n % 1000];
}
extern "C" NOIPA uint64_t big_a(uint64_t n) {
	volatile char v[40];
	v[n % 40] = 1;
	return big_b(n) + v[n % 40];
}

// Arguments on the stack, pushed before the call: the CFA moves within the function.
extern "C" NOIPA uint64_t many_b(uint64_t n, int a, int b, int c, int d, int e, int f, int g, int h, double i) {
	return leaf_many(n) + a + b + c + d + e + f + g + h + uint64_t(i);
}
extern "C" NOIPA uint64_t many_a(uint64_t n) {
	uint64_t total = 0;
	for (int i = 0; i < 4; i++)
		total += many_b(n / 4, i, 2, 3, 4, 5, i, 7, 8, 9.0);
	return total;
}
extern "C" NOIPA uint64_t pushed_b(uint64_t n, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f) {
	// Uses every register that has to be saved.
	uint64_t x = leaf_pushed(n / 4), y = leaf_pushed(n / 4), z = leaf_pushed(n / 4), w = leaf_pushed(n / 4);
	return a * x + b * y + c * z + d * w + e * x * y + f * z * w;
}
extern "C" NOIPA uint64_t pushed_a(uint64_t n) { return pushed_b(n, 1, 2, 3, 4, 5, n) + n; }

extern "C" NOIPA void turn(uint64_t seed) {
	sorted(seed);
	thrower(20000);
	sink = allocas_a(20000 + seed % 4999) + vla_a(20000 + seed % 4999);
	sink = aligned_a(20000 + seed % 4999) + realigned_a(20000, 1.0, 2) + many_a(20000) + pushed_a(20000);
	sink = big_a(3000); // a copy of its stack never holds all: few of them
}

int main(int argc, char **argv) {
	if (argc != 2) {
		fprintf(stderr, "usage: frames SECONDS\n");
		return 2;
	}
	puts("ready");
	fflush(stdout);
	uint64_t seed = 7919;
	for (time_t end = time(nullptr) + atoi(argv[1]); time(nullptr) < end;)
		turn(seed = (seed * 6364136223846793005 + 1442695040888963407) >> 1);
}
