// SPDX-License-Identifier: Apache-2.0

package dashboards

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v2"

	"github.com/hostflame/hostflame/exporter"
	"github.com/hostflame/hostflame/exporter/otlp"
)

func parse(t *testing.T) *Model {
	t.Helper()
	m, err := Parse()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// promtool runs promtool, which comes with Debian's prometheus.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("promtool", args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func TestRules(t *testing.T) {
	promtool(t, "check", "rules", "rules.yml")
	promtool(t, "test", "rules", "rules_test.yml")
	promtool(t, "check", "config", "../deploy/prometheus.yml")
}

// rule is one entry of rules.yml.
type rule struct {
	Record, Alert, Expr, For string
	Labels, Annotations      map[string]string
}

func rules(t *testing.T) []rule {
	t.Helper()
	var file struct {
		Groups []struct {
			Name  string
			Rules []rule
		}
	}
	if err := yaml.UnmarshalStrict(Rules, &file); err != nil {
		t.Fatal(err)
	}
	var all []rule
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) == 0 {
		t.Fatal("no rules")
	}
	return all
}

// Every alert has a test, and tells what it means and what to do.
func TestAlerts(t *testing.T) {
	tests, err := os.ReadFile("rules_test.yml")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules(t) {
		name, where := r.Record, "expr"
		if r.Alert != "" {
			name, where = r.Alert, "alertname"
			for _, a := range []string{"summary", "description", "runbook"} {
				if r.Annotations[a] == "" {
					t.Errorf("%s has no %s", name, a)
				}
			}
			if r.Labels["severity"] == "" {
				t.Errorf("%s has no severity", name)
			}
		}
		if !regexp.MustCompile(where + `:.*\b` + name + `\b`).Match(tests) {
			t.Errorf("rules_test.yml has no test of %s", name)
		}
	}
}

// variables stand for what Grafana puts in.
var variables = map[string]string{
	"__rate_interval": "1m", "__range": "1h",
	"job": ".*", "instance": ".*", "container": ".*", "device": ".*", "operation": ".*",
}

// Each query is valid PromQL once Grafana's variables are in it.
func TestQueriesParse(t *testing.T) {
	var file strings.Builder
	file.WriteString("groups:\n- name: panels\n  rules:\n")
	for i, q := range parse(t).Queries() {
		expr := q.Expand(variables)
		if strings.Contains(expr, "$") {
			t.Errorf("%s: a variable that the dashboard does not have in\n%s", q.Panel, expr)
		}
		fmt.Fprintf(&file, "  - record: q%d\n    expr: %q\n", i, expr)
	}
	path := filepath.Join(t.TempDir(), "panels.yml")
	if err := os.WriteFile(path, []byte(file.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", path)
}

// described lists the metrics that the agent has, by name, as its collectors describe
// them; that they are in a real scrape is the end-to-end test's business.
func described(t *testing.T) map[string]bool {
	t.Helper()
	// The readers only have to be there: nothing is read.
	c := exporter.NewCollector(exporter.Readers{
		Runqueue: struct{ exporter.RunqueueReader }{},
		Block:    struct{ exporter.BlockReader }{},
		CPU:      struct{ exporter.CPUReader }{},
		Agent:    struct{ exporter.AgentReader }{},
	}, time.Now(), slog.New(slog.NewTextHandler(io.Discard, nil)))
	descs := make(chan *prometheus.Desc)
	go func() {
		c.Describe(descs)
		(*otlp.Exporter)(nil).Describe(descs) // constant, as every Describe
		close(descs)
	}()
	names := map[string]bool{"hostflame_build_info": true}
	fqName := regexp.MustCompile(`fqName: "([^"]+)"`)
	for d := range descs {
		names[fqName.FindStringSubmatch(d.String())[1]] = true
	}
	return names
}

// series are the names of hostflame's metrics, and of recorded ones, in a query.
var series = regexp.MustCompile(`\bhostflame[_:][a-z0-9_:]+`)

// Every metric that a panel or a rule names is one that the agent has.
func TestMetricsExist(t *testing.T) {
	have := described(t)
	recorded := map[string]bool{}
	exprs := map[string]string{}
	for _, r := range rules(t) {
		recorded[r.Record] = true
		exprs[r.Record+r.Alert] = r.Expr
	}
	m := parse(t)
	for _, q := range m.Queries() {
		exprs[q.Panel+" "+q.Ref] = q.Expr
	}
	for _, v := range m.Templating.List {
		exprs["$"+v.Name] = string(v.Query)
	}
	used := map[string]bool{}
	for where, expr := range exprs {
		for _, name := range series.FindAllString(expr, -1) {
			base := name
			for _, suffix := range []string{"_bucket", "_count", "_sum"} {
				base = strings.TrimSuffix(base, suffix)
			}
			used[base] = true
			if !have[name] && !have[base] && !recorded[name] {
				t.Errorf("%s asks for %s, which does not exist", where, name)
			}
		}
	}
	if len(used) < 15 {
		t.Errorf("only %d metrics are used: the regular expression has rotted", len(used))
	}
}

// Grafana would take what is wrong here without a word and show nothing.
func TestDashboardStructure(t *testing.T) {
	m := parse(t)
	if m.SchemaVersion < 41 {
		t.Errorf("schema version %d is older than Grafana 12", m.SchemaVersion)
	}
	for _, match := range regexp.MustCompile(`"uid": "([^"]*)"`).FindAllStringSubmatch(string(Grafana), -1) {
		if match[1] != "${datasource}" && match[1] != "-- Grafana --" {
			t.Errorf("uid %q is of one installation", match[1])
		}
	}
	variables := map[string]bool{}
	for _, v := range m.Templating.List {
		variables[v.Name] = true
		if v.Type == "query" && (v.Datasource == nil || v.Datasource.UID != "${datasource}") {
			t.Errorf("variable %s does not use the data source that is chosen", v.Name)
		}
	}
	ids := map[int]bool{}
	taken := map[[2]int]string{}
	for _, p := range m.Panels {
		if p.ID == 0 || ids[p.ID] {
			t.Errorf("%s: id %d is not its own", p.Title, p.ID)
		}
		ids[p.ID] = true
		g := p.GridPos
		if g.X < 0 || g.W < 1 || g.H < 1 || g.X+g.W > 24 {
			t.Errorf("%s does not fit the 24 columns: %+v", p.Title, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other, ok := taken[[2]int{x, y}]; ok {
					t.Fatalf("%s lies over %s", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if !slices.Contains([]string{"timeseries", "stat", "heatmap", "table"}, p.Type) {
			t.Errorf("%s: no panel type %s", p.Title, p.Type)
		}
		if p.Description == "" {
			t.Errorf("%s has no description", p.Title)
		}
		if p.Repeat != "" && !variables[p.Repeat] {
			t.Errorf("%s repeats by %s, which is no variable", p.Title, p.Repeat)
		}
		if len(p.Targets) == 0 {
			t.Errorf("%s has no query", p.Title)
		}
		refs := map[string]bool{}
		for _, target := range p.Targets {
			if refs[target.RefID] {
				t.Errorf("%s: two queries %s", p.Title, target.RefID)
			}
			refs[target.RefID] = true
			if target.Datasource == nil || target.Datasource.UID != "${datasource}" {
				t.Errorf("%s %s does not use the data source that is chosen", p.Title, target.RefID)
			}
			if p.Type == "heatmap" && target.Format != "heatmap" {
				t.Errorf("%s %s: format %q is not a heatmap's", p.Title, target.RefID, target.Format)
			}
		}
	}
}
