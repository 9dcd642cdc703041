// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"fmt"
	"maps"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hostflame/hostflame/internal/histogram"
)

// Block is what the block layer hooks counted of one device and operation since they
// were attached. A device has all its operations from the first read on, and stays when
// it leaves the host.
type Block struct {
	Device    string // whole device, as in /proc/diskstats
	Operation string // read, write, flush, discard, write-zeroes or other

	Total      histogram.Snapshot // start to last byte, ns, in cells of histogram.Time
	Queue      histogram.Snapshot // start to issue
	DeviceTime histogram.Snapshot // issue to last byte
	Size       histogram.Snapshot // bytes, in cells of histogram.Size
	Depth      histogram.Snapshot // requests that the hardware queue had at issue, in cells of histogram.Depth
	Errors     map[string]uint64  // requests that ended with an error, by class; all classes are there
	Flagged    map[string]uint64  // requests by flag: sync, readahead, metadata

	Merges, Requeues, Splits uint64
}

// BlockContainer is the block I/O of one container, over all devices.
type BlockContainer struct {
	Container  string
	Since      time.Time                   // when it began to count
	Operations map[string]BlockContainerIO // read, write (with write-zeroes), other
	Attributed map[string]uint64           // requests by what tells the container: cgroup, submitter
}

// BlockContainerIO is that of one operation.
type BlockContainerIO struct {
	Total, Queue, DeviceTime, Size histogram.Snapshot // as in Block
}

// BlockBio is the I/O of one device without requests (zram, dm, md) and operation.
type BlockBio struct {
	Device, Operation string
	Total, Size       histogram.Snapshot // as in Block
	Errors            map[string]uint64  // bios that ended with an error, by class; all classes are there
}

// BlockReader reads the block layer's counters.
type BlockReader interface {
	ReadBlock() ([]Block, error)
	// ReadBlockContainers reads what was counted by container. The number of containers is
	// bounded by who makes it, the rest is in "~other"; names are valid UTF-8, each is there
	// once.
	ReadBlockContainers() ([]BlockContainer, error)
	// ReadBlockBios reads what was counted of the devices without requests.
	ReadBlockBios() ([]BlockBio, error)
	// ReadInFlight counts the requests that devices have now, by device.
	ReadInFlight() (map[string]int, error)
}

type blockGroup struct {
	reader  BlockReader
	created time.Time

	latency, queue, device, size, errors, flagged *prometheus.Desc
	merges, requeues, splits, depth, inFlight     *prometheus.Desc

	containerLatency, containerQueue, containerDevice, containerSize, attributed *prometheus.Desc
	bioLatency, bioSize, bioErrors                                               *prometheus.Desc
}

func newBlockGroup(r BlockReader, created time.Time) group {
	desc := func(name, help string, more ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, append([]string{"device", "operation"}, more...), nil)
	}
	byContainer := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("hostflame_container_block_io_"+name, help, []string{"container", "operation"}, nil)
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
			"Block I/O requests that ended with an error, by class of the first one.", "class"),
		flagged: desc("hostflame_block_io_flagged_requests_total",
			"Block I/O requests that are synchronous, readahead or metadata; one can be several of these.", "flag"),
		merges: desc("hostflame_block_io_merges_total",
			"Bios and requests that were merged into a block I/O request that waited."),
		requeues: desc("hostflame_block_io_requeues_total",
			"Block I/O requests that the driver sent back to be issued again."),
		splits: desc("hostflame_block_io_splits_total",
			"Bios that were cut in two because the device takes no larger ones."),
		depth: prometheus.NewDesc("hostflame_block_io_queue_depth",
			"Requests that the device's hardware queue had when a request was issued to it, that one included.", []string{"device"}, nil),
		inFlight: prometheus.NewDesc("hostflame_block_io_in_flight",
			"Block I/O requests that have started and not ended.", []string{"device"}, nil),
		bioLatency: desc("hostflame_block_bio_latency_seconds",
			"Time of bios of block devices that have no requests (zram, dm, md), from submission to completion; what they send to other devices is counted there again."),
		bioSize: desc("hostflame_block_bio_size_bytes",
			"Size of bios of block devices that have no requests."),
		bioErrors: desc("hostflame_block_bio_errors_total",
			"Bios of block devices that have no requests that ended with an error, by class.", "class"),
		containerLatency: byContainer("latency_seconds",
			"Time of a container's block I/O requests from their start to their last byte."),
		containerQueue: byContainer("queue_latency_seconds",
			"Time of a container's block I/O requests in the kernel's queues, before the device got them."),
		containerDevice: byContainer("device_latency_seconds",
			"Time of a container's block I/O requests in the device, from issue to their last byte."),
		containerSize: byContainer("size_bytes",
			"Size of a container's block I/O requests."),
		attributed: prometheus.NewDesc("hostflame_container_block_io_attributed_requests_total",
			"Block I/O requests of a container, by what tells that: the cgroup that the kernel charges, or the submitter where that is the root.",
			[]string{"container", "by"}, nil),
	}
}

