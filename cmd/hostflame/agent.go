// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/hostflame/hostflame/exporter"
	"github.com/hostflame/hostflame/exporter/otlp"
	"github.com/hostflame/hostflame/internal/buildinfo"
	"github.com/hostflame/hostflame/profiler"
	"github.com/hostflame/hostflame/profiler/unwind"
	"github.com/hostflame/hostflame/symbolizer"
)

// What the steps of the end may take: the last window, then the last push and meanwhile
// the answers to the requests under way. Together they stay below shutdownTimeout.
const (
	lastWindowTimeout = 1500 * time.Millisecond
	lastPushTimeout   = 3000 * time.Millisecond
	lastAnswerTimeout = 1000 * time.Millisecond
)

// agent is one run of serve.
type agent struct {
	flags  *serve
	log    *slog.Logger
	build  buildinfo.Info
	otlp   otlp.Config
	kernel *kernel
	// profiler and pulse are nil where CPU sampling does not work.
	profiler   *profiler.Profiler
	pulse      *pulse
	pusher     *otlp.Exporter // nil when OTLP is off
	accounting *accounting
	handler    lateHandler
	hung       atomic.Bool // something did not end in its time
}

// run serves on listeners, which it closes, until ctx ends or something essential fails.
func (a *agent) run(ctx context.Context, listeners []net.Listener) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	servers := serveHTTP(listeners, a.flags.web, &a.handler, a.log, fail)
	hangUp := sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), lastAnswerTimeout)
		defer cancel()
		if err := servers.shutdown(ctx); err != nil {
			a.log.Warn("requests were cut off", "err", err)
		}
	})
	defer hangUp()

	if os.Getenv("GOGC") == "" {
		// The host's memory is for its own work: half as much garbage costs a tenth more CPU,
		// of next to nothing.
		debug.SetGCPercent(50)
	}
	created := time.Now()
	var err error
	if a.kernel, err = attach(a.flags.config(), a.flags.waitSampling(), *a.flags.ioRate, a.log); err != nil {
		return err
	}
	defer func() {
		// What still uses it would fault.
		if !a.hung.Load() {
			a.kernel.close()
		}
	}()
	sym := symbolizer.New(symbolizer.Config{
		Cache: a.flags.openSymbolCache(a.log), Debuginfod: debuginfod(*a.flags.debuginfod),
	})
	defer sym.Close()
	cache := a.flags.openTableCache(a.log)
	if cache != nil {
		defer cache.Close()
	}
	if err := a.assemble(sym, cache, created); err != nil {
		return err
	}
	end := a.start(ctx, fail)
	go a.announce(ctx, listeners)

	<-ctx.Done()
	a.log.Info("stopping", "cause", context.Cause(ctx)) // a signal, or what failed
	notify(a.log, daemon.SdNotifyStopping)
	end(hangUp)
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// assemble makes what stands on the attached kernel side, and hands the HTTP surface to
// the servers, which run already.
func (a *agent) assemble(sym *symbolizer.Symbolizer, cache *unwind.Cache, created time.Time) (err error) {
	types, missing := profileTypes(a.kernel, a.flags.config(), *a.flags.ioRate, profiler.NewStates(sym))
	var capturer exporter.Capturer = noProfiles{a.kernel.cpuErr}
	if a.kernel.cpu != nil {
		a.pulse = newPulse(a.kernel.cpu)
		cfg := profiler.Config{
			Feeds: feeds(a.kernel, a.pulse), Types: types,
			Symbolizer: sym, Tables: a.kernel.cpu.Tables(), TableCache: cache,
			Window: *a.flags.interval, Logger: a.log,
		}
		if a.kernel.mappings != nil {
			cfg.Mappings = a.kernel.mappings
		}
		if a.profiler, err = profiler.New(cfg); err != nil {
			return fmt.Errorf("make profiler: %w", err)
		}
		capturer = a.profiler
	}
	a.accounting = newAccounting(a.kernel, a.flags.config(), a.log)

	collector := exporter.NewCollector(readers(a.kernel, a.profiler, sym, a.accounting), created, a.log)
	registry := exporter.NewRegistry(collector, !*a.flags.noExporterMetrics)
	if a.otlp.Enabled() {
		a.otlp.Gatherer, a.otlp.Logger = registry, a.log
		if a.pusher, err = otlp.New(a.otlp); err != nil {
			return fmt.Errorf("push OTLP: %w", err)
		}
		registry.MustRegister(a.pusher)
		if a.profiler != nil {
			a.profiler.OnWindow(a.pusher.Push)
		}
	}

	host, err := os.Hostname()
	if err != nil {
		return err // the os package says what it did
	}
	cfg := exporter.HandlerConfig{
		Gatherer: registry, Capturer: capturer, Types: types, MissingTypes: missing,
		NoProfiles: a.kernel.cpuErr, Collector: collector,
		MetricsPath: *a.flags.telemetryPath, MaxScrapes: *a.flags.maxRequests,
		DebugPprof: *a.flags.debugPprof,
		Build:      a.build, Host: host, Logger: a.log,
	}
	if cfg.MaxScrapes == 0 {
		cfg.MaxScrapes = -1 // no limit
	}
	if !*a.flags.noExporterMetrics {
		cfg.Registerer = registry
	}
	h, err := exporter.NewHandler(cfg)
	if err != nil {
		return err
	}
	a.handler.set(h)
	return nil
}

