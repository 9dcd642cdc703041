// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// clearEnvironment takes away what the machine has set.
func clearEnvironment(t *testing.T) {
	t.Helper()
	for _, e := range os.Environ() {
		if name, _, _ := strings.Cut(e, "="); strings.HasPrefix(name, "OTEL_") {
			t.Setenv(name, "")
		}
	}
}

func TestFromEnvironment(t *testing.T) {
	// want of a signal: "target tls|plain timeout gzip|none headers", "" for off.
	tests := []struct {
		name              string
		flag              string
		env               map[string]string
		metrics, profiles string
	}{
		{name: "nothing given"},
		{name: "no endpoint, so the rest is not looked at", env: map[string]string{
			"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json", "OTEL_EXPORTER_OTLP_TIMEOUT": "x", "OTEL_RESOURCE_ATTRIBUTES": "x"}},
		{name: "flag", flag: "http://127.0.0.1:4317",
			metrics: "127.0.0.1:4317 plain 10s gzip map[]", profiles: "127.0.0.1:4317 plain 10s gzip map[]"},
		{name: "flag wins over both", flag: "http://a:1", env: map[string]string{
			"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:2", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:3"},
			metrics: "a:1 plain 10s gzip map[]", profiles: "a:1 plain 10s gzip map[]"},
		{name: "one for all, and one for metrics", env: map[string]string{
			"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:2", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "https://c:3"},
			metrics: "c:3 TLS 10s gzip map[]", profiles: "b:2 plain 10s gzip map[]"},
		{name: "only profiles", env: map[string]string{"OTEL_EXPORTER_OTLP_PROFILES_ENDPOINT": "http://p:5"},
			profiles: "p:5 plain 10s gzip map[]"},
		{name: "no metrics", flag: "http://a:1", env: map[string]string{"OTEL_METRICS_EXPORTER": "none"},
			profiles: "a:1 plain 10s gzip map[]"},
		{name: "metrics to another exporter", flag: "http://a:1", env: map[string]string{
			"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_PROFILES_EXPORTER": "console, otlp"},
			profiles: "a:1 plain 10s gzip map[]"},
		{name: "disabled", flag: "http://a:1", env: map[string]string{"OTEL_SDK_DISABLED": "TRUE"}},
		{name: "everything else", env: map[string]string{
			"OTEL_EXPORTER_OTLP_ENDPOINT":             "collector:4317",
			"OTEL_EXPORTER_OTLP_INSECURE":             "true",
			"OTEL_EXPORTER_OTLP_PROTOCOL":             "grpc",
			"OTEL_EXPORTER_OTLP_TIMEOUT":              "2500",
			"OTEL_EXPORTER_OTLP_PROFILES_TIMEOUT":     "30000",
			"OTEL_EXPORTER_OTLP_METRICS_COMPRESSION":  "none",
			"OTEL_EXPORTER_OTLP_PROFILES_COMPRESSION": "gzip",
			"OTEL_EXPORTER_OTLP_HEADERS":              "Api-Key = a%20b ,tenant=t=1,",
			"OTEL_EXPORTER_OTLP_METRICS_HEADERS":      "x=y",
			"OTEL_EXPORTER_OTLP_PROFILES_INSECURE":    "false",
		}, metrics: "collector:4317 plain 2.5s none map[x:y]", profiles: "collector:4317 TLS 30s gzip map[api-key:a b tenant:t=1]"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			clearEnvironment(t)
			for k, v := range test.env {
				t.Setenv(k, v)
			}
			cfg, err := FromEnvironment(test.flag)
			if err != nil {
				t.Fatal(err)
			}
			if got := describe(cfg.Metrics); got != test.metrics {
				t.Errorf("metrics %q, want %q", got, test.metrics)
			}
			if got := describe(cfg.Profiles); got != test.profiles {
				t.Errorf("profiles %q, want %q", got, test.profiles)
			}
			if want := test.metrics+test.profiles != ""; cfg.Enabled() != want {
				t.Errorf("enabled: %v", cfg.Enabled())
			}
		})
	}
}

func describe(s Signal) string {
	if s.Target == "" {
		return ""
	}
	security, compression := "plain", "gzip"
	if s.TLS != nil {
		security = "TLS"
	}
	if s.Uncompressed {
		compression = "none"
	}
	var b strings.Builder
	for _, k := range sortedKeys(s.Headers) {
		b.WriteString(" " + k + ":" + s.Headers[k])
	}
	return strings.Join([]string{s.Target, security, s.Timeout.String(), compression, "map[" + strings.TrimSpace(b.String()) + "]"}, " ")
}

