// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/elffile"
)

const (
	maxPerfMaps = 128 // processes; each keeps a descriptor
	// perfMapLookAfter is how often the path is opened again, to see whether a file has
	// appeared or been replaced. One that only grows is read on at every call.
	perfMapLookAfter = time.Second
	// perfMapSlack is by how much a file may be older than its process: clocks step.
	perfMapSlack = time.Minute
	userHZ       = 100 // clock ticks a second of /proc/PID/stat
)

// PerfMap follows the perf map of one process: the file /tmp/perf-PID.map, by the pid in
// the process's own namespace and below its own root, in which JIT compilers note the
// functions that they make. Where entries overlap the later wins.
type PerfMap struct {
	sym   *Symbolizer
	pid   uint32
	start uint64       // clock ticks since boot; tells processes with one pid apart
	used  atomic.Int64 // Unix ns

	mu        sync.Mutex
	file      *os.File // stays open so that what a process wrote last can be read when it has gone
	retired   bool     // the symbolizer has forgotten it: no file is opened any more
	lookAfter time.Time
	reason    Reason // why there is no file
	table     atomic.Pointer[perfTable]
	dump      bool // file is a jitdump
}

// PerfMap returns the perf map of a process, never nil, and opens its file. Keep it for
// as long as the process is of interest: a call reads from /proc.
func (s *Symbolizer) PerfMap(pid uint32) *PerfMap {
	now := time.Now()
	start, err := s.startTime(pid)
	s.mu.Lock()
	var pm *PerfMap
	if el := s.perfMaps[pid]; el != nil {
		// Of a process that has gone, what is known stays good.
		if known := el.Value.(*PerfMap); err != nil || known.start == start {
			s.recentPM.MoveToFront(el)
			pm = known
		}
	}
	closed := s.closed
	var dropped []*PerfMap
	created := pm == nil && err == nil && !closed
	if created {
		if el := s.perfMaps[pid]; el != nil {
			dropped = append(dropped, s.recentPM.Remove(el).(*PerfMap))
		}
		pm = &PerfMap{sym: s, pid: pid, start: start}
		pm.used.Store(now.UnixNano())
		s.perfMaps[pid] = s.recentPM.PushFront(pm)
	}
	dropped = append(dropped, s.trimPerfMaps(now)...)
	s.mu.Unlock()
	for _, d := range dropped {
		d.retire(ReasonUnreadable)
	}
	switch {
	case created:
		pm.mu.Lock()
		pm.look(now)
		pm.mu.Unlock()
	case pm != nil:
		pm.used.Store(now.UnixNano())
	case closed:
		return &PerfMap{sym: s, pid: pid, retired: true, reason: ReasonClosed}
	default:
		return &PerfMap{sym: s, pid: pid, retired: true, reason: ReasonOf(err)}
	}
	return pm
}

// trimPerfMaps takes out what is over the bound or idle, for the caller to retire.
func (s *Symbolizer) trimPerfMaps(now time.Time) (dropped []*PerfMap) {
	for el := s.recentPM.Back(); el != nil; {
		pm, prev := el.Value.(*PerfMap), el.Prev()
		idle := now.UnixNano()-pm.used.Load() >= int64(closeIdleAfter)
		if s.recentPM.Len() <= maxPerfMaps && !idle {
			break
		}
		s.recentPM.Remove(el)
		delete(s.perfMaps, pm.pid)
		dropped = append(dropped, pm)
		el = prev
	}
	return dropped
}

// retire closes the file. What was read stays usable while it is in memory.
func (pm *PerfMap) retire(why Reason) {
	pm.mu.Lock()
	defer pm.mu.Unlock()
	pm.retired, pm.reason = true, why
	if pm.file != nil {
		pm.file.Close()
		pm.file = nil
	}
}

// Symbolize answers for addresses in the process's memory, one result each, in order. It
// reads what the process has written since the last call.
func (pm *PerfMap) Symbolize(addrs []uint64) []Result { return pm.SymbolizeAt(addrs, nil) }

