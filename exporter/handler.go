// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"strings"
	"syscall"
	"time"

	"github.com/google/pprof/profile"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/hostflame/hostflame/internal/buildinfo"
	"github.com/hostflame/hostflame/profiler"
)

// Capturer hands out profiles. *profiler.Profiler is one.
type Capturer interface {
	// Capture profiles the next Duration; it ends early, with an error, when ctx does.
	Capture(context.Context, profiler.Request) (*profile.Profile, error)
	// Newest is the window that closed last, nil before the first has. It does not change.
	Newest() *profiler.Window
	// Ready tells whether samples have been drained.
	Ready() bool
}

// HandlerConfig configures the HTTP surface.
type HandlerConfig struct {
	Gatherer prometheus.Gatherer
	Capturer Capturer
	// Types are the profile types that Capturer has, at least one. Those in MissingTypes are
	// answered with why they are not to be had after all.
	Types        []profiler.Type
	MissingTypes map[string]error
	// Registerer takes the metrics of the scrape handler itself. May be nil.
	Registerer prometheus.Registerer
	// Collector is where the landing page learns how the metric groups read. May be nil.
	Collector *Collector
	// NoProfiles says why this host has no profiles at all; nil where it has.
	NoProfiles error

	MetricsPath string // /metrics if empty
	MaxScrapes  int    // scrapes at once, 40 if zero, without limit if negative
	MaxCaptures int    // captures at once, 8 if zero
	DebugPprof  bool   // serve /debug/pprof/, the profiles of the agent itself

	Build  buildinfo.Info
	Host   string // name of this host, for people
	Logger *slog.Logger
}

const (
	scrapeTimeout = 10 * time.Second // what Prometheus waits by default
	maxReports    = 4                // web UI pages computed at once
)

// notDrained is why an agent is not ready that has attached its programs.
const notDrained = "no samples have been drained yet"

// noProfiles answers for all profiles of a host that has none.
const noProfiles = "there are no profiles of this host: %v"

// NewHandler returns the whole HTTP surface. It uses no state of net/http's default mux.
//
// A capture takes as long as its client asks, up to an hour: the handler lifts the
// server's WriteTimeout for it. To end captures when the agent stops, end the context
// that http.Server.BaseContext returns.
func NewHandler(cfg HandlerConfig) (http.Handler, error) {
	if cfg.MetricsPath == "" {
		cfg.MetricsPath = "/metrics"
	}
	if err := checkMetricsPath(cfg.MetricsPath); err != nil {
		return nil, err
	}
	if cfg.MaxScrapes == 0 {
		cfg.MaxScrapes = 40
	}
	if cfg.MaxCaptures == 0 {
		cfg.MaxCaptures = 8
	}
	if len(cfg.Types) == 0 {
		return nil, errors.New("serve profiles: no profile types")
	}
	landing, err := newLanding(cfg)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", landing)
	mux.Handle("GET "+cfg.MetricsPath, metricsHandler(cfg))
	captures := newCaptures(cfg)
	mux.Handle("GET /pprof/{type...}", captures)
	mux.HandleFunc("POST "+symbolzPath, symbolz)
	mux.Handle("GET /ui/{page...}", newUI(cfg))
	mux.HandleFunc("GET /-/healthy", func(w http.ResponseWriter, _ *http.Request) {
		plainText(w)
		io.WriteString(w, "hostflame is healthy\n")
	})
	mux.HandleFunc("GET /-/ready", func(w http.ResponseWriter, _ *http.Request) {
		if !cfg.Capturer.Ready() {
			unavailable(w, time.Second, "hostflame is not ready: %s", notDrained)
			return
		}
		plainText(w)
		io.WriteString(w, "hostflame is ready\n")
	})
	if cfg.DebugPprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	} else {
		mux.HandleFunc("GET /debug/pprof/", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "profiles of the agent itself are off; profiles of this host are at /pprof/cpu", http.StatusNotFound)
		})
	}
	mux.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "no such page: / links to those there are", http.StatusNotFound)
	})
	return readOnly(mux), nil
}

// checkMetricsPath refuses paths that are taken, and those that mean something to
// http.ServeMux.
func checkMetricsPath(path string) error {
	if !strings.HasPrefix(path, "/") || path == "/" || strings.ContainsAny(path, "{} \t?#") {
		return fmt.Errorf("serve metrics at %q: want a path that begins with / and is not / itself", path)
	}
	for _, taken := range []string{"/pprof/", "/ui/", "/-/", "/debug/"} {
		if strings.HasPrefix(path+"/", taken) {
			return fmt.Errorf("serve metrics at %q: %s is taken", path, taken)
		}
	}
	return nil
}

func metricsHandler(cfg HandlerConfig) http.Handler {
	h := promhttp.HandlerFor(cfg.Gatherer, promhttp.HandlerOpts{
		ErrorLog:            scrapeLog{cfg.Logger},
		ErrorHandling:       promhttp.ContinueOnError,
		Registry:            cfg.Registerer,
		MaxRequestsInFlight: cfg.MaxScrapes,
		Timeout:             scrapeTimeout,
		EnableOpenMetrics:   true,
	})
	if cfg.Registerer != nil {
		h = promhttp.InstrumentMetricHandler(cfg.Registerer, h)
	}
	return h
}

// scrapeLog logs what goes wrong in a scrape. That the scraper has left is no error of
// ours, and it comes once for each metric that was still to be sent.
type scrapeLog struct{ logger *slog.Logger }

// Println implements promhttp.Logger.
func (l scrapeLog) Println(v ...any) {
	level := slog.LevelError
	for _, x := range v {
		err, ok := x.(error)
		if ok && (errors.Is(err, context.Canceled) || errors.Is(err, http.ErrHandlerTimeout) ||
			errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)) {
			level = slog.LevelDebug
		}
	}
	l.logger.Log(context.Background(), level, strings.TrimSuffix(fmt.Sprintln(v...), "\n"))
}

// symbolzPath is where go tool pprof asks for the names of addresses that have none in a
// profile that it took from /pprof/<type>.
const symbolzPath = "/pprof/symbolz"

// symbolz answers that there are none: what could be resolved is in the profile already.
// At any status but 200 pprof would give up the whole profile. The body is not read.
func symbolz(w http.ResponseWriter, _ *http.Request) {
	plainText(w)
	io.WriteString(w, "num_symbols: 0\n")
}

// readOnly lets GET and HEAD through, and the one question that is a POST. It sets the
// headers that every answer has.
func readOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		question := r.Method == http.MethodPost && r.URL.Path == symbolzPath
		if r.Method != http.MethodGet && r.Method != http.MethodHead && !question {
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "only GET and HEAD are served here", http.StatusMethodNotAllowed)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func plainText(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
}

// unavailable answers 503 with the time after which it is worth to ask again.
func unavailable(w http.ResponseWriter, retry time.Duration, format string, args ...any) {
	w.Header().Set("Retry-After", seconds(retry))
	http.Error(w, fmt.Sprintf(format, args...), http.StatusServiceUnavailable)
}

// seconds rounds d up to whole seconds, one at least.
func seconds(d time.Duration) string {
	return fmt.Sprint(max(1, int64((d+time.Second-1)/time.Second)))
}
