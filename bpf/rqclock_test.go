// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type rqclock_switch rqclock testdata/rqclock.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -I. -I/usr/include/x86_64-linux-gnu

// rqclockModel is a CPU whose run queue clock is known: it runs behind ktime by an offset
// that drifts, and some switches skip its update.
type rqclockModel struct {
	prog   *ebpf.Program
	clock  uint64 // what the clock would show now, ns
	offset int64  // ktime - clock, ns
	ppm    int64
	drift  int64 // of the offset, in ns x 1e6
}

// pass lets time go by.
func (m *rqclockModel) pass(d time.Duration) {
	m.clock += uint64(d)
	m.drift += int64(d) * m.ppm
}

// step switches tasks, the clock late by late, and returns how far the answer is off.
func (m *rqclockModel) step(t *testing.T, late time.Duration) time.Duration {
	t.Helper()
	now, _ := m.run(t, rqclockRqclockSwitch{Clock: m.clock - uint64(late)})
	return now
}

// freshStep switches tasks with a clock that is known to be up to date. Guessed is how far
// ktime is off, where it was not read.
func (m *rqclockModel) freshStep(t *testing.T) (now time.Duration, guessed *time.Duration) {
	t.Helper()
	return m.run(t, rqclockRqclockSwitch{Clock: m.clock, Fresh: 1})
}

func (m *rqclockModel) run(t *testing.T, s rqclockRqclockSwitch) (now time.Duration, guessed *time.Duration) {
	t.Helper()
	s.Ktime = m.clock + uint64(m.offset+m.drift/1_000_000)
	if _, err := m.prog.Run(&ebpf.RunOptions{Context: s, ContextOut: &s}); err != nil {
		t.Fatal(err)
	}
	if s.Guessed != 0 {
		guessed = new(time.Duration(s.Guessed - s.Ktime))
	}
	return time.Duration(s.Now - m.clock), guessed
}

func TestRunQueueClock(t *testing.T) {
	kerneltest.Require(t)
	const us, ms = time.Microsecond, time.Millisecond
	for _, tt := range []struct {
		name   string
		offset int64
		ppm    int64
		idle   time.Duration // between two wakeups
		run    time.Duration
		wakes  int
		warm   int // wakeups until the answer holds
		most   time.Duration
	}{
		{"busy", 1_080_000, 0, 100 * us, 200 * us, 1000, 1, 0},
		{"ktime behind", -7_000_000_000, 0, 100 * us, 200 * us, 1000, 1, 0},
		{"mostly idle", 1_080_000, 0, 100 * ms, 200 * us, 100, 1, 0},
		{"busy, NTP faster", 1_080_000, 50, 100 * us, 200 * us, 40_000, 1, 1 * us},
		{"busy, NTP slower", 1_080_000, -50, 100 * us, 200 * us, 40_000, 1, 1 * us},
		{"idle, NTP faster", 1_080_000, 50, time.Second, 200 * us, 100, 6, 1 * us},
		{"idle, NTP slower", 1_080_000, -50, time.Second, 200 * us, 100, 6, 1 * us},
		{"idle, long runs", 1_080_000, 50, time.Second, 10 * ms, 100, 12, 3 * us},
		{"idle for long", 1_080_000, 50, 20 * time.Second, 200 * us, 10, 0, 8 * us},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.wakes > 1000 {
				kerneltest.SkipInVM(t, "runs a program 80,000 times, which says nothing of the kernel")
			}
			var objs rqclockObjects
			if err := loadRqclockObjects(&objs, nil); err != nil {
				t.Fatalf("%+v", err)
			}
			defer objs.Close()
			m := &rqclockModel{prog: objs.RqclockStep, clock: 3_600_000_000_000, offset: tt.offset, ppm: tt.ppm}
			m.step(t, 0)
			for i := range tt.wakes {
				m.pass(tt.idle)
				// A wakeup, the clock late by what it took to get to the switch.
				late := 2*us + time.Duration(rand.IntN(6000))
				m.pass(late)
				off := m.step(t, late)
				if i >= tt.warm && (off > tt.most || off < -tt.most) {
					t.Fatalf("wakeup %d: off by %v, want at most %v; the clock was late by %v", i, off, tt.most, late)
				}
				// It sleeps again: the clock is fresh.
				m.pass(tt.run)
				if off := m.step(t, 0); i >= tt.warm && (off > tt.most || off < 0) {
					t.Fatalf("switch-out %d: off by %v, want at most %v", i, off, tt.most)
				}
			}
		})
	}
	t.Run("fresh", func(t *testing.T) {
		const every, switches = 5 * us, 4000
		var objs rqclockObjects
		if err := loadRqclockObjects(&objs, nil); err != nil {
			t.Fatal(err)
		}
		defer objs.Close()
		m := &rqclockModel{prog: objs.RqclockStep, clock: 3_600_000_000_000, offset: 1_080_000, ppm: 50}
		n := 0
		for i := range switches {
			m.pass(every)
			// Wakeups that are late are all that the first window sees.
			if i < int(4*ms/every) || i%3 == 0 {
				m.step(t, 2*us)
				continue
			}
			now, guessed := m.freshStep(t)
			if guessed == nil {
				continue
			}
			n++
			// 50 ppm are 0.2 us a window.
			if now != 0 || *guessed > us/2 || *guessed < -us/2 {
				t.Fatalf("switch %d: the clock is off by %v, ktime by %v", i, now, *guessed)
			}
		}
		// It is read 16 times in a window of 4 ms.
		if least := switches / 2; n < least {
			t.Errorf("ktime was told without reading it %d times, want at least %d", n, least)
		}
	})
	t.Run("a step", func(t *testing.T) {
		kerneltest.SkipInVM(t, "runs a program 130,000 times, which says nothing of the kernel")
		var objs rqclockObjects
		if err := loadRqclockObjects(&objs, nil); err != nil {
			t.Fatal(err)
		}
		defer objs.Close()
		m := &rqclockModel{prog: objs.RqclockStep, clock: 3_600_000_000_000, offset: 5_000_000_000}
		for range 100_000 {
			m.pass(100 * us)
			m.step(t, 0)
		}
		// ktime never steps: the clock does.
		m.clock += uint64(time.Second)
		m.offset -= int64(time.Second)
		// On to where the rate is measured across the step, and not yet again.
		for i := range 30_000 {
			m.pass(100 * us)
			if off := m.step(t, 0); off != 0 && i > 2*40 {
				t.Fatalf("off by %v two windows after a step", off)
			}
		}
		m.pass(time.Second)
		if off := m.step(t, 0); off > us || off < 0 {
			t.Errorf("off by %v after a second of idling", off)
		}
	})
}
