// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"slices"
	"sync"
	"time"

	"github.com/hostflame/hostflame/symbolizer"
)

// names are the results for the locations of some rows.
type names map[any]map[Addr]symbolizer.Result

// of returns the result for l; it has no lines where there was nothing that could know.
func (n names) of(l Location) symbolizer.Result { return n[l.Mapping.resolver()][l.Addr] }

// resolver is what knows the names of a mapping's addresses: the same value for all
// mappings that ask the same. nil if nothing does.
func (m *Mapping) resolver() any {
	switch {
	case m.kernel:
		return kernelMapping
	case m.object != nil:
		return m.object
	case m.perfMap != nil:
		return m.perfMap
	}
	return nil
}

// symbols looks up names, and keeps those that can not change: what a version of a file
// calls an address. It may be used from any goroutine.
type symbols struct {
	symbolizer   *symbolizer.Symbolizer
	kernelLoaded bool // of the goroutine that calls warm

	mu         sync.Mutex
	young, old map[symbolKey]symbolizer.Result // old is dropped when young is full
}

type symbolKey struct {
	object *symbolizer.Object
	addr   uint64
}

// maxCachedSymbols bounds each of the two generations of results; some 200 bytes each.
const maxCachedSymbols = 8 << 10

// maxLookups is how many resolvers are asked at once, so that a big table which is read for
// the first time does not hold up the others.
const maxLookups = 3

func newSymbols(s *symbolizer.Symbolizer) *symbols {
	return &symbols{symbolizer: s, young: map[symbolKey]symbolizer.Result{}}
}

// jitCode is where JIT code was. Other code can come to its place: an address is called what
// was there when the last of its samples was taken.
type jitCode struct {
	perfMap *symbolizer.PerfMap
	addr    uint64
}

// job is the question to one resolver, and its answer.
type job struct {
	resolver any
	addrs    []uint64
	at       []uint64 // when, boot clock, ns; of JIT code
	results  []symbolizer.Result
}

// lookup looks up every location of rows once. What is not answered by the deadline is
// left without names, and late says how many resolvers that concerns; a zero deadline is
// none. The look-ups that are under way then end on their own, and serve later ones.
func (s *symbols) lookup(rows []row, deadline time.Time) (found names, late int) {
	found = names{}
	last := map[jitCode]uint64{}
	for _, r := range rows {
		for _, l := range r.stack {
			k := l.Mapping.resolver()
			if k == nil {
				continue
			}
			if found[k] == nil {
				found[k] = map[Addr]symbolizer.Result{}
			}
			found[k][l.Addr] = symbolizer.Result{}
			if m, ok := k.(*symbolizer.PerfMap); ok {
				c := jitCode{m, uint64(l.Addr)}
				last[c] = max(last[c], r.last)
			}
		}
	}
	jobs := s.remembered(found)
	for _, j := range jobs {
		if m, ok := j.resolver.(*symbolizer.PerfMap); ok {
			for _, addr := range j.addrs {
				j.at = append(j.at, last[jitCode{m, addr}])
			}
		}
	}
	answers := make(chan *job, len(jobs))
	work := make(chan *job, len(jobs))
	for _, j := range jobs {
		work <- j
	}
	close(work)
	stop := make(chan struct{})
	defer close(stop)
	for range min(maxLookups, len(jobs)) {
		go func() {
			for j := range work {
				select {
				case <-stop:
					return
				default:
				}
				s.ask(j)
				answers <- j
			}
		}()
	}
	var expired <-chan time.Time
	if !deadline.IsZero() {
		t := time.NewTimer(time.Until(deadline))
		defer t.Stop()
		expired = t.C
	}
	for answered := range jobs {
		select {
		case j := <-answers:
			byAddr := found[j.resolver]
			for i, addr := range j.addrs {
				byAddr[Addr(addr)] = j.results[i]
			}
		case <-expired:
			return found, len(jobs) - answered
		}
	}
	return found, 0
}

// remembered fills in what is kept and returns what is left to ask.
func (s *symbols) remembered(found names) []*job {
	s.mu.Lock()
	defer s.mu.Unlock()
	var jobs []*job
	for k, byAddr := range found {
		j := &job{resolver: k}
		object, _ := k.(*symbolizer.Object)
		for addr := range byAddr {
			if object != nil {
				if r, ok := s.get(symbolKey{object, uint64(addr)}); ok {
					byAddr[addr] = r
					continue
				}
			}
			j.addrs = append(j.addrs, uint64(addr))
		}
		if len(j.addrs) > 0 {
			slices.Sort(j.addrs) // what is near is read at once
			jobs = append(jobs, j)
		}
	}
	return jobs
}

// warm looks up what is not known of some stacks, to have it when a profile needs it: reading
// a symbol table for the first time can take longer than a profile may wait, and the perf
// map of a process can be gone by then.
func (s *symbols) warm(stacks []Stack) {
	wanted := names{}
	s.mu.Lock()
	for _, stack := range stacks {
		for _, l := range stack {
			k := l.Mapping.resolver()
			if k == nil || k == kernelMapping && s.kernelLoaded {
				continue
			}
			if object := l.Mapping.object; object != nil {
				if _, ok := s.get(symbolKey{object, uint64(l.Addr)}); ok {
					continue
				}
			}
			if wanted[k] == nil {
				wanted[k] = map[Addr]symbolizer.Result{}
			}
			wanted[k][l.Addr] = symbolizer.Result{}
		}
	}
	s.mu.Unlock()
	for _, j := range s.remembered(wanted) {
		s.ask(j)
		s.kernelLoaded = s.kernelLoaded || j.resolver == kernelMapping
	}
}

func (s *symbols) ask(j *job) {
	switch r := j.resolver.(type) {
	case *symbolizer.Object:
		j.results = r.Symbolize(j.addrs)
		s.remember(r, j)
	case *symbolizer.PerfMap:
		j.results = r.SymbolizeAt(j.addrs, j.at)
	default:
		j.results = s.symbolizer.Kernel(j.addrs)
	}
}

func (s *symbols) remember(o *symbolizer.Object, j *job) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, r := range j.results {
		// Other reasons can pass, and lines can follow.
		if r.Provisional {
			continue
		}
		if r.Reason == "" || r.Reason == symbolizer.ReasonNotFound || r.Reason == symbolizer.ReasonNoSymbols {
			s.put(symbolKey{o, j.addrs[i]}, r)
		}
	}
}

func (s *symbols) get(k symbolKey) (symbolizer.Result, bool) {
	if r, ok := s.young[k]; ok {
		return r, true
	}
	r, ok := s.old[k]
	if ok {
		s.put(k, r)
	}
	return r, ok
}

func (s *symbols) put(k symbolKey, r symbolizer.Result) {
	if len(s.young) >= maxCachedSymbols {
		s.old, s.young = s.young, make(map[symbolKey]symbolizer.Result, maxCachedSymbols)
	}
	s.young[k] = r
}
