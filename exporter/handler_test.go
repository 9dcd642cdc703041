// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"github.com/hostflame/hostflame/internal/buildinfo"
)

// testServer serves the handler as the command does. The change, if not nil, is made to
// the configuration and the server first.
func testServer(t *testing.T, capturer Capturer, change func(*HandlerConfig, *http.Server)) *httptest.Server {
	t.Helper()
	logger, log := logs()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log:\n%s", log)
		}
	})
	collector := NewCollector(testReaders(), testStart, logger)
	reg := NewRegistry(collector, true)
	cfg := HandlerConfig{
		Gatherer:   reg,
		Registerer: reg,
		Capturer:   capturer,
		Types:      testTypes,
		Collector:  collector,
		Build:      buildinfo.Info{Version: "1.2.3", Revision: "0123456789abcdef", GoVersion: "go1.26", Platform: "linux/amd64"},
		Host:       "testhost",
		Logger:     logger,
	}
	s := httptest.NewUnstartedServer(nil)
	if change != nil {
		change(&cfg, s.Config)
	}
	h, err := NewHandler(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s.Config.Handler = h
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// noRedirects shows redirects to the test.
var noRedirects = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

// fetch answers a request with an empty body.
func fetch(t *testing.T, method, url string, headers ...string) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	answer, err := noRedirects.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer, string(body)
}

// TestAnswersGolden holds the texts of all answers that are not a page or a profile.
func TestAnswersGolden(t *testing.T) {
	s := testServer(t, newFakeCapturer(t), nil)
	var b strings.Builder
	for _, request := range []string{
		"GET /nothing",
		"POST /",
		"DELETE /metrics",
		"POST /pprof/cpu",
		"POST /pprof/symbolz",
		"GET /-/healthy",
		"HEAD /-/healthy",
		"GET /-/ready",
		"GET /-/nothing",
		"GET /debug/pprof/",
		"GET /debug/pprof/heap",
		"GET /pprof",
		"GET /pprof/",
		"GET /pprof/runqueue",
		"GET /pprof/offcpu?seconds=1",
		"GET /pprof/wall",
		"GET /pprof/cpu/",
		"GET /pprof/CPU",
		"GET /pprof/cpu?second=1",
		"GET /pprof/cpu?seconds=",
		"GET /pprof/cpu?seconds=0",
		"GET /pprof/cpu?seconds=3601",
		"GET /pprof/cpu?seconds=-1",
		"GET /pprof/cpu?seconds=1.5",
		"GET /pprof/cpu?seconds=1s",
		"GET /pprof/cpu?seconds=1&seconds=2",
		"GET /pprof/cpu?seconds=9223372036854775808",
		"GET /pprof/cpu?pid=self",
		"GET /pprof/cpu?pid=0",
		"GET /pprof/cpu?pid=1&pid=4194305",
		"GET /pprof/cpu?comm=",
		"GET /pprof/cpu?comm=sixteen-letters!",
		"GET /pprof/cpu?container=",
		"GET /pprof/cpu?format=svg",
		"GET /pprof/cpu?format=",
		"GET /pprof/cpu?sample_index=cpu",
		"GET /pprof/cpu?format=folded&sample_index=delay",
		"GET /pprof/cpu?seconds=%zz",
		"GET /pprof/cpu?pid=1;pid=2",
		"GET /pprof/cpu?pid=1" + strings.Repeat("&pid=2", maxFilter),
		"HEAD /pprof/cpu",
		"HEAD /pprof/cpu?seconds=0",
		"GET /ui",
		"GET /ui/",
		"GET /ui/graph",
		"GET /ui/source?f=main",
		"GET /ui/disasm?f=main",
		"GET /ui/saveconfig?config=x",
		"GET /ui/deleteconfig?config=x",
		"GET /ui/../../etc/passwd",
		"GET /ui/flamegraph?g=nothing",
	} {
		method, path, _ := strings.Cut(request, " ")
		answer, body := fetch(t, method, s.URL+path)
		if len(request) > 100 {
			request = request[:100] + "…"
		}
		fmt.Fprintf(&b, "%s\n  %s\n", request, answer.Status)
		for _, name := range []string{"Location", "Allow", "Retry-After", "Content-Type"} {
			if v := answer.Header.Get(name); v != "" {
				fmt.Fprintf(&b, "  %s: %s\n", name, v)
			}
		}
		if answer.StatusCode/100 != 3 {
			fmt.Fprintf(&b, "  %s\n", strings.TrimSuffix(strings.ReplaceAll(body, s.URL, "http://agent"), "\n"))
		}
	}
	golden(t, "answers.txt", []byte(b.String()))
}