func (g *blockGroup) describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		g.latency, g.queue, g.device, g.size, g.errors, g.flagged,
		g.merges, g.requeues, g.splits, g.depth, g.inFlight,
		g.containerLatency, g.containerQueue, g.containerDevice, g.containerSize, g.attributed,
		g.bioLatency, g.bioSize, g.bioErrors,
	} {
		ch <- d
	}
}

func (g *blockGroup) collect(emit func(prometheus.Metric)) error {
	series, err := g.reader.ReadBlock()
	if err != nil {
		return fmt.Errorf("read block I/O: %w", err)
	}
	inFlight, err := g.reader.ReadInFlight()
	if err != nil {
		return fmt.Errorf("read block I/O in flight: %w", err)
	}
	containers, err := g.reader.ReadBlockContainers()
	if err != nil {
		return fmt.Errorf("read block I/O by container: %w", err)
	}
	bios, err := g.reader.ReadBlockBios()
	if err != nil {
		return fmt.Errorf("read bios: %w", err)
	}
	b := batch{emit: emit}
	for _, s := range bios {
		b.add(newHistogram(g.bioLatency, timeLayout(), s.Total, g.created, s.Device, s.Operation))
		b.add(newHistogram(g.bioSize, sizeLayout(), s.Size, g.created, s.Device, s.Operation))
		for class, n := range s.Errors {
			b.add(counter(g.bioErrors, g.created, float64(n), s.Device, s.Operation, class))
		}
	}
	for _, c := range containers {
		for op, s := range c.Operations {
			b.add(newHistogram(g.containerLatency, timeLayout(), s.Total, c.Since, c.Container, op))
			b.add(newHistogram(g.containerQueue, timeLayout(), s.Queue, c.Since, c.Container, op))
			b.add(newHistogram(g.containerDevice, timeLayout(), s.DeviceTime, c.Since, c.Container, op))
			b.add(newHistogram(g.containerSize, sizeLayout(), s.Size, c.Since, c.Container, op))
		}
		for by, n := range c.Attributed {
			b.add(counter(g.attributed, c.Since, float64(n), c.Container, by))
		}
	}
	for device, n := range inFlight {
		m, err := prometheus.NewConstMetric(g.inFlight, prometheus.GaugeValue, float64(n), labelValue(device))
		b.add(m, err)
	}
	depths := map[string]histogram.Snapshot{}
	for _, s := range mergeBlock(series) {
		depth := depths[s.Device]
		depth.Add(s.Depth)
		depths[s.Device] = depth
		b.add(newHistogram(g.latency, timeLayout(), s.Total, g.created, s.Device, s.Operation))
		b.add(newHistogram(g.queue, timeLayout(), s.Queue, g.created, s.Device, s.Operation))
		b.add(newHistogram(g.device, timeLayout(), s.DeviceTime, g.created, s.Device, s.Operation))
		b.add(newHistogram(g.size, sizeLayout(), s.Size, g.created, s.Device, s.Operation))
		for class, n := range s.Errors {
			b.add(counter(g.errors, g.created, float64(n), s.Device, s.Operation, class))
		}
		for flag, n := range s.Flagged {
			b.add(counter(g.flagged, g.created, float64(n), s.Device, s.Operation, flag))
		}
		b.add(counter(g.merges, g.created, float64(s.Merges), s.Device, s.Operation))
		b.add(counter(g.requeues, g.created, float64(s.Requeues), s.Device, s.Operation))
		b.add(counter(g.splits, g.created, float64(s.Splits), s.Device, s.Operation))
	}
	for device, s := range depths {
		b.add(newHistogram(g.depth, depthLayout(), s, g.created, device))
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
		m.Depth = added(m.Depth, s.Depth)
		m.Errors = summed(m.Errors, s.Errors)
		m.Flagged = summed(m.Flagged, s.Flagged)
		m.Merges += s.Merges
		m.Requeues += s.Requeues
		m.Splits += s.Splits
	}
	return merged
}

// summed is a + b, both left as they are.
func summed(a, b map[string]uint64) map[string]uint64 {
	sum := maps.Clone(a)
	for k, n := range b {
		sum[k] += n
	}
	return sum
}

// added is a + b, both left as they are.
func added(a, b histogram.Snapshot) histogram.Snapshot {
	var s histogram.Snapshot
	s.Add(a)
	s.Add(b)
	return s
}
