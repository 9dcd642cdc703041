// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"fmt"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Agent is what the agent knows of its own work since it started. The keys of the maps
// become label values, so they come from fixed sets; an entry with zero is a series that
// exists from the first scrape.
type Agent struct {
	Samples  map[string]uint64            // delivered, by profile type, as bpf.Sample.Due counts them
	Lost     map[string]map[string]uint64 // samples, likewise, by profile type and reason
	Stacks   map[string]map[string]uint64 // walked stacks, one a sample, by profile type and outcome
	Unseen   map[string]map[string]uint64 // events that a histogram lacks, by collector and reason
	Programs []Program
	Maps     []Map
	// Accounting is what was counted divided by what the kernel's own books say, by
	// subsystem. A subsystem is absent until it has been computed.
	Accounting map[string]float64
}

// Program is one BPF program.
type Program struct {
	Name            string
	Runs            uint64
	RecursionMisses uint64 // runs that the kernel left out, because the CPU was in the program already
	// RunTime is what TimedRuns of the runs took; both are zero where the kernel does
	// not tell.
	TimedRuns uint64
	RunTime   time.Duration
}

// Map is one BPF map. Maps of one name are added up.
type Map struct {
	ID     uint32 // the kernel's; 0: several maps
	Name   string
	Memory uint64 // bytes that the kernel accounts
}

// AgentReader reads the agent's own counters.
type AgentReader interface {
	ReadAgent() (Agent, error)
}

type agentGroup struct {
	reader  AgentReader
	created time.Time

	samples, lost, stacks, unseen    *prometheus.Desc
	runs, misses, timedRuns, runTime *prometheus.Desc
	mapMemory, accounting            *prometheus.Desc
}

func newAgentGroup(r AgentReader, created time.Time) group {
	desc := prometheus.NewDesc
	return &agentGroup{
		reader:  r,
		created: created,
		samples: desc("hostflame_samples_total",
			"Samples that were delivered to a profile.", []string{"profile"}, nil),
		lost: desc("hostflame_samples_lost_total",
			"Samples that were due and are in no profile, by reason.", []string{"profile", "reason"}, nil),
		stacks: desc("hostflame_stacks_total",
			"Stacks that were walked, by how the walk ended.", []string{"profile", "outcome"}, nil),
		unseen: desc("hostflame_events_lost_total",
			"Events that the histograms of a collector do not hold, by reason.", []string{"collector", "reason"}, nil),
		runs: desc("hostflame_bpf_program_runs_total",
			"Runs of a BPF program.", []string{"program"}, nil),
		misses: desc("hostflame_bpf_program_recursion_misses_total",
			"Runs of a BPF program that the kernel left out, because the CPU was in that program already.", []string{"program"}, nil),
		timedRuns: desc("hostflame_bpf_program_timed_runs_total",
			"Runs of a BPF program that the kernel timed: the runs that hostflame_bpf_program_run_seconds_total covers.", []string{"program"}, nil),
		runTime: desc("hostflame_bpf_program_run_seconds_total",
			"Time in a BPF program during its timed runs.", []string{"program"}, nil),
		mapMemory: desc("hostflame_bpf_map_memory_bytes",
			"Kernel memory of a BPF map.", []string{"map"}, nil),
		accounting: desc("hostflame_accounting_ratio",
			"What was counted divided by what the kernel's own accounting says.", []string{"subsystem"}, nil),
	}
}

func (g *agentGroup) describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		g.samples, g.lost, g.stacks, g.unseen,
		g.runs, g.misses, g.timedRuns, g.runTime,
		g.mapMemory, g.accounting,
	} {
		ch <- d
	}
}

func (g *agentGroup) collect(emit func(prometheus.Metric)) error {
	a, err := g.reader.ReadAgent()
	if err != nil {
		return fmt.Errorf("read agent: %w", err)
	}
	b := batch{emit: emit}
	for profile, n := range a.Samples {
		b.add(counter(g.samples, g.created, float64(n), profile))
	}
	two := func(desc *prometheus.Desc, counts map[string]map[string]uint64) {
		for first, m := range counts {
			for second, n := range m {
				b.add(counter(desc, g.created, float64(n), first, second))
			}
		}
	}
	two(g.lost, a.Lost)
	two(g.stacks, a.Stacks)
	two(g.unseen, a.Unseen)
	for _, p := range a.Programs {
		b.add(counter(g.runs, g.created, float64(p.Runs), p.Name))
		b.add(counter(g.misses, g.created, float64(p.RecursionMisses), p.Name))
		if p.TimedRuns > 0 {
			b.add(counter(g.timedRuns, g.created, float64(p.TimedRuns), p.Name))
			b.add(counter(g.runTime, g.created, p.RunTime.Seconds(), p.Name))
		}
	}
	for _, m := range mergeMaps(a.Maps) {
		b.add(prometheus.NewConstMetric(g.mapMemory, prometheus.GaugeValue, float64(m.Memory), m.Name))
	}
	for subsystem, ratio := range a.Accounting {
		b.add(prometheus.NewConstMetric(g.accounting, prometheus.GaugeValue, ratio, subsystem))
	}
	return b.err()
}

// mergeMaps adds up maps of one name: each loaded object has its own counters. What two objects
// share is one map.
func mergeMaps(maps []Map) []Map {
	var merged []Map
	seen := map[uint32]bool{}
	for _, m := range maps {
		if m.ID != 0 && seen[m.ID] {
			continue
		}
		seen[m.ID] = true
		i := slices.IndexFunc(merged, func(o Map) bool { return o.Name == m.Name })
		if i < 0 {
			merged = append(merged, m)
			continue
		}
		merged[i].Memory += m.Memory
	}
	return merged
}
