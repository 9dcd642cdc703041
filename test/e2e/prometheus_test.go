// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hostflame/hostflame/dashboards"
	"github.com/hostflame/hostflame/test/agent"
)

// prometheus is a running server.
type prometheus struct {
	url string
}

// startPrometheus starts Debian's Prometheus with the configuration and the rules that
// are shipped; only the agent's address and the intervals are changed in it.
func startPrometheus(t *testing.T, target string, flags ...string) *prometheus {
	t.Helper()
	root, dir := repository(t), t.TempDir()
	config, err := os.ReadFile(filepath.Join(root, "deploy/prometheus.yml"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(config)
	for was, is := range map[string]string{
		"127.0.0.1:4678":           strings.TrimPrefix(target, "http://"),
		"scrape_interval: 15s":     "scrape_interval: 2s",
		"evaluation_interval: 15s": "evaluation_interval: 2s",
		"../dashboards/rules.yml":  filepath.Join(root, "dashboards/rules.yml"),
	} {
		if strings.Count(text, was) != 1 {
			t.Fatalf("deploy/prometheus.yml does not have %q once", was)
		}
		text = strings.Replace(text, was, is, 1)
	}
	path := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	port, err := agent.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	address := fmt.Sprintf("127.0.0.1:%d", port)
	logs, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("prometheus", append(flags, "--config.file="+path, "--log.level=warn",
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+address)...)
	cmd.Stdout, cmd.Stderr = logs, logs
	if err := cmd.Start(); err != nil {
		t.Fatalf("start prometheus: %v", err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		logs.Close()
		if text, err := os.ReadFile(logs.Name()); err == nil && t.Failed() && len(text) > 0 {
			t.Logf("prometheus %s:\n%s", strings.Join(flags, " "), text)
		}
	})
	return &prometheus{url: "http://" + address}
}

// sample is one element of a vector.
type sample struct {
	Metric    map[string]string
	Value     float64
	Histogram bool // a native histogram: Value means nothing
}

// get asks the API and decodes data.
func (p *prometheus) get(path string, query url.Values, data any) error {
	resp, err := http.Get(p.url + path + "?" + query.Encode())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var answer struct {
		Status, Error string
		Data          json.RawMessage
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return fmt.Errorf("status %d: %w", resp.StatusCode, err)
	}
	if answer.Status != "success" {
		return fmt.Errorf("prometheus: %s", answer.Error)
	}
	return json.Unmarshal(answer.Data, data)
}

// query evaluates an expression now.
func (p *prometheus) query(expr string) ([]sample, error) {
	var data struct {
		ResultType string
		Result     []struct {
			Metric    map[string]string
			Value     [2]any
			Histogram []any
		}
	}
	if err := p.get("/api/v1/query", url.Values{"query": {expr}}, &data); err != nil {
		return nil, fmt.Errorf("query %s: %w", expr, err)
	}
	if data.ResultType != "vector" {
		return nil, fmt.Errorf("query %s: a %s, not a vector", expr, data.ResultType)
	}
	var list []sample
	for _, r := range data.Result {
		s := sample{Metric: r.Metric, Histogram: r.Histogram != nil}
		if !s.Histogram {
			text, _ := r.Value[1].(string)
			v, err := strconv.ParseFloat(text, 64)
			if err != nil {
				return nil, fmt.Errorf("query %s: value %q", expr, text)
			}
			s.Value = v
		}
		list = append(list, s)
	}
	return list, nil
}

// number evaluates an expression that has one number.
func (p *prometheus) number(expr string) (float64, error) {
	list, err := p.query(expr)
	if err != nil {
		return 0, err
	}
	if len(list) != 1 || list[0].Histogram {
		return 0, fmt.Errorf("query %s: want one number, got %v", expr, list)
	}
	return list[0].Value, nil
}

// soon is number, asked again for a while: after a scrape that timed out on a busy machine
// a server has no current value.
func (p *prometheus) soon(t *testing.T, expr string) float64 {
	t.Helper()
	var n float64
	eventually(t, 20*time.Second, func() (err error) {
		n, err = p.number(expr)
		return err
	})
	return n
}

// testPrometheus asks both servers what a user would, of the histograms and the rules.
func (s *stack) testPrometheus(t *testing.T) {
	for _, p := range []*prometheus{s.classic, s.native} {
		eventually(t, 20*time.Second, func() error {
			up, err := p.number(`up{job="hostflame"}`)
			if err == nil && up != 1 {
				err = fmt.Errorf("up is %g", up)
			}
			return err
		})
	}
	time.Sleep(25 * time.Second) // what the rates below look back to

	// The pinned ping-pong alone makes many thousand switches a second, and two burning
	// processes beside it make waits of milliseconds.
	switches := s.classic.soon(t, `rate(hostflame_runqueue_latency_seconds_count[20s])`)
	t.Logf("%.0f switches a second", switches)
	if switches < 2000 {
		t.Errorf("%.0f switches a second", switches)
	}
	for _, test := range []struct {
		what, metric, selector string
		low, high              float64
	}{
		{"run-queue wait", "hostflame_runqueue_latency_seconds", "", 1e-6, 1},
		{"block I/O, reads", "hostflame_block_io_latency_seconds", fmt.Sprintf(`{device=%q, operation="read"}`, s.fio.device), 10e-6, 5},
	} {
		classic := s.classic.soon(t, fmt.Sprintf(`histogram_quantile(0.99, sum by (le) (rate(%s_bucket%s[20s])))`, test.metric, test.selector))
		native := s.native.soon(t, fmt.Sprintf(`histogram_quantile(0.99, sum(rate(%s%s[20s])))`, test.metric, test.selector))
		t.Logf("%s, p99: classic %.3g s, native %.3g s", test.what, classic, native)
		for _, p99 := range []float64{classic, native} {
			if !(p99 >= test.low && p99 <= test.high) {
				t.Errorf("%s: p99 %g s is not between %g and %g", test.what, p99, test.low, test.high)
			}
		}
	}
	s.testQuantilesAgree(t)
	s.testRules(t)
}

// testQuantilesAgree compares quantiles since the start, in which the two seconds
// between the two servers' scrapes does not count.
func (s *stack) testQuantilesAgree(t *testing.T) {
	// A classic bucket is at most 2.5 times as wide as its lower bound, a native one of
	// schema 3 at most 1.0905 times; the truth is somewhere in both.
	const most = 2.5 * 1.0905
	for _, q := range []float64{0.5, 0.9, 0.99} {
		classic := s.classic.soon(t, fmt.Sprintf(`histogram_quantile(%g, hostflame_runqueue_latency_seconds_bucket)`, q))
		native := s.native.soon(t, fmt.Sprintf(`histogram_quantile(%g, hostflame_runqueue_latency_seconds)`, q))
		t.Logf("quantile %g since the start: classic %.3g s, native %.3g s", q, classic, native)
		// Below the native zero threshold, 2^-20 s, the native quantile is between 0 and it.
		if ratio := math.Max(classic, 1.0/(1<<20)) / math.Max(native, 1.0/(1<<20)); ratio > most || ratio < 1/most {
			t.Errorf("quantile %g: classic %g s, native %g s are further apart than a bucket", q, classic, native)
		}
	}
}

// testRules checks that the shipped rules evaluate and that no alert fires but for what
// the test's own load may cause.
func (s *stack) testRules(t *testing.T) {
	for _, p := range []*prometheus{s.classic, s.native} {
		var data struct {
			Groups []struct {
				Name  string
				Rules []struct{ Name, Health, LastError, Type, State string }
			}
		}
		if err := p.get("/api/v1/rules", nil, &data); err != nil {
			t.Fatal(err)
		}
		rules := 0
		for _, g := range data.Groups {
			for _, r := range g.Rules {
				rules++
				if r.Health != "ok" {
					t.Errorf("rule %s is %s: %s", r.Name, r.Health, r.LastError)
				}
				switch r.Name {
				case "HostflameDown", "HostflameCollectorFailing", "HostflameSamplesLost", "HostflameEventsLost",
					"HostflameBlockIOErrors", "HostflameOTLPDropped":
					// A scrape that came late makes it pending for a moment.
					if r.State == "firing" {
						t.Errorf("alert %s is firing on a healthy host", r.Name)
					}
					eventually(t, 20*time.Second, func() error {
						list, err := p.query(fmt.Sprintf(`ALERTS{alertname=%q}`, r.Name))
						if err == nil && len(list) > 0 {
							err = fmt.Errorf("alert %s on a healthy host: %v", r.Name, list)
						}
						return err
					})
				}
				if r.Type != "recording" {
					continue
				}
				eventually(t, 20*time.Second, func() error {
					list, err := p.query(r.Name)
					if err == nil && len(list) == 0 {
						err = fmt.Errorf("rule %s recorded nothing", r.Name)
					}
					return err
				})
			}
		}
		if rules < 10 {
			t.Errorf("Prometheus has %d rules", rules)
		}
	}
}

// labelValues is Grafana's query of the values of a label, as it is in the dashboard's JSON.
var labelValues = regexp.MustCompile(`label_values\((.*), ([a-z]+)\)`)

// testDashboard runs every query of every panel against both servers: no panel is empty, and
// neither is the list of a variable.
func (s *stack) testDashboard(t *testing.T) {
	m, err := dashboards.Parse()
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]string{
		"__rate_interval": "1m", "__range": "5m",
		"job": ".*", "instance": ".*", "container": ".*", "device": s.fio.device + "|zram0", "operation": "read|write",
	}
	lists := map[string]string{} // by variable
	for _, v := range m.Templating.List {
		if v.Type != "query" {
			continue
		}
		var query struct{ Query string }
		if err := json.Unmarshal(v.Query, &query); err != nil {
			t.Fatalf("variable %s: %v", v.Name, err)
		}
		if is := labelValues.FindStringSubmatch(query.Query); is != nil {
			lists[v.Name] = dashboards.Query{Expr: fmt.Sprintf("count by (%s) (%s)", is[2], is[1])}.Expand(values)
		}
	}
	if lists["container"] == "" {
		t.Error("the dashboard has no variable container, or one that is not asked for here")
	}
	for name, p := range map[string]*prometheus{"classic": s.classic, "native": s.native} {
		// The queries are over a minute: a machine that stood still meanwhile has that to fill.
		eventually(t, 90*time.Second, func() error {
			some := map[string]bool{}
			var errs []error
			for _, q := range m.Queries() {
				list, err := p.query(q.Expand(values))
				if err != nil {
					errs = append(errs, fmt.Errorf("%s: panel %s: %w", name, q.Panel, err))
				}
				some[q.Panel] = some[q.Panel] || len(list) > 0
			}
			for variable, expr := range lists {
				if list, err := p.query(expr); err != nil || len(list) == 0 {
					errs = append(errs, fmt.Errorf("%s: variable %s has no values (%v)", name, variable, err))
				}
			}
			for panel, ok := range some {
				if !ok && (s.zram || !strings.HasPrefix(panel, "Devices without requests")) {
					errs = append(errs, fmt.Errorf("%s: panel %s is empty", name, panel))
				}
			}
			return errors.Join(errs...)
		})
	}
}

// startZram makes a device without requests, if the kernel has one that is free, and writes to
// it now and then until the test ends.
func (s *stack) startZram(t *testing.T) {
	const dir = "/sys/block/zram0"
	if size, err := os.ReadFile(dir + "/disksize"); err != nil || strings.TrimSpace(string(size)) != "0" {
		t.Log("no zram device is free: panels of devices without requests may be empty")
		return
	}
	if err := os.WriteFile(dir+"/disksize", []byte("16M"), 0); err != nil {
		t.Fatal(err)
	}
	s.zram = true
	ctx, stop := context.WithCancel(context.Background())
	var writing sync.WaitGroup
	writing.Go(func() {
		for ctx.Err() == nil {
			// Past the page cache.
			cmd := exec.Command("dd", "if=/dev/zero", "of=/dev/zram0", "bs=64k", "count=16", "oflag=direct", "status=none")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", cmd, err, out)
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(2 * time.Second):
			}
		}
	})
	t.Cleanup(func() {
		stop()
		writing.Wait()
		if err := os.WriteFile(dir+"/reset", []byte("1"), 0); err != nil {
			t.Error(err)
		}
	})
}
