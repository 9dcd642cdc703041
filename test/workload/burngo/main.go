// SPDX-License-Identifier: Apache-2.0

// Burngo is burn.cc in Go: `burngo THREADS SECONDS` burns CPU in three named functions
// that take 50, 30 and 20 % of each thread's CPU time, and prints at the end what each
// really took, in nanoseconds of thread CPU time.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

var (
	stop  atomic.Bool
	spent [3]atomic.Int64
	sink  atomic.Uint64
)

func cpuTime() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		panic(err)
	}
	return t.Nano()
}

// Each of the three multiplies until its thread has used deadline ns of CPU time. The
// loop stands in each of them, because the inliner would not take it, and the clock is
// read about every 100 us only. Deadlines are absolute: what one turn runs over, the
// next one runs less.

//go:noinline
func fifty(deadline int64) {
	x := uint64(deadline)
	for ok := true; ok; ok = cpuTime() < deadline {
		for range 50_000 {
			x = x*6364136223846793005 + 1
		}
	}
	sink.Store(x)
}

//go:noinline
func thirty(deadline int64) {
	x := uint64(deadline)
	for ok := true; ok; ok = cpuTime() < deadline {
		for range 50_000 {
			x = x*2862933555777941757 + 1
		}
	}
	sink.Store(x)
}

//go:noinline
func twenty(deadline int64) {
	x := uint64(deadline)
	for ok := true; ok; ok = cpuTime() < deadline {
		for range 50_000 {
			x = x*3935559000370003845 + 1
		}
	}
	sink.Store(x)
}

//go:noinline
func run(end time.Time) {
	runtime.LockOSThread() // deadlines are of one thread's clock
	cpu := cpuTime()
	target, seed := cpu, uint64(cpu)
	turn := func(i int, share int64, burn func(int64)) {
		target += share
		burn(target)
		t := cpuTime()
		spent[i].Add(t - cpu)
		cpu = t
	}
	for !stop.Load() && time.Now().Before(end) {
		// Rounds of 10 to 20 ms, of no fixed length: a sampler must not fall into step.
		seed = seed*6364136223846793005 + 1442695040888963407
		percent := int64(100_000 + seed>>33%100_000)
		turn(0, 50*percent, fifty)
		turn(1, 30*percent, thirty)
		turn(2, 20*percent, twenty)
	}
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: burngo THREADS SECONDS")
		os.Exit(2)
	}
	threads, err1 := strconv.Atoi(os.Args[1])
	seconds, err2 := strconv.ParseFloat(os.Args[2], 64)
	if err1 != nil || err2 != nil {
		fmt.Fprintln(os.Stderr, "burngo: THREADS and SECONDS are numbers")
		os.Exit(2)
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	go func() {
		<-term
		stop.Store(true)
	}()
	end := time.Now().Add(time.Duration(seconds * float64(time.Second)))
	var wg sync.WaitGroup
	for range threads {
		wg.Go(func() { run(end) })
	}
	wg.Wait()
	for i, name := range []string{"fifty", "thirty", "twenty"} {
		fmt.Println(name, spent[i].Load())
	}
}
