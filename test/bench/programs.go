// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/test/workload"
)

// programRun is the kernel's statistics of one program.
type programRun struct {
	name  string
	kind  ebpf.ProgramType
	runs  uint64
	nanos uint64
}

// programs reads the statistics of every loaded program, by id.
func programs() (map[ebpf.ProgramID]programRun, error) {
	all := map[ebpf.ProgramID]programRun{}
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list BPF programs: %w", err)
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue // unloaded meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("open BPF program %d: %w", id, err)
		}
		stats, err := p.Stats()
		info, infoErr := p.Info()
		p.Close()
		if err := errors.Join(err, infoErr); err != nil {
			return nil, fmt.Errorf("read statistics of BPF program %d: %w", id, err)
		}
		all[id] = programRun{info.Name, info.Type, stats.RunCount, uint64(stats.Runtime.Nanoseconds())}
	}
}

// A comparison is one kind of event in the kernel, and the tools that watch it.
type comparison struct {
	title  string
	event  string                 // what one is called
	count  func() (uint64, error) // how many there have been, by the kernel's own books
	load   func() (func() error, error)
	tools  []tool
	prefix string // of the names of the agent's programs that watch these events
}

// watched is what a tool's programs did while there were so many events.
type watched struct {
	events   uint64
	programs map[string]programRun
}

// watch runs the tool under the load for a while with BPF statistics on, and returns what
// each program did that came with the tool.
func (b *bench) watch(c comparison, t tool) (w watched, err error) {
	before, err := programs()
	if err != nil {
		return w, err
	}
	stop, err := t.start()
	if err != nil {
		return w, err
	}
	defer stop()
	stopLoad, err := c.load()
	if err != nil {
		return w, err
	}
	defer stopLoad()
	if err := b.warm(c); err != nil {
		return w, err
	}
	w.programs, err = runs(before, func() error {
		first, err := c.count()
		if err != nil {
			return err
		}
		time.Sleep(b.window)
		last, err := c.count()
		w.events = last - first
		return err
	})
	maps.DeleteFunc(w.programs, func(name string, _ programRun) bool {
		return strings.HasPrefix(t.name, "hostflame") && !strings.HasPrefix(name, c.prefix)
	})
	return w, err
}

// runs returns what each program that is not in old did meanwhile, with BPF statistics on.
func runs(old map[ebpf.ProgramID]programRun, meanwhile func() error) (map[string]programRun, error) {
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return nil, fmt.Errorf("enable BPF statistics: %w", err)
	}
	defer stats.Close()
	begin, err := programs()
	if err != nil {
		return nil, err
	}
	if err := meanwhile(); err != nil {
		return nil, err
	}
	end, err := programs()
	if err != nil {
		return nil, err
	}
	grown := map[string]programRun{}
	for id, e := range end {
		if _, there := old[id]; there {
			continue
		}
		p := grown[e.name]
		p.name = e.name
		p.runs += e.runs - begin[id].runs
		p.nanos += e.nanos - begin[id].nanos
		grown[e.name] = p
	}
	return grown, nil
}

// warm returns when the load has made its first thousand events, and the tool has been
// left alone for a while: the start of either is not what is measured.
func (b *bench) warm(c comparison) error {
	time.Sleep(b.settle)
	first, err := c.count()
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		n, err := c.count()
		if err != nil || n > first+1000 {
			return err
		}
	}
	return fmt.Errorf("%s: the load makes none", c.title)
}

// programCosts prints what each BPF program costs, the agent's beside the peers'.
func (b *bench) programCosts(w io.Writer) error {
	data := filepath.Join(b.dir, "fio.data")
	if err := prepareFile(data, 64<<20); err != nil {
		return err
	}
	fmt.Fprintf(w, "\n## BPF programs, ns a run\n\n"+
		"By the kernel's statistics (`bpf_stats`), which cover a program's body and not its entry. Medians and\n"+
		"quartiles of %d interleaved rounds of %v.\n", b.windows, b.window)
	for _, c := range []comparison{{
		title:  "Context switches: a pipe ping-pong on one CPU",
		event:  "switch",
		count:  contextSwitches,
		prefix: "hf_sched",
		tools:  []tool{b.emptyProgram("sched_switch"), peer("runqlat"), b.agent()},
		load: func() (func() error, error) {
			return startLoad(b.loads[workload.PingPong], strconv.Itoa(b.cpu), "0")
		},
	}, {
		title:  "Block I/O: fio, direct random reads of 4 KiB, 32 at a time",
		event:  "request",
		count:  blockIOs,
		prefix: "hf_block",
		tools: []tool{b.clocks("block_io_start", "block_rq_issue", "block_rq_complete"), peer("biolatency"), peer("biolatency", "-Q"),
			b.agentWith("hostflame, no stacks of I/O", "--sampling.io-rate=0"), b.agent()},
		load: func() (func() error, error) {
			return startLoad("fio", append(randomReads(data), "--runtime=600", "--output=/dev/null")...)
		},
	}} {
		if err := b.compare(w, c); err != nil {
			return err
		}
	}
	return nil
}

