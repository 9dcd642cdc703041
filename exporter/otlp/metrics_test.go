// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hostflame/hostflame/exporter"
	"github.com/hostflame/hostflame/internal/histogram"
)

// hostMetrics is the agent's own collector over counters that a test sets, so that what
// is pushed is made by the code that makes it on a host.
type hostMetrics struct {
	runqueue exporter.Runqueue
	block    []exporter.Block
}

func (h hostMetrics) ReadRunqueue() (exporter.Runqueue, error)                { return h.runqueue, nil }
func (h hostMetrics) ReadBlock() ([]exporter.Block, error)                    { return h.block, nil }
func (h hostMetrics) ReadBlockContainers() ([]exporter.BlockContainer, error) { return nil, nil }
func (h hostMetrics) ReadBlockBios() ([]exporter.BlockBio, error)             { return nil, nil }
func (h hostMetrics) ReadInFlight() (map[string]int, error)                   { return nil, nil }

// hostCreated is the created timestamp of the series of hostMetrics.
var hostCreated = time.Unix(1_700_000_000, 0)

func empty(p *histogram.Partition) histogram.Snapshot {
	return histogram.Snapshot{Cells: make([]uint64, p.Cells())}
}

// observe counts values, n times each.
func observe(p *histogram.Partition, s *histogram.Snapshot, values map[uint64]uint64) {
	for v, n := range values {
		s.Cells[p.Cell(v)] += n
		s.Sum += v * n
	}
}

// latencies are what testMetrics has seen, in ns, each with a bucket of its own.
var latencies = map[uint64]uint64{
	0: 23, 900: 31, 954: 7, // two in the zero bucket, one just above it
	1_000: 11, 250_000: 1009, 1_000_000_000: 3, 1_000_000_001: 5, 70_000_000_000: 2, // beyond the last boundary
}

// testMetrics has one device that has seen something, and comes after one that has not:
// the bridge looks at the first.
func testMetrics() hostMetrics {
	time, size := histogram.Time(), histogram.Size()
	h := hostMetrics{runqueue: exporter.Runqueue{Latency: empty(time), KernelDelayNanos: 1_500_000_000}}
	for _, device := range []string{"aaa", "vda"} {
		h.block = append(h.block, exporter.Block{Device: device, Operation: "read",
			Total: empty(time), Queue: empty(time), DeviceTime: empty(time), Size: empty(size), Depth: empty(histogram.Depth())})
	}
	observe(time, &h.runqueue.Latency, latencies)
	observe(time, &h.block[1].Total, latencies)
	observe(size, &h.block[1].Size, map[uint64]uint64{0: 13, 512: 2, 4096: 17, 4097: 19, 1 << 30: 3})
	h.block[1].Errors = map[string]uint64{"io": 29}
	return h
}

func register(h hostMetrics) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(exporter.NewCollector(exporter.Readers{Runqueue: h, Block: h}, hostCreated, nil))
	return r
}

// sumOf is the sum of latencies in seconds.
func sumOf(values map[uint64]uint64) float64 {
	var sum uint64
	for v, n := range values {
		sum += v * n
	}
	return float64(sum) / 1e9
}

// TestMetrics pushes the agent's histograms and compares what arrives with what was put
// in, bucket by bucket.
func TestMetrics(t *testing.T) {
	b := startBackend(t)
	r := start(t, Config{Metrics: plain(b.address), Gatherer: register(testMetrics())}, nil)
	r.stop() // pushes
	if len(b.metrics) != 1 {
		t.Fatalf("%d requests", len(b.metrics))
	}
	checkMetrics(t, b.metrics[0].ResourceMetrics)
	r.wantValue(t, 1, "hostflame_otlp_exports_total", "success", "metrics")
}

