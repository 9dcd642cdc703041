// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"go.opentelemetry.io/otel/sdk/resource"

	"github.com/hostflame/hostflame/profiler"
)

// grace is how long the last push may take after the context of Run has ended.
const grace = 3 * time.Second

// Exporter pushes to the backends of its configuration. It is a prometheus.Collector of
// its own counters.
type Exporter struct {
	metrics  *metrics  // nil: off
	profiles *profiles // nil: off
}

// New makes an exporter that does nothing until Run, and connects no sooner than that.
// The caller runs it or forgets it.
func New(cfg Config) (*Exporter, error) {
	logger := cfg.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Resource == nil {
		cfg.Resource = resource.Empty()
	}
	e := new(Exporter)
	var err error
	if cfg.Metrics.Target != "" {
		if cfg.Gatherer == nil {
			return nil, errors.New("otlp: metrics without a gatherer")
		}
		if e.metrics, err = newMetrics(cfg.Metrics, cfg.Resource, cfg.Gatherer, logger); err != nil {
			return nil, err
		}
	}
	if cfg.Profiles.Target != "" {
		if e.profiles, err = newProfiles(cfg.Profiles, cfg.Resource, logger); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// Push hands over a closed window. It never waits, keeps w and only reads it. Use it as
// the profiler's subscriber.
func (e *Exporter) Push(w *profiler.Window) {
	if e.profiles != nil {
		e.profiles.push(w)
	}
}

// Run pushes until ctx ends. Then it pushes the metrics once more and the windows that
// came before, tries nothing a second time, and returns within three seconds; end ctx
// after the profiler has returned, so that its last window is among them. Trouble with a
// backend is counted and logged, never returned.
func (e *Exporter) Run(ctx context.Context) error {
	hard, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(grace, cancel) })
	defer stop()

	var wg sync.WaitGroup
	var conns []interface{ Close() error }
	if m := e.metrics; m != nil {
		conns = append(conns, m.conn)
		wg.Go(func() { m.run(ctx, hard) })
	}
	if p := e.profiles; p != nil {
		conns = append(conns, p.conn)
		wg.Go(func() { p.convert(ctx) })
		wg.Go(func() { p.send(ctx, hard) })
	}
	wg.Wait()
	var errs []error
	for _, c := range conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
