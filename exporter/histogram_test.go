// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"math"
	"math/big"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/hostflame/hostflame/internal/histogram"
)

// partitions under test, with the options that make client_golang's own histogram count
// into the same buckets.
var partitions = []struct {
	name    string
	layout  *layout
	factor  float64 // NativeHistogramBucketFactor
	largest uint64  // last value with a native bucket of its own
}{
	{"time", timeLayout(), 1.1, 64_000_000_000},
	{"size", sizeLayout(), 2, 64 << 20},
}

// testValues are every cut with its neighbours and values of all magnitudes.
func testValues(p *histogram.Partition, largest uint64) []uint64 {
	values := []uint64{0, 1}
	for _, c := range p.Cuts {
		values = append(values, c-1, c, c+1)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 50_000 {
		values = append(values, r.Uint64()>>r.IntN(64)%(largest+1))
	}
	for i, v := range values {
		values[i] = min(v, largest)
	}
	return values
}

func write(t *testing.T, m prometheus.Metric) *dto.Histogram {
	t.Helper()
	var out dto.Metric
	if err := m.Write(&out); err != nil {
		t.Fatal(err)
	}
	return out.Histogram
}

func testHistogram(t *testing.T, l *layout, s histogram.Snapshot) *dto.Histogram {
	t.Helper()
	desc := prometheus.NewDesc("hostflame_test_seconds", "Test.", nil, nil)
	m, err := newHistogram(desc, l, s, testStart)
	if err != nil {
		t.Fatal(err)
	}
	return write(t, m)
}

// nativeBuckets undoes spans and deltas; empty buckets are left out.
func nativeBuckets(h *dto.Histogram) map[int32]int64 {
	buckets := map[int32]int64{}
	var index int32
	var count int64
	deltas := h.PositiveDelta
	for _, s := range h.PositiveSpan {
		index += s.GetOffset()
		for range s.GetLength() {
			count += deltas[0]
			deltas = deltas[1:]
			if count != 0 {
				buckets[index] = count
			}
			index++
		}
	}
	if len(deltas) != 0 {
		buckets[math.MaxInt32] = int64(len(deltas))
	}
	return buckets
}

func classicBuckets(h *dto.Histogram) map[float64]uint64 {
	buckets := map[float64]uint64{}
	for _, b := range h.Bucket {
		buckets[b.GetUpperBound()] = b.GetCumulativeCount()
	}
	return buckets
}

// TestHistogramAgainstClient lets client_golang count the same values itself.
func TestHistogramAgainstClient(t *testing.T) {
	for _, tt := range partitions {
		t.Run(tt.name, func(t *testing.T) {
			p := tt.layout.partition
			values := testValues(p, tt.largest)
			var bounds []float64
			for _, c := range p.Classic {
				bounds = append(bounds, float64(c)/p.Unit)
			}
			client := prometheus.NewHistogram(prometheus.HistogramOpts{
				Name: "test", Help: "Test.",
				Buckets:                      bounds,
				NativeHistogramBucketFactor:  tt.factor,
				NativeHistogramZeroThreshold: tt.layout.threshold,
			})
			for _, v := range values {
				client.Observe(float64(v) / p.Unit)
			}
			want := write(t, client)
			got := testHistogram(t, tt.layout, snapshotOf(p, values...))
			if got.GetSchema() != want.GetSchema() {
				t.Errorf("schema %d, want %d", got.GetSchema(), want.GetSchema())
			}
			if got.GetSampleCount() != want.GetSampleCount() {
				t.Errorf("count %d, want %d", got.GetSampleCount(), want.GetSampleCount())
			}
			if got.GetZeroCount() != want.GetZeroCount() {
				t.Errorf("zero count %d, want %d", got.GetZeroCount(), want.GetZeroCount())
			}
			// The client adds floats, one rounding each.
			if g, w := got.GetSampleSum(), want.GetSampleSum(); math.Abs(g-w) > 1e-9*w {
				t.Errorf("sum %v, want %v", g, w)
			}
			if diff := cmp.Diff(classicBuckets(want), classicBuckets(got)); diff != "" {
				t.Errorf("classic buckets (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(nativeBuckets(want), nativeBuckets(got)); diff != "" {
				t.Errorf("native buckets (-want +got):\n%s", diff)
			}
		})
	}
}

// atMost tells whether v ns <= 2^(index/8) s, in integers.
func atMost(v uint64, index int) bool {
	l := new(big.Int).Exp(new(big.Int).SetUint64(v), big.NewInt(8), nil)
	r := new(big.Int).Exp(big.NewInt(10), big.NewInt(72), nil)
	if index >= 0 {
		r.Lsh(r, uint(index))
	} else {
		l.Lsh(l, uint(-index))
	}
	return l.Cmp(r) <= 0
}

// TestHistogramByDefinition counts by the definition of each bucket, without floats.
func TestHistogramByDefinition(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	p := histogram.Time()
	var values []uint64
	for _, c := range p.Cuts {
		values = append(values, c, c+1)
	}
	for range 2_000 {
		values = append(values, r.Uint64()>>(26+r.IntN(38)))
	}
	h := testHistogram(t, timeLayout(), snapshotOf(p, values...))
	native := nativeBuckets(h)
	// Schema 3 and, merged as Prometheus does, every coarser one.
	for shift := range 4 {
		step := 1 << shift
		merged := map[int]int64{}
		for i, n := range native {
			merged[int(math.Ceil(float64(i)/float64(step)))] += n
		}
		want := map[int]int64{}
		var zero uint64
		for _, v := range values {
			if atMost(v, histogram.MinIndex) {
				zero++
				continue
			}
			i := histogram.MinIndex / step
			for i*step <= histogram.MaxIndex && !atMost(v, i*step) {
				i++
			}
			want[i]++
		}
		if diff := cmp.Diff(want, merged); diff != "" {
			t.Errorf("schema %d (-want +got):\n%s", 3-shift, diff)
		}
		if h.GetZeroCount() != zero {
			t.Errorf("zero count %d, want %d", h.GetZeroCount(), zero)
		}
	}
	for i, b := range h.Bucket {
		var want uint64
		for _, v := range values {
			if v <= p.Classic[i] {
				want++
			}
		}
		if b.GetCumulativeCount() != want {
			t.Errorf("le %v: %d, want %d", b.GetUpperBound(), b.GetCumulativeCount(), want)
		}
	}
}

func TestHistogramSumsUp(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, tt := range partitions {
		for range 200 {
			s := histogram.Snapshot{Cells: make([]uint64, tt.layout.partition.Cells())}
			for range r.IntN(20) {
				s.Cells[r.IntN(len(s.Cells))] = r.Uint64N(1 << 40)
			}
			s.Cells[len(s.Cells)-1] = r.Uint64N(3)
			h := testHistogram(t, tt.layout, s)
			got := h.GetZeroCount()
			for _, n := range nativeBuckets(h) {
				got += uint64(n)
			}
			if want := s.Count(); got != want || h.GetSampleCount() != want {
				t.Fatalf("%s: native buckets hold %d, count is %d, cells hold %d", tt.name, got, h.GetSampleCount(), want)
			}
			for i, b := range h.Bucket {
				if i > 0 && b.GetCumulativeCount() < h.Bucket[i-1].GetCumulativeCount() {
					t.Fatalf("%s: le %v counts less than the one before", tt.name, b.GetUpperBound())
				}
			}
		}
	}
}

// TestHistogramOverflow: what lies above the last cut is in the bucket after the last
// native one and in no finite classic one.
func TestHistogramOverflow(t *testing.T) {
	for _, tt := range []struct {
		layout *layout
		value  uint64
		index  int32
	}{
		{timeLayout(), 3_600_000_000_000, histogram.MaxIndex + 1},
		{sizeLayout(), 1 << 32, 27},
	} {
		h := testHistogram(t, tt.layout, snapshotOf(tt.layout.partition, tt.value))
		if diff := cmp.Diff(map[int32]int64{tt.index: 1}, nativeBuckets(h)); diff != "" {
			t.Errorf("native buckets (-want +got):\n%s", diff)
		}
		if last := h.Bucket[len(h.Bucket)-1]; last.GetCumulativeCount() != 0 || h.GetSampleCount() != 1 {
			t.Errorf("last le %v counts %d of %d", last.GetUpperBound(), last.GetCumulativeCount(), h.GetSampleCount())
		}
		if want := float64(tt.value) / tt.layout.partition.Unit; h.GetSampleSum() != want {
			t.Errorf("sum %v, want %v", h.GetSampleSum(), want)
		}
	}
}

// TestHistogramEmpty: a series without observations is native too, or it would change
// its kind at the first one.
func TestHistogramEmpty(t *testing.T) {
	for _, tt := range partitions {
		h := testHistogram(t, tt.layout, snapshotOf(tt.layout.partition))
		if h.GetZeroThreshold() <= 0 || h.Schema == nil {
			t.Errorf("%s: not native: %v", tt.name, h)
		}
		if !h.GetCreatedTimestamp().AsTime().Equal(testStart) {
			t.Errorf("%s: created %v", tt.name, h.GetCreatedTimestamp().AsTime())
		}
	}
}

func TestHistogramRejects(t *testing.T) {
	desc := prometheus.NewDesc("hostflame_test_seconds", "Test.", []string{"device"}, nil)
	if _, err := newHistogram(desc, timeLayout(), histogram.Snapshot{Cells: make([]uint64, 3)}, testStart, "vda"); err == nil {
		t.Error("took 3 cells")
	}
	if _, err := newHistogram(desc, timeLayout(), snapshotOf(histogram.Time()), testStart); err == nil {
		t.Error("took no label")
	}
}

// TestHistogramExemplars: exemplars go to both kinds of buckets of the metric.
func TestHistogramExemplars(t *testing.T) {
	desc := prometheus.NewDesc("hostflame_test_seconds", "Test.", nil, nil)
	m, err := newHistogram(desc, timeLayout(), snapshotOf(histogram.Time(), 1_500_000), testStart)
	if err != nil {
		t.Fatal(err)
	}
	m, err = prometheus.NewMetricWithExemplars(m, prometheus.Exemplar{
		Value: 0.0015, Labels: prometheus.Labels{"stack_id": "23"}, Timestamp: testStart.Add(time.Second),
	})
	if err != nil {
		t.Fatal(err)
	}
	h := write(t, m)
	if len(h.Exemplars) != 1 {
		t.Errorf("%d native exemplars", len(h.Exemplars))
	}
	for _, b := range h.Bucket {
		if has := b.Exemplar != nil; has != (b.GetUpperBound() == 0.002) {
			t.Errorf("le %v has an exemplar: %v", b.GetUpperBound(), has)
		}
	}
}

func BenchmarkHistogramWrite(b *testing.B) {
	s := snapshotOf(histogram.Time(), testValues(histogram.Time(), 64_000_000_000)...)
	desc := prometheus.NewDesc("hostflame_test_seconds", "Test.", nil, nil)
	b.ReportAllocs()
	for b.Loop() {
		m, err := newHistogram(desc, timeLayout(), s, testStart)
		if err != nil {
			b.Fatal(err)
		}
		if err := m.Write(new(dto.Metric)); err != nil {
			b.Fatal(err)
		}
	}
}
