// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/pprof/profile"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	metricspb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	profilespb "go.opentelemetry.io/proto/otlp/collector/profiles/v1development"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"

	"github.com/hostflame/hostflame/profiler"
)

// backend is an OTLP/gRPC server that answers as a test wants, with gRPC's default limits.
type backend struct {
	address string
	// answer is what the nth request (from 0) of a signal gets; nil: success.
	answer func(n int) (rejected int64, message string, err error)

	mu       sync.Mutex
	profiles []*profilespb.ExportProfilesServiceRequest
	metrics  []*metricspb.ExportMetricsServiceRequest
	times    []time.Time
	headers  metadata.MD // of the last request
	encoding string
	arrived  chan struct{}
}

type (
	profilesService struct {
		profilespb.UnimplementedProfilesServiceServer
		*backend
	}
	metricsService struct {
		metricspb.UnimplementedMetricsServiceServer
		*backend
	}
)

func startBackend(t *testing.T, options ...grpc.ServerOption) *backend {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &backend{address: l.Addr().String(), arrived: make(chan struct{}, 1000)}
	s := grpc.NewServer(append(options, grpc.StatsHandler(b))...)
	profilespb.RegisterProfilesServiceServer(s, profilesService{backend: b})
	metricspb.RegisterMetricsServiceServer(s, metricsService{backend: b})
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() { s.Stop(); <-done })
	return b
}

func (b *backend) note(ctx context.Context, n int) (int64, string, error) {
	b.times = append(b.times, time.Now())
	b.headers, _ = metadata.FromIncomingContext(ctx)
	b.arrived <- struct{}{}
	if b.answer == nil {
		return 0, "", nil
	}
	return b.answer(n)
}

func (s profilesService) Export(ctx context.Context, r *profilespb.ExportProfilesServiceRequest) (*profilespb.ExportProfilesServiceResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.profiles = append(s.profiles, r)
	rejected, message, err := s.note(ctx, len(s.profiles)-1)
	return &profilespb.ExportProfilesServiceResponse{
		PartialSuccess: &profilespb.ExportProfilesPartialSuccess{RejectedProfiles: rejected, ErrorMessage: message}}, err
}

func (s metricsService) Export(ctx context.Context, r *metricspb.ExportMetricsServiceRequest) (*metricspb.ExportMetricsServiceResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.metrics = append(s.metrics, r)
	rejected, message, err := s.note(ctx, len(s.metrics)-1)
	return &metricspb.ExportMetricsServiceResponse{
		PartialSuccess: &metricspb.ExportMetricsPartialSuccess{RejectedDataPoints: rejected, ErrorMessage: message}}, err
}

// wait returns when n more requests have come.
func (b *backend) wait(t *testing.T, n int) {
	t.Helper()
	for range n {
		select {
		case <-b.arrived:
		case <-time.After(time.Minute):
			t.Fatal("a request did not come")
		}
	}
}

// HandleRPC implements stats.Handler.
func (b *backend) HandleRPC(_ context.Context, s stats.RPCStats) {
	if h, ok := s.(*stats.InHeader); ok {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.encoding = h.Compression
	}
}

// TagRPC, TagConn and HandleConn implement stats.Handler.
func (b *backend) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (b *backend) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (b *backend) HandleConn(context.Context, stats.ConnStats)                       {}

// running is an Exporter that runs.
type running struct {
	*Exporter
	registry *prometheus.Registry
	log      *logBuffer
	stop     func() time.Duration // ends Run, waits for it, and tells how long that took
}

// start makes an exporter of cfg, which adjust may change, and runs it until the test ends.
func start(t *testing.T, cfg Config, adjust func(*Exporter)) *running {
	t.Helper()
	r := &running{registry: prometheus.NewRegistry(), log: new(logBuffer)}
	cfg.Resource = testResource(t)
	cfg.Logger = slog.New(slog.NewTextHandler(r.log, nil))
	if cfg.Gatherer == nil {
		cfg.Gatherer = r.registry
	}
	var err error
	if r.Exporter, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	r.registry.MustRegister(r.Exporter)
	if adjust != nil {
		adjust(r.Exporter)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	var once sync.Once
	r.stop = func() (took time.Duration) {
		once.Do(func() {
			begin := time.Now()
			cancel()
			if err := <-done; err != nil {
				t.Errorf("run: %v", err)
			}
			took = time.Since(begin)
		})
		return took
	}
	t.Cleanup(func() { r.stop() })
	return r
}

// value is one of the exporter's own metrics, by name and label values in their order.
func (r *running) value(t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	families, err := r.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			var values []string
			for _, l := range m.Label {
				values = append(values, l.GetValue())
			}
			// Gather sorts labels by name; outcome and reason come before signal.
			if f.GetName() == name && slices.Equal(values, labels) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no %s%v", name, labels)
	return 0
}

// wantValue waits until one of the exporter's own metrics is want.
func (r *running) wantValue(t *testing.T, want float64, name string, labels ...string) {
	t.Helper()
	var got float64
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if got = r.value(t, name, labels...); got == want {
			return
		}
	}
	t.Fatalf("%s%v is %v, want %v\nlog: %s", name, labels, got, want, r.log)
}

// waitLog waits until text is in the log.
func (r *running) waitLog(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(r.log.String(), text); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in the log: %q\n%s", text, r.log)
		}
	}
}

// plain is a Signal without TLS.
func plain(address string) Signal { return Signal{Target: address, Timeout: 5 * time.Second} }

func window() *profiler.Window { return windowOf(hostProfile()) }

func windowOf(p *profile.Profile) *profiler.Window {
	return &profiler.Window{Profiles: []profiler.Profile{profiler.NewProfile("cpu", p, 0, nil)}}
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// authority is a CA with one certificate for 127.0.0.1, for server and client, in files.
type authority struct{ ca, cert, key string }

func newAuthority(t *testing.T) authority {
	t.Helper()
	dir := t.TempDir()
	a := authority{filepath.Join(dir, "ca.pem"), filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")}
	template := func(serial int64, ca bool) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "hostflame test"},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: ca, BasicConstraintsValid: true,
			KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}
	}
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	write := func(file, kind string, der []byte, err error) {
		if err == nil {
			err = os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	caKey, key := newKey(), newKey()
	ca := template(1, true)
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	write(a.ca, "CERTIFICATE", der, err)
	der, err = x509.CreateCertificate(rand.Reader, template(2, false), ca, key.Public(), caKey)
	write(a.cert, "CERTIFICATE", der, err)
	der, err = x509.MarshalPKCS8PrivateKey(key)
	write(a.key, "PRIVATE KEY", der, err)
	return a
}

// server demands a client certificate of the same authority.
func (a authority) server(t *testing.T) *tls.Config {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(a.cert, a.key)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(a.ca)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
}

func lint(t *testing.T, g prometheus.Gatherer) {
	t.Helper()
	problems, err := testutil.GatherAndLint(g)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// pprofOf is the pprof profile of a window that window has made.
func pprofOf(w *profiler.Window) *profile.Profile {
	p, err := w.Profiles[0].Pprof()
	if err != nil {
		panic(err)
	}
	return p
}
