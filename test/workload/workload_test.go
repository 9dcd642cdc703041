// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"bytes"
	"debug/elf"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// checkShares holds what the functions took against the design, within points.
func checkShares(t *testing.T, took map[string]int64, points float64) {
	t.Helper()
	var total int64
	for name := range BurnShares {
		total += took[name]
	}
	for name, want := range BurnShares {
		got := 100 * float64(took[name]) / float64(total)
		t.Logf("%s: %.2f %%", name, got)
		// A negated comparison: no CPU time at all makes NaN.
		if !(math.Abs(got-want) <= points) {
			t.Errorf("%s took %.2f %% of the CPU time, want %g within %g", name, got, want, points)
		}
	}
}

func numbers(t *testing.T, text string) map[string]int64 {
	t.Helper()
	n, err := Numbers(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// The programs' own clock says that shares are as designed, on a contended CPU too.
func TestBurnShares(t *testing.T) {
	kerneltest.MeasureLock(t) // it burns CPU
	commands := map[string][]string{}
	for _, name := range []string{Burn, BurnNoFP, BurnGo} {
		commands[name] = []string{Build(t, name), "2"}
	}
	if python := Python(); python != nil {
		commands["burn.py"] = python
	}
	for name, command := range commands {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := Start(t, command[0], append(command[1:], "3")...)
			checkShares(t, numbers(t, p.Wait()), 1)
		})
	}
}

func TestBurnStopsOnTerm(t *testing.T) {
	kerneltest.MeasureLock(t) // it burns CPU
	for _, name := range []string{Burn, BurnGo} {
		p := Start(t, Build(t, name), "1", "60")
		time.Sleep(500 * time.Millisecond)
		begin := time.Now()
		checkShares(t, numbers(t, p.Stop()), 3)
		if took := time.Since(begin); took > time.Second {
			t.Errorf("%s took %v to stop", name, took)
		}
	}
}

// Another profiler sees the same shares at the leaves, and nearly all under load::run.
func TestBurnAsPerfSeesIt(t *testing.T) {
	perf, err := exec.LookPath("perf")
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs perf and root")
	}
	kerneltest.MeasureLock(t)
	data := filepath.Join(t.TempDir(), "perf.data")
	record := exec.Command(perf, "record", "-q", "-e", "cpu-clock", "-F", "1999", "-g", "-o", data,
		Build(t, Burn), "1", "4")
	if text, err := record.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	script, err := exec.Command(perf, "script", "-i", data, "-F", "ip,sym").Output()
	if err != nil {
		t.Fatal(err)
	}
	took := map[string]int64{}
	var samples, inRun int
	var stack []string
	lines := bufio.NewScanner(bytes.NewReader(script))
	for lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) > 1 {
			stack = append(stack, strings.TrimPrefix(f[1], "load::"))
			continue
		}
		if len(stack) == 0 {
			continue
		}
		samples++
		took[stack[0]]++
		for _, symbol := range stack {
			if symbol == "run" {
				inRun++
			}
		}
		stack = stack[:0]
	}
	if samples < 3000 {
		t.Fatalf("perf took %d samples in 4 s", samples)
	}
	checkShares(t, took, 3)
	if inRun < samples*95/100 {
		t.Errorf("load::run is in %d of %d stacks", inRun, samples)
	}
}

func TestPingPongSwitches(t *testing.T) {
	kerneltest.MeasureLock(t) // it burns CPU
	const rounds = 10007
	n := numbers(t, Start(t, Build(t, PingPong), "1", strconv.Itoa(rounds)).Wait())
	if n["rounds"] != rounds {
		t.Errorf("%d rounds, want %d", n["rounds"], rounds)
	}
	// Others that run on that CPU add a few.
	if d := n["switches"] - 2*rounds; d < -10 || d > 200 {
		t.Errorf("%d switches, want %d and at most 200 more", n["switches"], 2*rounds)
	}
}

func TestDirectReadReachesTheDevice(t *testing.T) {
	const reads = 1009
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, make([]byte, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	p := Start(t, Build(t, DirectRead), file, "4096", strconv.Itoa(reads))
	n := numbers(t, p.Wait())
	if n["reads"] != reads || n["bytes"] != reads*4096 {
		t.Errorf("%d reads of %d bytes, want %d of %d", n["reads"], n["bytes"], reads, reads*4096)
	}
	// The kernel charges direct reads as input blocks of 512 bytes.
	usage := p.cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if blocks := int64(reads * 8); usage.Inblock < blocks {
		t.Skipf("%d blocks were read from the device, not %d: the file system has no real direct I/O",
			usage.Inblock, blocks)
	}
}

func TestStormCounts(t *testing.T) {
	kerneltest.MeasureLock(t) // it burns CPU
	n := numbers(t, Start(t, Build(t, Storm), "4", "499").Wait())
	if n["processes"] != 499 {
		t.Errorf("%d processes, want 499", n["processes"])
	}
	// 0 to 7 ms in turn: 3.5 ms a process, and the cost of exec on top.
	if mean := n["cpu_ns"] / 499; mean < 3_400_000 || mean > 8_000_000 {
		t.Errorf("%d ns of CPU a process, want 3.5 to 8 ms", mean)
	}
}

func TestThreadsLiveThroughout(t *testing.T) {
	kerneltest.MeasureLock(t) // it burns CPU
	p := Start(t, Build(t, Threads), "5", "2", "1")
	p.Ready()
	tasks := func() int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.PID))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	for range 8 {
		if n := tasks(); n != 8 {
			t.Fatalf("%d threads, want 5 sleepers, 2 hogs and the main thread", n)
		}
		time.Sleep(100 * time.Millisecond)
	}
	p.Wait()
}

func TestBadELFRunsAndIsBad(t *testing.T) {
	kerneltest.MeasureLock(t) // it burns CPU
	path := Build(t, BadELF)
	for _, kind := range []string{"garbage", "header", "loop", "short"} {
		t.Run(kind, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), kind)
			p := Start(t, path, kind, file, "1")
			p.Ready()
			maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", p.PID))
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(maps), " r-xs 00000000") {
				t.Errorf("no executable mapping of the file in\n%s", maps)
			}
			p.Wait()
			if f, err := elf.Open(file); err == nil {
				t.Errorf("debug/elf reads it: %v", f.FileHeader)
			}
		})
	}
}

func TestCorruptStillRuns(t *testing.T) {
	kerneltest.MeasureLock(t) // it burns CPU
	for _, name := range []string{Burn, BurnGo} {
		path := Build(t, name)
		bad, err := Corrupt(t.TempDir(), path)
		if err != nil {
			t.Fatal(err)
		}
		checkShares(t, numbers(t, Start(t, bad, "1", "0.5").Wait()), 5)
		if f, err := elf.Open(bad); err == nil {
			if symbols, err := f.Symbols(); err == nil {
				t.Errorf("%s: debug/elf reads %d symbols", name, len(symbols))
			}
		}
	}
}

func TestNumbers(t *testing.T) {
	got, err := Numbers("reads 1009 bytes 4132864\n")
	if err != nil || got["reads"] != 1009 || got["bytes"] != 4132864 {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"reads", "reads many", "reads 1.5"} {
		if _, err := Numbers(bad); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func TestCompileUnknown(t *testing.T) {
	if _, err := Compile(t.TempDir(), "nothing"); err == nil || !strings.Contains(err.Error(), PingPong) {
		t.Errorf("%v does not say what there is", err)
	}
}