// SymbolizeAt is Symbolize for addresses at moments of the boot clock (CLOCK_BOOTTIME), in ns;
// 0 is now. Only a jitdump knows what was where before.
func (pm *PerfMap) SymbolizeAt(addrs, at []uint64) []Result {
	results := make([]Result, len(addrs))
	pm.mu.Lock()
	defer pm.mu.Unlock()
	now := time.Now()
	pm.used.Store(now.UnixNano())
	if !pm.retired && !now.Before(pm.lookAfter) {
		pm.look(now)
	}
	reason := pm.reason
	t := pm.table.Load()
	if pm.file != nil {
		var err error
		if t, err = pm.readOn(t); err != nil && t == nil {
			reason = ReasonOf(err)
		}
	}
	if t == nil {
		if reason == "" {
			reason = ReasonUnreadable
		}
		for i := range results {
			results[i].Reason = reason
		}
		return results
	}
	asleep := suspended(readClock)
	for i, addr := range addrs {
		when := uint64(0)
		if at != nil && at[i] > asleep {
			when = at[i] - asleep
		}
		if t.dump {
			results[i] = t.lookupJIT(addr, when)
		} else {
			results[i] = t.lookup(addr)
		}
	}
	pm.sym.memory.set(&t.resident, t.bytes())
	return results
}

// look opens the path again and takes what it finds, if that is another file.
func (pm *PerfMap) look(now time.Time) {
	pm.lookAfter = now.Add(perfMapLookAfter)
	dump := false
	file, err := pm.open()
	if err != nil && ReasonOf(err) == ReasonNoPerfMap {
		if f, err2 := pm.openDump(); err2 == nil {
			file, err, dump = f, nil, true
		}
	}
	if err != nil {
		if pm.file == nil {
			pm.reason = ReasonOf(err)
		}
		return
	}
	if pm.file != nil && sameFile(pm.file, file) {
		file.Close()
		return
	}
	if pm.file != nil {
		pm.file.Close()
		pm.forget()
	}
	pm.file, pm.reason, pm.dump = file, "", dump
}

