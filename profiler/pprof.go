// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/pprof/profile"
)

// meta is what a profile says of itself.
type meta struct {
	host      string
	event     string
	frequency int
	start     time.Time
	duration  time.Duration
	samples   uint64
	lost      map[string]uint64
	late      int // binaries whose symbols were not ready
}

// period is the CPU time between two samples, as it was set.
func (m meta) period() time.Duration { return time.Second / time.Duration(m.frequency) }

// comments say where and how the profile was taken, and what is missing.
func (m meta) comments() []string {
	var lost uint64
	for _, n := range m.lost {
		lost += n
	}
	rate := 0.0
	if m.samples > 0 {
		rate = float64(m.samples) / float64(m.samples+lost) * float64(time.Second) / float64(m.period())
	}
	c := []string{
		"host: " + m.host,
		fmt.Sprintf("event: %s, %d Hz requested, %.2f Hz delivered", m.event, m.frequency, rate),
		fmt.Sprintf("samples: %d delivered, %d lost", m.samples, lost),
	}
	for _, reason := range slices.Sorted(maps.Keys(m.lost)) {
		if n := m.lost[reason]; n > 0 {
			c = append(c, fmt.Sprintf("lost: %s %d", reason, n))
		}
	}
	if m.late > 0 {
		c = append(c, fmt.Sprintf("symbols: %d binaries were not read in time, their frames have addresses only", m.late))
	}
	return c
}

// buildProfile makes the pprof profile of rows.
func buildProfile(rows []row, n names, m meta) (*profile.Profile, error) {
	b := builder{
		names:     n,
		mappings:  map[mappingKey]*profile.Mapping{},
		locations: map[Location]*profile.Location{},
		merged:    map[locationKey]*profile.Location{},
		functions: map[functionKey]*profile.Function{},
	}
	b.p = &profile.Profile{
		SampleType:    []*profile.ValueType{{Type: "samples", Unit: "count"}, {Type: "cpu", Unit: "nanoseconds"}},
		PeriodType:    &profile.ValueType{Type: "cpu", Unit: "nanoseconds"},
		Period:        int64(m.period()),
		TimeNanos:     m.start.UnixNano(),
		DurationNanos: int64(m.duration),
		Comments:      m.comments(),
	}
	for _, r := range rows {
		s := &profile.Sample{
			Location: make([]*profile.Location, 0, len(r.stack)),
			Value:    []int64{int64(r.count), int64(r.value)},
			Label:    map[string][]string{"comm": {r.comm}, "thread": {r.thread}, "container": {r.container}},
		}
		if r.pid != 0 {
			s.NumLabel = map[string][]int64{"pid": {int64(r.pid)}, "tid": {int64(r.tid)}}
		}
		for _, l := range r.stack {
			s.Location = append(s.Location, b.location(l))
		}
		b.p.Sample = append(b.p.Sample, s)
	}
	for _, l := range b.p.Location {
		if l.Mapping != nil && len(l.Line) == 0 {
			// So that a reader who has the file can still look these up.
			l.Mapping.HasFunctions = false
		}
	}
	if err := b.p.CheckValid(); err != nil {
		return nil, fmt.Errorf("make profile: %w", err)
	}
	return b.p, nil
}

type mappingKey struct {
	start, limit, offset uint64
	file, buildID        string
	resolver             any // code that two processes made is not the same at the same address
}

type locationKey struct {
	mapping *profile.Mapping
	addr    Addr
	note    string
}

type functionKey struct {
	name, systemName, file string
	startLine              int64
}

type builder struct {
	p         *profile.Profile
	names     names
	mappings  map[mappingKey]*profile.Mapping
	locations map[Location]*profile.Location // by what was asked, to ask once
	merged    map[locationKey]*profile.Location
	functions map[functionKey]*profile.Function
}

func (b *builder) location(l Location) *profile.Location {
	if loc := b.locations[l]; loc != nil {
		return loc
	}
	loc := b.merge(l)
	b.locations[l] = loc
	return loc
}

// merge makes a location, one for all mappings that are equal.
func (b *builder) merge(l Location) *profile.Location {
	m := l.Mapping
	if m.note != "" {
		// One location for all addresses that are in no mapping: nothing more is known of
		// any of them, and they would not compare between processes.
		k := locationKey{note: m.note}
		if b.merged[k] == nil {
			b.merged[k] = b.newLocation(nil, 0, []profile.Line{{Function: b.function(functionKey{name: m.note, systemName: m.note})}})
		}
		return b.merged[k]
	}
	result := b.names.of(l)
	k := mappingKey{start: m.Start, limit: m.Limit, offset: m.Offset, file: m.File, buildID: m.BuildID}
	if m.perfMap != nil {
		k.resolver = m.perfMap
	}
	if m.kernel && len(result.Lines) > 0 && result.Lines[0].File != "" {
		k.file = result.Lines[0].File
	}
	mapping := b.mapping(k)
	lk := locationKey{mapping: mapping, addr: l.Addr}
	if loc := b.merged[lk]; loc != nil {
		return loc
	}
	var lines []profile.Line
	for _, line := range result.Lines {
		fk := functionKey{line.Function, line.SystemName, line.File, line.StartLine}
		if m.kernel {
			fk.file = "" // the mapping has it
		}
		lines = append(lines, profile.Line{Function: b.function(fk), Line: line.Line})
	}
	loc := b.newLocation(mapping, l.Addr, lines)
	b.merged[lk] = loc
	return loc
}

func (b *builder) newLocation(m *profile.Mapping, addr Addr, lines []profile.Line) *profile.Location {
	loc := &profile.Location{ID: uint64(len(b.p.Location) + 1), Mapping: m, Address: uint64(addr), Line: lines}
	b.p.Location = append(b.p.Location, loc)
	return loc
}

func (b *builder) mapping(k mappingKey) *profile.Mapping {
	m := b.mappings[k]
	if m == nil {
		m = &profile.Mapping{
			ID: uint64(len(b.p.Mapping) + 1), Start: k.start, Limit: k.limit, Offset: k.offset,
			File: k.file, BuildID: k.buildID, HasFunctions: true,
		}
		b.p.Mapping = append(b.p.Mapping, m)
		b.mappings[k] = m
	}
	return m
}

func (b *builder) function(k functionKey) *profile.Function {
	f := b.functions[k]
	if f == nil {
		f = &profile.Function{
			ID: uint64(len(b.p.Function) + 1), Name: k.name, SystemName: k.systemName,
			Filename: k.file, StartLine: k.startLine,
		}
		b.p.Function = append(b.p.Function, f)
		b.functions[k] = f
	}
	return f
}
