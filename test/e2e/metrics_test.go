// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/hostflame/hostflame/test/agent"
)

// scrape reads the agent's metrics in the text format.
func scrape(t *testing.T, a *agent.Agent) (map[string]*dto.MetricFamily, []byte) {
	t.Helper()
	status, body, err := a.Get("/metrics")
	if err != nil || status != http.StatusOK {
		t.Fatalf("scrape: status %d, %v", status, err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(body))
	if err != nil {
		t.Fatalf("scrape: %v\n%s", err, body)
	}
	return families, body
}

// value adds up the counters and gauges of a family whose labels match all of want.
func value(families map[string]*dto.MetricFamily, name string, want map[string]string) (sum float64, series int) {
	f := families[name]
	if f == nil {
		return 0, 0
	}
	for _, m := range f.Metric {
		matched := 0
		for _, l := range m.Label {
			if v, ok := want[l.GetName()]; ok && v == l.GetValue() {
				matched++
			}
		}
		if matched < len(want) {
			continue
		}
		series++
		sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
	}
	return sum, series
}

// testReasons looks for each reason for a loss in what docs/metrics.md says of its collector or
// profile.
func testReasons(t *testing.T, families map[string]*dto.MetricFamily) {
	t.Helper()
	docs, err := os.ReadFile(filepath.Join(repository(t), "docs/metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	for name, what := range map[string]string{"hostflame_events_lost_total": "events", "hostflame_samples_lost_total": "samples"} {
		for _, m := range families[name].GetMetric() {
			labels := map[string]string{}
			for _, l := range m.Label {
				labels[l.GetName()] = l.GetValue()
			}
			row := fmt.Sprintf("| %s of `%s` | `%s` |", what, labels["collector"]+labels["profile"], labels["reason"])
			all := fmt.Sprintf("| %s of all | `%s` |", what, labels["reason"])
			if !bytes.Contains(docs, []byte(row)) && !bytes.Contains(docs, []byte(all)) {
				t.Errorf("docs/metrics.md does not have %s", row)
			}
		}
	}
}

// testFirstScrape looks at the first scrape: the series are there at zero, so that the
// first increase shows in a rate.
func (s *stack) testFirstScrape(t *testing.T) {
	families, text := scrape(t, s.agent)
	for _, name := range []string{
		"hostflame_runqueue_latency_seconds",
		"hostflame_runqueue_delay_seconds_total",
		"hostflame_runqueue_length",
		"hostflame_preemptions_total",
		"hostflame_offcpu_seconds",
		"hostflame_container_runqueue_latency_seconds",
		"hostflame_container_offcpu_seconds",
		"hostflame_block_io_latency_seconds",
		"hostflame_block_io_queue_latency_seconds",
		"hostflame_block_io_device_latency_seconds",
		"hostflame_block_io_size_bytes",
		"hostflame_block_io_errors_total",
		"hostflame_samples_total",
		"hostflame_samples_lost_total",
		"hostflame_stacks_total",
		"hostflame_events_lost_total",
		"hostflame_bpf_program_runs_total",
		"hostflame_bpf_map_memory_bytes",
		"hostflame_build_info",
		"hostflame_scrape_collector_duration_seconds",
		"hostflame_scrape_collector_success",
		"hostflame_otlp_dropped_total",
	} {
		if families[name] == nil {
			t.Errorf("%s is not in the first scrape", name)
		}
	}
	for _, operation := range []string{"read", "write", "flush", "discard", "write-zeroes", "other"} {
		for _, name := range []string{"hostflame_block_io_latency_seconds", "hostflame_block_io_errors_total"} {
			if _, n := value(families, name, map[string]string{"operation": operation}); n == 0 {
				t.Errorf("%s{operation=%q} is not in the first scrape", name, operation)
			}
		}
	}
	if lost, n := value(families, "hostflame_samples_lost_total", map[string]string{"profile": "cpu", "reason": "ring_full"}); n != 1 || lost != 0 {
		t.Errorf("%d series with %g samples that found the ring full, want one at zero", n, lost)
	}
	testReasons(t, families)
	for _, m := range families["hostflame_scrape_collector_success"].GetMetric() {
		if m.GetGauge().GetValue() != 1 {
			t.Errorf("collector %v does not work", m.Label)
		}
	}
	for _, program := range []string{"hf_cpu", "hf_sched_switch"} {
		if _, n := value(families, "hostflame_bpf_program_runs_total", map[string]string{"program": program}); n != 1 {
			t.Errorf("hostflame_bpf_program_runs_total{program=%q} is there %d times", program, n)
		}
	}
	lint := exec.Command("promtool", "check", "metrics")
	lint.Stdin = bytes.NewReader(text)
	if out, err := lint.CombinedOutput(); err != nil {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "NaN") {
			t.Errorf("not a number: %s", line)
		}
	}
}
