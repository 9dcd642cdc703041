// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"context"
	"testing"
	"time"
)

func TestCPUSamplesThisProcess(t *testing.T) {
	c, err := NewCPU(CPUConfig{Frequency: 99, CgroupV1: CPUControllerV1()})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer c.Close()
	stop := make(chan struct{})
	go func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	time.Sleep(2 * time.Second)
	close(stop)
	if err := c.Wait(context.Background(), time.Millisecond); err != nil {
		t.Fatal(err)
	}
	n := 0
	if err := c.Drain(func(s *Sample) {
		n++
		if n < 5 {
			t.Logf("%+v", *s)
		}
	}); err != nil {
		t.Fatal(err)
	}
	st, err := c.Stats()
	t.Logf("%d samples; %+v %v", n, st, err)
}