func TestEndpoints(t *testing.T) {
	const bad = "error"
	tests := []struct{ endpoint, target, want string }{
		{"http://127.0.0.1:4317", "127.0.0.1:4317", "plain"},
		{"HTTP://collector:4317/", "collector:4317", "plain"},
		{"http://collector", "collector:4317", "plain"},
		{"https://otlp.example.com", "otlp.example.com:443", "as given"},
		{"https://[::1]:4317", "[::1]:4317", "as given"},
		{"http://[fe80::1]", "[fe80::1]:4317", "plain"},
		{"collector:4317", "collector:4317", "as given"},
		{"[::1]:4317", "[::1]:4317", "as given"},
		{"localhost:4317", "localhost:4317", "as given"},
		{"unix:///run/otlp.sock", "unix:///run/otlp.sock", "as given"},
		{"unix:/run/otlp.sock", "unix:/run/otlp.sock", "as given"},
		{"dns:///collector:4317", "dns:///collector:4317", "as given"},
		{"collector", bad, "no host:port"},
		{":4317", bad, "no host"},
		{"collector:", bad, "no valid port"},
		{"collector:otlp", bad, "no valid port"},
		{"collector:70000", bad, "no valid port"},
		{"http://", bad, "no host"},
		{"http://:4317", bad, "no host"},
		{"http://collector:0", bad, "no valid port"},
		{"http://collector:4318/v1/metrics", bad, "no path"},
		{"http://collector:4317?x=y", bad, "no path"},
		{"http://user:secret@collector:4317", bad, "not supported"},
		{"http://[::1", bad, "not a URL"},
		{"tcp://collector:4317", bad, "scheme is not supported"},
		{"unix://", bad, "nothing after"},
		{"true", bad, "no host:port"},
	}
	for _, test := range tests {
		for _, insecure := range []bool{false, true} {
			target, plain, err := parseEndpoint("--otlp.endpoint", test.endpoint, insecure)
			if test.target == bad {
				var e *ConfigError
				if !errors.As(err, &e) || !strings.Contains(e.Error(), test.want) || !strings.Contains(e.Error(), "--otlp.endpoint") {
					t.Errorf("%q: %v, want %q", test.endpoint, err, test.want)
				} else if e.Hint() == "" || strings.Contains(e.Error(), "secret") {
					t.Errorf("%q: hint %q of %q", test.endpoint, e.Hint(), e)
				}
				continue
			}
			if wantPlain := test.want == "plain" || test.want == "as given" && insecure && !strings.HasPrefix(test.endpoint, "https"); err != nil || target != test.target || plain != wantPlain {
				t.Errorf("%q, insecure %v: %q plain %v, %v", test.endpoint, insecure, target, plain, err)
			}
		}
	}
}

func TestConfigErrors(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct{ variable, value, want string }{
		{"OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", `OTEL_EXPORTER_OTLP_PROTOCOL "http/protobuf": this protocol is not supported`},
		{"OTEL_EXPORTER_OTLP_PROFILES_PROTOCOL", "http/json", `OTEL_EXPORTER_OTLP_PROFILES_PROTOCOL "http/json": this protocol is not supported`},
		{"OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "gzip and none are"},
		{"OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "not a positive number of milliseconds"},
		{"OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "0", "not a positive number of milliseconds"},
		{"OTEL_EXPORTER_OTLP_INSECURE", "yes", "neither true nor false"},
		{"OTEL_SDK_DISABLED", "1", "neither true nor false"},
		{"OTEL_EXPORTER_OTLP_HEADERS", "secret", "OTEL_EXPORTER_OTLP_HEADERS: not a list of key=value pairs"},
		{"OTEL_EXPORTER_OTLP_HEADERS", "a=%zz", "not a list of key=value pairs"},
		{"OTEL_EXPORTER_OTLP_HEADERS", "grpc-status=0", "not a list of key=value pairs"},
		{"OTEL_EXPORTER_OTLP_HEADERS", "a=%0a", "not a list of key=value pairs"},
		{"OTEL_EXPORTER_OTLP_CERTIFICATE", "/nonexistent", "OTEL_EXPORTER_OTLP_CERTIFICATE: open /nonexistent"},
		{"OTEL_EXPORTER_OTLP_CERTIFICATE", empty, "no PEM certificate in it"},
		{"OTEL_EXPORTER_OTLP_CLIENT_KEY", empty, "a key without a certificate"},
		{"OTEL_EXPORTER_OTLP_METRICS_CLIENT_CERTIFICATE", empty, "a certificate without its key"},
		{"OTEL_RESOURCE_ATTRIBUTES", "nothing", "not a list of key=value pairs"},
	}
	for _, test := range tests {
		t.Run(test.variable+"="+test.value, func(t *testing.T) {
			clearEnvironment(t)
			t.Setenv(test.variable, test.value)
			cfg, err := FromEnvironment("https://127.0.0.1:4317")
			if err == nil {
				t.Fatal("no error")
			}
			text := err.Error()
			if e, ok := errors.AsType[*ConfigError](err); ok {
				text += " " + e.Hint()
			}
			if !strings.Contains(text, test.want) || strings.Contains(text, "secret: ") {
				t.Errorf("%q, want %q", text, test.want)
			}
			if cfg.Enabled() {
				t.Error("enabled all the same")
			}
		})
	}
}

func TestResource(t *testing.T) {
	clearEnvironment(t)
	t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=prod,host.name=web%2D1,service.name=from-attributes")
	t.Setenv("OTEL_SERVICE_NAME", "hosts")
	cfg, err := FromEnvironment("http://127.0.0.1:4317")
	if err != nil {
		t.Fatal(err)
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, a := range resourceMessage(cfg.Resource).Attributes {
		got[a.Key] = a.Value.GetStringValue()
	}
	arch := got["host.arch"]
	delete(got, "service.version")
	want := map[string]string{
		"service.name": "hosts", "service.instance.id": host, "deployment.environment.name": "prod",
		"host.name": "web-1", "os.type": "linux", "host.arch": arch,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if arch != "amd64" && arch != "arm64" {
		t.Errorf("host.arch %q", arch)
	}
}
