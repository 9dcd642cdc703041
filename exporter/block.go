// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hostflame/hostflame/internal/histogram"
)

// Block is what the block layer hooks counted of one device and operation since they
// were attached. A device has all its operations from the first read on, and stays when
// it leaves the host.
type Block struct {
	Device    string // whole device, as in /proc/diskstats
	Operation string // read, write, flush, discard or other

	Total      histogram.Snapshot // start to last byte, ns, in cells of histogram.Time
	Queue      histogram.Snapshot // start to issue
	DeviceTime histogram.Snapshot // issue to last byte
	Size       histogram.Snapshot // bytes, in cells of histogram.Size
	Errors     uint64             // requests that ended with an error
}

// BlockReader reads the block layer's counters.
type BlockReader interface {
	ReadBlock() ([]Block, error)
}

type blockGroup struct {
	reader  BlockReader
	created time.Time

	latency, queue, device, size, errors *prometheus.Desc
}

func newBlockGroup(r BlockReader, created time.Time) group {
	desc := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, []string{"device", "operation"}, nil)
	}
	return &blockGroup{
		reader:  r,
		created: created,
		latency: desc("hostflame_block_io_latency_seconds",
			"Time of block I/O requests from their start to their last byte."),
		queue: desc("hostflame_block_io_queue_latency_seconds",
			"Time of block I/O requests in the kernel's queues, before the device got them."),
		device: desc("hostflame_block_io_device_latency_seconds",
			"Time of block I/O requests in the device, from issue to their last byte."),
		size: desc("hostflame_block_io_size_bytes",
			"Size of block I/O requests."),
		errors: desc("hostflame_block_io_errors_total",
			"Block I/O requests that ended with an error."),
	}
}

func (g *blockGroup) describe(ch chan<- *prometheus.Desc) {
	ch <- g.latency
	ch <- g.queue
	ch <- g.device
	ch <- g.size
	ch <- g.errors
}

func (g *blockGroup) collect(emit func(prometheus.Metric)) error {
	series, err := g.reader.ReadBlock()
	if err != nil {
		return fmt.Errorf("read block I/O: %w", err)
	}
	b := batch{emit: emit}
	for _, s := range mergeBlock(series) {
		b.add(newHistogram(g.latency, timeLayout(), s.Total, g.created, s.Device, s.Operation))
		b.add(newHistogram(g.queue, timeLayout(), s.Queue, g.created, s.Device, s.Operation))
		b.add(newHistogram(g.device, timeLayout(), s.DeviceTime, g.created, s.Device, s.Operation))
		b.add(newHistogram(g.size, sizeLayout(), s.Size, g.created, s.Device, s.Operation))
		b.add(counter(g.errors, g.created, float64(s.Errors), s.Device, s.Operation))
	}
	return b.err()
}

// mergeBlock adds up series of the same device name and operation: a name can come back
// with another device number, and a scrape must not hold one series twice.
func mergeBlock(series []Block) []Block {
	type key struct{ device, operation string }
	at := make(map[key]int, len(series))
	merged := make([]Block, 0, len(series))
	for _, s := range series {
		k := key{labelValue(s.Device), s.Operation}
		i, seen := at[k]
		if !seen {
			at[k] = len(merged)
			merged = append(merged, s)
			continue
		}
		m := &merged[i]
		m.Total = added(m.Total, s.Total)
		m.Queue = added(m.Queue, s.Queue)
		m.DeviceTime = added(m.DeviceTime, s.DeviceTime)
		m.Size = added(m.Size, s.Size)
		m.Errors += s.Errors
	}
	return merged
}

// added is a + b, both left as they are.
func added(a, b histogram.Snapshot) histogram.Snapshot {
	var s histogram.Snapshot
	s.Add(a)
	s.Add(b)
	return s
}
