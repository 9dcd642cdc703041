// SPDX-License-Identifier: Apache-2.0
//
// deep THREADS SECONDS: burns CPU at the end of 25 to 45 virtual calls, as many C++
// programs have them, each with a frame of another size and use of registers. Built as
// distributions do, -O2 without frame pointers. A stack of its samples is
//
//	main > deep::run > deep::Level<45..25>::visit > ... > deep::Level<1>::visit > deep::burn
//
// where the first level differs from call to call. Threads but the first begin in
// deep::run, below what the C++ library calls them through.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <thread>
#include <vector>

namespace deep {

constexpr int least = 25, most = 45;

std::atomic<bool> stop;
volatile uint64_t sink;

struct Step {
	virtual uint64_t visit(uint64_t seed, uint64_t other) = 0;
	virtual ~Step() = default;
};

Step *volatile levels[most + 1];

[[gnu::noipa]] uint64_t burn(uint64_t seed, uint64_t turns) {
	for (uint64_t i = 0; i < turns; i++)
		seed = seed * 6364136223846793005 + 1;
	return seed;
}

template <int N> struct Level : Step {
	[[gnu::noipa]] uint64_t visit(uint64_t seed, uint64_t other) override {
		// Written before the call and read behind it: the frame has to be there.
		volatile uint64_t local[1 + N * 7 % 13];
		for (auto &l : local)
			l = seed += N;
		uint64_t below;
		if constexpr (N == 1)
			below = burn(seed, 2000 + seed % 2000);
		else
			below = levels[N - 1]->visit(seed, other ^ N);
		for (auto &l : local)
			below += l;
		return below * seed + other;
	}
};

template <int N> void fill() {
	levels[N] = new Level<N>;
	if constexpr (N > 1)
		fill<N - 1>();
}

[[gnu::noipa]] void run() {
	uint64_t seed = 7919;
	while (!stop) {
		seed = seed * 6364136223846793005 + 1442695040888963407;
		sink = levels[least + (seed >> 33) % (most - least + 1)]->visit(seed, 0);
	}
	sink = 0; // not a tail call
}

} // namespace deep

int main(int argc, char **argv) {
	if (argc != 3) {
		fprintf(stderr, "usage: deep THREADS SECONDS\n");
		return 2;
	}
	deep::fill<deep::most>();
	std::vector<std::thread> threads;
	threads.emplace_back([seconds = atof(argv[2])] {
		timespec t{time_t(seconds), long(1e9 * (seconds - time_t(seconds)))};
		nanosleep(&t, nullptr);
		deep::stop = true;
	});
	for (int i = 1; i < atoi(argv[1]); i++)
		threads.emplace_back(deep::run);
	puts("ready");
	fflush(stdout);
	deep::run();
	for (auto &t : threads)
		t.join();
}
