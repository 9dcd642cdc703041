// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/test/agent"
	"github.com/hostflame/hostflame/test/workload"
)

// processCPU is the CPU time of a process so far, threads that have ended included, to
// the nanosecond (/proc/PID/stat counts in ticks of 10 ms).
func processCPU(pid int) (time.Duration, error) {
	// A process's CPU clock, as clock_getcpuclockid(3) makes it: ~pid << 3 | CPUCLOCK_SCHED.
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &t); err != nil {
		return 0, fmt.Errorf("read CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// userSystem are utime and stime of /proc/PID/stat, as durations.
func userSystem(pid int) (user, system time.Duration, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("read CPU time: %w", err)
	}
	// The command stands in parentheses and can hold anything; the state follows.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	const tick = 10 * time.Millisecond // USER_HZ is 100 for every architecture
	utime, err1 := strconv.ParseInt(string(fields[11]), 10, 64)
	stime, err2 := strconv.ParseInt(string(fields[12]), 10, 64)
	return time.Duration(utime) * tick, time.Duration(stime) * tick, errors.Join(err1, err2)
}

// status reads fields of /proc/PID/status that are in kB, in bytes.
func status(pid int) (map[string]uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, fmt.Errorf("read memory use: %w", err)
	}
	values := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		if kb, ok := strings.CutSuffix(strings.TrimSpace(value), " kB"); ok {
			n, err := strconv.ParseUint(kb, 10, 64)
			if err != nil {
				return nil, fmt.Errorf("read memory use: %w", err)
			}
			values[name] = n * 1024
		}
	}
	return values, nil
}

// mapMemory is what the kernel accounts to each loaded map, by id.
func mapMemory() (map[ebpf.MapID]uint64, error) {
	all := map[ebpf.MapID]uint64{}
	for id := ebpf.MapID(0); ; {
		next, err := ebpf.MapGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list BPF maps: %w", err)
		}
		id = next
		m, err := ebpf.NewMapFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue // freed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("open BPF map %d: %w", id, err)
		}
		info, err := m.Info()
		m.Close()
		if err != nil {
			return nil, fmt.Errorf("read BPF map %d: %w", id, err)
		}
		bytes, _ := info.Memlock()
		all[id] = bytes
	}
}

// busyLoad keeps both CPUs busy with all that the agent looks at: deep and shallow
// stacks, C++ and Go, many switches, short-lived processes, block I/O.
func (b *bench) busyLoad() (stop func() error, err error) {
	data := filepath.Join(b.dir, "busy.data")
	if err := prepareFile(data, 64<<20); err != nil {
		return nil, err
	}
	var stops []func() error
	stop = onStop(func() error {
		var errs []error
		for _, s := range slices.Backward(stops) {
			errs = append(errs, s())
		}
		return errors.Join(errs...)
	})
	seconds := strconv.Itoa(int(b.busy.Seconds()) + 60) // they are stopped before
	for _, command := range [][]string{
		{b.loads[workload.Burn], strconv.Itoa(runtime.NumCPU()), seconds},
		{b.loads[workload.BurnGo], "1", seconds},
		{b.loads[workload.Threads], "20", "0", seconds},
		{b.loads[workload.PingPong], strconv.Itoa(b.cpu), "0"},
		{b.loads[workload.Storm], "1", "1000000"},
		{"fio", "--name=busy", "--filename=" + data, "--size=64M", "--rw=randrw", "--bs=4k", "--direct=1",
			"--ioengine=psync", "--rate_iops=500", "--time_based", "--runtime=600", "--output=/dev/null"},
	} {
		s, err := startLoad(command[0], command[1:]...)
		if err != nil {
			return nil, errors.Join(err, stop())
		}
		stops = append(stops, s)
	}
	return stop, nil
}

