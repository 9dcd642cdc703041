// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"maps"
	"sync/atomic"
	"time"

	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/exporter"
	"github.com/hostflame/hostflame/internal/histogram"
	"github.com/hostflame/hostflame/profiler"
	"github.com/hostflame/hostflame/symbolizer"
)

// The exporter knows no BPF and declares what it reads; here bpf's and the profiler's
// counters become that.

// readers hands every group of the exporter its reader. A part that could not be attached
// reads as its error, so that its absence shows in the metrics.
func readers(k *kernel, p *profiler.Profiler, s *symbolizer.Symbolizer, a *accounting) exporter.Readers {
	r := exporter.Readers{
		Runqueue: runqueueReader{k.sched, k.schedErr, k.cpu},
		Block:    blockReader{k.block, k.bio, k.blockErr},
		Agent:    agentReader{k, p, a},
	}
	if p != nil {
		r.CPU, r.Symbols, r.Unwind = p, symbolsReader{s}, unwindReader{p}
	}
	return r
}

type runqueueReader struct {
	sched *bpf.Sched
	err   error
	cpu   *bpf.CPU // nil where it does not work
}

func (r runqueueReader) ReadRunqueue() (exporter.Runqueue, error) {
	if r.err != nil {
		return exporter.Runqueue{}, r.err
	}
	host, containers, err := r.sched.Read()
	if err != nil {
		return exporter.Runqueue{}, err
	}
	q := exporter.Runqueue{Latency: host.Latency, Blocked: blocked(host), KernelDelayNanos: host.RunDelayNanos}
	if r.cpu != nil {
		if q.Length, err = r.cpu.RunQueueLengths(); err != nil {
			return exporter.Runqueue{}, err
		}
	}
	for _, c := range containers {
		q.Containers = append(q.Containers, runqueueContainer(c))
	}
	return q, nil
}

func runqueueContainer(c bpf.SchedContainer) exporter.RunqueueContainer {
	r := exporter.RunqueueContainer{
		Container: c.Name, Since: c.Since, Latency: c.Latency, Blocked: blocked(c.SchedCells),
		DelayNanos: map[string]uint64{}, Preemptions: map[string]uint64{}, DelayedByNanos: c.DelayedBy,
	}
	for cause, ns := range c.DelayNanos {
		r.DelayNanos[bpf.Cause(cause).String()] = ns
	}
	for by, n := range c.Preempted {
		r.Preemptions[bpf.Preemptor(by).String()] = n
	}
	return r
}

// blocked are the times of the label `state`.
func blocked(c bpf.SchedCells) map[string]histogram.Snapshot {
	return map[string]histogram.Snapshot{"block_io": c.BlockedIO, "other": c.Blocked}
}

// errorsByClass are the counts of the label `class`.
func errorsByClass(errors [bpf.BlockErrors]uint64) map[string]uint64 {
	byClass := make(map[string]uint64, len(errors))
	for class, n := range errors {
		byClass[bpf.BlockError(class).String()] = n
	}
	return byClass
}

type blockReader struct {
	block *bpf.Block
	bio   *bpf.BlockBio // nil where it does not work
	err   error
}

func (r blockReader) ReadBlock() ([]exporter.Block, error) {
	if r.err != nil {
		return nil, r.err
	}
	cells, err := r.block.Read()
	if err != nil {
		return nil, err
	}
	list := make([]exporter.Block, len(cells))
	for i, c := range cells {
		list[i] = exporter.Block{
			Device: c.Device, Operation: c.Operation,
			Total: c.Total, Queue: c.Queue, DeviceTime: c.DeviceTime, Size: c.Size, Depth: c.Depth,
			Errors:  errorsByClass(c.Errors),
			Flagged: map[string]uint64{"sync": c.Sync, "readahead": c.Readahead, "metadata": c.Metadata},
			Merges:  c.Merges, Requeues: c.Requeues, Splits: c.Splits,
		}
	}
	return list, nil
}

func (r blockReader) ReadBlockContainers() ([]exporter.BlockContainer, error) {
	if r.err != nil {
		return nil, r.err
	}
	containers, err := r.block.Containers()
	if err != nil {
		return nil, err
	}
	list := make([]exporter.BlockContainer, len(containers))
	for i, c := range containers {
		list[i] = exporter.BlockContainer{
			Container: c.Name, Since: c.Since, Operations: map[string]exporter.BlockContainerIO{},
			Attributed: map[string]uint64{"cgroup": c.Charged, "submitter": c.Requests - c.Charged},
		}
		for _, o := range c.Operations {
			list[i].Operations[o.Operation] = exporter.BlockContainerIO{Total: o.Total, Queue: o.Queue, DeviceTime: o.DeviceTime, Size: o.Size}
		}
	}
	return list, nil
}

func (r blockReader) ReadBlockBios() ([]exporter.BlockBio, error) {
	if r.bio == nil {
		return nil, r.err
	}
	cells, err := r.bio.Read()
	if err != nil {
		return nil, err
	}
	list := make([]exporter.BlockBio, len(cells))
	for i, c := range cells {
		list[i] = exporter.BlockBio{
			Device: c.Device, Operation: c.Operation, Total: c.Total, Size: c.Size, Errors: errorsByClass(c.Errors),
		}
	}
	return list, nil
}