func TestSecurityHeaders(t *testing.T) {
	s := testServer(t, newFakeCapturer(t), nil)
	for _, path := range []string{"/", "/metrics", "/pprof/none", "/ui/flamegraph", "/-/ready", "/none"} {
		answer, _ := fetch(t, "GET", s.URL+path)
		for _, name := range []string{"X-Content-Type-Options", "X-Frame-Options", "Content-Security-Policy", "Referrer-Policy"} {
			if answer.Header.Get(name) == "" {
				t.Errorf("%s has no %s", path, name)
			}
		}
	}
}

func TestReady(t *testing.T) {
	capturer := newFakeCapturer(t)
	s := testServer(t, capturer, nil)
	if answer, body := fetch(t, "GET", s.URL+"/-/ready"); answer.StatusCode != 200 {
		t.Errorf("%s %q", answer.Status, body)
	}
	capturer.ready = false
	for path, want := range map[string]string{
		"/-/ready":             "hostflame is not ready: no samples have been drained yet\n",
		"/pprof/cpu?seconds=1": "no profile yet: no samples have been drained yet\n",
	} {
		if answer, body := fetch(t, "GET", s.URL+path); answer.StatusCode != 503 || answer.Header.Get("Retry-After") != "1" || body != want {
			t.Errorf("%s: %s %q", path, answer.Status, body)
		}
	}
	if answer, _ := fetch(t, "GET", s.URL+"/-/healthy"); answer.StatusCode != 200 {
		t.Errorf("healthy: %s", answer.Status)
	}
}

// TestNoProfiles: a host where CPU sampling does not work has metrics all the same.
func TestNoProfiles(t *testing.T) {
	s := testServer(t, newFakeCapturer(t), func(c *HandlerConfig, _ *http.Server) {
		c.NoProfiles = errors.New("open perf event on CPU 0: permission denied")
	})
	want := "there are no profiles of this host: open perf event on CPU 0: permission denied"
	for _, path := range []string{"/pprof/cpu?seconds=1", "/ui/", "/ui/flamegraph"} {
		if answer, body := fetch(t, "GET", s.URL+path); answer.StatusCode != 503 || body != want+"\n" {
			t.Errorf("%s: %s %q", path, answer.Status, body)
		}
	}
	for path, want := range map[string]string{"/": want[1:], "/metrics": "hostflame_runqueue_latency_seconds", "/-/ready": "ready"} {
		if answer, body := fetch(t, "GET", s.URL+path); answer.StatusCode != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %s %.300s", path, answer.Status, body)
		}
	}
}

func TestMetricsPath(t *testing.T) {
	for _, bad := range []string{"metrics", "/", "/ui", "/ui/metrics", "/pprof/cpu", "/-/metrics", "/debug/vars", "/a b", "/{x}"} {
		if _, err := NewHandler(HandlerConfig{MetricsPath: bad, Types: testTypes}); err == nil {
			t.Errorf("took %q", bad)
		}
	}
	s := testServer(t, newFakeCapturer(t), func(c *HandlerConfig, _ *http.Server) { c.MetricsPath = "/some/where" })
	if answer, body := fetch(t, "GET", s.URL+"/some/where"); answer.StatusCode != 200 || !strings.Contains(body, "hostflame_samples_total") {
		t.Errorf("%s %.100s", answer.Status, body)
	}
	if answer, _ := fetch(t, "GET", s.URL+"/metrics"); answer.StatusCode != 404 {
		t.Errorf("/metrics: %s", answer.Status)
	}
}

