// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hostflame/hostflame/internal/histogram"
)

// Runqueue is what the scheduler hook counted since it was attached.
type Runqueue struct {
	Latency histogram.Snapshot // wait of each switch-in, ns, in cells of histogram.Time
	// KernelDelayNanos is the growth of the kernel's own sched_info.run_delay.
	KernelDelayNanos uint64
}

// RunqueueReader reads the scheduler's counters.
type RunqueueReader interface {
	ReadRunqueue() (Runqueue, error)
}

type runqueueGroup struct {
	reader  RunqueueReader
	created time.Time
	latency *prometheus.Desc
	delay   *prometheus.Desc
}

func newRunqueueGroup(r RunqueueReader, created time.Time) group {
	return &runqueueGroup{
		reader:  r,
		created: created,
		latency: prometheus.NewDesc("hostflame_runqueue_latency_seconds",
			"Time that threads were runnable before they got a CPU, one observation a switch-in.", nil, nil),
		delay: prometheus.NewDesc("hostflame_runqueue_kernel_delay_seconds_total",
			"Growth of the kernel's own run_delay of all threads, uncorrected, as the scheduler hook saw it.", nil, nil),
	}
}

func (g *runqueueGroup) describe(ch chan<- *prometheus.Desc) {
	ch <- g.latency
	ch <- g.delay
}

func (g *runqueueGroup) collect(emit func(prometheus.Metric)) error {
	r, err := g.reader.ReadRunqueue()
	if err != nil {
		return fmt.Errorf("read run queue: %w", err)
	}
	b := batch{emit: emit}
	b.add(newHistogram(g.latency, timeLayout(), r.Latency, g.created))
	b.add(counter(g.delay, g.created, float64(r.KernelDelayNanos)/1e9))
	return b.err()
}
