// SPDX-License-Identifier: Apache-2.0

// Package profiler turns kernel samples into profiles: it drains them, attributes them to
// processes, containers and mappings, merges equal stacks, symbolizes what is left and
// hands out pprof profiles by window and on demand.
package profiler

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/symbolizer"
)

// Source delivers kernel samples. *bpf.CPU is one.
type Source interface {
	// Drain hands every sample that is there to fn. The sample is valid during the call only.
	Drain(fn func(*bpf.Sample)) error
	// Wait returns when draining cannot wait, after d, or when ctx ends.
	Wait(ctx context.Context, d time.Duration) error
}

// Config configures a Profiler.
type Config struct {
	Source     Source
	Symbolizer *symbolizer.Symbolizer
	Window     time.Duration // what is published together; 10 s if zero
	Frequency  int           // requested samples a second and CPU
	Event      string        // what triggers a sample; cpu-clock if empty
	Logger     *slog.Logger  // nothing is logged if nil
	// Losses returns what the kernel side lost, by reason, since it was loaded. May be nil.
	Losses func() map[string]uint64
}

// Profiler makes profiles of one source.
type Profiler struct{}

// New returns a Profiler that does nothing until Run.
func New(cfg Config) (*Profiler, error) { return nil, errors.New("not built yet") }

// Run drains the source and closes windows until ctx ends. Then it drains once more,
// closes the last window, hands it to the subscribers and returns nil. The caller stops
// the source's sampling before it ends ctx.
func (p *Profiler) Run(ctx context.Context) error { return nil }

// Ready tells whether the source has been drained once.
func (p *Profiler) Ready() bool { return false }

// Window is what was sampled between two moments.
type Window struct {
	Start, End time.Time
	Profile    *profile.Profile
	Samples    uint64            // delivered
	Lost       map[string]uint64 // by reason
}

// Newest returns the window that closed last, nil before the first has closed.
func (p *Profiler) Newest() *Window { return nil }

// OnWindow adds a subscriber; call it before Run.
func (p *Profiler) OnWindow(fn func(*Window)) {}

// Filter selects samples: each non-empty field must match, any of its values does.
type Filter struct {
	PIDs       []uint32
	Comms      []string
	Containers []string
}

// Request asks for one profile.
type Request struct {
	Type     string // "cpu"
	Duration time.Duration
	Filter   Filter
}

// Capture profiles the next Duration and returns within Duration + 1 s.
func (p *Profiler) Capture(ctx context.Context, r Request) (*profile.Profile, error) {
	return nil, errors.New("not built yet")
}

// ContainerCPU is the sampled CPU time of a container since the start.
type ContainerCPU struct {
	Container    string
	User, System time.Duration
}

// CPUByContainer returns the sampled CPU time by container.
func (p *Profiler) CPUByContainer() []ContainerCPU { return nil }

// Stats counts since the start.
type Stats struct {
	Samples map[string]uint64            // delivered, by profile
	Lost    map[string]map[string]uint64 // lost in user space, by profile and reason
	Stacks  map[string]map[string]uint64 // by profile and outcome
}

// Stats returns the counters.
func (p *Profiler) Stats() Stats { return Stats{} }
