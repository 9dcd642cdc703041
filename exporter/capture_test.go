// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/profiler"
)

func TestCapture(t *testing.T) {
	capturer := newFakeCapturer(t)
	// A server that would cut the answer off without the handler's doing.
	s := testServer(t, capturer, func(_ *HandlerConfig, s *http.Server) { s.WriteTimeout = 500 * time.Millisecond })
	begin := time.Now()
	answer, body := fetch(t, "GET", s.URL+"/pprof/cpu?seconds=1&pid=42&pid=43&comm=a+b&container=/&container=0123456789ab")
	// How late it may be is the capturer's affair, and that of the load on the test.
	if took := time.Since(begin); took < time.Second {
		t.Errorf("answered after %v, want 1 s", took)
	}
	if answer.StatusCode != 200 || answer.Header.Get("Content-Type") != "application/octet-stream" {
		t.Fatalf("%s %s", answer.Status, answer.Header)
	}
	if got := answer.Header.Get("Content-Disposition"); !strings.HasPrefix(got, `attachment; filename="hostflame-testhost-cpu-20`) || !strings.HasSuffix(got, `Z.pb.gz"`) {
		t.Errorf("disposition %s", got)
	}
	p, err := profile.ParseData([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Sample) == 0 || len(p.Sample) != len(capturer.profile.Sample) {
		t.Errorf("%d samples, want %d", len(p.Sample), len(capturer.profile.Sample))
	}
	want := []profiler.Request{{
		Type: "cpu", Duration: time.Second,
		Filter: profiler.Filter{PIDs: []uint32{42, 43}, Comms: []string{"a b"}, Containers: []string{"/", "0123456789ab"}},
	}}
	if diff := cmp.Diff(want, capturer.requests); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
}

// What a type says of itself is what its path takes.
func TestCaptureOfAnotherType(t *testing.T) {
	capturer := newFakeCapturer(t)
	capturer.capture = func(context.Context, profiler.Request) error { return nil }
	wait := profiler.Type{
		Name:   "wait",
		Values: []profiler.Value{{ValueType: profiler.ValueType{Name: "waits", Unit: "count"}}, {ValueType: profiler.ValueType{Name: "delay", Unit: "nanoseconds"}}},
		Labels: []profiler.Label{{Name: "state"}},
		Least:  &profiler.Least{Parameter: "min_delay"},
	}
	capturer.newest.Profiles = append(capturer.newest.Profiles, profiler.NewProfile("wait", oneStack("waitingFunction"), 0, nil))
	s := testServer(t, capturer, func(c *HandlerConfig, _ *http.Server) {
		c.Types = []profiler.Type{testTypes[0], wait, {Name: "absent", Values: wait.Values}}
		c.MissingTypes = map[string]error{"absent": errors.New("no such hook")}
	})
	for _, test := range []struct {
		path   string
		status int
		body   string
	}{
		{"/pprof/wait?seconds=1&state=D&state=S&min_delay=1.5ms", 200, ""},
		{"/pprof/wait?format=folded&sample_index=cpu", 400, "want waits or delay"},
		{"/pprof/wait?min_delay=7", 400, "such as 500us or 10ms"},
		{"/pprof/wait?min_delay=1s&min_delay=2s", 400, "min_delay is given 2 times"},
		{"/pprof/wait?state=", 400, "state is empty"},
		{"/pprof/cpu?state=D", 400, "unknown parameter \"state\""},
		{"/pprof/absent", 503, "no such hook"},
		{"/pprof/nothing", 404, "cpu, wait, absent"},
		{"/ui/wait/flamegraph", 200, "waitingFunction"},
		{"/ui/wait/flamegraph", 200, `<a href="../../">`},
		{"/ui/wait/source", 404, "/pprof/wait?seconds"},
		{"/", 200, `href="pprof/wait?seconds=10"`},
	} {
		answer, body := fetch(t, "GET", s.URL+test.path)
		if answer.StatusCode != test.status || !strings.Contains(body, test.body) {
			t.Errorf("%s: %s %.300s", test.path, answer.Status, body)
		}
	}
	want := []profiler.Request{{Type: "wait", Duration: time.Second, Filter: profiler.Filter{
		Labels: map[string][]string{"state": {"D", "S"}}, Least: 1_500_000,
	}}}
	if diff := cmp.Diff(want, capturer.requests); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
}

// A value that a label never has is refused at once, with those that it has.
func TestCaptureClosedLabels(t *testing.T) {
	capturer := newFakeCapturer(t)
	capturer.capture = func(context.Context, profiler.Request) error { return nil }
	s := testServer(t, capturer, func(c *HandlerConfig, _ *http.Server) { c.Types = allTypes })
	const (
		blocked = "block_io, lock, condition, network, poll, pipe, sleep, page_fault, child, signal, other"
		causes  = "quota, own, other, kernel, idle, stolen, unknown"
	)
	for query, want := range map[string]string{
		"runqueue?cause=bogus":             `cause="bogus": want one of ` + causes,
		"culprit?cause=own&cause=Own":      `cause="Own": want one of ` + causes,
		"offcpu?state=nap":                 `state="nap": want one of ` + blocked,
		"offcpu?state=LOCK":                `state="LOCK": want one of ` + blocked,
		"offcpu?state=cpu":                 `state="cpu": want one of ` + blocked,
		"offcpu?idle=maybe":                `idle="maybe": want one of true, false`,
		"wall?state=nap":                   `state="nap": want one of cpu, runqueue, ` + blocked,
		"blockio?operation=bogus":          `operation="bogus": want one of read, write, flush, discard, write-zeroes, other`,
		"runqueue?cause=other&culprit=x":   "",
		"offcpu?state=lock&idle=false":     "",
		"wall?state=cpu&state=runqueue":    "",
		"blockio?operation=read&device=xy": "",
	} {
		status := 200
		if want != "" {
			status, want = 400, want+"\n"
		}
		answer, body := fetch(t, "GET", s.URL+"/pprof/"+query)
		if answer.StatusCode != status || want != "" && body != want {
			t.Errorf("%s: %s %.300q, want %d %q", query, answer.Status, body, status, want)
		}
	}
	if len(capturer.requests) != 4 {
		t.Errorf("%d captures, want 4", len(capturer.requests))
	}
}

// TestCaptureHTTP2: there the server's WriteTimeout ends a stream that waits, too.
func TestCaptureHTTP2(t *testing.T) {
	plain := testServer(t, newFakeCapturer(t), nil)
	s := httptest.NewUnstartedServer(plain.Config.Handler)
	s.Config.WriteTimeout = 500 * time.Millisecond
	s.EnableHTTP2 = true
	s.StartTLS()
	defer s.Close()
	answer, err := s.Client().Get(s.URL + "/pprof/cpu?seconds=1")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if answer.ProtoMajor != 2 || answer.StatusCode != 200 {
		t.Errorf("%s %s", answer.Proto, answer.Status)
	}
	if _, err := profile.Parse(answer.Body); err != nil {
		t.Error(err)
	}
}

func TestCaptureDefaults(t *testing.T) {
	capturer := newFakeCapturer(t)
	capturer.capture = func(context.Context, profiler.Request) error { return nil }
	s := testServer(t, capturer, nil)
	fetch(t, "GET", s.URL+"/pprof/cpu")
	fetch(t, "GET", s.URL+"/pprof/cpu?format=pprof&seconds=3600")
	want := []profiler.Request{{Type: "cpu", Duration: 10 * time.Second}, {Type: "cpu", Duration: time.Hour}}
	if diff := cmp.Diff(want, capturer.requests); diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
}

func TestCaptureFails(t *testing.T) {
	capturer := newFakeCapturer(t)
	capturer.capture = func(context.Context, profiler.Request) error { return errors.New("rings are closed") }
	s := testServer(t, capturer, nil)
	if answer, body := fetch(t, "GET", s.URL+"/pprof/cpu"); answer.StatusCode != 500 || body != "capture failed: rings are closed\n" {
		t.Errorf("%s %q", answer.Status, body)
	}
}

// TestCaptureFolded asks for text; what the lines hold is the profiler's to test.
func TestCaptureFolded(t *testing.T) {
	capturer := newFakeCapturer(t)
	capturer.capture = func(context.Context, profiler.Request) error { return nil }
	s := testServer(t, capturer, nil)
	for _, index := range []string{"", "&sample_index=cpu"} {
		answer, body := fetch(t, "GET", s.URL+"/pprof/cpu?format=folded"+index)
		if answer.StatusCode != 200 || answer.Header.Get("Content-Type") != "text/plain; charset=utf-8" {
			t.Errorf("%s %s", answer.Status, answer.Header)
		}
		if !slices.ContainsFunc(strings.Split(body, "\n"), func(line string) bool {
			return strings.HasPrefix(line, "knowncomm;") && strings.Contains(line, "burnKnownFunction")
		}) {
			t.Errorf("no stack of the known function:\n%s", body)
		}
	}
}

// TestCaptureAbandoned: a capture ends when its client leaves, and its slot is free.
func TestCaptureAbandoned(t *testing.T) {
	capturer := newFakeCapturer(t)
	begun, ended := make(chan struct{}, 1), make(chan error, 1)
	capturer.capture = func(ctx context.Context, r profiler.Request) error {
		if r.Duration == time.Second {
			return nil
		}
		begun <- struct{}{}
		select {
		case <-ctx.Done():
			ended <- ctx.Err()
		case <-t.Context().Done(): // the test has failed
		}
		return ctx.Err()
	}
	s := testServer(t, capturer, func(c *HandlerConfig, _ *http.Server) { c.MaxCaptures = 1 })
	ctx, leave := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, "GET", s.URL+"/pprof/cpu?seconds=3600", nil)
	if err != nil {
		t.Fatal(err)
	}
	go http.DefaultClient.Do(r)
	<-begun
	leave()
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Fatal("the capture went on for 5 s after its client had left")
	}
	for deadline := time.Now().Add(5 * time.Second); ; {
		answer, body := fetch(t, "GET", s.URL+"/pprof/cpu?seconds=1")
		if answer.StatusCode == 200 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the slot is still taken: %s %s", answer.Status, body)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestCaptureStops: the end of the server's base context ends captures with an answer.
func TestCaptureStops(t *testing.T) {
	capturer := newFakeCapturer(t)
	base, stop := context.WithCancel(t.Context())
	defer stop()
	capturer.capture = func(ctx context.Context, _ profiler.Request) error {
		stop()
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Second):
			t.Error("the capture goes on")
		}
		return fmt.Errorf("capture: %w", ctx.Err())
	}
	s := testServer(t, capturer, func(_ *HandlerConfig, s *http.Server) {
		s.BaseContext = contextOf(base)
	})
	if answer, body := fetch(t, "GET", s.URL+"/pprof/cpu?seconds=3600"); answer.StatusCode != 503 || body != "the capture was abandoned\n" {
		t.Errorf("%s %q", answer.Status, body)
	}
}

