// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/pprof/profile"
	profilesv1 "go.opentelemetry.io/proto/otlp/profiles/v1development"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// quick makes retries fast enough for a test.
func quick(e *Exporter) {
	if e.profiles != nil {
		e.profiles.retry = 10 * time.Millisecond
	}
}

func TestPush(t *testing.T) {
	b := startBackend(t)
	s := plain(b.address)
	s.Headers = map[string]string{"api-key": "secret"}
	r := start(t, Config{Profiles: s}, nil)
	r.Push(window())
	b.wait(t, 1)
	r.wantValue(t, 1, "hostflame_otlp_exports_total", "success", "profiles")
	b.mu.Lock()
	defer b.mu.Unlock()
	d := &profilesv1.ProfilesData{ResourceProfiles: b.profiles[0].ResourceProfiles, Dictionary: b.profiles[0].Dictionary}
	if problems := conform(d); problems != nil {
		t.Error(strings.Join(problems, "\n"))
	}
	if b.encoding != "gzip" {
		t.Errorf("encoding %q", b.encoding)
	}
	if got := b.headers.Get("api-key"); !slices.Equal(got, []string{"secret"}) {
		t.Errorf("api-key %q", got)
	}
	if got := b.headers.Get("user-agent"); len(got) != 1 || !strings.HasPrefix(got[0], "hostflame/") {
		t.Errorf("user-agent %q", got)
	}
	if strings.Contains(r.log.String(), "secret") {
		t.Error("a header's value is in the log")
	}
}

// TestPushLast: what was pushed before the end arrives, even if it is not converted yet.
func TestPushLast(t *testing.T) {
	kerneltest.Timed(t)
	b := startBackend(t)
	r := start(t, Config{Profiles: plain(b.address)}, nil)
	for range windowsWaiting {
		r.Push(window())
	}
	if took := r.stop(); took > 3*time.Second {
		t.Errorf("the end took %v", took)
	}
	if len(b.profiles) != windowsWaiting {
		t.Errorf("%d of %d windows arrived", len(b.profiles), windowsWaiting)
	}
}

// TestPushLarge: a window of more than 4 MiB passes a server that takes 4 MiB, whole.
func TestPushLarge(t *testing.T) {
	b := startBackend(t)
	p := largeProfile(2_000, 12_000)
	s := plain(b.address)
	s.Uncompressed, s.Timeout = true, time.Minute // gzip is slow with the race detector
	r := start(t, Config{Profiles: s}, nil)
	r.Push(windowOf(p))
	b.wait(t, 2)
	r.stop()
	var messages []*profilesv1.ProfilesData
	for _, m := range b.profiles {
		messages = append(messages, &profilesv1.ProfilesData{ResourceProfiles: m.ResourceProfiles, Dictionary: m.Dictionary})
	}
	if diff := cmp.Diff(canonical(p, 0), canonical(toPprof(t, messages), 0)); diff != "" {
		t.Errorf("-want +got\n%.2000s\nlog: %s", diff, r.log)
	}
	r.wantValue(t, 0, "hostflame_otlp_exports_total", "refused", "profiles")
}

// TestPushRetries: what fails for now comes again, unchanged and in order, not before the
// server wants it.
func TestPushRetries(t *testing.T) {
	const asked = 300 * time.Millisecond
	throttled, err := status.New(codes.ResourceExhausted, "slow down").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(asked)})
	if err != nil {
		t.Fatal(err)
	}
	b := startBackend(t)
	b.answer = func(n int) (int64, string, error) {
		switch n {
		case 0:
			return 0, "", status.Error(codes.Unavailable, "not yet")
		case 1:
			return 0, "", throttled.Err()
		}
		return 0, "", nil
	}
	r := start(t, Config{Profiles: plain(b.address)}, quick)
	first, second := window(), window()
	pprofOf(second).TimeNanos++
	r.Push(first)
	r.Push(second)
	b.wait(t, 4)
	r.wantValue(t, 2, "hostflame_otlp_exports_total", "retryable", "profiles")
	r.wantValue(t, 2, "hostflame_otlp_exports_total", "success", "profiles")
	r.stop()
	var ids, times []any
	for _, m := range b.profiles {
		p := m.ResourceProfiles[0].ScopeProfiles[0].Profiles[0]
		ids = append(ids, string(p.ProfileId))
		times = append(times, int64(p.TimeUnixNano)-pprofOf(first).TimeNanos)
	}
	if diff := cmp.Diff([]any{int64(0), int64(0), int64(0), int64(1)}, times); diff != "" {
		t.Errorf("order: -want +got\n%s", diff)
	}
	if ids[0] != ids[1] || ids[1] != ids[2] || ids[2] == ids[3] {
		t.Error("a retry has another profile id, or another profile the same")
	}
	if paused := b.times[2].Sub(b.times[1]); paused < asked {
		t.Errorf("came again after %v, asked for %v", paused, asked)
	}
	for _, line := range []string{"OTLP export failed", "OTLP export works again"} {
		if n := strings.Count(r.log.String(), line); n != 1 {
			t.Errorf("%q is %d times in the log\n%s", line, n, r.log)
		}
	}
}