// checkMetrics compares with testMetrics.
func checkMetrics(t *testing.T, resources []*metricspb.ResourceMetrics) {
	t.Helper()
	if len(resources) != 1 || !hasAttribute(resources[0].Resource.Attributes, "service.name") {
		t.Fatalf("%d resources, want one with a service.name", len(resources))
	}
	metrics := map[string]*metricspb.Metric{}
	for _, s := range resources[0].ScopeMetrics {
		for _, m := range s.Metrics {
			metrics[m.Name] = m
		}
	}

	delay := metrics["hostflame_runqueue_kernel_delay_seconds_total"]
	if s := delay.GetSum(); len(s.GetDataPoints()) != 1 || s.DataPoints[0].GetAsDouble() != 1.5 || !s.IsMonotonic ||
		s.AggregationTemporality != metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE {
		t.Errorf("kernel delay %v", delay)
	} else if got := s.DataPoints[0].StartTimeUnixNano; got != uint64(hostCreated.UnixNano()) {
		t.Errorf("kernel delay since %d", got)
	}
	for name, unit := range map[string]string{
		"hostflame_runqueue_kernel_delay_seconds_total": "s", "hostflame_runqueue_latency_seconds": "s",
		"hostflame_block_io_size_bytes": "By", "hostflame_block_io_errors_total": "",
	} {
		if m := metrics[name]; m == nil || m.Unit != unit || m.Description == "" {
			t.Errorf("%s: unit %q, want %q; described by %q", name, m.GetUnit(), unit, m.GetDescription())
		}
	}

	runqueue := metrics["hostflame_runqueue_latency_seconds"].GetExponentialHistogram()
	checkHistogram(t, "run queue", runqueue, "", latencies)
	total := metrics["hostflame_block_io_latency_seconds"].GetExponentialHistogram()
	checkHistogram(t, "block I/O", total, "vda", latencies)
	checkHistogram(t, "block I/O", total, "aaa", nil)
	checkSizes(t, metrics["hostflame_block_io_size_bytes"].GetExponentialHistogram())
}

// point is the data point of a device, of the only series if device is "".
func point(h *metricspb.ExponentialHistogram, device string) *metricspb.ExponentialHistogramDataPoint {
	for _, p := range h.GetDataPoints() {
		if device == "" {
			return p
		}
		for _, a := range p.Attributes {
			if a.Key == "device" && a.Value.GetStringValue() == device {
				return p
			}
		}
	}
	return nil
}

// checkHistogram compares with values in nanoseconds. Buckets are computed here from the
// definition: index i of scale 3 holds 2^(i/8) < v <= 2^((i+1)/8) seconds.
func checkHistogram(t *testing.T, name string, h *metricspb.ExponentialHistogram, device string, values map[uint64]uint64) {
	t.Helper()
	p := point(h, device)
	if p == nil {
		t.Errorf("%s %s is not there", name, device)
		return
	}
	if h.AggregationTemporality != metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE {
		t.Errorf("%s: temporality %v", name, h.AggregationTemporality)
	}
	want := map[int32]uint64{}
	var zero, count uint64
	for v, n := range values {
		count += n
		seconds := float64(v) / 1e9
		switch {
		case seconds <= 1.0/(1<<20):
			zero += n
		case seconds > 64: // counted in the bucket above the last boundary
			want[48] += n
		default:
			want[int32(math.Ceil(math.Log2(seconds)*8))-1] += n
		}
	}
	if p.Scale != 3 || p.ZeroThreshold != 1.0/(1<<20) || p.ZeroCount != zero || p.Count != count || p.GetSum() != sumOf(values) {
		t.Errorf("%s %s: scale %d, zero %d up to %v, count %d, sum %v; want 3, %d up to 2^-20, %d, %v",
			name, device, p.Scale, p.ZeroCount, p.ZeroThreshold, p.Count, p.GetSum(), zero, count, sumOf(values))
	}
	if got := p.StartTimeUnixNano; got != uint64(hostCreated.UnixNano()) {
		t.Errorf("%s %s: starts at %d", name, device, got)
	}
	if time.Since(time.Unix(0, int64(p.TimeUnixNano))).Abs() > time.Hour {
		t.Errorf("%s %s: time %d", name, device, p.TimeUnixNano)
	}
	if diff := cmp.Diff(want, buckets(p)); diff != "" {
		t.Errorf("%s %s: -want +got\n%s", name, device, diff)
	}
}

// buckets are the positive buckets that are not empty, by index.
func buckets(p *metricspb.ExponentialHistogramDataPoint) map[int32]uint64 {
	got := map[int32]uint64{}
	for i, n := range p.GetPositive().GetBucketCounts() {
		if n > 0 {
			got[p.Positive.Offset+int32(i)] = n
		}
	}
	return got
}

// checkSizes: schema 0, so index i holds 2^i < v <= 2^(i+1) bytes; 512 and less are zero.
func checkSizes(t *testing.T, h *metricspb.ExponentialHistogram) {
	t.Helper()
	p := point(h, "vda")
	if p == nil {
		t.Error("sizes of vda are not there")
		return
	}
	want := map[int32]uint64{11: 17, 12: 19, 26: 3} // 1 GiB is beyond the last boundary, 64 MiB
	if diff := cmp.Diff(want, buckets(p)); diff != "" || p.Scale != 0 || p.ZeroThreshold != 512 || p.ZeroCount != 15 || p.Count != 54 {
		t.Errorf("sizes: scale %d, zero %d up to %v, count %d\n-want +got\n%s", p.Scale, p.ZeroCount, p.ZeroThreshold, p.Count, diff)
	}
}

