// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/alecthomas/units"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/profiler/unwind"
	"github.com/hostflame/hostflame/symbolizer"
)

// maxFrequency keeps a typing slip from costing a core: at 1,000 Hz a sample of 16 us is
// 1.6 % of each busy CPU.
const maxFrequency = 1000

// sampling is how CPU samples are taken.
type sampling struct {
	frequency   *int
	event       *string
	tableMemory *units.Base2Bytes
	tableCache  *string
	symbolCache *string
	debuginfod  *bool
}

func samplingFlags(c *kingpin.CmdClause) (s sampling) {
	s.frequency = c.Flag("sampling.frequency", "CPU samples a second on each busy CPU, 1 to 1000.").Default("99").Int()
	s.event = c.Flag("sampling.event", "What takes a CPU sample: cpu-clock works everywhere, cycles needs a PMU.").
		Default(string(bpf.EventCPUClock)).Enum(string(bpf.EventCPUClock), string(bpf.EventCycles))
	s.tableMemory = c.Flag("unwind.table-memory", "Kernel memory for unwind tables, at least 1MiB. Of what finds no room the least recently sampled goes.").Default("32MiB").Bytes()
	s.tableCache = c.Flag("unwind.cache-directory", "Where unwind tables are kept between starts, at most 256 MiB; empty for nowhere.").
		Default(defaultCacheDirectory("unwind")).String()
	s.symbolCache = c.Flag("symbols.cache-directory", "Where indexes of debug information are kept between starts, at most 1 GiB; empty for nowhere.").
		Default(defaultCacheDirectory("symbols")).String()
	s.debuginfod = debuginfodFlag(c)
	return s
}

// waitFlags are how waits and blocked time are sampled.
type waitFlags struct {
	mean *time.Duration
	rate *int
}

func newWaitFlags(c *kingpin.CmdClause) (w waitFlags) {
	w.mean = c.Flag("sampling.wait-interval", "Time waited for a CPU between two samples of it, on average; 0 takes none.").Default(bpf.DefaultWaitMean.String()).Duration()
	w.rate = c.Flag("sampling.wait-rate", "Samples a second and CPU of waits, and of blocked time, on average, at most; 0 takes none.").Default(strconv.Itoa(bpf.DefaultWalks)).Int()
	return w
}

func (w waitFlags) checkWaits() error {
	if d := *w.mean; d < 0 {
		return usagef("10ms is a good value for always", "--sampling.wait-interval=%v is negative", d)
	}
	if n := *w.rate; n < 0 || n > maxFrequency {
		return usagef("100 is a good rate for always; --sampling.wait-rate takes 0 to 1000", "wait rate %d Hz is out of range", n)
	}
	return nil
}

func (w waitFlags) waitSampling() bpf.WaitSampling {
	s := bpf.WaitSampling{Wait: *w.mean, PerSecond: *w.rate}
	if *w.rate == 0 {
		s.Blocked = -1
	}
	if *w.mean == 0 || *w.rate == 0 {
		s.Wait = -1
	}
	return s
}

// ioFlag is how many requests of block I/O have their stacks taken.
func ioFlag(c *kingpin.CmdClause) *int {
	return c.Flag("sampling.io-rate", "Block requests a second that each CPU takes the stack of, of one device and operation, before it leaves some out; 0 takes none.").
		Default(strconv.Itoa(bpf.DefaultStackRate)).Int()
}

func checkIO(rate int) error {
	if rate < 0 || rate > maxFrequency {
		return usagef("50 is a good rate for always; --sampling.io-rate takes 0 to 1000", "I/O rate %d Hz is out of range", rate)
	}
	return nil
}

func debuginfodFlag(c *kingpin.CmdClause) *bool {
	return c.Flag("symbols.debuginfod", "Load debug files that are not on this host from the servers in DEBUGINFOD_URLS, by build id, into the cache directory.").Bool()
}

// debuginfod is who is asked, if that is wished for.
func debuginfod(wished bool) (d symbolizer.Debuginfod) {
	if wished {
		d.URLs = strings.Fields(os.Getenv("DEBUGINFOD_URLS"))
	}
	return d
}

// tableCacheQuota is in bytes: a table of a region takes 10 KiB on average.
const tableCacheQuota = 256 << 20

// indexCacheQuota is in bytes: an index takes a twentieth of the debug sections.
const indexCacheQuota = 1 << 30

// defaultCacheDirectory is what systemd gives the service, or the user's own.
func defaultCacheDirectory(name string) string {
	base := os.Getenv("CACHE_DIRECTORY")
	switch {
	case base != "":
		base, _, _ = strings.Cut(base, ":")
	case os.Geteuid() == 0:
		base = "/var/cache/hostflame"
	default:
		dir, err := os.UserCacheDir()
		if err != nil {
			return ""
		}
		base = filepath.Join(dir, "hostflame")
	}
	return filepath.Join(base, name)
}

// openTableCache opens the cache. What does not work costs time at starts, no more: it is
// logged, and there is none.
func (s sampling) openTableCache(log *slog.Logger) *unwind.Cache {
	if *s.tableCache == "" {
		return nil
	}
	c, err := unwind.OpenCache(*s.tableCache, tableCacheQuota)
	if err != nil {
		notKept(log, "unwind", *s.tableCache, err)
		return nil
	}
	return c
}

// openSymbolCache is openTableCache for the indexes of debug information.
func (s sampling) openSymbolCache(log *slog.Logger) *symbolizer.Cache {
	if *s.symbolCache == "" {
		return nil
	}
	c, err := symbolizer.OpenCache(*s.symbolCache, indexCacheQuota)
	if err != nil {
		notKept(log, "symbols", *s.symbolCache, err)
		return nil
	}
	return c
}

func notKept(log *slog.Logger, name, dir string, err error) {
	level := slog.LevelWarn
	if dir == defaultCacheDirectory(name) {
		level = slog.LevelInfo // nobody has asked for it
	}
	log.Log(context.Background(), level, "not kept on disk", "what", name, "err", err, "hint", "choose a directory with --"+name+".cache-directory")
}

func (s sampling) check() error {
	if hz := *s.frequency; hz < 1 || hz > maxFrequency {
		return usagef("99 is a good rate for always; --sampling.frequency takes 1 to 1000", "sampling frequency %d Hz is out of range", hz)
	}
	if n := *s.tableMemory; n < 1<<20 || n > 1<<30 {
		return usagef("32MiB holds some 5 million rows; --unwind.table-memory takes 1MiB to 1GiB", "memory of %v for unwind tables is out of range", n)
	}
	return nil
}

func (s sampling) config() bpf.CPUConfig {
	return bpf.CPUConfig{
		Event: bpf.Event(*s.event), Frequency: *s.frequency, CgroupV1: bpf.CPUControllerV1(),
		TableMemory: uint64(*s.tableMemory),
	}
}

const privilegeHint = "run as root, or with CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE, CAP_SYSLOG, CAP_DAC_READ_SEARCH and CAP_CHECKPOINT_RESTORE as deploy/hostflame.service does; hostflame doctor tells which are missing"

// attachHint says what to do about an error of loading or attaching.
func attachHint(err error, event bpf.Event) string {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return privilegeHint
	case event == bpf.EventCycles && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP)):
		return "this machine has no PMU: use --sampling.event=cpu-clock"
	}
	return "hostflame doctor tells what this kernel allows"
}
