// SPDX-License-Identifier: Apache-2.0

package profiler

import (
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

// symbolize looks up every location of rows once. What is not answered by the deadline is
// left without names; a zero deadline is none. The look-up that is under way then ends
// on its own, and what it read serves later ones.
func symbolize(s *symbolizer.Symbolizer, rows []row, deadline time.Time) (n names, late int) {
	wanted := names{}
	for _, r := range rows {
		for _, l := range r.stack {
			k := l.Mapping.resolver()
			if k == nil {
				continue
			}
			if wanted[k] == nil {
				wanted[k] = map[Addr]symbolizer.Result{}
			}
			wanted[k][l.Addr] = symbolizer.Result{}
		}
	}
	type answer struct {
		resolver any
		addrs    []uint64
		results  []symbolizer.Result
	}
	var jobs []answer
	for k, byAddr := range wanted {
		a := answer{resolver: k, addrs: make([]uint64, 0, len(byAddr))}
		for addr := range byAddr {
			a.addrs = append(a.addrs, uint64(addr))
		}
		jobs = append(jobs, a)
	}
	stop := make(chan struct{})
	defer close(stop)
	answers := make(chan answer, len(jobs))
	go func() {
		for _, a := range jobs {
			select {
			case <-stop:
				return
			default:
			}
			switch r := a.resolver.(type) {
			case *symbolizer.Object:
				a.results = r.Symbolize(a.addrs)
			case *symbolizer.PerfMap:
				a.results = r.Symbolize(a.addrs)
			default:
				a.results = s.Kernel(a.addrs)
			}
			answers <- a
		}
	}()
	var expired <-chan time.Time
	if !deadline.IsZero() {
		t := time.NewTimer(time.Until(deadline))
		defer t.Stop()
		expired = t.C
	}
	for answered := 0; answered < len(jobs); answered++ {
		select {
		case a := <-answers:
			byAddr := wanted[a.resolver]
			for i, addr := range a.addrs {
				byAddr[Addr(addr)] = a.results[i]
			}
		case <-expired:
			return wanted, len(jobs) - answered
		}
	}
	return wanted, 0
}
