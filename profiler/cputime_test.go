// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"fmt"
	"testing"
	"time"

	"github.com/hostflame/hostflame/bpf"
)

func TestCPUTimes(t *testing.T) {
	c := newCPUTimes(4)
	clock := time.Unix(1000, 0)
	c.now = func() time.Time { return clock }
	of := func(name string) ContainerCPU {
		for _, x := range c.list() {
			if x.Container == name {
				return x
			}
		}
		return ContainerCPU{Container: "not there"}
	}
	user, system := &bpf.Sample{UserMode: true, Value: 10}, &bpf.Sample{Value: 1}
	if got := of("/"); got != (ContainerCPU{Container: "/"}) {
		t.Errorf("the host before the first sample: %+v", got)
	}
	for _, name := range []string{"a", "b", "c", "d", "/"} {
		c.add(name, user)
		c.add(name, system)
		c.add(name, system)
	}
	for _, name := range []string{"/", "a", "b"} {
		if got := of(name); got != (ContainerCPU{name, 10, 2}) {
			t.Errorf("%+v", got)
		}
	}
	if got := of("~other"); got != (ContainerCPU{"~other", 20, 4}) {
		t.Errorf("%+v, want that of two containers", got)
	}
	// A place is free only after a long time without a sample.
	clock = clock.Add(idleAfter - 1)
	c.add("b", user)
	c.add("c", user)
	if got := of("~other"); got.User != 30 {
		t.Errorf("%+v", got)
	}
	clock = clock.Add(1)
	c.add("c", user)
	if got := of("c"); got != (ContainerCPU{"c", 10, 0}) {
		t.Errorf("%+v, want the place of the one that was idle", got)
	}
	if got := of("a"); got.Container != "not there" {
		t.Errorf("%+v still there", got)
	}
	if got := of("b"); got.User != 20 {
		t.Errorf("%+v lost its place", got)
	}
	for i := range 1000 {
		c.add(fmt.Sprint(i), user)
	}
	if n := len(c.list()); n != 4 {
		t.Errorf("%d containers, limit 4", n)
	}
}
