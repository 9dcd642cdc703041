// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Symbols is what the symbolizer holds and has done.
type Symbols struct {
	Tables        int    // files with symbol tables in memory, and perf maps
	TableMemory   int64  // bytes of them
	TableLimit    int64  // bytes
	TablesEvicted uint64 // to stay within the limit

	IndexesMade    int   // indexes that were made of debug information
	IndexesCached  int   // indexes that were taken from disk
	IndexesFailed  int   // files with debug information of which none could be made
	IndexesWaiting int   // files whose index is being made or waits for it
	UnitsSkipped   int   // units of debug information that were malformed or over a limit
	CacheBytes     int64 // of the cache on disk
	CacheLimit     int64 // bytes; 0: there is no cache
	CacheEvicted   int   // files that made room for others
	CacheRefused   int   // files that were damaged or of another binary, and were removed
}

// SymbolsReader reads the figures of the symbolizer.
type SymbolsReader interface {
	ReadSymbols() Symbols
}

type symbolsGroup struct {
	reader  SymbolsReader
	created time.Time

	tables, memory, limit, evicted  *prometheus.Desc
	made, cached, failed, waiting   *prometheus.Desc
	skipped, cacheBytes, cacheLimit *prometheus.Desc
	cacheEvicted, cacheRefused      *prometheus.Desc
}

func newSymbolsGroup(r SymbolsReader, created time.Time) group {
	desc := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("hostflame_symbols_"+name, help, nil, nil)
	}
	return &symbolsGroup{
		reader:       r,
		created:      created,
		tables:       desc("tables", "Files and perf maps with symbol tables in memory."),
		memory:       desc("table_memory_bytes", "Memory of the symbol tables."),
		limit:        desc("table_memory_limit_bytes", "Limit of the memory of the symbol tables."),
		evicted:      desc("tables_evicted_total", "Symbol tables that made room for others."),
		made:         desc("indexes_made_total", "Indexes that were made of debug information."),
		cached:       desc("indexes_cached_total", "Indexes of debug information that were taken from the cache on disk."),
		failed:       desc("indexes_failed_total", "Files with debug information of which no index could be made."),
		waiting:      desc("indexes_waiting", "Files whose index is being made or waits for it."),
		skipped:      desc("units_skipped_total", "Units of debug information that were malformed or over a limit."),
		cacheBytes:   desc("cache_bytes", "Bytes of the cache on disk."),
		cacheLimit:   desc("cache_limit_bytes", "Limit of the cache on disk."),
		cacheEvicted: desc("cache_evicted_total", "Files of the cache on disk that made room for others."),
		cacheRefused: desc("cache_refused_total", "Files of the cache on disk that were damaged or of another binary, and were removed."),
	}
}

func (g *symbolsGroup) describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		g.tables, g.memory, g.limit, g.evicted, g.made, g.cached, g.failed, g.waiting, g.skipped,
		g.cacheBytes, g.cacheLimit, g.cacheEvicted, g.cacheRefused,
	} {
		ch <- d
	}
}

func (g *symbolsGroup) collect(emit func(prometheus.Metric)) error {
	s := g.reader.ReadSymbols()
	b := batch{emit: emit}
	gauge := func(d *prometheus.Desc, v float64) {
		b.add(prometheus.NewConstMetric(d, prometheus.GaugeValue, v))
	}
	total := func(d *prometheus.Desc, v float64) { b.add(counter(d, g.created, v)) }
	gauge(g.tables, float64(s.Tables))
	gauge(g.memory, float64(s.TableMemory))
	gauge(g.limit, float64(s.TableLimit))
	total(g.evicted, float64(s.TablesEvicted))
	total(g.made, float64(s.IndexesMade))
	total(g.cached, float64(s.IndexesCached))
	total(g.failed, float64(s.IndexesFailed))
	gauge(g.waiting, float64(s.IndexesWaiting))
	total(g.skipped, float64(s.UnitsSkipped))
	if s.CacheLimit > 0 {
		gauge(g.cacheBytes, float64(s.CacheBytes))
		gauge(g.cacheLimit, float64(s.CacheLimit))
		total(g.cacheEvicted, float64(s.CacheEvicted))
		total(g.cacheRefused, float64(s.CacheRefused))
	}
	return b.err()
}
