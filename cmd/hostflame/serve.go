// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/exporter-toolkit/web"
	"github.com/prometheus/exporter-toolkit/web/kingpinflag"

	"github.com/hostflame/hostflame/exporter/otlp"
)

const defaultAddress = "127.0.0.1:4678"

// shutdownTimeout is what the whole end may take, whatever hangs: the promise is 5 s.
const shutdownTimeout = 4700 * time.Millisecond

type serve struct {
	web               *web.FlagConfig
	telemetryPath     *string
	maxRequests       *int
	noExporterMetrics *bool
	debugPprof        *bool
	sampling
	waitFlags
	ioRate       *int
	interval     *time.Duration
	otlpEndpoint *string
}

func addServe(app *kingpin.Application) (string, command) {
	c := app.Command("serve", "Attach to the kernel and serve metrics and profiles over HTTP, until SIGINT or SIGTERM.")
	s := &serve{
		web:               kingpinflag.AddFlags(c, defaultAddress),
		telemetryPath:     c.Flag("web.telemetry-path", "Path of the metrics.").Default("/metrics").String(),
		maxRequests:       c.Flag("web.max-requests", "Scrapes at once; 0 for no limit.").Default("40").Int(),
		noExporterMetrics: c.Flag("web.disable-exporter-metrics", "Leave out the metrics of the agent's own process and runtime (process_*, go_*, promhttp_*).").Bool(),
		debugPprof:        c.Flag("web.enable-debug-pprof", "Serve profiles of the agent itself at /debug/pprof/.").Bool(),
	}
	s.sampling = samplingFlags(c)
	s.waitFlags = newWaitFlags(c)
	s.ioRate = ioFlag(c)
	s.interval = c.Flag("profile.interval", "The window: the time that one published profile covers, 1s to 1h.").Default("10s").Duration()
	s.otlpEndpoint = c.Flag("otlp.endpoint", "Push metrics and profiles over OTLP/gRPC to this endpoint: http://HOST:4317 without TLS, https://HOST:4317 with. Wins over OTEL_EXPORTER_OTLP_ENDPOINT; nothing is pushed unless one of them is set.").PlaceHolder("URL").String()
	return "serve", s
}

func (s *serve) run(ctx context.Context, env environment) error {
	if err := cmp.Or(s.check(), s.checkWaits(), checkIO(*s.ioRate)); err != nil {
		return err
	}
	if *s.interval < time.Second || *s.interval > time.Hour {
		return usagef("--profile.interval takes 1s to 1h; 10s is a good one", "window of %v is out of range", *s.interval)
	}
	push, err := otlp.FromEnvironment(*s.otlpEndpoint)
	if err != nil {
		if e, ok := errors.AsType[*otlp.ConfigError](err); ok {
			return usagef(e.Hint(), "%w", err)
		}
		return err
	}
	// First of all that takes time: a busy port is the most likely reason not to start.
	listeners, err := listen(s.web)
	if err != nil {
		return err
	}
	a := &agent{flags: s, log: promslog.New(env.log), build: env.build, otlp: push}
	a.log.Info("starting", "version", env.build.Version, "commit", env.build.Revision)
	ended := make(chan error, 1)
	go func() { ended <- a.run(ctx, listeners) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(shutdownTimeout):
		// The kernel lets go of what is attached when the process ends.
		a.log.Warn("gave up waiting", "for", "the end", "after", shutdownTimeout)
		return nil
	}
}