// busyMinute prints what the agent's process takes while the host is busy.
func (b *bench) busyMinute(w io.Writer) error {
	progress("the busy minute: %v", b.busy)
	oldMaps, err := mapMemory()
	if err != nil {
		return err
	}
	oldPrograms, err := programs()
	if err != nil {
		return err
	}
	a, err := agent.Start(agent.Config{Path: b.hostflame})
	if err != nil {
		return err
	}
	stop := onStop(func() error { _, err := a.Stop(); return err })
	defer stop()
	startCPU, err := processCPU(a.PID)
	if err != nil {
		return err
	}
	stopLoad, err := b.busyLoad()
	if err != nil {
		return err
	}
	defer stopLoad()
	time.Sleep(min(b.busy, 10*time.Second)) // symbols of new programs are read once

	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return fmt.Errorf("enable BPF statistics: %w", err)
	}
	defer stats.Close()
	begin, err := b.observe(a.PID)
	if err != nil {
		return err
	}
	// As a Prometheus would that scrapes every 15 s.
	end := time.Now().Add(b.busy)
	scrapes, text := 0, 0
	for {
		time.Sleep(min(15*time.Second, time.Until(end)))
		if !time.Now().Before(end) {
			break
		}
		code, body, err := a.Get("/metrics")
		if err != nil || code != http.StatusOK {
			return fmt.Errorf("scrape: status %d: %w", code, err)
		}
		scrapes, text = scrapes+1, len(body)
	}
	last, err := b.observe(a.PID)
	if err != nil {
		return err
	}
	mem, err := status(a.PID)
	if err != nil {
		return err
	}
	maps, err := mapMemory()
	if err != nil {
		return err
	}
	var kernel uint64
	count := 0
	for id, n := range maps {
		if _, old := oldMaps[id]; !old {
			kernel += n
			count++
		}
	}
	took := last.at.Sub(begin.at)
	ofCore := func(d time.Duration) string {
		return fmt.Sprintf("%.1f ms a second (%.2f %% of a core)", d.Seconds()*1e3/took.Seconds(), 100*d.Seconds()/took.Seconds())
	}
	mib := func(n uint64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
	fmt.Fprintf(w, "\n## The agent over a busy %.0f s\n\n"+
		"All CPUs busy %.0f %% of the time with burning in C++ and Go, a pinned ping-pong, sleepers, short-lived processes and\n"+
		"direct I/O: %.0f switches and %.0f I/Os a second. Default flags, scraped %d times (%d kB each).\n\n",
		took.Seconds(), last.host.since(begin.host).busyShare(), float64(last.switches-begin.switches)/took.Seconds(),
		float64(last.ios-begin.ios)/took.Seconds(), scrapes, text/1000)
	out := table{header: []string{"what", "measured"}}
	out.add("CPU of the process, BPF apart", ofCore(last.cpu-begin.cpu))
	out.add("- of it in user mode, system mode (ticks)",
		fmt.Sprintf("%v, %v", last.user-begin.user, last.system-begin.system))
	out.add("CPU until ready, once", fmt.Sprintf("%.0f ms", startCPU.Seconds()*1e3))
	var bpf time.Duration
	var rows [][]string
	for id, e := range last.programs {
		if _, old := oldPrograms[id]; old {
			continue
		}
		runs, nanos := e.runs-begin.programs[id].runs, e.nanos-begin.programs[id].nanos
		bpf += time.Duration(nanos)
		if runs > 0 {
			rows = append(rows, []string{"- `" + e.name + "`",
				fmt.Sprintf("%d ns a run, %.0f runs a second", nanos/runs, float64(runs)/took.Seconds())})
		}
	}
	slices.SortFunc(rows, func(x, y []string) int { return strings.Compare(x[0], y[0]) })
	out.add("BPF run time (`bpf_stats`), in whatever runs", ofCore(bpf))
	for _, row := range rows {
		out.add(row...)
	}
	out.add("RSS", fmt.Sprintf("%s (anonymous %s, peak %s)", mib(mem["VmRSS"]), mib(mem["RssAnon"]), mib(mem["VmHWM"])))
	out.add("kernel maps", fmt.Sprintf("%s in %d maps", mib(kernel), count))
	out.add("RSS and kernel maps", mib(mem["VmRSS"]+kernel))
	out.print(w)
	return stop()
}

// observation is the state of the counters at one moment.
type observation struct {
	at            time.Time
	cpu           time.Duration // of the agent's process
	user, system  time.Duration
	host          ticks
	switches, ios uint64
	programs      map[ebpf.ProgramID]programRun
}

func (b *bench) observe(pid int) (o observation, err error) {
	var errs [6]error
	o.at = time.Now()
	o.cpu, errs[0] = processCPU(pid)
	o.user, o.system, errs[1] = userSystem(pid)
	o.host, errs[2] = readTicks()
	o.switches, errs[3] = contextSwitches()
	o.ios, errs[4] = blockIOs()
	o.programs, errs[5] = programs()
	return o, errors.Join(errs[:]...)
}

// ticks are the CPU time of the host, all CPUs together.
type ticks struct{ busy, idle, stolen uint64 }

// readTicks reads /proc/stat (proc_stat(5); the time of guests is in user).
func readTicks() (t ticks, err error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return t, fmt.Errorf("read CPU time of the host: %w", err)
	}
	var user, nice, system, iowait, irq, softirq uint64
	if _, err := fmt.Sscanf(string(b), "cpu %d %d %d %d %d %d %d %d",
		&user, &nice, &system, &t.idle, &iowait, &irq, &softirq, &t.stolen); err != nil {
		return t, fmt.Errorf("read CPU time of the host: %w", err)
	}
	t.busy = user + nice + system + irq + softirq
	t.idle += iowait
	return t, nil
}

func (t ticks) since(begin ticks) ticks {
	return ticks{t.busy - begin.busy, t.idle - begin.idle, t.stolen - begin.stolen}
}

// busyShare is the share of time in which CPUs had something to do, in percent.
func (t ticks) busyShare() float64 {
	return 100 * float64(t.busy+t.stolen) / float64(t.busy+t.stolen+t.idle)
}

// stolenShare is the share of that time that the hypervisor gave to others, in percent.
func (t ticks) stolenShare() float64 {
	return 100 * float64(t.stolen) / float64(t.busy+t.stolen)
}
