// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"bytes"
	"errors"
	"regexp"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"github.com/hostflame/hostflame/internal/histogram"
	"github.com/hostflame/hostflame/profiler"
)

func testCollector(t *testing.T, r Readers) (*Collector, *bytes.Buffer) {
	t.Helper()
	logger, b := logs()
	return NewCollector(r, testStart, logger), b
}

func gather(t *testing.T, c *Collector, exporterMetrics bool) []*dto.MetricFamily {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	register(reg, c, exporterMetrics)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	return families
}

func exposition(t *testing.T, families []*dto.MetricFamily, format expfmt.FormatType) []byte {
	t.Helper()
	var b bytes.Buffer
	enc := expfmt.NewEncoder(&b, expfmt.NewFormat(format))
	for _, f := range families {
		if err := enc.Encode(f); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// What depends on the clock and on the build.
var variable = regexp.MustCompile(`(?m)^(hostflame_scrape_collector_duration_seconds\{.*\}|hostflame_build_info).*$`)

func TestExpositionGolden(t *testing.T) {
	c, _ := testCollector(t, testReaders())
	families := gather(t, c, false)
	text := variable.ReplaceAll(exposition(t, families, expfmt.TypeTextPlain), []byte("$1 …"))
	golden(t, "metrics.txt", text)
	var native bytes.Buffer
	for _, f := range families {
		if f.GetType() != dto.MetricType_HISTOGRAM {
			continue
		}
		enc := expfmt.NewEncoder(&native, expfmt.NewFormat(expfmt.TypeProtoText))
		for _, m := range f.Metric {
			m.Histogram.Bucket = nil
		}
		if err := enc.Encode(f); err != nil {
			t.Fatal(err)
		}
	}
	// The text format of protobuf varies its blanks on purpose.
	golden(t, "native.txt", regexp.MustCompile(` +`).ReplaceAll(native.Bytes(), []byte(" ")))
}

func TestPromlint(t *testing.T) {
	c, _ := testCollector(t, testReaders())
	families := append(gather(t, c, true), gatherOTLP(t)...)
	if len(families) < 40 {
		t.Errorf("only %d families", len(families))
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func family(families []*dto.MetricFamily, name string) *dto.MetricFamily {
	for _, f := range families {
		if f.GetName() == name {
			return f
		}
	}
	return nil
}

// success is hostflame_scrape_collector_success by collector.
func success(families []*dto.MetricFamily) map[string]float64 {
	values := map[string]float64{}
	for _, m := range family(families, "hostflame_scrape_collector_success").GetMetric() {
		values[m.Label[0].GetValue()] = m.Gauge.GetValue()
	}
	return values
}

func TestFailingCollector(t *testing.T) {
	r := testReaders()
	block := r.Block.(*fakeBlock)
	c, log := testCollector(t, r)
	reg := prometheus.NewPedanticRegistry()
	register(reg, c, false)
	scrape := func(wantBlock float64) []*dto.MetricFamily {
		t.Helper()
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]float64{"agent": 1, "block": wantBlock, "cpu": 1, "runqueue": 1, "symbols": 1, "unwind": 1}
		if diff := cmp.Diff(want, success(families)); diff != "" {
			t.Errorf("success (-want +got):\n%s", diff)
		}
		if has := family(families, "hostflame_block_io_errors_total") != nil; has != (wantBlock == 1) {
			t.Errorf("block metrics are there: %v", has)
		}
		return families
	}
	scrape(1)
	block.err = errors.New("map is gone")
	scrape(0)
	scrape(0)
	if got := c.Status()[1]; got.Name != "block" || got.Err == nil {
		t.Errorf("status %+v", got)
	}
	// One series that can not be made takes its group along, and nothing else.
	block.err = nil
	good := block.series
	block.series = []Block{good[0], {Device: "vdb", Operation: "read"}}
	scrape(0)
	block.series = good
	scrape(1)
	// One line for each change, however many scrapes there were.
	want := regexp.MustCompile(`^level=ERROR msg="collector failed" collector=block err="read block I/O: map is gone"
level=ERROR msg="collector failed" collector=block err="make metrics: .* 0 cells, want .*"
level=INFO msg="collector works again" collector=block
$`)
	if got := log.String(); !want.MatchString(got) {
		t.Errorf("log:\n%s\nwant\n%s", got, want)
	}
}

func TestAbsentCollectors(t *testing.T) {
	c, _ := testCollector(t, Readers{CPU: fakeCPU{{Container: "/"}}})
	if diff := cmp.Diff(map[string]float64{"cpu": 1}, success(gather(t, c, false))); diff != "" {
		t.Errorf("success (-want +got):\n%s", diff)
	}
}

// TestForeignNames: names come from outside, and twice. None of that may fail a scrape.
func TestForeignNames(t *testing.T) {
	r := testReaders()
	r.Block = &fakeBlock{series: []Block{testBlock("sd\xff", "read", 1), testBlock("sd\xfe", "read", 2)}}
	r.CPU = fakeCPU{
		{Container: "/a\xff\n\"", User: time.Second},
		{Container: "/a\xfe\n\"", User: 2 * time.Second, System: time.Second},
	}
	c, _ := testCollector(t, r)
	families := gather(t, c, false)
	if got := success(families); got["block"] != 1 || got["cpu"] != 1 {
		t.Errorf("success %v", got)
	}
	total := family(families, "hostflame_block_io_latency_seconds").Metric
	if len(total) != 1 || total[0].Histogram.GetSampleCount() != 6 {
		t.Errorf("merged: %v", total)
	}
	var user float64
	for _, m := range family(families, "hostflame_cpu_seconds_total").Metric {
		if m.Label[1].GetValue() == "user" {
			user += m.Counter.GetValue()
		}
	}
	if user != 3 {
		t.Errorf("user %v s", user)
	}
}

// TestMergeLeavesSnapshots: a reader may hand out the same cells again.
func TestMergeLeavesSnapshots(t *testing.T) {
	one, two := testBlock("sda", "read", 1), testBlock("sda", "read", 2)
	before := snapshotOf(histogram.Time())
	before.Add(one.Total)
	mergeBlock([]Block{one, two})
	if diff := cmp.Diff(before, one.Total); diff != "" {
		t.Errorf("changed (-want +got):\n%s", diff)
	}
}

var _ CPUReader = (*profiler.Profiler)(nil)

func BenchmarkGather(b *testing.B) {
	r := testReaders()
	series := r.Block.(*fakeBlock)
	series.series = nil
	for _, device := range []string{"sda", "sdb", "nvme0n1", "nvme1n1"} {
		for _, op := range []string{"read", "write", "flush", "discard", "other"} {
			series.series = append(series.series, testBlock(device, op, 1))
		}
	}
	logger, _ := logs()
	reg := NewRegistry(NewCollector(r, testStart, logger), false)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := reg.Gather(); err != nil {
			b.Fatal(err)
		}
	}
}
