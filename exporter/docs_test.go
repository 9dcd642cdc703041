// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"fmt"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/exporter/otlp"
	"github.com/hostflame/hostflame/profiler"
)

// tableRows are the cells of the rows of a document that begin with code.
func tableRows(t *testing.T, path string) [][]string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var rows [][]string
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range cells {
			cells[i] = strings.ReplaceAll(strings.TrimSpace(cells[i]), "`", "")
		}
		rows = append(rows, cells)
	}
	return rows
}

// gatherOTLP gathers what the agent has beside its own groups when it pushes.
func gatherOTLP(t *testing.T) []*dto.MetricFamily {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	e, err := otlp.New(otlp.Config{
		Metrics:  otlp.Signal{Target: "127.0.0.1:1"},
		Profiles: otlp.Signal{Target: "127.0.0.1:1"},
		Gatherer: reg,
	})
	if err != nil {
		t.Fatal(err)
	}
	reg.MustRegister(e)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	return families
}

// TestMetricsDocumented: the table in docs/metrics.md and the registry have the same
// families, with the same types and labels.
func TestMetricsDocumented(t *testing.T) {
	type entry struct{ kind, labels string }
	documented := map[string]entry{}
	for _, row := range tableRows(t, "../docs/metrics.md") {
		if len(row) != 6 {
			t.Errorf("row of %s has %d cells", row[0], len(row))
			continue
		}
		if row[4] == "" || row[5] == "" || row[3] == "" {
			t.Errorf("row of %s has an empty cell", row[0])
		}
		documented[row[0]] = entry{row[1], row[2]}
	}
	real := map[string]entry{}
	c, _ := testCollector(t, testReaders())
	for _, f := range append(gather(t, c, false), gatherOTLP(t)...) {
		var labels []string
		for _, l := range f.Metric[0].Label {
			labels = append(labels, l.GetName())
		}
		real[f.GetName()] = entry{strings.ToLower(f.GetType().String()), strings.Join(labels, ", ")}
	}
	if diff := cmp.Diff(real, documented, cmp.AllowUnexported(entry{})); diff != "" {
		t.Errorf("docs/metrics.md differs from the registry (-real +documented):\n%s", diff)
	}
}

// TestReasonsDocumented: docs/metrics.md explains all reasons for losses, and no others.
func TestReasonsDocumented(t *testing.T) {
	known := map[string]bool{
		"undecodable":                    true, // the profiler's
		string(bpf.MappingLossMalformed): true, string(bpf.MappingLossCPUOnline): true, string(bpf.MappingLossRingFull): true,
	}
	for reason := range bpf.DropReason(math.MaxUint8) {
		if name := reason.String(); !strings.HasPrefix(name, "reason_") {
			known[name] = true
		}
	}
	text, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	explained := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| (?:events|samples) of [^|]+ \\| `([a-z_]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		explained[row[1]] = true
	}
	if diff := cmp.Diff(known, explained); diff != "" {
		t.Errorf("docs/metrics.md differs from the reasons that there are (-real +explained):\n%s", diff)
	}
}

// TestMetricsDocumentedQueries: every metric that a query in docs/metrics.md names exists.
func TestMetricsDocumentedQueries(t *testing.T) {
	text, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	c, _ := testCollector(t, testReaders())
	families := append(gather(t, c, false), gatherOTLP(t)...)
	names := regexp.MustCompile(`hostflame_[a-z_]+[a-z]`).FindAllString(string(text), -1)
	if len(names) < 30 {
		t.Fatalf("found %d names", len(names))
	}
	for _, name := range names {
		base := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
		if family(families, name) == nil && family(families, base) == nil {
			t.Errorf("docs/metrics.md names %s, which does not exist", name)
		}
	}
}

// TestPathsDocumented: what docs/http-api.md lists is served.
func TestPathsDocumented(t *testing.T) {
	states := profiler.NewStates(nil)
	s := testServer(t, newFakeCapturer(t), func(c *HandlerConfig, _ *http.Server) {
		c.DebugPprof = true
		c.Types = []profiler.Type{profiler.CPU("", 99), profiler.Runqueue(), profiler.Culprit(), profiler.OffCPU(states), profiler.Wall(99, states), profiler.BlockIO(50)}
	})
	paths := 0
	for _, row := range tableRows(t, "../docs/http-api.md") {
		if !strings.HasPrefix(row[0], "/") {
			continue
		}
		paths++
		if answer, _ := fetch(t, http.MethodHead, s.URL+row[0]); answer.StatusCode >= 400 {
			t.Errorf("%s: %s", row[0], answer.Status)
		}
	}
	if paths < 7 {
		t.Errorf("found %d paths", paths)
	}
}

// TestMetricsDocumentedPromQL has promtool parse the queries of docs/metrics.md.
func TestMetricsDocumentedPromQL(t *testing.T) {
	if testing.Short() {
		t.Skip("runs promtool")
	}
	text, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	var rules strings.Builder
	rules.WriteString("groups:\n- name: docs\n  rules:\n")
	queries := 0
	for _, block := range regexp.MustCompile("(?s)```promql\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		for query := range strings.Lines(block[1]) {
			if query = strings.TrimSpace(query); query != "" {
				queries++
				fmt.Fprintf(&rules, "  - record: docs:query:%d\n    expr: %q\n", queries, query)
			}
		}
	}
	if queries < 10 {
		t.Fatalf("found %d queries", queries)
	}
	path := filepath.Join(t.TempDir(), "rules.yml")
	if err := os.WriteFile(path, []byte(rules.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "promtool", "check", "rules", path).CombinedOutput()
	if err != nil {
		t.Errorf("promtool (make test installs it): %v\n%s", err, out)
	}
}
