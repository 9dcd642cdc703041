// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// Outcomes of a request.
type outcome string

const (
	outcomeSuccess   outcome = "success"
	outcomePartial   outcome = "partial"   // taken, but some of it was rejected
	outcomeRetryable outcome = "retryable" // failed for now
	outcomeRefused   outcome = "refused"   // failed for good
)

// Reasons for giving up a message.
type dropReason string

const (
	dropRefused     dropReason = "refused"     // the backend does not want it
	dropTimeout     dropReason = "timeout"     // not taken in time; metrics only, the next push has them
	dropQueueFull   dropReason = "queue_full"  // the oldest, while the backend takes nothing
	dropTooLarge    dropReason = "too_large"   // one sample alone is over the size limit
	dropUnsupported dropReason = "unsupported" // not a profile that can be sent
	dropShutdown    dropReason = "shutdown"    // not taken before the end
)

// Signals, as the values of the label.
const (
	signalMetrics  = "metrics"
	signalProfiles = "profiles"
)

// counts are the counters of one signal.
type counts struct {
	signal string

	mu       sync.Mutex
	exports  map[outcome]uint64
	dropped  map[dropReason]uint64
	rejected uint64
}

// newCounts makes the counters of what can happen to a signal, so that they exist at zero.
func newCounts(signal string) *counts {
	c := &counts{signal: signal, exports: map[outcome]uint64{}, dropped: map[dropReason]uint64{}}
	for _, o := range []outcome{outcomeSuccess, outcomePartial, outcomeRetryable, outcomeRefused} {
		c.exports[o] = 0
	}
	reasons := []dropReason{dropRefused, dropTimeout}
	if signal == signalProfiles {
		reasons = []dropReason{dropRefused, dropQueueFull, dropTooLarge, dropUnsupported, dropShutdown}
	}
	for _, r := range reasons {
		c.dropped[r] = 0
	}
	return c
}

func (c *counts) export(o outcome, rejected int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.exports[o]++
	c.rejected += uint64(max(rejected, 0))
}

func (c *counts) drop(r dropReason, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropped[r] += uint64(n)
}

var (
	exportsDesc = prometheus.NewDesc("hostflame_otlp_exports_total",
		"OTLP requests, retries included, by outcome.", []string{"signal", "outcome"}, nil)
	droppedDesc = prometheus.NewDesc("hostflame_otlp_dropped_total",
		"OTLP messages that were given up, by reason.", []string{"signal", "reason"}, nil)
	rejectedDesc = prometheus.NewDesc("hostflame_otlp_rejected_total",
		"Data points or profiles that the backend rejected of requests that it took.", []string{"signal"}, nil)
	queueMessagesDesc = prometheus.NewDesc("hostflame_otlp_queue_messages",
		"OTLP profile messages that wait to be sent.", nil, nil)
	queueBytesDesc = prometheus.NewDesc("hostflame_otlp_queue_bytes",
		"Size of the OTLP profile messages that wait to be sent.", nil, nil)
)

// Describe implements prometheus.Collector.
func (e *Exporter) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{exportsDesc, droppedDesc, rejectedDesc, queueMessagesDesc, queueBytesDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector. Only signals that are on have series.
func (e *Exporter) Collect(ch chan<- prometheus.Metric) {
	if e.metrics != nil {
		e.metrics.counts.collect(ch)
	}
	if e.profiles != nil {
		e.profiles.counts.collect(ch)
		messages, bytes := e.profiles.queue.waiting()
		ch <- prometheus.MustNewConstMetric(queueMessagesDesc, prometheus.GaugeValue, float64(messages))
		ch <- prometheus.MustNewConstMetric(queueBytesDesc, prometheus.GaugeValue, float64(bytes))
	}
}

func (c *counts) collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	counter := func(d *prometheus.Desc, n uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	for o, n := range c.exports {
		counter(exportsDesc, n, c.signal, string(o))
	}
	for r, n := range c.dropped {
		counter(droppedDesc, n, c.signal, string(r))
	}
	counter(rejectedDesc, c.rejected, c.signal)
}
