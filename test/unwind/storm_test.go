// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/pprof/profile"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/test/agent"
	"github.com/hostflame/hostflame/test/workload"
)

// The root frames of samples that have no user stack to be walked: in execve, and in exit
// once the address space is gone.
var withoutStack = []string{"[exec]", "[exiting]"}

// TestStorm holds the real agent against a storm of processes that nearly all live for
// less than 32 ms: its samples stand for the CPU time that the kernel says they took, and
// their stacks are whole, from the first second on.
func TestStorm(t *testing.T) {
	kerneltest.Require(t)
	dir := t.TempDir()
	binary, err := agent.Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	storm := workload.Build(t, workload.ShellStorm)
	kerneltest.MeasureLock(t)

	a := startAgent(t, binary, "--sampling.frequency=997")
	time.Sleep(time.Second)
	first := capture(t, a, 3)
	all := newCaptured()
	var cpu, rounds int64
	host := kerneltest.ReadHostCPU(t)
	// In bursts: a profile has room for 16,384 different samples, and they nearly all differ.
	for range 4 {
		burst := capture(t, a, 9)
		time.Sleep(time.Second)
		took := runStorm(t, storm, "5")
		cpu += took["cpu_ns"]
		rounds += took["rounds"]
		all.add(<-burst)
	}
	stretch := kerneltest.ReadHostCPU(t).Since(host).Stretch()
	p := <-first
	p.log(t, "the first 2 s")
	p.checkWhole(t)
	all.log(t, "all of it")
	all.checkWhole(t)
	ratio := float64(all.nanos) / float64(cpu)
	t.Logf("%d rounds took %.2f s of CPU, samples stand for %.2f s: %.4f; with what was stolen %.4f", rounds, float64(cpu)/1e9, float64(all.nanos)/1e9, ratio, stretch)
	// The timer goes on in what is stolen, the kernel's account does not.
	if !(ratio >= 0.97 && ratio <= 1.03*stretch) {
		t.Errorf("samples stand for %.4f of the CPU time, want 1 to %.4f within 3 %%", ratio, stretch)
	}
	for line := range strings.Lines(metrics(t, a)) {
		if strings.HasPrefix(line, "hostflame_samples_") || strings.HasPrefix(line, "hostflame_stacks_total") {
			t.Log(strings.TrimSpace(line))
		}
	}
	if _, err := a.Stop(); err != nil {
		t.Error(err)
	}

	// What it costs, at the default rate.
	a = startAgent(t, binary)
	for _, state := range []string{"cold", "warm"} {
		begin, at := processCPU(t, a.PID), time.Now()
		runStorm(t, storm, "10")
		share := 100 * (processCPU(t, a.PID) - begin).Seconds() / time.Since(at).Seconds()
		t.Logf("the agent's process took %.2f %% of a core at 99 Hz, tables %s", share, state)
		if state == "warm" && !(share < 3) {
			t.Errorf("the agent's process took %.2f %% of a core, want less than 3", share)
		}
	}
	if _, err := a.Stop(); err != nil {
		t.Error(err)
	}
}

func startAgent(t *testing.T, binary string, args ...string) *agent.Agent {
	t.Helper()
	a, err := agent.Start(agent.Config{Path: binary, Args: args})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Kill()
		if t.Failed() {
			t.Logf("the agent's log:\n%s", a.Log())
		}
	})
	return a
}

func metrics(t *testing.T, a *agent.Agent) string {
	t.Helper()
	status, body, err := a.Get("/metrics")
	if err != nil || status != http.StatusOK {
		t.Fatalf("scrape: status %d, %v", status, err)
	}
	return string(body)
}

const stormCgroup = "hostflame-storm"

// runStorm runs the storm in a cgroup of its own, by which its samples are told.
func runStorm(t *testing.T, path, seconds string) map[string]int64 {
	t.Helper()
	p := workload.Start(t, path, seconds, "2", t.TempDir(), newCgroup(t, stormCgroup).procs)
	p.Ready()
	out := p.Wait()
	took, err := workload.Numbers(out[strings.IndexByte(out, '\n')+1:])
	if err != nil {
		t.Fatal(err)
	}
	return took
}

