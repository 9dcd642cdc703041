// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"fmt"
	"math/bits"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hostflame/hostflame/internal/histogram"
)

// layout says how the cells of a partition add up to the buckets of a histogram that is
// classic and native at once. Every bucket is an exact sum of cells. Immutable.
//
// What lies above the last cut has no upper bound, and no native bucket means "above 64
// seconds". It is counted in the native bucket that follows the last one (64 s to 69.8 s
// for time): the count and the sum stay exact, and a quantile that falls there is
// understated, as one in the classic +Inf bucket is.
type layout struct {
	partition *histogram.Partition
	// le and leEnd describe the classic buckets: bound, and the number of cells up to it.
	le    []float64
	leEnd []int
	// schema, threshold and index describe the native ones: the bucket with index
	// index+i is made of cells [end[i-1], end[i]), where end[-1] is zeroEnd, and cells
	// [0, zeroEnd) are the zero bucket.
	schema    int32
	threshold float64
	index     int32
	zeroEnd   int
	end       []int
}

var (
	timeLayout   = sync.OnceValue(func() *layout { return newLayout(histogram.Time()) })
	sizeLayout   = sync.OnceValue(func() *layout { return newLayout(histogram.Size()) })
	depthLayout  = sync.OnceValue(func() *layout { return newLayout(histogram.Depth()) })
	lengthLayout = sync.OnceValue(func() *layout { return newLayout(histogram.Length()) })
)

func newLayout(p *histogram.Partition) *layout {
	l := &layout{partition: p}
	for _, c := range p.Classic {
		l.le = append(l.le, p.Le(c))
		l.leEnd = append(l.leEnd, p.Cell(c)+1)
	}
	if p.Native != nil {
		l.schema, l.threshold = histogram.Schema, histogram.ZeroThreshold
		l.index = histogram.MinIndex + 1
		l.zeroEnd = p.Native[0] + 1
		for _, cut := range p.Native[1:] {
			l.end = append(l.end, cut+1)
		}
	} else {
		// All cuts are successive powers of two: bucket i of schema 0 ends at 2^i.
		l.threshold = p.Le(p.Cuts[0])
		l.index = int32(bits.TrailingZeros64(p.Cuts[0])) + 1
		l.zeroEnd = 1
		for i := range p.Cuts[1:] {
			l.end = append(l.end, i+2)
		}
	}
	l.end = append(l.end, p.Cells())
	return l
}

// histogramMetric is one series of a histogram, classic and native at once.
// prometheus.NewMetricWithExemplars can wrap it and then fills both.
type histogramMetric struct {
	desc     *prometheus.Desc
	labels   []*dto.LabelPair
	layout   *layout
	snapshot histogram.Snapshot
	created  *timestamppb.Timestamp
}

// newHistogram makes a metric of s, which it keeps. It fails when s does not have the
// cells of the layout, or the labels do not fit desc.
func newHistogram(desc *prometheus.Desc, l *layout, s histogram.Snapshot, created time.Time, labels ...string) (prometheus.Metric, error) {
	if len(s.Cells) != l.partition.Cells() {
		return nil, fmt.Errorf("make histogram of %s: %d cells, want %d", desc, len(s.Cells), l.partition.Cells())
	}
	for i := range labels {
		labels[i] = labelValue(labels[i])
	}
	// Only to have desc and labels checked against each other.
	if _, err := prometheus.NewConstMetric(desc, prometheus.UntypedValue, 0, labels...); err != nil {
		return nil, err
	}
	return &histogramMetric{
		desc:     desc,
		labels:   prometheus.MakeLabelPairs(desc, labels),
		layout:   l,
		snapshot: s,
		created:  timestamppb.New(created),
	}, nil
}

// Desc implements prometheus.Metric.
func (h *histogramMetric) Desc() *prometheus.Desc { return h.desc }

// Write implements prometheus.Metric.
func (h *histogramMetric) Write(out *dto.Metric) error {
	l, cells := h.layout, h.snapshot.Cells
	pb := &dto.Histogram{
		SampleSum:        proto.Float64(float64(h.snapshot.Sum) / l.partition.Unit),
		CreatedTimestamp: h.created,
		Schema:           proto.Int32(l.schema),
		ZeroThreshold:    proto.Float64(l.threshold),
		ZeroCount:        proto.Uint64(sum(cells[:l.zeroEnd])),
	}
	var cumulative uint64
	from := 0
	for i, end := range l.leEnd {
		cumulative += sum(cells[from:end])
		from = end
		pb.Bucket = append(pb.Bucket, &dto.Bucket{
			UpperBound:      proto.Float64(l.le[i]),
			CumulativeCount: proto.Uint64(cumulative),
		})
	}
	pb.SampleCount = proto.Uint64(cumulative + sum(cells[from:]))
	l.writeNative(cells, pb)
	out.Histogram = pb
	out.Label = h.labels
	return nil
}

// maxGap is how many empty buckets are worth less than a new span.
const maxGap = 2

// writeNative fills the spans and deltas: only buckets that count something, except for
// short gaps, each as the difference to the one before.
func (l *layout) writeNative(cells []uint64, pb *dto.Histogram) {
	var (
		span *dto.BucketSpan
		next int32 // index after the last bucket written
		last int64 // its count
	)
	put := func(count int64) {
		*span.Length++
		pb.PositiveDelta = append(pb.PositiveDelta, count-last)
		last = count
		next++
	}
	from := l.zeroEnd
	for i, end := range l.end {
		count := int64(sum(cells[from:end]))
		from = end
		if count == 0 {
			continue
		}
		index := l.index + int32(i)
		if span != nil && index-next <= maxGap {
			for next < index {
				put(0)
			}
		} else {
			offset := index
			if span != nil {
				offset = index - next
			}
			span = &dto.BucketSpan{Offset: proto.Int32(offset), Length: proto.Uint32(0)}
			pb.PositiveSpan = append(pb.PositiveSpan, span)
			next = index
		}
		put(count)
	}
}

func sum(cells []uint64) uint64 {
	var n uint64
	for _, c := range cells {
		n += c
	}
	return n
}
