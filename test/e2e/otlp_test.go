// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"net/http"
	"os"
	"slices"
	"testing"
	"time"

	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	profilespb "go.opentelemetry.io/proto/otlp/profiles/v1development"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/hostflame/hostflame/test/agent"
	"github.com/hostflame/hostflame/test/workload"
)

// leaves adds up the values of a message's samples by the function of the leaf.
func leaves(d *profilespb.ProfilesData, into map[string]int64) (samples int, err error) {
	dict := d.GetDictionary()
	for _, rp := range d.GetResourceProfiles() {
		for _, sp := range rp.GetScopeProfiles() {
			for _, p := range sp.GetProfiles() {
				for _, s := range p.GetSamples() {
					samples++
					stack := dict.GetStackTable()[s.GetStackIndex()]
					if len(stack.GetLocationIndices()) == 0 || len(s.GetValues()) != 1 {
						return samples, fmt.Errorf("a sample with %d locations and %d values", len(stack.GetLocationIndices()), len(s.GetValues()))
					}
					leaf := dict.GetLocationTable()[stack.GetLocationIndices()[0]]
					if len(leaf.GetLines()) == 0 {
						continue // not symbolized
					}
					// What is inlined comes before the function that it is inlined into.
					f := dict.GetFunctionTable()[leaf.GetLines()[len(leaf.GetLines())-1].GetFunctionIndex()]
					into[dict.GetStringTable()[f.GetNameStrindex()]] += s.GetValues()[0]
				}
			}
		}
	}
	return samples, nil
}

// shares compares the burning functions with their design.
func shares(values map[string]int64, prefix string, points float64) error {
	var sum int64
	for name := range workload.BurnShares {
		sum += values[prefix+name]
	}
	var errs []error
	for name, want := range workload.BurnShares {
		if got := 100 * float64(values[prefix+name]) / float64(sum); !(math.Abs(got-want) <= points) {
			errs = append(errs, fmt.Errorf("%s%s has %.1f %% of the three, want %g within %g", prefix, name, got, want, points))
		}
	}
	return errors.Join(errs...)
}

// lastMetrics are the newest messages of metrics that the Collector has written. All of
// them would take long to read: each push holds everything.
func (s *stack) lastMetrics(t *testing.T) []*metricspb.MetricsData {
	t.Helper()
	b, err := os.ReadFile(s.collector.MetricsFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	complete := b[:bytes.LastIndexByte(b, '\n')+1]
	lines := slices.Collect(bytes.Lines(complete))
	var list []*metricspb.MetricsData
	for _, line := range lines[max(0, len(lines)-4):] { // a push may be split
		m := new(metricspb.MetricsData)
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(line, m); err != nil {
			t.Fatalf("read %s: %v", s.collector.MetricsFile, err)
		}
		list = append(list, m)
	}
	return list
}

// metric finds a metric by name and adds up its observations, or its values, as the last
// message that has it tells them.
func metric(messages []*metricspb.MetricsData, name string) (total float64, found bool) {
	for _, d := range slices.Backward(messages) {
		for _, rm := range d.GetResourceMetrics() {
			for _, sm := range rm.GetScopeMetrics() {
				for _, m := range sm.GetMetrics() {
					if m.GetName() != name {
						continue
					}
					found = true
					for _, p := range m.GetExponentialHistogram().GetDataPoints() {
						total += float64(p.GetCount())
					}
					for _, p := range slices.Concat(m.GetSum().GetDataPoints(), m.GetGauge().GetDataPoints()) {
						total += p.GetAsDouble() + float64(p.GetAsInt())
					}
				}
			}
		}
		if found {
			return total, true
		}
	}
	return 0, false
}

// testCollector reads what the Collector wrote: the metrics, the burning functions in
// their shares, and the reads of fio.
func (s *stack) testCollector(t *testing.T) {
	eventually(t, 40*time.Second, func() error {
		messages := s.lastMetrics(t)
		for _, name := range []string{
			"hostflame_runqueue_latency_seconds", "hostflame_block_io_latency_seconds",
			"hostflame_samples_total", "hostflame_cpu_seconds_total", "hostflame_build_info",
		} {
			if total, found := metric(messages, name); !found || total == 0 {
				return fmt.Errorf("%s in %d messages: found %v, total %g", name, len(messages), found, total)
			}
		}
		return nil
	})
	eventually(t, 60*time.Second, func() error {
		values := map[string]int64{}
		samples := 0
		for _, d := range s.collector.Profiles(t) {
			n, err := leaves(d, values)
			if err != nil {
				return err
			}
			samples += n
		}
		return errors.Join(shares(values, "load::", 5), shares(values, "main.", 5))
	})
	eventually(t, 20*time.Second, func() error { return s.checkBlockIOPushed(t) })
	for _, d := range s.lastMetrics(t) {
		for _, rm := range d.GetResourceMetrics() {
			attributes := map[string]string{}
			for _, a := range rm.GetResource().GetAttributes() {
				attributes[a.GetKey()] = a.GetValue().GetStringValue()
			}
			if attributes["service.name"] != "hostflame-e2e" || attributes["host.name"] == "" {
				t.Fatalf("resource %v", attributes)
			}
		}
	}
}

// lastProfiled is the end of the newest profile that the Collector has.
func (s *stack) lastProfiled(t *testing.T) time.Time {
	var last uint64
	for _, d := range s.collector.Profiles(t) {
		for _, rp := range d.GetResourceProfiles() {
			for _, sp := range rp.GetScopeProfiles() {
				for _, p := range sp.GetProfiles() {
					last = max(last, p.GetTimeUnixNano()+p.GetDurationNano())
				}
			}
		}
	}
	return time.Unix(0, int64(last))
}

// testStop ends the agent: it exits 0 within 5 s and publishes the last window.
func (s *stack) testStop(t *testing.T) {
	stopped := time.Now()
	stopAgent(t, s.agent)
	s.collector.Stop(t)
	if last := s.lastProfiled(t); last.Before(stopped.Add(-300 * time.Millisecond)) {
		t.Errorf("the last profile ends at %v, the agent was stopped at %v", last, stopped)
	}
	var newest uint64
	for _, d := range s.lastMetrics(t) {
		for _, rm := range d.GetResourceMetrics() {
			for _, sm := range rm.GetScopeMetrics() {
				for _, m := range sm.GetMetrics() {
					for _, p := range m.GetExponentialHistogram().GetDataPoints() {
						newest = max(newest, p.GetTimeUnixNano())
					}
				}
			}
		}
	}
	if last := time.Unix(0, int64(newest)); last.Before(stopped.Add(-300 * time.Millisecond)) {
		t.Errorf("the last metrics are of %v, the agent was stopped at %v", last, stopped)
	}
}

// startAgent starts an agent for this test alone.
func startAgent(t *testing.T, binary string, env []string, args ...string) *agent.Agent {
	t.Helper()
	a, err := agent.Start(agent.Config{Path: binary, Args: args, Env: env})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Kill()
		if t.Failed() {
			t.Logf("log of the agent at %s:\n%s", a.URL, a.Log())
		}
	})
	return a
}