func sameFile(a, b *os.File) bool {
	x, err1 := a.Stat()
	y, err2 := b.Stat()
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// forget drops what was read.
func (pm *PerfMap) forget() {
	if t := pm.table.Load(); t != nil {
		pm.sym.memory.remove(&t.resident)
		pm.table.CompareAndSwap(t, nil)
	}
}

// readOn reads what was appended since the last time; all of it, if the file has been
// written anew.
func (pm *PerfMap) readOn(t *perfTable) (*perfTable, error) {
	fi, err := pm.file.Stat()
	if err != nil {
		return t, err
	}
	if t != nil && (fi.Size() < t.off || !pm.dump && !t.continues(pm.file, fi.Size())) {
		pm.forget()
		t = nil
	}
	if t == nil {
		t = newPerfTable(pm.sym.cfg.MaxTableBytes / 2)
		t.dump = pm.dump
		t.drop = func() { pm.table.CompareAndSwap(t, nil) }
		pm.table.Store(t)
	}
	if t.dump {
		return t, t.readJIT(pm.file, fi.Size())
	}
	return t, t.readOn(pm.file, fi.Size())
}

// maxMapsBytes bounds what is read of a process's mappings.
const maxMapsBytes = 16 << 20

// openDump opens the process's jitdump, which it maps executable, by its mapping.
func (pm *PerfMap) openDump() (*os.File, error) {
	pid := strconv.FormatUint(uint64(pm.pid), 10)
	p, err := pm.sym.process(pid)
	if err != nil {
		return nil, err
	}
	maps, err := os.Open(pm.sym.proc(pid, "maps"))
	if err != nil {
		return nil, fmt.Errorf("open maps of process %d: %w", pm.pid, err)
	}
	defer maps.Close()
	sc := bufio.NewScanner(io.LimitReader(maps, maxMapsBytes))
	for sc.Scan() {
		// 7f0000000000-7f0000001000 r-xp 00000000 fd:00 1234   /tmp/jit-1.dump
		f := strings.Fields(sc.Text())
		if len(f) < 6 || len(f[1]) < 3 || f[1][2] != 'x' || !strings.HasSuffix(f[5], "/jit-"+p.nsPID+".dump") {
			continue
		}
		file, err := os.OpenFile(pm.sym.proc(pid, "map_files", f[0]), os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			if file, err = elffile.OpenBelow(pm.sym.proc(pid, "root"), f[5], nil); err != nil {
				return nil, err
			}
		}
		fi, err := file.Stat()
		if err == nil {
			err = p.trusts(fi, pm.started())
		}
		if err != nil {
			file.Close()
			return nil, fmt.Errorf("open %s: %w", f[5], err)
		}
		return file, nil
	}
	return nil, errorf(ReasonNoPerfMap, "no jitdump")
}

// open opens the file and checks that it is the process's own: another user could put one
// there to give it false names.
func (pm *PerfMap) open() (*os.File, error) {
	pid := strconv.FormatUint(uint64(pm.pid), 10)
	// O_PATH at the root that the process has: links below it resolve as it sees them.
	root, err := unix.Open(pm.sym.proc(pid, "root"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open root of process %d: %w", pm.pid, err)
	}
	defer unix.Close(root)
	p, err := pm.sym.process(pid)
	if err != nil {
		return nil, err
	}
	if start, err := pm.sym.startTime(pm.pid); err != nil || start != pm.start {
		return nil, fmt.Errorf("process %d has gone", pm.pid)
	}
	name := "tmp/perf-" + p.nsPID + ".map"
	fd, err := unix.Openat2(root, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	switch err {
	case nil:
	case unix.ENOENT, unix.ENOTDIR:
		return nil, errorf(ReasonNoPerfMap, "open %s: %w", name, err)
	case unix.ELOOP:
		return nil, errorf(ReasonUntrusted, "open %s: %w", name, err)
	default:
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	file := os.NewFile(uintptr(fd), name)
	fi, err := file.Stat()
	if err == nil {
		err = p.trusts(fi, pm.started())
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	return file, nil
}

// started is when the process started, on the wall clock.
func (pm *PerfMap) started() time.Time {
	var boot unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot) != nil {
		return time.Time{}
	}
	sinceBoot := time.Duration(pm.start) * (time.Second / userHZ)
	return time.Now().Add(sinceBoot - time.Duration(boot.Nano()))
}

// process is what /proc tells of one.
type process struct {
	nsPID string // in its own pid namespace
	uids  []uint32
}

func (p *process) trusts(fi fs.FileInfo, started time.Time) error {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.Mode().IsRegular() {
		return errorf(ReasonNotRegular, "not a regular file")
	}
	if fi.ModTime().Add(perfMapSlack).Before(started) {
		return errorf(ReasonStale, "older than the process")
	}
	if st.Uid == 0 {
		return nil
	}
	for _, uid := range p.uids {
		if st.Uid == uid {
			return nil
		}
	}
	return errorf(ReasonUntrusted, "owner is user %d, not the process's", st.Uid)
}

func (s *Symbolizer) process(pid string) (*process, error) {
	b, err := os.ReadFile(s.proc(pid, "status"))
	if err != nil {
		return nil, fmt.Errorf("read status of process %s: %w", pid, err)
	}
	p := &process{nsPID: pid}
	for line := range bytes.Lines(b) {
		key, value, _ := strings.Cut(string(line), ":")
		fields := strings.Fields(value)
		switch {
		case key == "NSpid" && len(fields) > 0:
			// One for each namespace, the innermost last.
			if _, err := strconv.ParseUint(fields[len(fields)-1], 10, 32); err == nil {
				p.nsPID = fields[len(fields)-1]
			}
		case key == "Uid":
			for _, f := range fields {
				if uid, err := strconv.ParseUint(f, 10, 32); err == nil {
					p.uids = append(p.uids, uint32(uid))
				}
			}
		}
	}
	return p, nil
}

// startTime is when a process started, in clock ticks since boot.
func (s *Symbolizer) startTime(pid uint32) (uint64, error) {
	b, err := os.ReadFile(s.proc(strconv.FormatUint(uint64(pid), 10), "stat"))
	if err != nil {
		return 0, fmt.Errorf("read stat of process %d: %w", pid, err)
	}
	// The name, in parentheses, can contain any byte; after it come the fields from the
	// third on, and the start time is the 22nd.
	if i := bytes.LastIndexByte(b, ')'); i >= 0 {
		if f := bytes.Fields(b[i+1:]); len(f) > 19 {
			if v, err := strconv.ParseUint(string(f[19]), 10, 64); err == nil {
				return v, nil
			}
		}
	}
	return 0, fmt.Errorf("read stat of process %d: no start time", pid)
}
