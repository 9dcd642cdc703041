// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"sync"
	"time"

	"github.com/hostflame/hostflame/bpf"
)

// ContainerCPU is the sampled CPU time of a container since the profiler started.
type ContainerCPU struct {
	Container    string
	User, System time.Duration
}

// idleAfter is how long a container must not have been sampled before another one may
// take its place.
const idleAfter = 10 * time.Minute

// cpuTimes sums CPU time by container, for a bounded number of them. The rest is summed
// under "~other". Each sum only grows; that of a container that was idle for long can
// vanish, and starts from zero should the container come back.
type cpuTimes struct {
	limit int
	now   func() time.Time

	mu     sync.Mutex
	byName map[string]*cpuTime
}

type cpuTime struct {
	user, system uint64 // ns
	last         time.Time
}

func newCPUTimes(limit int) *cpuTimes {
	// They exist, at zero, from the start.
	return &cpuTimes{limit: limit, now: time.Now, byName: map[string]*cpuTime{rootName: {}, otherName: {}}}
}

func (c *cpuTimes) add(container string, s *bpf.Sample) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.byName[container]
	now := c.now()
	if t == nil {
		t = c.place(container, now)
	}
	t.last = now
	if s.UserMode {
		t.user += s.Value
	} else {
		t.system += s.Value
	}
}

// place makes room for a container, or returns where those without room go.
func (c *cpuTimes) place(container string, now time.Time) *cpuTime {
	if len(c.byName) >= c.limit {
		idlest := ""
		for name, t := range c.byName {
			if name != rootName && name != otherName && (idlest == "" || t.last.Before(c.byName[idlest].last)) {
				idlest = name
			}
		}
		if idlest == "" || now.Sub(c.byName[idlest].last) < idleAfter {
			return c.byName[otherName]
		}
		delete(c.byName, idlest)
	}
	t := new(cpuTime)
	c.byName[container] = t
	return t
}

func (c *cpuTimes) list() []ContainerCPU {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]ContainerCPU, 0, len(c.byName))
	for name, t := range c.byName {
		list = append(list, ContainerCPU{name, time.Duration(t.user), time.Duration(t.system)})
	}
	return list
}
