// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/sdk/resource"
)

const defaultTimeout = 10 * time.Second // of one export, as the specification has it

// Config says what is sent where. FromEnvironment fills all but the last two fields.
type Config struct {
	Metrics  Signal
	Profiles Signal
	// Resource describes the host that both signals are about.
	Resource *resource.Resource

	// Gatherer is what the metrics are read from, at every push. Required with Metrics.
	Gatherer prometheus.Gatherer
	// Logger gets what goes wrong with a backend, at most once in five minutes for each
	// signal. Nothing is logged if nil.
	Logger *slog.Logger
}

// Signal says how one signal is sent.
type Signal struct {
	// Target is a gRPC target ("host:4317", "unix:///run/otlp.sock"). The signal is off
	// when it is empty.
	Target string
	// TLS is nil for plain text.
	TLS *tls.Config
	// Headers go with every request. They often hold credentials: never log them.
	Headers map[string]string
	// Timeout bounds one request, and all tries together of one push of metrics.
	Timeout time.Duration
	// Uncompressed turns gzip off.
	Uncompressed bool
}

// Enabled tells whether anything is to be sent.
func (c Config) Enabled() bool { return c.Metrics.Target != "" || c.Profiles.Target != "" }

// ConfigError is a setting that cannot be used.
type ConfigError struct {
	Setting string // the flag or environment variable
	Value   string // as given, "" where it may be secret
	Problem string
	hint    string
}

// Error names the setting, its value and what is wrong with it.
func (e *ConfigError) Error() string {
	if e.Value == "" {
		return e.Setting + ": " + e.Problem
	}
	return fmt.Sprintf("%s %q: %s", e.Setting, e.Value, e.Problem)
}

// Hint says what would work.
func (e *ConfigError) Hint() string { return e.hint }

// EndpointFlag is how errors name the argument of FromEnvironment.
const EndpointFlag = "--otlp.endpoint"

// FromEnvironment makes the configuration of an endpoint given by flag, or else by the
// variables OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_EXPORTER_OTLP_{METRICS,PROFILES}_ENDPOINT.
// Without an endpoint, and with OTEL_SDK_DISABLED=true, nothing is enabled and no other
// variable is looked at.
//
// The other standard variables hold with the flag too: _HEADERS, _TIMEOUT, _COMPRESSION
// (gzip if not set), _CERTIFICATE, _CLIENT_CERTIFICATE, _CLIENT_KEY, _INSECURE and
// _PROTOCOL (only grpc is built), each for one signal or for both,
// OTEL_{METRICS,PROFILES}_EXPORTER (none turns a signal off), OTEL_SERVICE_NAME and
// OTEL_RESOURCE_ATTRIBUTES. OTEL_METRIC_EXPORT_INTERVAL is read by the SDK (60 s).
//
// A setting that cannot be used is a *ConfigError. Certificates are read here, once.
func FromEnvironment(endpoint string) (Config, error) {
	var cfg Config
	if disabled, err := boolean("OTEL_SDK_DISABLED"); err != nil || disabled {
		return cfg, err
	}
	var err error
	if cfg.Metrics, err = signalFromEnvironment("METRICS", endpoint); err != nil {
		return Config{}, err
	}
	if cfg.Profiles, err = signalFromEnvironment("PROFILES", endpoint); err != nil {
		return Config{}, err
	}
	if !cfg.Enabled() {
		return cfg, nil
	}
	if cfg.Resource, err = newResource(); err != nil {
		return Config{}, err
	}
	return cfg, nil
}

