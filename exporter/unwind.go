// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Unwind is what is known of the unwind tables by which user stacks are walked.
type Unwind struct {
	Tables      int    // in the kernel, each of one region of a file
	Rows        uint64 // of them
	Memory      uint64 // bytes of the kernel
	MemoryLimit uint64
	Evicted     uint64 // tables that made room for others
	Made        uint64 // tables that were made of files
	CacheHits   uint64 // tables that were taken from disk
	CacheErrors uint64 // files of the cache that were damaged or foreign, and were removed
	Finished    uint64 // stacks that were finished in user space
	// Skipped is what of the unwind information of files could not be used, by reason.
	Skipped map[string]uint64
}

// UnwindReader reads the figures of the unwinder.
type UnwindReader interface {
	ReadUnwind() (Unwind, error)
}

type unwindGroup struct {
	reader  UnwindReader
	created time.Time

	tables, rows, memory, limit *prometheus.Desc
	evicted, made, cached       *prometheus.Desc
	refused, finished, skipped  *prometheus.Desc
}

func newUnwindGroup(r UnwindReader, created time.Time) group {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("hostflame_unwind_"+name, help, labels, nil)
	}
	return &unwindGroup{
		reader:  r,
		created: created,
		tables:  desc("tables", "Unwind tables in the kernel, each of 256 KiB of a file."),
		rows:    desc("table_rows", "Rows of the unwind tables in the kernel."),
		memory:  desc("table_memory_bytes", "Kernel memory of the unwind tables."),
		limit:   desc("table_memory_limit_bytes", "Limit of the kernel memory of the unwind tables."),
		evicted: desc("tables_evicted_total", "Unwind tables that made room for others."),
		made:    desc("tables_made_total", "Unwind tables that were made of files."),
		cached:  desc("tables_cached_total", "Unwind tables that were taken from the cache on disk."),
		refused: desc("cache_refused_total", "Files of the cache on disk that were damaged or foreign, and were removed."),
		finished: desc("stacks_finished_total",
			"Stacks that were finished in user space, because a table was not in the kernel yet."),
		skipped: desc("info_skipped_total",
			"Pieces of the unwind information of files that could not be used, by reason.", "reason"),
	}
}

func (g *unwindGroup) describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		g.tables, g.rows, g.memory, g.limit, g.evicted, g.made, g.cached, g.refused, g.finished, g.skipped,
	} {
		ch <- d
	}
}

func (g *unwindGroup) collect(emit func(prometheus.Metric)) error {
	u, err := g.reader.ReadUnwind()
	if err != nil {
		return fmt.Errorf("read unwinder: %w", err)
	}
	b := batch{emit: emit}
	gauge := func(d *prometheus.Desc, v float64) {
		b.add(prometheus.NewConstMetric(d, prometheus.GaugeValue, v))
	}
	gauge(g.tables, float64(u.Tables))
	gauge(g.rows, float64(u.Rows))
	gauge(g.memory, float64(u.Memory))
	gauge(g.limit, float64(u.MemoryLimit))
	b.add(counter(g.evicted, g.created, float64(u.Evicted)))
	b.add(counter(g.made, g.created, float64(u.Made)))
	b.add(counter(g.cached, g.created, float64(u.CacheHits)))
	b.add(counter(g.refused, g.created, float64(u.CacheErrors)))
	b.add(counter(g.finished, g.created, float64(u.Finished)))
	for reason, n := range u.Skipped {
		b.add(counter(g.skipped, g.created, float64(n), reason))
	}
	return b.err()
}