// stopAgent sends SIGTERM and holds the agent to its promise.
func stopAgent(t *testing.T, a *agent.Agent) {
	t.Helper()
	took, err := a.Stop()
	if err != nil {
		t.Errorf("stop: %v", err)
	}
	if took > 5*time.Second {
		t.Errorf("the agent took %v to exit, want 5 s at most", took)
	}
	t.Logf("exited after %v", took.Round(time.Millisecond))
}

// testEndpointDown pushes to a port where nobody listens.
func (s *stack) testEndpointDown(t *testing.T) {
	port, err := agent.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	s.testEndpoint(t, fmt.Sprintf("http://127.0.0.1:%d", port))
}

// testEndpointHangs pushes to one who takes connections and never says a word.
func (s *stack) testEndpointHangs(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
		}
	}()
	s.testEndpoint(t, "http://"+l.Addr().String())
}

// testEndpoint runs an agent whose OTLP endpoint takes nothing: it serves all the same,
// counts what is lost, and ends in time.
func (s *stack) testEndpoint(t *testing.T, endpoint string) {
	a := startAgent(t, s.binary, []string{"OTEL_METRIC_EXPORT_INTERVAL=1000", "OTEL_EXPORTER_OTLP_TIMEOUT=1000"},
		"--otlp.endpoint="+endpoint, "--profile.interval=1s")
	eventually(t, 20*time.Second, func() error {
		families, _ := scrape(t, a)
		for _, want := range []struct{ name, signal, label, value string }{
			{"hostflame_otlp_exports_total", "profiles", "outcome", "retryable"},
			{"hostflame_otlp_exports_total", "metrics", "outcome", "retryable"},
			{"hostflame_otlp_dropped_total", "metrics", "reason", "timeout"},
		} {
			if n, _ := value(families, want.name, map[string]string{"signal": want.signal, want.label: want.value}); n == 0 {
				return fmt.Errorf("%s{signal=%q, %s=%q} is zero", want.name, want.signal, want.label, want.value)
			}
		}
		if n, _ := value(families, "hostflame_otlp_queue_messages", nil); n == 0 {
			return errors.New("no profile waits in the queue")
		}
		return nil
	})
	checkServes(t, a)
	stopAgent(t, a)
}

// checkServes checks that an agent answers everything.
func checkServes(t *testing.T, a *agent.Agent) {
	t.Helper()
	for _, path := range []string{"/", "/metrics", "/-/healthy", "/-/ready", "/pprof/cpu?seconds=1", "/ui/"} {
		if status, body, err := a.Get(path); err != nil || status != http.StatusOK {
			t.Errorf("%s: status %d, %v: %.200s", path, status, err, body)
		}
	}
}
