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
	// Names that are equal once they fit for a label share a series.
	user, system := map[string]time.Duration{}, map[string]time.Duration{}
	for _, c := range g.reader.CPUByContainer() {
		name := labelValue(c.Container)
		user[name] += c.User
		system[name] += c.System
	}
	b := batch{emit: emit}
	for name := range user {
		b.add(counter(g.seconds, g.created, user[name].Seconds(), name, "user"))
		b.add(counter(g.seconds, g.created, system[name].Seconds(), name, "system"))
	}
	return b.err()
}
