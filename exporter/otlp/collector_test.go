// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	profilespb "go.opentelemetry.io/proto/otlp/profiles/v1development"

	"github.com/hostflame/hostflame/profiler"
	"github.com/hostflame/hostflame/test/collector"
)

// TestCollector pushes to a real OpenTelemetry Collector that runs the configuration in
// deploy/, and reads from its files that what was pushed is there, exactly.
func TestCollector(t *testing.T) {
	clearEnvironment(t)
	c := collector.Start(t, collector.Config(t))
	cfg, err := FromEnvironment("http://" + c.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Gatherer = register(testMetrics())
	r := start(t, cfg, nil)
	goWindow := goProfile(t, 500*time.Millisecond)
	host := hostProfile()
	large := largeProfile(2_000, 12_000)
	for _, p := range []*profiler.Window{windowOf(goWindow), windowOf(host), windowOf(large)} {
		r.Push(p)
	}
	r.wantValue(t, 4, "hostflame_otlp_exports_total", "success", "profiles") // the large one is split
	r.stop()
	c.Stop(t) // writes what it has

	metrics := c.Metrics(t)
	if len(metrics) != 1 {
		t.Fatalf("%d requests of metrics, want 1", len(metrics))
	}
	checkMetrics(t, metrics[0].ResourceMetrics)

	profiles := c.Profiles(t)
	if len(profiles) != 4 {
		t.Fatalf("%d requests of profiles, want 4", len(profiles))
	}
	for _, p := range []struct {
		name     string
		messages []*profilespb.ProfilesData
		want     map[string]int64
	}{
		{"Go", profiles[:1], canonical(goWindow, 0)},
		{"large", profiles[2:], canonical(large, 0)},
	} {
		if diff := cmp.Diff(p.want, canonical(toPprof(t, p.messages), 0)); diff != "" {
			t.Errorf("%s: -want +got\n%.2000s", p.name, diff)
		}
	}
	var text bytes.Buffer
	dump(&text, profiles[0])
	if !strings.Contains(text.String(), "otlp.burnPrimes") {
		t.Errorf("the function that burns is not in the Collector's file\n%.3000s", text.String())
	}
	text.Reset()
	dump(&text, profiles[1])
	if diff := cmp.Diff(readGolden(t, "host.golden"), text.String()); diff != "" {
		t.Errorf("the host's profile came through changed: -want +got\n%s", diff)
	}
}

// TestCollectorWithoutProfiles: a Collector that was started without the feature gate, or
// has no profiles pipeline, refuses profiles; metrics go on, and the log says what to do.
func TestCollectorWithoutProfiles(t *testing.T) {
	clearEnvironment(t)
	c := collector.Start(t, "yaml:"+strings.Join([]string{
		"receivers: {otlp: {protocols: {grpc: {endpoint: '${env:OTLP_LISTEN_ADDRESS}'}}}}",
		"exporters: {file: {path: '${env:OTLP_METRICS_FILE}'}}",
		"service: {telemetry: {metrics: {level: none}}, pipelines: {metrics: {receivers: [otlp], exporters: [file]}}}",
	}, "\n"))
	r := start(t, Config{Metrics: plain(c.Endpoint), Profiles: plain(c.Endpoint), Gatherer: register(testMetrics())}, nil)
	r.Push(window())
	r.wantValue(t, 1, "hostflame_otlp_dropped_total", "refused", "profiles")
	r.stop()
	r.wantValue(t, 1, "hostflame_otlp_exports_total", "success", "metrics")
	if !strings.Contains(r.log.String(), "service.profilesSupport") {
		t.Errorf("no hint in the log\n%s", r.log)
	}
}