func (r blockReader) ReadInFlight() (map[string]int, error) {
	if r.err != nil {
		return nil, r.err
	}
	return r.block.InFlight()
}

type unwindReader struct{ profiler *profiler.Profiler }

func (r unwindReader) ReadUnwind() (exporter.Unwind, error) {
	s := r.profiler.Stats().Unwind
	return exporter.Unwind{
		Tables: s.Kernel.Tables, Rows: s.Kernel.Rows, Memory: s.Kernel.Memory, MemoryLimit: s.Kernel.Limit,
		Evicted: s.Kernel.Evicted, Made: s.Made, CacheHits: s.Cache.Hits, CacheErrors: s.Cache.Refused,
		Finished: s.Finished, Skipped: s.Skipped,
	}, nil
}

type symbolsReader struct{ symbolizer *symbolizer.Symbolizer }

func (r symbolsReader) ReadSymbols() exporter.Symbols {
	s := r.symbolizer.Stats()
	return exporter.Symbols{
		Tables: s.Tables, TableMemory: s.TableBytes, TableLimit: s.TableLimit, TablesEvicted: s.Evictions,
		IndexesMade: s.Index.Built, IndexesCached: s.Index.Loaded, IndexesFailed: s.Index.Failed,
		IndexesWaiting: s.Index.Waiting, UnitsSkipped: s.Index.Broken,
		CacheBytes: s.Index.CacheBytes, CacheLimit: s.Index.CacheLimit,
		CacheEvicted: s.Index.Evicted, CacheRefused: s.Index.Refused,
	}
}

type agentReader struct {
	kernel     *kernel
	profiler   *profiler.Profiler
	accounting *accounting
}

func (r agentReader) ReadAgent() (exporter.Agent, error) {
	a := exporter.Agent{
		Lost:       map[string]map[string]uint64{},
		Unseen:     map[string]map[string]uint64{},
		Accounting: r.accounting.ratios(),
	}
	if r.profiler != nil {
		s := r.profiler.Stats()
		a.Samples, a.Stacks = s.Samples, s.Stacks
		for profile, reasons := range s.Lost {
			a.Lost[profile] = maps.Clone(reasons)
		}
	}
	if m := r.kernel.mappings; m != nil {
		a.Unseen["mappings"] = map[string]uint64{}
		for reason, n := range m.Stats().Lost {
			a.Unseen["mappings"][string(reason)] = n
		}
	}
	if b := r.kernel.block; b != nil && b.HasStacks() {
		lost, err := b.StackLosses()
		if err != nil {
			return a, err
		}
		into := a.Lost["blockio"]
		if into == nil {
			into = map[string]uint64{}
			a.Lost["blockio"] = into
		}
		for reason, n := range lost {
			into[reason.String()] += n
		}
	}
	for _, o := range r.kernel.objects() {
		s, err := o.stats()
		if err != nil {
			return a, err
		}
		into := a.Unseen
		if o.profile {
			into = a.Lost
		}
		if into[o.name] == nil {
			into[o.name] = map[string]uint64{}
		}
		for reason, n := range s.Dropped {
			into[o.name][reason.String()] += n
		}
		for _, p := range s.Programs {
			a.Programs = append(a.Programs, exporter.Program{
				Name: p.Name, Runs: p.Runs, RecursionMisses: p.RecursionMisses,
				TimedRuns: p.StatsRuns, RunTime: p.RunTime,
			})
		}
		for _, m := range s.Maps {
			a.Maps = append(a.Maps, exporter.Map(m))
		}
	}
	return a, nil
}

// counted is one object's counters. What it drops is a sample of the profile of that
// name, or an event of the collector of that name.
type counted struct {
	name    string
	profile bool
	stats   func() (bpf.Stats, error)
}

func (k *kernel) objects() []counted {
	var list []counted
	if k.cpu != nil {
		list = append(list, counted{"cpu", true, k.cpu.Stats})
	}
	if k.sched != nil {
		list = append(list, counted{"runqueue", false, k.sched.Stats})
	}
	if k.waits != nil {
		list = append(list, counted{"waits", true, k.waits.Stats}) // runqueue and offcpu share their rings
	}
	if k.block != nil {
		list = append(list, counted{"block", false, k.block.Stats})
	}
	if k.bio != nil {
		list = append(list, counted{"block", false, k.bio.Stats})
	}
	return list
}

// pulse is a profiler.Source that knows when it was last drained.
type pulse struct {
	profiler.Source
	drained atomic.Int64 // Unix ns
}

func newPulse(s profiler.Source) *pulse {
	p := &pulse{Source: s}
	p.drained.Store(time.Now().UnixNano())
	return p
}

func (p *pulse) Drain(fn func(*bpf.Sample)) error {
	err := p.Source.Drain(fn)
	p.drained.Store(time.Now().UnixNano())
	return err
}

// alive tells whether the drain loop runs: it drains every second.
func (p *pulse) alive() bool {
	return time.Since(time.Unix(0, p.drained.Load())) < 10*time.Second
}

// noProfiles is what answers for profiles where CPU sampling does not work.
type noProfiles struct{ err error }

func (n noProfiles) Capture(context.Context, profiler.Request) (*profile.Profile, error) {
	return nil, n.err
}

func (noProfiles) Newest() *profiler.Window { return nil }

// Ready: nothing more will come.
func (noProfiles) Ready() bool { return true }
