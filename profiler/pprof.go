// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/symbolizer"
)

// meta is what a profile says of itself.
type meta struct {
	typ      *Type
	host     string
	start    time.Time
	duration time.Duration
	samples  uint64
	lost     map[string]uint64
	late     int // binaries whose symbols were not ready
}

// comments say where and how the profile was taken, and what is missing.
func (m meta) comments() []string {
	var lost uint64
	for _, n := range m.lost {
		lost += n
	}
	c := []string{"host: " + m.host}
	if m.typ.Describe != nil {
		c = append(c, m.typ.Describe(m.samples, lost))
	}
	c = append(c, fmt.Sprintf("samples: %d delivered, %d lost", m.samples, lost))
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
	b := newBuilder(m.typ, n)
	b.p = &profile.Profile{
		SampleType:    make([]*profile.ValueType, len(m.typ.Values)),
		Sample:        make([]*profile.Sample, len(rows)),
		PeriodType:    m.typ.Period.pprof(),
		Period:        m.typ.Period.Value,
		TimeNanos:     m.start.UnixNano(),
		DurationNanos: int64(m.duration),
		Comments:      m.comments(),
	}
	for i, v := range m.typ.Values {
		b.p.SampleType[i] = v.pprof()
	}
	samples := make([]profile.Sample, len(rows))
	for i, r := range rows {
		b.p.Sample[i] = &samples[i]
		b.sample(&samples[i], r)
	}
	b.mark()
	if err := b.p.CheckValid(); err != nil {
		return nil, fmt.Errorf("make profile: %w", err)
	}
	return b.p, nil
}

func (v ValueType) pprof() *profile.ValueType {
	return &profile.ValueType{Type: v.Name, Unit: v.Unit}
}