// TestMetricsFormats asks as Prometheus does.
func TestMetricsFormats(t *testing.T) {
	s := testServer(t, newFakeCapturer(t), nil)
	const protobuf = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
	answer, body := fetch(t, "GET", s.URL+"/metrics", "Accept", protobuf)
	decoder := expfmt.NewDecoder(strings.NewReader(body), expfmt.ResponseFormat(answer.Header))
	families := map[string]*dto.MetricFamily{}
	for {
		var f dto.MetricFamily
		if err := decoder.Decode(&f); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		families[f.GetName()] = &f
	}
	h := families["hostflame_runqueue_latency_seconds"].GetMetric()[0].GetHistogram()
	if h.GetSchema() != 3 || len(h.PositiveSpan) == 0 || len(h.Bucket) != 24 || h.CreatedTimestamp == nil {
		t.Errorf("protobuf: %v", h)
	}
	for _, name := range []string{"promhttp_metric_handler_requests_total", "go_goroutines", "process_cpu_seconds_total", "hostflame_build_info"} {
		if families[name] == nil {
			t.Errorf("no %s", name)
		}
	}
	answer, body = fetch(t, "GET", s.URL+"/metrics", "Accept", "application/openmetrics-text;version=1.0.0")
	if got := answer.Header.Get("Content-Type"); !strings.HasPrefix(got, "application/openmetrics-text") || !strings.HasSuffix(body, "# EOF\n") {
		t.Errorf("OpenMetrics: %s", got)
	}
	answer, body = fetch(t, "GET", s.URL+"/metrics")
	if got := answer.Header.Get("Content-Type"); !strings.HasPrefix(got, "text/plain; version=0.0.4") || !strings.Contains(body, `hostflame_runqueue_latency_seconds_bucket{le="1e-06"} 4`) {
		t.Errorf("text: %s", got)
	}
}

// TestMetricsSurviveGatherError: what can not be gathered does not take the rest along.
func TestMetricsSurviveGatherError(t *testing.T) {
	s := testServer(t, newFakeCapturer(t), func(c *HandlerConfig, _ *http.Server) {
		c.Gatherer = prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
			c := NewCollector(Readers{CPU: fakeCPU{{Container: "/"}}}, testStart, c.Logger)
			families, _ := NewRegistry(c, false).Gather()
			return families, errors.New("one family is broken")
		})
	})
	if answer, body := fetch(t, "GET", s.URL+"/metrics"); answer.StatusCode != 200 || !strings.Contains(body, "hostflame_cpu_seconds_total") {
		t.Errorf("%s %.200s", answer.Status, body)
	}
}

// TestScrapeLog: a scraper that leaves is no error.
func TestScrapeLog(t *testing.T) {
	for _, test := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("write: %w", context.Canceled), ""},
		{fmt.Errorf("write: %w", http.ErrHandlerTimeout), ""},
		{errors.New("bad metric"), "level=ERROR msg=\"error encoding and sending metric family: bad metric\"\n"},
	} {
		logger, text := logs()
		scrapeLog{logger}.Println("error encoding and sending metric family:", test.err)
		if got := text.String(); got != test.want {
			t.Errorf("%v is logged as %q, want %q", test.err, got, test.want)
		}
	}
}

func TestDebugPprof(t *testing.T) {
	s := testServer(t, newFakeCapturer(t), func(c *HandlerConfig, _ *http.Server) { c.DebugPprof = true })
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/goroutine?debug=1", "/debug/pprof/cmdline", "/debug/pprof/symbol"} {
		if answer, _ := fetch(t, "GET", s.URL+path); answer.StatusCode != 200 {
			t.Errorf("%s: %s", path, answer.Status)
		}
	}
}