// TestCaptureLimit: captures over the limit are told when to come back.
func TestCaptureLimit(t *testing.T) {
	const limit = 8
	capturer := newFakeCapturer(t)
	begun, end := make(chan struct{}, limit), make(chan struct{})
	capturer.capture = func(_ context.Context, r profiler.Request) error {
		if r.Duration == time.Second {
			return errors.New("this one is over the limit")
		}
		begun <- struct{}{}
		<-end
		return nil
	}
	s := testServer(t, capturer, nil)
	statuses := make(chan int, limit)
	for i := range limit {
		go func() {
			answer, err := http.Get(fmt.Sprintf("%s/pprof/cpu?seconds=%d", s.URL, 100*(i+1)))
			if err != nil {
				statuses <- 0
				return
			}
			answer.Body.Close()
			statuses <- answer.StatusCode
		}()
	}
	for range limit {
		<-begun
	}
	answer, body := fetch(t, "GET", s.URL+"/pprof/cpu?seconds=1")
	retry := answer.Header.Get("Retry-After")
	if want := "8 captures are running, which is the limit: try again in " + retry + " s\n"; answer.StatusCode != 503 || body != want {
		t.Errorf("%s %q, want %q", answer.Status, body, want)
	}
	if n, err := strconv.Atoi(retry); err != nil || n < 60 || n > 100 {
		t.Errorf("Retry-After %s, the first capture ends within 100 s", retry)
	}
	close(end)
	for range limit {
		if status := <-statuses; status != 200 {
			t.Errorf("one of the captures: %d", status)
		}
	}
}

// TestGoToolPprof has the reference reader take a profile by URL.
func TestGoToolPprof(t *testing.T) {
	s := testServer(t, newFakeCapturer(t), nil)
	cmd := exec.CommandContext(t.Context(), "go", "tool", "pprof", "-top", s.URL+"/pprof/cpu?seconds=1")
	cmd.Env = append(cmd.Environ(), "PPROF_TMPDIR="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), "burnKnownFunction") {
		t.Errorf("the known function is not there:\n%s", out)
	}
}
