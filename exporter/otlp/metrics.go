// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	bridge "go.opentelemetry.io/contrib/bridges/prometheus"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/resource"
	"google.golang.org/grpc"
)

// pointsPerRequest keeps requests of metrics below what servers take: a point of the
// finest histogram, with all its buckets, has less than 4 KiB.
const pointsPerRequest = 1000

// metrics pushes what a gatherer has, through the SDK.
type metrics struct {
	*observer
	resource *resource.Resource
	timeout  time.Duration
	conn     *grpc.ClientConn
	exporter *otlpmetricgrpc.Exporter
	producer producer
}

func newMetrics(s Signal, r *resource.Resource, g prometheus.Gatherer, logger *slog.Logger) (*metrics, error) {
	m := &metrics{observer: newObserver(signalMetrics, logger), resource: r, timeout: s.Timeout}
	m.producer = producer{bridge.NewMetricProducer(bridge.WithGatherer(&tolerant{g, complaints{logger: logger}}))}
	var err error
	if m.conn, err = dial(s, m.observe); err != nil {
		return nil, err
	}
	// Passing the connection makes the SDK's own reading of the endpoint, TLS and
	// compression variables moot. Its retries would wait for a backend at the very end.
	m.exporter, err = otlpmetricgrpc.New(context.Background(),
		otlpmetricgrpc.WithGRPCConn(m.conn),
		otlpmetricgrpc.WithHeaders(s.Headers),
		otlpmetricgrpc.WithTimeout(s.Timeout),
		otlpmetricgrpc.WithRetry(otlpmetricgrpc.RetryConfig{Enabled: false}),
	)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make OTLP metric exporter: %w", err), m.conn.Close())
	}
	return m, nil
}

// run pushes at the SDK's interval until soft ends, and then once more.
func (m *metrics) run(soft, hard context.Context) {
	reader := metric.NewPeriodicReader(pusher{m, soft},
		metric.WithProducer(m.producer), metric.WithMaxExportBatchSize(pointsPerRequest))
	provider := metric.NewMeterProvider(metric.WithReader(reader), metric.WithResource(m.resource))
	<-soft.Done()
	// What goes wrong in the last push has been counted and logged by then.
	_ = provider.Shutdown(hard)
}

// pusher is the metric.Exporter of one run.
type pusher struct {
	*metrics
	soft context.Context // when it ends, nothing is tried again
}

// Export implements metric.Exporter. What fails for now is tried again while there is
// time; what is given up is counted, and the next push has newer values of the same
// series. It returns no error: the SDK would only print it.
func (p pusher) Export(ctx context.Context, data *metricdata.ResourceMetrics) error {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	for pause := retryFirst; ; pause = min(2*pause, retryMax) {
		before := p.taken()
		err := p.exporter.Export(ctx, data)
		if err == nil || p.taken() > before { // taken with an error: a partial success
			return nil
		}
		kind, asked := classify(err)
		if kind == outcomeRefused && ctx.Err() == nil {
			p.drop(dropRefused, 1)
			return nil
		}
		wait := max(asked, jitter(pause))
		if end, _ := ctx.Deadline(); p.soft.Err() != nil || time.Until(end) < wait {
			p.drop(dropTimeout, 1)
			return nil
		}
		sleep(ctx, wait)
	}
}

// taken counts the requests that the backend took.
func (m *metrics) taken() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.exports[outcomeSuccess] + m.exports[outcomePartial]
}

// Temporality implements metric.Exporter.
func (m *metrics) Temporality(k metric.InstrumentKind) metricdata.Temporality {
	return m.exporter.Temporality(k)
}

// Aggregation implements metric.Exporter.
func (m *metrics) Aggregation(k metric.InstrumentKind) metric.Aggregation {
	return m.exporter.Aggregation(k)
}

// ForceFlush implements metric.Exporter.
func (m *metrics) ForceFlush(ctx context.Context) error { return m.exporter.ForceFlush(ctx) }

// Shutdown implements metric.Exporter.
func (m *metrics) Shutdown(ctx context.Context) error { return m.exporter.Shutdown(ctx) }

// tolerant gathers what can be gathered: where one collector fails, the bridge would
// leave out all of them.
type tolerant struct {
	prometheus.Gatherer
	failures complaints
}

func (t *tolerant) Gather() ([]*dto.MetricFamily, error) {
	families, err := t.Gatherer.Gather()
	if err != nil {
		t.failures.warn("gather metrics for OTLP", "err", err)
	} else {
		t.failures.resolved("all metrics are gathered for OTLP again")
	}
	return families, nil
}

// producer adds the units, which the bridge leaves out: Prometheus keeps them in the name.
type producer struct{ metric.Producer }

func (p producer) Produce(ctx context.Context) ([]metricdata.ScopeMetrics, error) {
	scopes, err := p.Producer.Produce(ctx)
	for _, s := range scopes {
		for i := range s.Metrics {
			s.Metrics[i].Unit = unit(s.Metrics[i].Name)
		}
	}
	return scopes, err
}

// unit is the UCUM unit of a metric by the base unit in its name.
func unit(name string) string {
	base := strings.TrimSuffix(name, "_total")
	for suffix, unit := range map[string]string{"_seconds": "s", "_bytes": "By", "_ratio": "1"} {
		if strings.HasSuffix(base, suffix) {
			return unit
		}
	}
	return ""
}
