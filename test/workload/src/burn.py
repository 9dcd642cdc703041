# SPDX-License-Identifier: Apache-2.0
"""burn.py SECONDS: burns CPU in three named functions that take 50, 30 and 20 % of the
thread's CPU time, and prints at the end what each really took, in nanoseconds."""

import random
import sys
import time


def spin(deadline):
    x = 0
    while time.thread_time_ns() < deadline:
        for i in range(1000):
            x = (x * 3 + i) & 0xFFFF
    return x


def fifty(deadline):
    return spin(deadline)


def thirty(deadline):
    return spin(deadline)


def twenty(deadline):
    return spin(deadline)


def run(seconds):
    turns = [(fifty, 50), (thirty, 30), (twenty, 20)]
    spent = dict.fromkeys((f.__name__ for f, _ in turns), 0)
    end = time.monotonic() + seconds
    cpu = target = time.thread_time_ns()
    while time.monotonic() < end:
        # Rounds of no fixed length: a sampler must not fall into step.
        percent = random.randrange(100_000, 200_000)
        for burn, share in turns:
            target += share * percent
            burn(target)
            now = time.thread_time_ns()
            spent[burn.__name__] += now - cpu
            cpu = now
    for name, nanos in spent.items():
        print(name, nanos)


run(float(sys.argv[1]))