func signalFromEnvironment(signal, endpoint string) (Signal, error) {
	env := environment{signal}
	name := EndpointFlag
	if endpoint == "" {
		name, endpoint = env.lookup("ENDPOINT")
	}
	if endpoint == "" || !env.selected() {
		return Signal{}, nil
	}
	if name, protocol := env.lookup("PROTOCOL"); protocol != "" && protocol != "grpc" {
		return Signal{}, &ConfigError{name, protocol, "this protocol is not supported",
			"set " + name + "=grpc, and give the endpoint of the backend's gRPC port (usually 4317)"}
	}
	s := Signal{Timeout: defaultTimeout}
	plain, err := boolean(first(env.lookup("INSECURE")))
	if err != nil {
		return Signal{}, err
	}
	if s.Target, plain, err = parseEndpoint(name, endpoint, plain); err != nil {
		return Signal{}, err
	}
	if !plain {
		if s.TLS, err = env.tls(); err != nil {
			return Signal{}, err
		}
	}
	if s.Headers, err = env.headers(); err != nil {
		return Signal{}, err
	}
	if name, v := env.lookup("TIMEOUT"); v != "" {
		ms, err := strconv.Atoi(v)
		if err != nil || ms <= 0 {
			return Signal{}, &ConfigError{name, v, "not a positive number of milliseconds", "10000 is ten seconds"}
		}
		s.Timeout = time.Duration(ms) * time.Millisecond
	}
	switch name, v := env.lookup("COMPRESSION"); v {
	case "", "gzip":
	case "none":
		s.Uncompressed = true
	default:
		return Signal{}, &ConfigError{name, v, "this compression is not supported", "gzip and none are"}
	}
	return s, nil
}

// environment reads the variables of one signal.
type environment struct{ signal string }

// lookup returns the variable of the signal, or else the one of all signals, and its
// name. A variable set to nothing counts as not set.
func (e environment) lookup(suffix string) (name, value string) {
	name = "OTEL_EXPORTER_OTLP_" + e.signal + "_" + suffix
	if value = strings.TrimSpace(os.Getenv(name)); value != "" {
		return name, value
	}
	name = "OTEL_EXPORTER_OTLP_" + suffix
	return name, strings.TrimSpace(os.Getenv(name))
}

// selected tells whether OTLP is among the exporters of the signal.
func (e environment) selected() bool {
	list := os.Getenv("OTEL_" + e.signal + "_EXPORTER")
	for name := range strings.SplitSeq(list, ",") {
		if strings.TrimSpace(name) == "otlp" {
			return true
		}
	}
	return strings.TrimSpace(list) == ""
}

func (e environment) tls() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if name, file := e.lookup("CERTIFICATE"); file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, &ConfigError{name, file, "no PEM certificate in it", ""}
		}
	}
	certName, cert := e.lookup("CLIENT_CERTIFICATE")
	keyName, key := e.lookup("CLIENT_KEY")
	switch {
	case cert == "" && key == "":
		return cfg, nil
	case cert == "":
		return nil, &ConfigError{keyName, key, "a key without a certificate", "set " + certName + " too"}
	case key == "":
		return nil, &ConfigError{certName, cert, "a certificate without its key", "set " + keyName + " too"}
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", certName, err)
	}
	cfg.Certificates = []tls.Certificate{pair}
	return cfg, nil
}

// headers parses key=value pairs as W3C baggage has them: separated by commas, values
// percent-encoded.
func (e environment) headers() (map[string]string, error) {
	name, list := e.lookup("HEADERS")
	headers := map[string]string{}
	for pair := range strings.SplitSeq(list, ",") {
		if strings.TrimSpace(pair) == "" {
			continue
		}
		key, value, found := strings.Cut(pair, "=")
		key = strings.ToLower(strings.TrimSpace(key))
		decoded, err := url.PathUnescape(strings.TrimSpace(value))
		if !found || err != nil || !validHeader(key, decoded) {
			return nil, &ConfigError{name, "", "not a list of key=value pairs",
				"for example api-key=secret,tenant=a; percent-encode what is special in values"}
		}
		headers[key] = decoded
	}
	return headers, nil
}

// validHeader tells whether gRPC takes the header: it would fail every request, late.
func validHeader(key, value string) bool {
	for _, c := range key {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && !strings.ContainsRune("-_.", c) {
			return false
		}
	}
	for _, c := range value {
		if (c < ' ' || c > '~') && !strings.HasSuffix(key, "-bin") {
			return false
		}
	}
	return key != "" && !strings.HasPrefix(key, "grpc-")
}

// boolean reads a variable by the specification's rule, in which only "true" is true,
// except that a value that is neither is an error: a typing error must not turn TLS off
// or on.
func boolean(name string) (bool, error) {
	switch v := strings.TrimSpace(os.Getenv(name)); strings.ToLower(v) {
	case "true":
		return true, nil
	case "false", "":
		return false, nil
	default:
		return false, &ConfigError{name, v, "neither true nor false", ""}
	}
}

func first(name, _ string) string { return name }
