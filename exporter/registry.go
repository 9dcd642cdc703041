// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/collectors/version"
)

// NewRegistry returns a registry with the metric groups and hostflame_build_info, which
// tells what internal/buildinfo has published. exporterMetrics adds the metrics of the
// agent's own process and Go runtime.
func NewRegistry(c *Collector, exporterMetrics bool) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	register(reg, c, exporterMetrics)
	return reg
}

func register(reg prometheus.Registerer, c *Collector, exporterMetrics bool) {
	reg.MustRegister(c, version.NewCollector(namespace))
	if exporterMetrics {
		reg.MustRegister(
			collectors.NewGoCollector(),
			collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		)
	}
}