// TestPushRefused: what fails for good is not repeated, and does not stop the rest.
func TestPushRefused(t *testing.T) {
	for _, code := range []codes.Code{codes.ResourceExhausted, codes.InvalidArgument, codes.Unimplemented, codes.Unauthenticated} {
		t.Run(code.String(), func(t *testing.T) {
			b := startBackend(t)
			b.answer = func(n int) (int64, string, error) {
				if n == 0 {
					return 0, "", status.Error(code, "no")
				}
				return 0, "", nil
			}
			r := start(t, Config{Profiles: plain(b.address)}, quick)
			r.Push(window())
			r.Push(window())
			b.wait(t, 2)
			r.wantValue(t, 1, "hostflame_otlp_exports_total", "refused", "profiles")
			r.wantValue(t, 1, "hostflame_otlp_exports_total", "success", "profiles")
			r.wantValue(t, 1, "hostflame_otlp_dropped_total", "refused", "profiles")
			if has := strings.Contains(r.log.String(), "service.profilesSupport"); has != (code == codes.Unimplemented) {
				t.Errorf("hint in the log: %v\n%s", has, r.log)
			}
		})
	}
}

func TestPushPartial(t *testing.T) {
	b := startBackend(t)
	b.answer = func(n int) (int64, string, error) {
		return int64(1 - n), "too old", nil // the second time it is a remark
	}
	r := start(t, Config{Profiles: plain(b.address)}, nil)
	r.Push(window())
	r.Push(window())
	b.wait(t, 2)
	r.wantValue(t, 1, "hostflame_otlp_exports_total", "partial", "profiles")
	r.wantValue(t, 1, "hostflame_otlp_exports_total", "success", "profiles")
	r.wantValue(t, 1, "hostflame_otlp_rejected_total", "profiles")
	if !strings.Contains(r.log.String(), "too old") {
		t.Errorf("what the backend says is not in the log\n%s", r.log)
	}
}

// TestBackendDown: nothing listens. Push does not wait, memory is bounded, the end comes
// at once, and what did not arrive is counted.
func TestBackendDown(t *testing.T) {
	kerneltest.Timed(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	r := start(t, Config{Profiles: plain(address), Metrics: plain(address)}, func(e *Exporter) {
		quick(e)
		e.profiles.queue.limit = 10_000
	})
	const pushed = 200
	begin := time.Now()
	for range pushed {
		r.Push(window())
		time.Sleep(time.Millisecond)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("%d windows took %v to push", pushed, took)
	}
	if n := r.value(t, "hostflame_otlp_queue_bytes"); n > 10_000 {
		t.Errorf("%v bytes in the queue", n)
	}
	if took := r.stop(); took > 2*time.Second {
		t.Errorf("the end took %v: it waited for a backend that is known to be down", took)
	}
	var lost float64
	for _, reason := range []string{"queue_full", "shutdown"} {
		n := r.value(t, "hostflame_otlp_dropped_total", reason, "profiles")
		if n == 0 {
			t.Errorf("nothing lost by %s", reason)
		}
		lost += n
	}
	if lost != pushed {
		t.Errorf("%v lost of %d", lost, pushed)
	}
	r.wantValue(t, 1, "hostflame_otlp_dropped_total", "timeout", "metrics")
	if n := strings.Count(r.log.String(), "OTLP export failed"); n != 2 {
		t.Errorf("%d lines in the log, want one a signal\n%s", n, r.log)
	}
}

// TestBackendHangs: connections are accepted and never answered. Requests end by their
// timeout, and where that is long, the end of the run does not wait for it.
func TestBackendHangs(t *testing.T) {
	kerneltest.Timed(t)
	for _, timeout := range []time.Duration{100 * time.Millisecond, time.Hour} {
		t.Run(timeout.String(), func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			s := plain(l.Addr().String())
			s.Timeout = timeout
			r := start(t, Config{Profiles: s, Metrics: s}, quick)
			begin := time.Now()
			for range 10 {
				r.Push(window())
			}
			if took := time.Since(begin); took > 100*time.Millisecond {
				t.Errorf("ten windows took %v to push", took)
			}
			if timeout < time.Minute {
				r.waitLog(t, "DeadlineExceeded")
			}
			if took := r.stop(); took > 4*time.Second {
				t.Errorf("the end took %v", took)
			}
		})
	}
}