// start starts what runs until the end; fail gets what may not fail. The returned end
// stops it in order: no more samples, the last window, the last push while hangUp runs.
func (a *agent) start(ctx context.Context, fail func(error)) (end func(hangUp func())) {
	var background sync.WaitGroup
	background.Go(func() { a.accounting.run(ctx) })
	background.Go(func() { watchdog(ctx, a.log, a.alive) })

	// The profiler and the pusher outlive ctx, each until its turn.
	profile, endProfile := context.WithCancel(context.WithoutCancel(ctx))
	push, endPush := context.WithCancel(context.WithoutCancel(ctx))
	var profiled, pushed sync.WaitGroup
	if a.profiler != nil {
		background.Go(func() {
			a.kernel.cpu.Follow(ctx, func(err error) { a.log.Warn("follow CPU hotplug", "err", err) })
		})
		if a.kernel.mappings != nil {
			background.Go(func() {
				a.kernel.mappings.Follow(ctx, func(err error) { a.log.Warn("follow CPU hotplug", "err", err) })
			})
		}
		profiled.Go(func() {
			if err := a.profiler.Run(profile); err != nil {
				fail(fmt.Errorf("profile: %w", err))
			}
		})
	}
	if a.pusher != nil {
		pushed.Go(func() {
			if err := a.pusher.Run(push); err != nil {
				a.log.Warn("push OTLP", "err", err)
			}
		})
	}
	return func(hangUp func()) {
		if err := a.kernel.detach(); err != nil {
			a.log.Warn("detach", "err", err)
		}
		endProfile()
		a.await(&profiled, lastWindowTimeout, "the last window")
		endPush()
		background.Go(hangUp)
		a.await(&pushed, lastPushTimeout, "the last push")
		a.await(&background, lastAnswerTimeout, "background work")
	}
}

// await waits for work, but not longer than d: what hangs ends with the process.
func (a *agent) await(work *sync.WaitGroup, d time.Duration, what string) {
	done := make(chan struct{})
	go func() {
		work.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(d):
		a.hung.Store(true)
		a.log.Warn("gave up waiting", "for", what, "after", d)
	}
}

// announce tells systemd and people, as soon as it is so, that the agent is ready and
// where to look.
func (a *agent) announce(ctx context.Context, listeners []net.Listener) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for a.profiler != nil && !a.profiler.Ready() {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
	notify(a.log, daemon.SdNotifyReady+"\nSTATUS=serving")
	for _, l := range listeners {
		url := urlOf(l, *a.flags.web.WebConfigFile)
		a.log.Info("ready", "ui", url+"/", "metrics", url+*a.flags.telemetryPath,
			"profile", "go tool pprof '"+url+"/pprof/cpu?seconds=10'")
	}
}

// alive tells systemd's watchdog whether the agent does its work.
func (a *agent) alive() bool { return a.pulse == nil || a.pulse.alive() }