// TestHistogramsAreNative: the bridge takes a whole family for what its first series is,
// so every series must be native, also one that has seen nothing.
func TestHistogramsAreNative(t *testing.T) {
	h := testMetrics()
	h.block[1] = h.block[0]
	h.block[1].Device = "vda"
	families, err := register(h).Gather()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetType() == dto.MetricType_HISTOGRAM {
				seen++
				if m.Histogram.GetZeroThreshold() == 0 {
					t.Errorf("%s is not native: %v", f.GetName(), m.Histogram)
				}
			}
		}
	}
	if seen != 11 {
		t.Errorf("%d series of histograms, want 11", seen)
	}
}

// TestMetricsInterval: OTEL_METRIC_EXPORT_INTERVAL holds.
func TestMetricsInterval(t *testing.T) {
	t.Setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
	b := startBackend(t)
	start(t, Config{Metrics: plain(b.address)}, nil)
	b.wait(t, 3)
}

// TestMetricsRetry: what fails for now comes again within the same push.
func TestMetricsRetry(t *testing.T) {
	t.Setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
	b := startBackend(t)
	b.answer = func(n int) (int64, string, error) {
		switch n {
		case 0:
			return 0, "", status.Error(codes.Unavailable, "not yet")
		case 1:
			return 3, "three are bad", nil
		case 2:
			return 0, "", status.Error(codes.InvalidArgument, "no")
		}
		return 0, "", nil
	}
	r := start(t, Config{Metrics: plain(b.address)}, nil)
	b.wait(t, 4)
	r.wantValue(t, 1, "hostflame_otlp_exports_total", "retryable", "metrics")
	r.wantValue(t, 1, "hostflame_otlp_exports_total", "partial", "metrics")
	r.wantValue(t, 3, "hostflame_otlp_rejected_total", "metrics")
	r.wantValue(t, 1, "hostflame_otlp_dropped_total", "refused", "metrics")
	r.wantValue(t, 0, "hostflame_otlp_dropped_total", "timeout", "metrics")
	if paused := b.times[1].Sub(b.times[0]); paused < retryFirst/2 {
		t.Errorf("came again after %v", paused)
	}
}

// TestMetricsPart: one collector that fails does not take the others with it.
func TestMetricsPart(t *testing.T) {
	b := startBackend(t)
	registry := register(testMetrics())
	registry.MustRegister(broken{prometheus.NewDesc("broken_total", "Never there.", nil, nil)})
	r := start(t, Config{Metrics: plain(b.address), Gatherer: registry}, nil)
	r.stop()
	if len(b.metrics) != 1 {
		t.Fatalf("%d requests", len(b.metrics))
	}
	checkMetrics(t, b.metrics[0].ResourceMetrics)
	if !strings.Contains(r.log.String(), "out of order") {
		t.Errorf("nothing in the log\n%s", r.log)
	}
}

type broken struct{ desc *prometheus.Desc }

func (b broken) Describe(ch chan<- *prometheus.Desc) { ch <- b.desc }
func (b broken) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.NewInvalidMetric(b.desc, errors.New("out of order"))
}

// TestMetricsBatches: many series come in several requests, each below the limit.
func TestMetricsBatches(t *testing.T) {
	b := startBackend(t)
	h := testMetrics()
	vda := h.block[1]
	for i := range vda.Total.Cells {
		vda.Total.Cells[i] = math.MaxUint32 + uint64(i)
	}
	const devices = 400
	h.block = nil
	for i := range devices {
		vda.Device = strings.Repeat("x", 50) + string(rune('a'+i%26)) + strings.Repeat("y", i/26)
		vda.Queue, vda.DeviceTime = vda.Total, vda.Total
		h.block = append(h.block, vda)
	}
	r := start(t, Config{Metrics: plain(b.address), Gatherer: register(h)}, nil)
	r.stop()
	points := 0
	for _, m := range b.metrics {
		for _, s := range m.ResourceMetrics[0].ScopeMetrics {
			for _, m := range s.Metrics {
				if m.Name == "hostflame_block_io_latency_seconds" {
					points += len(m.GetExponentialHistogram().DataPoints)
				}
			}
		}
	}
	if points != devices || len(b.metrics) < 2 {
		t.Errorf("%d series in %d requests, want %d in several", points, len(b.metrics), devices)
	}
}
