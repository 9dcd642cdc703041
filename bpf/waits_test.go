// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"testing"
	"time"
)

func TestZZWaits(t *testing.T) {
	s, err := NewSched(SchedConfig{CgroupV1: CPUControllerV1()})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer s.Close()
	tables, err := NewTables(DefaultTableMemory)
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	w, err := NewWaits(s, tables)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer w.Close()
	if err := w.Observe(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	if err := w.Observe(); err != nil {
		t.Fatal(err)
	}
	n := 0
	w.Drain(func(s *Sample) {
		if n++; n < 30 {
			t.Logf("%v %s %s d %d v %d w %d cause %v state %v by %s kernel %d %v user %d %v stack %d", s.Profile, s.Comm, s.Thread, s.Duration, s.Value, s.Weight, s.Cause, s.State, s.By, len(s.Kernel), s.KernelOutcome, len(s.User), s.UserOutcome, len(s.Stack))
			if n < 6 { for _, a := range s.Kernel { t.Logf("  %x", a) } }
		}
	})
	st, _ := w.Stats()
	t.Log(n, st)
}
