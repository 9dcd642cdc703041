// SPDX-License-Identifier: Apache-2.0

// Package exporter is everything that leaves the host by pull: the Prometheus
// collectors, one file a metric group, and the HTTP surface with the profiles and the
// web UI.
//
// The package knows no BPF. Each metric group reads one small interface that is declared
// beside it, and the command hands in what implements it.
package exporter

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const namespace = "hostflame"

// group is one metric group. Its descriptors are constant; collect reads one snapshot
// and turns it into metrics. When collect returns an error, none of its metrics are
// exposed in that scrape.
type group interface {
	describe(chan<- *prometheus.Desc)
	collect(emit func(prometheus.Metric)) error
}

// Readers are where the metric groups come from. A group whose reader is nil does not
// exist. A group that should exist but could not be set up gets a reader that returns
// the reason, so that it shows as hostflame_scrape_collector_success 0.
//
// Readers are called once a scrape, possibly from several goroutines at once, and must
// not block: they read counters, they do not compute.
type Readers struct {
	Runqueue RunqueueReader
	Block    BlockReader
	CPU      CPUReader
	Symbols  SymbolsReader
	Unwind   UnwindReader
	Agent    AgentReader
}

// Collector is the prometheus.Collector of all metric groups. A group that fails is
// missing from that scrape, and the other groups are not affected.
type Collector struct {
	logger   *slog.Logger
	names    []string
	groups   map[string]group
	duration *prometheus.Desc
	success  *prometheus.Desc

	mu   sync.Mutex
	last map[string]string // error text by collector, "" when the last read worked
}

// NewCollector makes the collector of every reader that is set. Created is the created
// timestamp of all cumulative series: a moment before the first program was attached.
func NewCollector(r Readers, created time.Time, logger *slog.Logger) *Collector {
	c := &Collector{
		logger: logger,
		groups: map[string]group{},
		last:   map[string]string{},
		duration: prometheus.NewDesc("hostflame_scrape_collector_duration_seconds",
			"Time that a collector took in this scrape.", []string{"collector"}, nil),
		success: prometheus.NewDesc("hostflame_scrape_collector_success",
			"Whether a collector's metrics are in this scrape.", []string{"collector"}, nil),
	}
	add := func(name string, g group) {
		c.names = append(c.names, name)
		c.groups[name] = g
	}
	if r.Agent != nil {
		add("agent", newAgentGroup(r.Agent, created))
	}
	if r.Block != nil {
		add("block", newBlockGroup(r.Block, created))
	}
	if r.CPU != nil {
		add("cpu", newCPUGroup(r.CPU, created))
	}
	if r.Runqueue != nil {
		add("runqueue", newRunqueueGroup(r.Runqueue, created))
	}
	if r.Symbols != nil {
		add("symbols", newSymbolsGroup(r.Symbols, created))
	}
	if r.Unwind != nil {
		add("unwind", newUnwindGroup(r.Unwind, created))
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.duration
	ch <- c.success
	for _, name := range c.names {
		c.groups[name].describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	for _, name := range c.names {
		metrics, took, err := c.read(name)
		success := 1.0
		if err != nil {
			success = 0
		}
		for _, m := range metrics {
			ch <- m
		}
		ch <- prometheus.MustNewConstMetric(c.duration, prometheus.GaugeValue, took.Seconds(), name)
		ch <- prometheus.MustNewConstMetric(c.success, prometheus.GaugeValue, success, name)
	}
}

// read reads one group and logs when it begins to fail, fails otherwise, or recovers.
func (c *Collector) read(name string) ([]prometheus.Metric, time.Duration, error) {
	var metrics []prometheus.Metric
	begin := time.Now()
	err := c.groups[name].collect(func(m prometheus.Metric) { metrics = append(metrics, m) })
	took := time.Since(begin)
	text := ""
	if err != nil {
		metrics = nil
		text = err.Error()
	}
	c.mu.Lock()
	before := c.last[name]
	c.last[name] = text
	c.mu.Unlock()
	switch {
	case text == before:
	case text == "":
		c.logger.Info("collector works again", "collector", name)
	default:
		c.logger.Error("collector failed", "collector", name, "err", err)
	}
	return metrics, took, err
}

// CollectorStatus is how one metric group reads now.
type CollectorStatus struct {
	Name string
	Took time.Duration
	Err  error // why its metrics are missing, nil when they are not
}

// Status reads every group once, as a scrape does, and tells how that went.
func (c *Collector) Status() []CollectorStatus {
	var status []CollectorStatus
	for _, name := range c.names {
		_, took, err := c.read(name)
		status = append(status, CollectorStatus{Name: name, Took: took, Err: err})
	}
	return status
}

// counter is one cumulative value with its created timestamp.
func counter(desc *prometheus.Desc, created time.Time, value float64, labels ...string) (prometheus.Metric, error) {
	for i := range labels {
		labels[i] = labelValue(labels[i])
	}
	return prometheus.NewConstMetricWithCreatedTimestamp(desc, prometheus.CounterValue, value, created, labels...)
}

// labelValue makes s fit for a label. Names of devices and containers come from outside,
// and one byte that is not UTF-8 would fail the whole scrape.
func labelValue(s string) string {
	return strings.ToValidUTF8(s, "\uFFFD")
}

// batch emits what was made without error and keeps the errors.
type batch struct {
	emit func(prometheus.Metric)
	errs []error
}

func (b *batch) add(m prometheus.Metric, err error) {
	if err != nil {
		b.errs = append(b.errs, err)
		return
	}
	b.emit(m)
}

func (b *batch) err() error {
	if err := errors.Join(b.errs...); err != nil {
		return fmt.Errorf("make metrics: %w", err)
	}
	return nil
}
