// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

const (
	// maxCulprits bounds how many containers SchedContainer.DelayedBy names.
	maxCulprits = 32
	// culpritFade is by what part of it the lead of a culprit fades in each slotRivalry: it
	// is that of the last minute or so.
	culpritFade = 8
)

// culprits divides the time that a container waited for others up by these. Those that it
// waits for the most have series of their own. A series counts only while its culprit is
// one of them, and the rest counts what is in none then: so neither ever falls, and all of
// them together grow by what was waited.
type culprits struct {
	all     map[string]*culprit
	named   int
	rest    uint64
	rivalry time.Time
}

type culprit struct {
	named  bool
	series uint64
	lately uint64
}

func newCulprits() culprits { return culprits{all: map[string]*culprit{}, rivalry: time.Now()} }

// add counts ns that were waited for a culprit.
func (c *culprits) add(by string, ns uint64) {
	if by == "" || by == OtherContainers {
		c.rest += ns
		return
	}
	p := c.all[by]
	if p == nil {
		p = &culprit{named: c.named < maxCulprits}
		if p.named {
			c.named++
		}
		c.all[by] = p
	}
	p.lately += ns
	if p.named {
		p.series += ns
	} else {
		c.rest += ns
	}
}

// rival gives the series of culprits to those that have been waited for more than twice as
// long lately, and those that are left over to whom there is. To be called now and then.
func (c *culprits) rival(now time.Time) {
	if now.Sub(c.rivalry) < slotRivalry {
		return
	}
	c.rivalry = now
	var with, without []*culprit
	for _, p := range c.all {
		if p.named {
			with = append(with, p)
		} else {
			without = append(without, p)
		}
	}
	slices.SortFunc(with, func(a, b *culprit) int { return cmp.Compare(a.lately, b.lately) })
	slices.SortFunc(without, func(a, b *culprit) int { return cmp.Compare(b.lately, a.lately) })
	for _, p := range without {
		if c.named == maxCulprits {
			if len(with) == 0 || with[0].lately >= p.lately/2 {
				break
			}
			with[0].named = false
			with = with[1:]
			c.named--
		}
		p.named = true
		c.named++
	}
	for _, p := range c.all {
		p.lately -= p.lately / culpritFade
	}
}

// forget drops the culprits that are gone, and their series.
func (c *culprits) forget(gone func(name string) bool) {
	maps.DeleteFunc(c.all, func(name string, p *culprit) bool {
		if gone(name) && p.named {
			c.named--
		}
		return gone(name)
	})
}

// series are those that there are now, and the rest.
func (c *culprits) series() map[string]uint64 {
	all := map[string]uint64{}
	if c.rest > 0 {
		all[OtherContainers] = c.rest
	}
	for name, p := range c.all {
		if p.named {
			all[name] = p.series
		}
	}
	return all
}