type mappingKey struct {
	start, limit, offset uint64
	file, buildID        string
	perfMap              *symbolizer.PerfMap // code that two processes made is not the same at the same address
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

// builder makes what the samples of a profile share, each once.
type builder struct {
	p         *profile.Profile
	typ       *Type
	names     names
	files     map[*Mapping]*profile.Mapping // of one file or perf map each
	mappings  map[mappingKey]*profile.Mapping
	locations map[Location]*profile.Location // by what was asked, to ask once
	merged    map[locationKey]*profile.Location
	functions map[functionKey]*profile.Function

	// Cut into pieces, as a profile is mostly small slices of known size.
	stacks slab[*profile.Location]
	values slab[int64]
	labels slab[string]
	lines  slab[profile.Line]
	store  slab[profile.Location]
}

func newBuilder(t *Type, n names) *builder {
	asked := 0
	for _, byAddr := range n {
		asked += len(byAddr)
	}
	return &builder{
		typ:       t,
		names:     n,
		files:     map[*Mapping]*profile.Mapping{},
		mappings:  map[mappingKey]*profile.Mapping{},
		locations: make(map[Location]*profile.Location, 2*asked),
		merged:    make(map[locationKey]*profile.Location, asked),
		functions: make(map[functionKey]*profile.Function, asked/2),
	}
}

// slab hands out slices of one large array after the other.
type slab[T any] []T

func (s *slab[T]) take(n int) []T {
	if len(*s) < n {
		*s = make([]T, max(n, 1024))
	}
	piece := (*s)[:n:n]
	*s = (*s)[n:]
	return piece
}

func (b *builder) sample(s *profile.Sample, r row) {
	stack := r.stack
	if b.typ.Hooked {
		stack = stack[b.hookFrames(stack):]
	}
	if b.typ.waited(&r) {
		stack = stack[b.schedulerFrames(stack):]
	}
	s.Location = b.stacks.take(len(stack))
	for i, l := range stack {
		s.Location[i] = b.location(l)
	}
	s.Value = b.values.take(len(b.typ.Values))
	for i := range s.Value {
		s.Value[i] = int64(r.values[i])
	}
	s.Label = map[string][]string{"comm": b.label(r.comm), "thread": b.label(r.thread), "container": b.label(r.container)}
	for i, l := range b.typ.Labels {
		s.Label[l.Name] = b.label(r.labels[i])
	}
	if r.pid == 0 {
		return
	}
	s.NumLabel = map[string][]int64{"pid": b.number(int64(r.pid)), "tid": b.number(int64(r.tid))}
	if len(b.typ.Numbers) > 0 {
		s.NumUnit = make(map[string][]string, len(b.typ.Numbers))
	}
	for i, n := range b.typ.Numbers {
		s.NumLabel[n.Name] = b.number(int64(r.numbers[i] / r.count))
		s.NumUnit[n.Name] = b.label(n.Unit)
	}
}

// hookFrames is how many of the first frames of a stack are those of a BPF program in a
// tracepoint, and of what calls it: the outermost is one that only tracepoints have.
func (b *builder) hookFrames(stack Stack) int {
	const most = 8
	for i := min(most, len(stack)) - 1; i >= 0; i-- {
		if !stack[i].Mapping.kernel {
			continue
		}
		for _, line := range b.names.of(stack[i]).Lines {
			for _, prefix := range []string{"bpf_trace_run", "__bpf_trace_", "__traceiter_"} {
				if strings.HasPrefix(line.Function, prefix) {
					return i + 1
				}
			}
		}
	}
	return 0
}

// waited tells whether the samples of r are of a thread that gave its CPU away: those end in
// the scheduler. Where a type has CPU time as well, only its states tell.
func (t *Type) waited(r *row) bool {
	if !t.takes(bpf.ProfileCPU) {
		return slices.ContainsFunc(t.Samples, func(p bpf.Profile) bool {
			return p == bpf.ProfileRunqueue || p == bpf.ProfileCulprit || p == bpf.ProfileOffCPU
		})
	}
	i := slices.IndexFunc(t.Labels, func(l Label) bool { return l.Name == stateLabel })
	return i >= 0 && r.labels[i] != stateCPU
}

// schedulerFunctions are what a thread that gives its CPU away goes through at last, whatever
// it waits for. With a * at the end: those that begin so.
var schedulerFunctions = []string{
	"finish_task_switch", "__schedule", "schedule", "schedule_preempt_disabled", "schedule_rtlock", "schedule_timeout*",
	"schedule_hrtimeout*", "io_schedule*", "preempt_schedule*", "do_nanosleep",
}

// schedulerFrames is how many of the first frames of a stack only say that the thread gave its
// CPU away. A thread that is sampled as it stays blocked has none of them, as the kernel leaves
// them out of what it tells of threads that do not run: without them a wait has one stack.
func (b *builder) schedulerFrames(stack Stack) int {
	for i, l := range stack {
		name := ""
		if lines := b.names.of(l).Lines; l.Mapping.kernel && len(lines) > 0 {
			name, _, _ = strings.Cut(lines[len(lines)-1].Function, ".") // the others are inlined
		}
		if !fits(name, schedulerFunctions) {
			return i
		}
	}
	return 0
}

func (b *builder) number(v int64) []int64 {
	l := b.values.take(1)
	l[0] = v
	return l
}

func (b *builder) label(v string) []string {
	l := b.labels.take(1)
	l[0] = v
	return l
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
	mapping := b.mappingOf(m, result)
	lk := locationKey{mapping: mapping, addr: l.Addr}
	if loc := b.merged[lk]; loc != nil {
		return loc
	}
	lines := b.lines.take(len(result.Lines))
	for i, line := range result.Lines {
		fk := functionKey{line.Function, line.SystemName, line.File, line.StartLine}
		lines[i] = profile.Line{Function: b.function(fk), Line: line.Line}
	}
	loc := b.newLocation(mapping, l.Addr, lines)
	b.merged[lk] = loc
	return loc
}

func (b *builder) newLocation(m *profile.Mapping, addr Addr, lines []profile.Line) *profile.Location {
	loc := &b.store.take(1)[0]
	*loc = profile.Location{ID: uint64(len(b.p.Location) + 1), Mapping: m, Address: uint64(addr), Line: lines}
	b.p.Location = append(b.p.Location, loc)
	return loc
}

// mappingOf is the one mapping for all that equal m. Which of the kernel's it is, the
// kernel itself or a module, comes with the result of the look-up.
func (b *builder) mappingOf(m *Mapping, result symbolizer.Result) *profile.Mapping {
	k := mappingKey{start: m.Start, limit: m.Limit, offset: m.Offset, file: m.File, buildID: m.BuildID, perfMap: m.perfMap}
	if m.kernel {
		if result.Module != "" {
			k.file = result.Module
		}
		return b.mapping(k)
	}
	if b.files[m] == nil {
		b.files[m] = b.mapping(k)
	}
	return b.files[m]
}

// mark says of each mapping what is known of all its locations, so that a reader who has
// the file can still look the others up, and need not where all is there.
func (b *builder) mark() {
	lines := map[*profile.Mapping]bool{}
	for _, l := range b.p.Location {
		m := l.Mapping
		if m == nil {
			continue
		}
		if len(l.Line) == 0 {
			m.HasFunctions = false
		}
		known := len(l.Line) > 0 && l.Line[0].Line > 0 && l.Line[0].Function.Filename != ""
		if all, seen := lines[m]; !seen || all {
			lines[m] = known
		}
	}
	for m, all := range lines {
		m.HasFilenames, m.HasLineNumbers, m.HasInlineFrames = all, all, all
	}
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
