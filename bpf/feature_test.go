// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

func find(t *testing.T, list []Feature, name string) Feature {
	t.Helper()
	for _, f := range list {
		if f.Name == name {
			return f
		}
	}
	t.Fatalf("no feature %q", name)
	return Feature{}
}

// TestProbeExplains runs with any privileges: whatever is missing has to say why, what is
// lost and what to do.
func TestProbeExplains(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range Probe() {
		if seen[f.Name] {
			t.Errorf("%s: twice", f.Name)
		}
		seen[f.Name] = true
		if f.Available && (f.Lost != "" || f.Hint != "") {
			t.Errorf("%s: available, but lost %q, hint %q", f.Name, f.Lost, f.Hint)
		}
		if !f.Available && (f.Detail == "" || f.Lost == "" || f.Hint == "") {
			t.Errorf("%s: not available, and does not explain: %+v", f.Name, f)
		}
	}
	if len(seen) < 25 {
		t.Errorf("%d features", len(seen))
	}
}

func TestProbeAsRoot(t *testing.T) {
	kerneltest.Require(t)
	list := Probe()
	if !Serves(list) {
		t.Error("serve would not work")
	}
	for _, name := range []string{FeatureCPU, FeatureSched, FeatureBlock, "kernel", "btf", "ringbuf", "task-storage",
		"tp_btf", "tracepoint-sched_switch", "sched-info", "perf-cpu-clock", "kallsyms", "cgroups", "CAP_BPF", "CAP_PERFMON"} {
		if f := find(t, list, name); !f.Available {
			t.Errorf("%s: %s", name, f.Detail)
		}
	}
	// What sysfs says of the same: the PMU of arm64 has another name.
	var pmus []string
	for _, pattern := range []string{"cpu", "armv*"} {
		found, err := filepath.Glob("/sys/bus/event_source/devices/" + pattern)
		if err != nil {
			t.Fatal(err)
		}
		pmus = append(pmus, found...)
	}
	if f := find(t, list, "perf-cycles"); f.Available != (len(pmus) > 0) {
		t.Errorf("perf-cycles: %v (%s), PMUs %v", f.Available, f.Detail, pmus)
	}
}

func TestServes(t *testing.T) {
	for _, tt := range []struct {
		list []Feature
		want bool
	}{
		{nil, false},
		{[]Feature{{Name: FeatureCPU}, {Name: FeatureSched}, {Name: FeatureBlock}, {Name: "btf", Available: true}}, false},
		{[]Feature{{Name: FeatureCPU}, {Name: FeatureSched, Available: true}, {Name: FeatureBlock}}, true},
	} {
		if got := Serves(tt.list); got != tt.want {
			t.Errorf("Serves(%+v) = %v", tt.list, got)
		}
	}
}

func TestCgroupLayout(t *testing.T) {
	for _, tt := range []struct{ cgroup, want string }{
		{"0::/init.scope\n", "v2"},
		{"0::/\n1:name=systemd:/\n", "v2"},
		{"3:cpu,cpuacct:/\n2:memory:/x\n1:name=systemd:/\n", "v1"},
		{"3:cpu,cpuacct:/a:b\n1:name=systemd:/\n0::/\n", "hybrid"},
	} {
		if got := cgroupLayoutOf(tt.cgroup); got != tt.want {
			t.Errorf("layout of %q: %s, want %s", tt.cgroup, got, tt.want)
		}
	}
}

func TestSelectedWord(t *testing.T) {
	for s, want := range map[string]string{
		"[none] integrity confidentiality\n": "none",
		"none [integrity] confidentiality\n": "integrity",
		"":                                   "",
	} {
		if got := selectedWord(s); got != want {
			t.Errorf("selected word of %q: %q, want %q", s, got, want)
		}
	}
}

func TestHaveCapability(t *testing.T) {
	have, err := haveCapability(unix.CAP_DAC_OVERRIDE)
	if err != nil {
		t.Fatal(err)
	}
	// The judge: only who has it may open a file that nobody may open.
	path := t.TempDir() + "/closed"
	if err := os.WriteFile(path, nil, 0); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err == nil {
		f.Close()
	}
	if have != (err == nil) {
		t.Errorf("CAP_DAC_OVERRIDE %v, and opening a file of mode 0: %v", have, err)
	}
}
