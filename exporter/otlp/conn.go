// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	metricspb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	profilespb "go.opentelemetry.io/proto/otlp/collector/profiles/v1development"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/hostflame/hostflame/internal/buildinfo"
)

// reconnectMax bounds gRPC's own pause between attempts to connect: after an outage the
// backend gets data again within it.
const reconnectMax = 30 * time.Second

// dial makes the connection of one signal. It connects when the first request is made.
// Every request, retries included, passes through observe.
func dial(s Signal, observe func(endpoint string, reply any, err error)) (*grpc.ClientConn, error) {
	creds := insecure.NewCredentials()
	if s.TLS != nil {
		creds = credentials.NewTLS(s.TLS.Clone())
	}
	connect := backoff.DefaultConfig
	connect.MaxDelay = reconnectMax
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithUserAgent("hostflame/" + buildinfo.Read().Version),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: connect, MinConnectTimeout: defaultTimeout}),
		// Pings only while a request runs, no oftener than servers allow by default. The
		// timeout is also TCP_USER_TIMEOUT, and that is what it is here for: without it
		// a peer that vanished is only noticed after a quarter of an hour.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 5 * time.Minute, Timeout: 20 * time.Second}),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, request, reply any,
			cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
		) error {
			err := invoke(ctx, method, request, reply, cc, opts...)
			observe(s.Target, reply, err)
			return err
		}),
	}
	if !s.Uncompressed {
		options = append(options, grpc.WithDefaultCallOptions(grpc.UseCompressor(gzip.Name)))
	}
	conn, err := grpc.NewClient(s.Target, options...)
	if err != nil {
		return nil, fmt.Errorf("make OTLP client for %s: %w", s.Target, err)
	}
	return conn, nil
}

// classify tells what a request came to, and for how long the server asks to wait.
// Which codes may be retried: OTLP specification, "OTLP/gRPC response", failures.
func classify(err error) (o outcome, wait time.Duration) {
	s := status.Convert(err)
	asked := false
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.RetryInfo); ok {
			asked, wait = true, info.GetRetryDelay().AsDuration()
		}
	}
	switch s.Code() {
	case codes.OK:
		return outcomeSuccess, 0
	case codes.Canceled, codes.DeadlineExceeded, codes.Aborted, codes.OutOfRange, codes.Unavailable, codes.DataLoss:
		return outcomeRetryable, wait
	case codes.ResourceExhausted:
		if asked {
			return outcomeRetryable, wait
		}
	}
	return outcomeRefused, 0
}

// observer counts and reports what the requests of one signal came to.
type observer struct {
	*counts
	failures, partials complaints
}

func newObserver(signal string, logger *slog.Logger) *observer {
	logger = logger.With("signal", signal)
	return &observer{
		counts:   newCounts(signal),
		failures: complaints{logger: logger},
		partials: complaints{logger: logger},
	}
}

func (o *observer) observe(endpoint string, reply any, err error) {
	if err != nil {
		kind, _ := classify(err)
		o.export(kind, 0)
		args := []any{"endpoint", endpoint, "err", err}
		if h := hint(endpoint, err); h != "" {
			args = append(args, "hint", h)
		}
		o.failures.warn("OTLP export failed", args...)
		return
	}
	o.failures.resolved("OTLP export works again", "endpoint", endpoint)
	rejected, message := partialSuccess(reply)
	if rejected == 0 && message == "" {
		o.export(outcomeSuccess, 0)
		return
	}
	if rejected == 0 {
		o.export(outcomeSuccess, 0) // only a remark
	} else {
		o.export(outcomePartial, rejected)
	}
	o.partials.warn("OTLP backend complains", "endpoint", endpoint, "rejected", rejected, "message", message)
}

func partialSuccess(reply any) (rejected int64, message string) {
	switch r := reply.(type) {
	case *metricspb.ExportMetricsServiceResponse:
		return r.GetPartialSuccess().GetRejectedDataPoints(), r.GetPartialSuccess().GetErrorMessage()
	case *profilespb.ExportProfilesServiceResponse:
		return r.GetPartialSuccess().GetRejectedProfiles(), r.GetPartialSuccess().GetErrorMessage()
	}
	return 0, ""
}

// hint says what to do about errors that have a usual cause.
func hint(endpoint string, err error) string {
	text := err.Error()
	switch {
	case status.Code(err) == codes.Unimplemented:
		return "this backend does not take the signal; a Collector needs --feature-gates=+service.profilesSupport and a profiles pipeline for profiles"
	case strings.Contains(text, "first record does not look like a TLS handshake"):
		return "the backend speaks plain text: give http://" + endpoint
	case strings.HasSuffix(endpoint, ":4318"):
		return "4318 is the port of OTLP/HTTP; OTLP/gRPC has 4317"
	case strings.Contains(text, "x509: "):
		return "OTEL_EXPORTER_OTLP_CERTIFICATE names the certificate to trust"
	}
	return ""
}
