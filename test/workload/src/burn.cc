// SPDX-License-Identifier: Apache-2.0
//
// burn THREADS SECONDS: burns CPU in three named functions that take 50, 30 and 20 % of
// each thread's CPU time. At the end (time is up, or SIGTERM) it prints what each
// function really took, in nanoseconds of thread CPU time:
//
//	fifty 4999871234
//	thirty 2999950123
//	twenty 2000012345
//
// A profile sees main > load::run > load::{fifty,thirty,twenty}; all work is in the
// leaves. Built with frame pointers (burn) and without (burn-nofp).

#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <thread>
#include <vector>

namespace load {

std::atomic<bool> stop;
std::atomic<uint64_t> spent[3];
volatile uint64_t sink;

uint64_t now(clockid_t clock) {
	timespec t;
	clock_gettime(clock, &t);
	return uint64_t(t.tv_sec) * 1'000'000'000 + uint64_t(t.tv_nsec);
}

// Multiplies until the thread has used deadline ns of CPU time. The clock costs a
// system call, so it is read about every 100 us only. Deadlines are absolute: what one
// turn runs over, the next one runs less.
[[gnu::always_inline]] inline void spin(uint64_t deadline, uint64_t factor) {
	uint64_t x = deadline;
	do {
		for (int i = 0; i < 50'000; i++)
			x = x * factor + 1;
		sink = x;
	} while (now(CLOCK_THREAD_CPUTIME_ID) < deadline);
}

// The factors differ so that the compiler can not fold the three into one.
[[gnu::noipa]] void fifty(uint64_t deadline) { spin(deadline, 6364136223846793005); sink = 50; }
[[gnu::noipa]] void thirty(uint64_t deadline) { spin(deadline, 2862933555777941757); sink = 30; }
[[gnu::noipa]] void twenty(uint64_t deadline) { spin(deadline, 3935559000370003845); sink = 20; }

[[gnu::noipa]] void run(uint64_t end) {
	uint64_t cpu = now(CLOCK_THREAD_CPUTIME_ID), target = cpu, seed = cpu;
	while (!stop && now(CLOCK_MONOTONIC) < end) {
		// Rounds of 10 to 20 ms, of no fixed length: a sampler must not fall into step.
		seed = seed * 6364136223846793005 + 1442695040888963407;
		uint64_t percent = 100'000 + (seed >> 33) % 100'000;
		int i = 0;
		auto took = [&] {
			uint64_t t = now(CLOCK_THREAD_CPUTIME_ID);
			spent[i++] += t - cpu;
			cpu = t;
		};
		fifty(target += 50 * percent);
		took();
		thirty(target += 30 * percent);
		took();
		twenty(target += 20 * percent);
		took();
	}
	sink = 0; // not a tail call
}

} // namespace load

int main(int argc, char **argv) {
	if (argc != 3) {
		fprintf(stderr, "usage: burn THREADS SECONDS\n");
		return 2;
	}
	signal(SIGTERM, [](int) { load::stop = true; });
	uint64_t end = load::now(CLOCK_MONOTONIC) + uint64_t(atof(argv[2]) * 1e9);
	std::vector<std::thread> others;
	for (int i = 1; i < atoi(argv[1]); i++)
		others.emplace_back(load::run, end);
	load::run(end);
	for (auto &t : others)
		t.join();
	const char *names[] = {"fifty", "thirty", "twenty"};
	for (int i = 0; i < 3; i++)
		printf("%s %llu\n", names[i], (unsigned long long)load::spent[i]);
}
