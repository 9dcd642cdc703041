// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hostflame/hostflame/internal/histogram"
)

// Runqueue is what the scheduler hooks counted since they were attached.
type Runqueue struct {
	Latency histogram.Snapshot // wait of each switch-in, ns, in cells of histogram.Time
	// Blocked is the time before a wait in which a thread was not runnable, likewise, by
	// state; the states come from a fixed set and are all there.
	Blocked map[string]histogram.Snapshot
	// KernelDelayNanos is the growth of the kernel's own sched_info.run_delay.
	KernelDelayNanos uint64
	// Length is how many threads the run queues of busy CPUs held, in cells of
	// histogram.Length; without cells where CPUs are not sampled.
	Length     histogram.Snapshot
	Containers []RunqueueContainer
}

// RunqueueContainer is that of the threads of one container. The number of containers is
// bounded by who makes it, the rest is in "~other"; names are valid UTF-8, each is there
// once.
type RunqueueContainer struct {
	Container string
	Since     time.Time // when it began to count
	Latency   histogram.Snapshot
	Blocked   map[string]histogram.Snapshot
	// DelayNanos are the parts of Latency, by cause; Preemptions are by whose thread came
	// instead. Both keys are from fixed sets, all of which are there.
	DelayNanos  map[string]uint64
	Preemptions map[string]uint64
	// DelayedByNanos is the part of DelayNanos in which other containers ran, by these.
	DelayedByNanos map[string]uint64
}

// RunqueueReader reads the scheduler's counters.
type RunqueueReader interface {
	ReadRunqueue() (Runqueue, error)
}

type runqueueGroup struct {
	reader  RunqueueReader
	created time.Time

	latency, blocked, kernelDelay, length                       *prometheus.Desc
	containerLatency, containerBlocked, delay, delayedBy, taken *prometheus.Desc
}

func newRunqueueGroup(r RunqueueReader, created time.Time) group {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	return &runqueueGroup{
		reader:  r,
		created: created,
		latency: desc("hostflame_runqueue_latency_seconds",
			"Time that threads were runnable before they got a CPU, one observation a switch-in."),
		blocked: desc("hostflame_offcpu_seconds",
			"Time that threads neither ran nor were runnable, one observation for each switch-in after that.", "state"),
		kernelDelay: desc("hostflame_runqueue_kernel_delay_seconds_total",
			"Growth of the kernel's own run_delay of all threads, uncorrected, as the scheduler hook saw it."),
		length: desc("hostflame_runqueue_length",
			"Threads that ran or were runnable on a CPU, looked at with each CPU sample, so only while it is busy."),
		containerLatency: desc("hostflame_container_runqueue_latency_seconds",
			"Time that threads of a container were runnable before they got a CPU, one observation a switch-in.", "container"),
		containerBlocked: desc("hostflame_container_offcpu_seconds",
			"Time that threads of a container neither ran nor were runnable, one observation for each switch-in after that.", "container", "state"),
		delay: desc("hostflame_runqueue_delay_seconds_total",
			"Time that threads of a container were runnable before they got a CPU, by what kept them from it.", "container", "cause"),
		delayedBy: desc("hostflame_runqueue_delayed_by_seconds_total",
			"Time that threads of a container waited for a CPU on which another container ran.", "victim", "culprit"),
		taken: desc("hostflame_preemptions_total",
			"Switch-outs of threads of a container that would have gone on, by whose thread came instead.", "container", "by"),
	}
}

func (g *runqueueGroup) describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{g.latency, g.blocked, g.kernelDelay, g.length,
		g.containerLatency, g.containerBlocked, g.delay, g.delayedBy, g.taken} {
		ch <- d
	}
}

func (g *runqueueGroup) collect(emit func(prometheus.Metric)) error {
	r, err := g.reader.ReadRunqueue()
	if err != nil {
		return fmt.Errorf("read run queue: %w", err)
	}
	b := batch{emit: emit}
	b.add(newHistogram(g.latency, timeLayout(), r.Latency, g.created))
	for state, s := range r.Blocked {
		b.add(newHistogram(g.blocked, timeLayout(), s, g.created, state))
	}
	b.add(counter(g.kernelDelay, g.created, inSeconds(r.KernelDelayNanos)))
	if r.Length.Cells != nil {
		b.add(newHistogram(g.length, lengthLayout(), r.Length, g.created))
	}
	for _, c := range r.Containers {
		b.add(newHistogram(g.containerLatency, timeLayout(), c.Latency, c.Since, c.Container))
		for state, s := range c.Blocked {
			b.add(newHistogram(g.containerBlocked, timeLayout(), s, c.Since, c.Container, state))
		}
		for cause, ns := range c.DelayNanos {
			b.add(counter(g.delay, c.Since, inSeconds(ns), c.Container, cause))
		}
		for culprit, ns := range c.DelayedByNanos {
			b.add(counter(g.delayedBy, c.Since, inSeconds(ns), c.Container, culprit))
		}
		for by, n := range c.Preemptions {
			b.add(counter(g.taken, c.Since, float64(n), c.Container, by))
		}
	}
	return b.err()
}

func inSeconds(nanos uint64) float64 { return float64(nanos) / 1e9 }