func processCPU(t *testing.T, pid int) time.Duration {
	t.Helper()
	// A process's CPU clock, as clock_getcpuclockid(3) makes it: ~pid << 3 | CPUCLOCK_SCHED.
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// captured is what a profile tells of the storm.
type captured struct {
	nanos   int64            // CPU time that the samples stand for
	samples int64            // of all
	stacks  int64            // with a user stack to be walked
	whole   int64            // of these, up to a known start
	ends    map[string]int64 // samples by what their root says where it is no function
	roots   map[string]int64 // whole stacks by their root
	where   map[string]int64 // stacks that end early, by comm and outermost frames
}

func newCaptured() *captured {
	return &captured{ends: map[string]int64{}, roots: map[string]int64{}, where: map[string]int64{}}
}

func (c *captured) add(o *captured) {
	c.nanos += o.nanos
	c.samples += o.samples
	c.stacks += o.stacks
	c.whole += o.whole
	for _, m := range []struct{ to, from map[string]int64 }{{c.ends, o.ends}, {c.roots, o.roots}, {c.where, o.where}} {
		for k, n := range m.from {
			m.to[k] += n
		}
	}
}

// capture asks the agent for a profile of the storm, of so many seconds.
func capture(t *testing.T, a *agent.Agent, seconds int) <-chan *captured {
	result := make(chan *captured, 1)
	go func() {
		c := newCaptured()
		defer func() { result <- c }()
		status, body, err := a.Get(fmt.Sprintf("/pprof/cpu?seconds=%d&container=/%s", seconds, stormCgroup))
		if err != nil || status != http.StatusOK {
			t.Errorf("capture: status %d, %v", status, err)
			return
		}
		p, err := profile.Parse(bytes.NewReader(body))
		if err != nil {
			t.Error(err)
			return
		}
		c.count(p)
	}()
	return result
}

func (c *captured) count(p *profile.Profile) {
	for _, s := range p.Sample {
		if !slices.Contains(s.Label["container"], "/"+stormCgroup) {
			continue // what there was no room for
		}
		n := s.Value[0]
		c.samples += n
		c.nanos += s.Value[1]
		root := name(s, 1)
		if slices.Contains(withoutStack, root) {
			c.ends[root] += n
			continue
		}
		c.stacks += n
		// What ends early has a note such as [bad stack]; [ls+0x61d0] is the start of a program
		// without symbols, by where its function begins.
		if !strings.HasPrefix(root, "[") || strings.Contains(root, "+0x") {
			c.whole += n
			c.roots[root] += n
			continue
		}
		c.ends[root] += n
		c.where[strings.Join([]string{s.Label["comm"][0], root, name(s, 2), name(s, 3)}, " > ")] += n
	}
}

// name is that of the nth frame from the root.
func name(s *profile.Sample, n int) string {
	if n > len(s.Location) {
		return ""
	}
	loc := s.Location[len(s.Location)-n]
	if len(loc.Line) > 0 {
		return loc.Line[len(loc.Line)-1].Function.Name
	}
	if loc.Mapping != nil {
		return fmt.Sprintf("%s+%#x", filepath.Base(loc.Mapping.File), loc.Address)
	}
	return fmt.Sprintf("%#x", loc.Address)
}

func (c *captured) log(t *testing.T, what string) {
	t.Helper()
	t.Logf("%s: %d samples, %d with a stack, %.2f %% of these whole; %v", what, c.samples, c.stacks,
		100*float64(c.whole)/float64(c.stacks), c.ends)
	most := func(m map[string]int64) {
		keys := slices.SortedFunc(maps.Keys(m), func(x, y string) int { return cmp.Compare(m[y], m[x]) })
		for _, k := range keys[:min(len(keys), 12)] {
			t.Logf("%6d %s", m[k], k)
		}
	}
	most(c.roots)
	most(c.where)
}

func (c *captured) checkWhole(t *testing.T) {
	t.Helper()
	if share := float64(c.whole) / float64(c.stacks); !(share >= 0.97) {
		t.Errorf("%.2f %% of %d stacks end at a known start, want 97 %%", 100*share, c.stacks)
	}
}
