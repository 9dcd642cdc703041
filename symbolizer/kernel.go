// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernel answers for kernel addresses from the newest reading of kallsyms.
//
// The kernel's own symbols never change; those of modules, BPF programs and trampolines
// do. Whether they have is asked only when an address is not in the kernel's own text, at
// most once a second, by what is cheap: the list of modules, and the ids of BPF programs
// and links, which only grow. Reading kallsyms anew costs tens of ms, most of it in the
// kernel: it takes at most 1/reloadShare of the time.
type kernel struct {
	sym               *Symbolizer
	kallsyms, modules string // paths

	newest atomic.Pointer[KernelStats] // so that asking does not wait for a reading

	mu         sync.Mutex
	table      *kernelTable
	lines      map[int][]Line // of the rows of table that were seen
	reason     Reason         // why there is no table
	generation generation     // of table
	changed    bool           // kallsyms may have more than table
	checkAfter time.Time      // earliest next look at the generation
	loadAfter  time.Time      // earliest next reading
	loaded     time.Time
	loads      uint64
	vmlinux    vmlinux
	ko         kernelModules
	bpf        bpfLines
}

const (
	checkInterval = time.Second
	reloadShare   = 2000
	// blindReload is how old a table gets that is asked for addresses outside of the
	// kernel's text, where the ids of BPF programs are not ours to see.
	blindReload = time.Minute
)

func (k *kernel) init(s *Symbolizer) {
	proc := s.cfg.Proc
	k.sym = s
	k.kallsyms = filepath.Join(proc, "kallsyms")
	k.modules = filepath.Join(proc, "modules")
}

// Kernel answers for kernel addresses, one result each, in order. Inlined functions and
// lines come from the running kernel's vmlinux, where one with debug information is there.
// Addresses need CAP_SYSLOG, or kernel.kptr_restrict=0 and a permissive
// kernel.perf_event_paranoid; without, the Reason is ReasonNoPermission.
func (s *Symbolizer) Kernel(addrs []uint64) []Result { return s.kernel.symbolize(addrs) }

func (k *kernel) symbolize(addrs []uint64) []Result {
	results := make([]Result, len(addrs))
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	if k.table == nil && now.After(k.loadAfter) {
		k.generation = k.currentGeneration(generation{})
		k.load(now)
	}
	moving := k.answer(addrs, results)
	if moving && k.table != nil && k.outdated(now) {
		k.load(now)
		k.answer(addrs, results)
	}
	if k.table != nil && len(addrs) > 0 {
		k.vmlinux.find(k.sym)
		k.vmlinux.addLines(k.table, addrs, results)
		k.ko.addLines(k.sym, k.table.modules, k.loads, addrs, results)
		k.bpf.addLines(k.loads, addrs, results)
	}
	return results
}

// answer fills in results. moving is whether an address is outside of what never changes.
func (k *kernel) answer(addrs []uint64, results []Result) (moving bool) {
	for i, addr := range addrs {
		if k.table == nil {
			results[i] = Result{Reason: k.reason}
			continue
		}
		row, module, ok := k.table.find(addr)
		if module != 0 || !ok {
			moving = moving || addr >= kernelHalf
		}
		if !ok {
			results[i] = Result{Reason: ReasonNotFound}
			continue
		}
		lines := k.lines[row]
		if lines == nil {
			// A copy, so that a profile that keeps the name does not keep the table.
			name := strings.Clone(k.table.name(k.table.rows[row].name))
			lines = []Line{{Function: demangled(name), SystemName: name}}
			k.lines[row] = lines
		}
		results[i] = Result{Lines: lines, Module: k.table.modules[module]}
	}
	return moving
}

// outdated is whether kallsyms is to be read again now.
func (k *kernel) outdated(now time.Time) bool {
	if now.After(k.checkAfter) {
		k.checkAfter = now.Add(checkInterval)
		current := k.currentGeneration(k.generation)
		if current != k.generation || !current.bpf && now.Sub(k.loaded) >= blindReload {
			k.generation, k.changed = current, true
		}
	}
	return k.changed && now.After(k.loadAfter)
}

// load reads kallsyms. A table that is there stays if that fails.
func (k *kernel) load(now time.Time) {
	expect := expectSymbols
	if k.table != nil {
		expect = len(k.table.rows) + len(k.table.rows)/8
	}
	table, err := readKallsyms(k.kallsyms, expect)
	took := time.Since(now)
	k.loadAfter = now.Add(max(checkInterval, reloadShare*took))
	k.changed = false
	k.loads++
	if err != nil {
		k.reason = ReasonOf(err)
	} else {
		k.table, k.reason, k.loaded = table, "", now
		k.lines = map[int][]Line{}
	}
	st := KernelStats{Loads: k.loads, LoadTime: took, Reason: k.reason, Err: err}
	if k.table != nil {
		st.Symbols, st.Modules, st.Bytes = k.table.symbols, len(k.table.modules)-1, k.table.bytes()
	}
	k.newest.Store(&st)
}

func readKallsyms(path string, expect int) (*kernelTable, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open kallsyms: %w", err)
	}
	defer f.Close()
	t, err := parseKallsyms(f, expect)
	if err != nil {
		return nil, fmt.Errorf("read kallsyms: %w", err)
	}
	return t, nil
}

// generation changes when modules or BPF programs come.
type generation struct {
	modules uint64 // a hash
	bpf     bool   // the ids below are known: that needs CAP_SYS_ADMIN
	program uint32 // the highest id
	link    uint32
}

// currentGeneration goes on from an earlier one, so that it costs two system calls and
// the list of modules.
func (k *kernel) currentGeneration(from generation) generation {
	var g generation
	if b, err := os.ReadFile(k.modules); err == nil {
		g.modules = hashModules(b)
	}
	var ok1, ok2 bool
	g.program, ok1 = lastBPFID(unix.BPF_PROG_GET_NEXT_ID, from.program)
	g.link, ok2 = lastBPFID(unix.BPF_LINK_GET_NEXT_ID, from.link)
	g.bpf = ok1 && ok2
	return g
}

// hashModules hashes names, sizes and addresses; use counts change all the time.
func hashModules(list []byte) uint64 {
	h := fnv.New64a()
	for line := range bytes.Lines(list) {
		f := bytes.Fields(line)
		if len(f) < 6 {
			continue
		}
		for _, i := range []int{0, 1, 5} {
			h.Write(f[i])
			h.Write([]byte{0})
		}
	}
	return h.Sum64()
}

// lastBPFID is the highest id at or above from, by the bpf(2) command that returns the
// next one. It is false where that is not permitted.
func lastBPFID(cmd uintptr, from uint32) (uint32, bool) {
	for {
		attr := struct{ start, next, flags uint32 }{start: from}
		_, _, errno := unix.Syscall(unix.SYS_BPF, cmd, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		if errno != 0 {
			return from, errno == unix.ENOENT
		}
		if attr.next <= from {
			return from, true
		}
		from = attr.next
	}
}

// KernelStats describes the kernel's symbols.
type KernelStats struct {
	Symbols  int // text symbols
	Modules  int // modules with symbols, [bpf] and the like included
	Bytes    int64
	Loads    uint64        // readings of kallsyms
	LoadTime time.Duration // of the last one
	Reason   Reason        // why kernel addresses have no names; empty when they have, or were not asked for yet
	Err      error         // what was wrong with the last reading, for people
}

func (k *kernel) stats() KernelStats {
	if st := k.newest.Load(); st != nil {
		return *st
	}
	return KernelStats{}
}