// compare prints one table: a line for each program that ran, and one for all of a tool's.
func (b *bench) compare(w io.Writer, c comparison) error {
	type key struct{ tool, program string }
	const all = "~" // sorts behind every name
	ns, perSecond := map[key][]float64{}, map[key][]float64{}
	add := func(k key, nanos, runs uint64) {
		ns[k] = append(ns[k], float64(nanos)/float64(runs))
		perSecond[k] = append(perSecond[k], float64(runs)/b.window.Seconds())
	}
	for round := range b.windows {
		progress("%s: round %d of %d", c.title, round+1, b.windows)
		for i := range c.tools {
			t := c.tools[(i+round)%len(c.tools)] // none is always first
			got, err := b.watch(c, t)
			if err != nil {
				return err
			}
			if got.events == 0 {
				return fmt.Errorf("%s: the load made none", c.title)
			}
			var nanos uint64
			for name, p := range got.programs {
				nanos += p.nanos
				if p.runs > 0 {
					add(key{t.name, name}, p.nanos, p.runs)
				}
			}
			add(key{t.name, all}, nanos, got.events)
		}
	}
	order := func(name string) int {
		return slices.IndexFunc(c.tools, func(t tool) bool { return t.name == name })
	}
	keys := slices.SortedFunc(maps.Keys(ns), func(x, y key) int {
		return cmp.Or(
			cmp.Compare(order(x.tool), order(y.tool)),
			strings.Compare(x.program, y.program))
	})
	out := table{header: []string{"tool", "program", "ns a run", "quartiles", "runs a second"}}
	for _, k := range keys {
		program := "`" + k.program + "`"
		if k.program == all {
			program = "all, ns a " + c.event
		}
		s := spreadOf(ns[k])
		out.add(k.tool, program, fmt.Sprintf("%.0f", s.median), fmt.Sprintf("%.0f-%.0f", s.q1, s.q3),
			fmt.Sprintf("%.0f", spreadOf(perSecond[k]).median))
	}
	fmt.Fprintf(w, "\n%s\n\n", c.title)
	out.print(w)
	return nil
}

// contextSwitches is how many there have been on all CPUs.
func contextSwitches() (uint64, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, fmt.Errorf("count context switches: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if n, ok := strings.CutPrefix(line, "ctxt "); ok {
			return strconv.ParseUint(strings.TrimSpace(n), 10, 64)
		}
	}
	return 0, errors.New("count context switches: no ctxt line in /proc/stat")
}

// blockIOs is how many requests whole devices have completed.
func blockIOs() (uint64, error) {
	paths, err := filepath.Glob("/sys/block/*/stat")
	if err != nil {
		return 0, fmt.Errorf("count block I/O: %w", err)
	}
	var total uint64
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			return 0, fmt.Errorf("count block I/O: %w", err)
		}
		fields := strings.Fields(string(b))
		// Documentation/block/stat.rst: reads, writes, discards, flushes.
		for _, i := range []int{0, 4, 11, 15} {
			if i < len(fields) {
				n, err := strconv.ParseUint(fields[i], 10, 64)
				if err != nil {
					return 0, fmt.Errorf("count block I/O: %w", err)
				}
				total += n
			}
		}
	}
	return total, nil
}

// prepareFile writes a file of real blocks, through to the disk.
func prepareFile(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("make a file to read: %w", err)
	}
	defer f.Close()
	block := make([]byte, 1<<20)
	for i := range block {
		block[i] = byte(i)
	}
	for range size / len(block) {
		if _, err := f.Write(block); err != nil {
			return fmt.Errorf("make a file to read: %w", err)
		}
	}
	return f.Sync()
}
