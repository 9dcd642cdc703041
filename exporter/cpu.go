// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hostflame/hostflame/profiler"
)

// CPUReader reads the CPU time of containers as the samples show it, since the agent
// started. The number of containers is bounded by who makes it, the rest is in "~other".
// *profiler.Profiler is one.
type CPUReader interface {
	CPUByContainer() []profiler.ContainerCPU
}

type cpuGroup struct {
	reader  CPUReader
	created time.Time
	seconds *prometheus.Desc
}

func newCPUGroup(r CPUReader, created time.Time) group {
	return &cpuGroup{
		reader:  r,
		created: created,
		seconds: prometheus.NewDesc("hostflame_cpu_seconds_total",
			"CPU time of containers, estimated from the CPU samples.", []string{"container", "mode"}, nil),
	}
}

func (g *cpuGroup) describe(ch chan<- *prometheus.Desc) { ch <- g.seconds }

func (g *cpuGroup) collect(emit func(prometheus.Metric)) error {
	b := batch{emit: emit}
	for _, c := range g.reader.CPUByContainer() {
		b.add(counter(g.seconds, g.created, c.User.Seconds(), c.Container, "user"))
		b.add(counter(g.seconds, g.created, c.System.Seconds(), c.Container, "system"))
	}
	return b.err()
}