func TestTLS(t *testing.T) {
	a := newAuthority(t)
	b := startBackend(t, grpc.Creds(credentials.NewTLS(a.server(t))))
	configure := func(t *testing.T, endpoint string, env map[string]string) Config {
		clearEnvironment(t)
		for k, v := range env {
			t.Setenv("OTEL_EXPORTER_OTLP_"+k, v)
		}
		cfg, err := FromEnvironment(endpoint)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Metrics = Signal{}
		return cfg
	}
	all := map[string]string{"CERTIFICATE": a.ca, "CLIENT_CERTIFICATE": a.cert, "CLIENT_KEY": a.key}
	t.Run("works", func(t *testing.T) {
		for _, endpoint := range []string{"https://" + b.address, b.address} {
			r := start(t, configure(t, endpoint, all), nil)
			r.Push(window())
			b.wait(t, 1)
			r.wantValue(t, 1, "hostflame_otlp_exports_total", "success", "profiles")
		}
	})
	failing := []struct {
		name, endpoint string
		env            map[string]string
		want           string // in the log
	}{
		{"unknown authority", "https://" + b.address, nil, "OTEL_EXPORTER_OTLP_CERTIFICATE names the certificate to trust"},
		{"no client certificate", "https://" + b.address, map[string]string{"CERTIFICATE": a.ca}, "OTLP export failed"},
		{"plain text to TLS", "http://" + b.address, nil, "OTLP export failed"},
		{"TLS to plain text", "https://" + startBackend(t).address, nil, "the backend speaks plain text: give http://"},
	}
	for _, test := range failing {
		t.Run(test.name, func(t *testing.T) {
			r := start(t, configure(t, test.endpoint, test.env), quick)
			r.Push(window())
			r.waitLog(t, test.want)
			if n := r.value(t, "hostflame_otlp_exports_total", "success", "profiles"); n != 0 {
				t.Errorf("%v exports worked", n)
			}
		})
	}
}

// TestPushUnsupported: a profile that cannot be sent is counted, and the next one arrives.
func TestPushUnsupported(t *testing.T) {
	b := startBackend(t)
	r := start(t, Config{Profiles: plain(b.address)}, nil)
	bad := window()
	pprofOf(bad).SampleType = []*profile.ValueType{{Type: "a", Unit: "b"}, {Type: "c", Unit: "d"}}
	r.Push(bad)
	r.Push(window())
	b.wait(t, 1)
	r.wantValue(t, 1, "hostflame_otlp_dropped_total", "unsupported", "profiles")
}

func TestQueue(t *testing.T) {
	q := newQueue(10)
	if n := q.put([]byte("aaaa")) + q.put([]byte("bbbb")); n != 0 {
		t.Errorf("%d dropped too early", n)
	}
	if n := q.put([]byte("ccccc")); n != 1 { // aaaa
		t.Errorf("%d dropped, want 1", n)
	}
	m, ok := q.next(t.Context())
	if string(m) != "bbbb" || !ok {
		t.Errorf("%q, %v", m, ok)
	}
	if !q.putBack(m) {
		t.Error("no way back")
	}
	m, _ = q.next(t.Context())
	q.put([]byte("dd"))
	if string(m) != "bbbb" || q.putBack(m) {
		t.Errorf("%q came back though newer ones fill the queue", m)
	}
	if n := q.put([]byte("larger than everything")); n != 3 {
		t.Errorf("%d dropped, want all three", n)
	}
	if n, size := q.waiting(); n != 0 || size != 0 {
		t.Errorf("%d messages of %d bytes in an empty queue", n, size)
	}
	q.close()
	if _, ok := q.next(t.Context()); ok {
		t.Error("a message out of a closed, empty queue")
	}
}

func TestClassify(t *testing.T) {
	retryable := map[codes.Code]bool{
		codes.Canceled: true, codes.DeadlineExceeded: true, codes.Aborted: true,
		codes.OutOfRange: true, codes.Unavailable: true, codes.DataLoss: true,
	}
	for c := codes.OK; c <= codes.Unauthenticated; c++ {
		want := outcomeRefused
		switch {
		case c == codes.OK:
			want = outcomeSuccess
		case retryable[c]:
			want = outcomeRetryable
		}
		if got, wait := classify(status.Error(c, "")); got != want || wait != 0 {
			t.Errorf("%v: %v after %v, want %v", c, got, wait, want)
		}
	}
}

func TestOwnMetrics(t *testing.T) {
	r := start(t, Config{Profiles: plain("127.0.0.1:1"), Metrics: plain("127.0.0.1:1")}, nil)
	lint(t, r.registry)
	for _, signal := range []string{"metrics", "profiles"} {
		r.wantValue(t, 0, "hostflame_otlp_rejected_total", signal)
		for _, o := range []string{"success", "partial", "retryable", "refused"} {
			r.wantValue(t, 0, "hostflame_otlp_exports_total", o, signal)
		}
	}
	r.wantValue(t, 0, "hostflame_otlp_queue_messages")
}
