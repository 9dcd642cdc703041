// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/google/pprof/profile"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/symbolizer"
	"github.com/hostflame/hostflame/test/workload"
)

// loads are what this test binary can do in another process, by HOSTFLAME_TEST_LOAD.
var loads = map[string]func() error{
	"burn":   func() error { burnForever(); return nil },
	"kernel": loadKernel,
	"vdso":   loadVDSO,
	"jit":    loadJIT,
	"memfd":  loadMemfd,
	"exec":   loadExec,
	"brief":  func() error { burnFor(30 * time.Millisecond); return nil },
	"leader": loadWithoutLeader,
	"waits":  loadWaits,
}

func TestMain(m *testing.M) {
	if load := os.Getenv("HOSTFLAME_TEST_LOAD"); load != "" {
		runtime.LockOSThread()
		if err := loads[load](); err != nil {
			fmt.Fprintln(os.Stderr, load, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var sink int

// burn has a frame of its own, which walks by frame pointers need.
//
//go:noinline
func burn(n int) {
	var a [64]int
	for i := range n {
		a[i%len(a)] += i
	}
	sink += a[n%len(a)]
}

//go:noinline
func burnForever() {
	for {
		burn(1 << 20)
	}
}

//go:noinline
func burnFor(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		burn(10_000)
	}
}

func loadKernel() error {
	for {
		unix.Getppid()
	}
}

func loadVDSO() error {
	for {
		sink += time.Now().Nanosecond()
	}
}

// loadJIT spins in a function in anonymous memory that only a perf map names.
func loadJIT() error {
	code := []byte{0x55, 0x48, 0x89, 0xe5, 0xeb, 0xfe} // push %rbp; mov %rsp,%rbp; jmp .
	if runtime.GOARCH == "arm64" {
		code = []byte{0xfd, 0x7b, 0xbf, 0xa9, 0xfd, 0x03, 0x00, 0x91, 0x00, 0x00, 0x00, 0x14} // stp x29, x30, [sp, #-16]!; mov x29, sp; b .
	}
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	copy(mem[256:], code)
	entry := &mem[256]
	perfMap := fmt.Sprintf("/tmp/perf-%d.map", os.Getpid())
	line := fmt.Sprintf("%x %x jitted_function\n", uintptr(unsafe.Pointer(entry)), len(code))
	if err := os.WriteFile(perfMap, []byte(line), 0o644); err != nil {
		return err
	}
	funcval := &entry
	(*(*func())(unsafe.Pointer(&funcval)))()
	return nil
}

// loadMemfd executes this program from memory.
func loadMemfd() error {
	fd, err := unix.MemfdCreate("burner", 0)
	if err != nil {
		return err
	}
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	if _, err := unix.Write(fd, exe); err != nil {
		return err
	}
	return unix.Exec(fmt.Sprintf("/proc/self/fd/%d", fd), []string{"memfd"}, []string{"HOSTFLAME_TEST_LOAD=burn"})
}

// loadExec burns, and then executes another program.
func loadExec() error {
	burnFor(1500 * time.Millisecond)
	return unix.Exec("/bin/sh", []string{"sh", "-c", "while :; do :; done"}, os.Environ())
}

// loadWithoutLeader ends the main thread and burns in another.
func loadWithoutLeader() error {
	go func() {
		time.Sleep(200 * time.Millisecond)
		burnForever()
	}()
	// The main goroutine is on the main thread.
	unix.RawSyscallNoError(unix.SYS_EXIT, 0, 0, 0)
	return nil
}

// start runs this test binary with a load until the test ends.
func start(t *testing.T, load string) int {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "HOSTFLAME_TEST_LOAD="+load)
	return startCommand(t, cmd)
}

func startCommand(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	// The signal comes when the thread ends that has started the program: so this one lives on.
	started, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		started <- cmd.Start()
		<-ended
		runtime.UnlockOSThread()
	}()
	if err := <-started; err != nil {
		close(ended)
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		close(ended)
	})
	return cmd.Process.Pid
}

// sampling runs a profiler of the real kernel, with windows of this length.
func sampling(t *testing.T, hz int, length time.Duration) (*Profiler, <-chan *Window) {
	t.Helper()
	kerneltest.Require(t)
	cpu, err := bpf.NewCPU(bpf.CPUConfig{Frequency: hz, CgroupV1: bpf.CPUControllerV1()})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	mappings, err := bpf.NewMappings(bpf.MappingsConfig{})
	if err != nil {
		t.Fatal(err)
	}
	s := symbolizer.New(symbolizer.Config{})
	p, err := New(Config{
		Feeds: []Feed{{Source: cpu, Profiles: []bpf.Profile{bpf.ProfileCPU}}}, Types: []Type{CPU("", hz)},
		Symbolizer: s, Tables: cpu.Tables(), Mappings: mappings, Window: length,
	})
	if err != nil {
		t.Fatal(err)
	}
	windows, end := runKernel(t, p, cpu.Detach)
	t.Cleanup(func() {
		end()
		cpu.Close()
		mappings.Close()
		s.Close()
	})
	await(t, "ready", p.Ready)
	return p, windows
}

// runKernel runs p, and returns its windows and what ends it after its source was detached.
func runKernel(t *testing.T, p *Profiler, detach func() error) (windows chan *Window, end func()) {
	t.Helper()
	windows = make(chan *Window, 100)
	p.OnWindow(func(w *Window) { windows <- w })
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	return windows, func() {
		if err := detach(); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// stacks are the samples of one process: their functions, leaf first, joined.
type stacks struct {
	count map[string]int64
	total int64
	p     *profile.Profile
}

func stacksOf(p *profile.Profile, pid int) stacks {
	s := stacks{count: map[string]int64{}, p: &profile.Profile{}}
	for _, sample := range p.Sample {
		if pids := sample.NumLabel["pid"]; len(pids) == 0 || pids[0] != int64(pid) {
			continue
		}
		s.p.Sample = append(s.p.Sample, sample)
		var list []string
		for _, l := range sample.Location {
			if len(l.Line) == 0 && l.Mapping != nil {
				list = append(list, "["+filepath.Base(l.Mapping.File)+"]")
			}
			for _, line := range l.Line {
				name := line.Function.Name
				list = append(list, name[strings.LastIndexAny(name, "./:")+1:])
			}
		}
		s.count[strings.Join(list, ";")] += sample.Value[0]
		s.total += sample.Value[0]
	}
	return s
}

// share is that of the samples whose stack satisfies f, in percent.
func (s stacks) share(f func(stack string) bool) float64 {
	var n int64
	for stack, count := range s.count {
		if f(stack) {
			n += count
		}
	}
	return 100 * float64(n) / float64(max(s.total, 1))
}

func contains(sub string) func(string) bool {
	return func(stack string) bool { return strings.Contains(stack, sub) }
}

// expect checks that at least a share of the samples satisfies f.
func (s stacks) expect(t *testing.T, what string, percent float64, f func(stack string) bool) {
	t.Helper()
	if s.total < 20 {
		t.Errorf("%s: %d samples", what, s.total)
		return
	}
	if got := s.share(f); got < percent {
		var lines []string
		for stack, n := range s.count {
			lines = append(lines, fmt.Sprintf("%5d %s", n, stack))
		}
		slices.Sort(lines)
		slices.Reverse(lines)
		t.Errorf("%s: %.1f %% of %d samples, want %v %%; most:\n%s", what, got, s.total, percent,
			strings.Join(lines[:min(len(lines), 12)], "\n"))
	}
}

// The functions of programs have the shares that they were built to have, and every stack
// is whole: through libc, which keeps no frame pointers, to where the process or a thread
// began.
func TestKernelShares(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	for _, test := range []struct {
		name  string
		whole *regexp.Regexp
	}{
		{workload.Burn, regexp.MustCompile(`(^|;)run;main;[^;]*libc[^;]*;.*_start$`)},
		{workload.BurnGo, regexp.MustCompile(`(;run;[^;]*;func1;goexit|;goexit|(^|;)mstart0;mstart|;rt0_go)$`)},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := workload.Start(t, workload.Build(t, test.name), "1", "60")
			_, windows := sampling(t, 997, 4*time.Second)
			got := stacksOf(pprofOf(t, (<-windows).Of("cpu")), w.PID)
			var spent [3]float64
			var names [3]string
			if _, err := fmt.Sscan(w.Stop(), &names[0], &spent[0], &names[1], &spent[1], &names[2], &spent[2]); err != nil {
				t.Fatal(err)
			}
			for i, name := range names {
				designed, real := workload.BurnShares[name], 100*spent[i]/(spent[0]+spent[1]+spent[2])
				share := got.share(func(stack string) bool { return slices.Contains(strings.Split(stack, ";"), name) })
				t.Logf("%s: %.1f %% of %d samples, designed %v %%, measured by itself %.1f %%", name, share, got.total, designed, real)
				if math.Abs(share-designed) > 5 {
					t.Errorf("%s: %.1f %% of %d samples, want %v", name, share, got.total, designed)
				}
			}
			got.expect(t, "whole stacks", 99, test.whole.MatchString)
		})
	}
}

// kernelEntry is where system calls enter the kernel.
var kernelEntry = map[string]string{"amd64": "do_syscall_64;entry_SYSCALL_64", "arm64": "el0_svc;"}

// What a stack can lead through.
func TestKernelMappings(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	dir := t.TempDir()
	program := workload.Build(t, workload.Burn)
	deleted := filepath.Join(dir, "deleted")
	copyFile(t, program, deleted)
	hidden := filepath.Join(dir, "hidden")
	write(t, filepath.Join(hidden, "burn"), "the file of this path outside of the mount namespace")

	pids := map[string]int{}
	for _, load := range []string{"kernel", "vdso", "jit", "memfd", "leader"} {
		pids[load] = start(t, load)
	}
	t.Cleanup(func() { os.Remove(fmt.Sprintf("/tmp/perf-%d.map", pids["jit"])) })
	pids["deleted"] = startCommand(t, exec.Command(deleted, "1", "60"))
	pids["hidden"] = startCommand(t, exec.Command("unshare", "-m", "sh", "-c",
		`mount -t tmpfs none "$1" && cp "$0" "$1/burn" && exec "$1/burn" 1 60`, program, hidden))
	await(t, "program in its own mount namespace", func() bool {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pids["hidden"]))
		return err == nil && exe == filepath.Join(hidden, "burn")
	})
	if err := os.Remove(deleted); err != nil {
		t.Fatal(err)
	}
	_, windows := sampling(t, 997, 6*time.Second)
	pids["exec"] = start(t, "exec")
	got := pprofOf(t, (<-windows).Of("cpu"))
	of := func(name string) stacks { return stacksOf(got, pids[name]) }

	// The system call is made by a function without a frame.
	of("kernel").expect(t, "kernel above user", 20, func(stack string) bool {
		return strings.Contains(stack, kernelEntry[runtime.GOARCH]) && strings.HasSuffix(stack, ";RawSyscallNoError;Getppid;loadKernel;TestMain;main;main;goexit")
	})
	of("vdso").expect(t, "vDSO", 20, contains("vdso_clock_gettime"))
	of("jit").expect(t, "JIT code named by a perf map", 90, contains("jitted_function;loadJIT;TestMain;main;main;goexit"))
	of("memfd").expect(t, "program in a memfd", 90, contains("burn;burnForever;"))
	of("leader").expect(t, "process whose main thread is gone", 90, contains("burn;burnForever;"))
	of("deleted").expect(t, "deleted file", 90, contains("run;main;"))
	of("hidden").expect(t, "file in another mount namespace", 90, contains("run;main;"))
	// Both programs of one process, each with its own mappings.
	of("exec").expect(t, "before execve", 5, contains("burn;burnFor;loadExec;"))
	of("exec").expect(t, "after execve", 30, contains("[dash+0x"))

	files := map[string]bool{}
	for _, m := range got.Mapping {
		files[m.File] = true
		if m.Start >= kernelHalf {
			continue
		}
		if strings.HasSuffix(m.File, "/burn") && m.BuildID == "" {
			t.Errorf("%s: no build id", m.File)
		}
	}
	for _, want := range []string{"[kernel.kallsyms]", "[vdso]", "[anon]", "/memfd:burner", deleted, filepath.Join(hidden, "burn")} {
		if !files[want] {
			t.Errorf("no mapping %s", want)
		}
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

// A process that is gone when its samples are drained is in the profile by its name, with
// whole stacks: the program that it was is known of others.
func TestKernelBriefProcesses(t *testing.T) {
	p, _ := sampling(t, 997, time.Hour)
	// The table of their program is in the kernel once a stack of it has been walked.
	first := exec.Command("/proc/self/exe")
	first.Env = []string{"HOSTFLAME_TEST_LOAD=burn"}
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "the table of the program", func() bool {
		got, err := p.Capture(context.Background(), Request{Duration: 200 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(slices.Collect(maps.Keys(stacksOf(got, first.Process.Pid).count)), func(stack string) bool {
			return strings.Contains(stack, "burnForever")
		})
	})
	first.Process.Kill()
	first.Wait()
	got := make(chan *profile.Profile, 1)
	go func() {
		p, err := p.Capture(context.Background(), Request{Duration: 3 * time.Second})
		if err != nil {
			t.Error(err)
		}
		got <- p
	}()
	pids := map[int64]bool{}
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{"HOSTFLAME_TEST_LOAD=brief"}
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		pids[int64(cmd.Process.Pid)] = true
	}
	var samples, due, whole int64
	for _, s := range (<-got).Sample {
		if len(s.NumLabel["pid"]) == 0 || !pids[s.NumLabel["pid"][0]] {
			continue
		}
		samples += s.Value[0]
		if s.Label["comm"][0] == "" || s.Label["container"][0] == "" {
			t.Errorf("labels %v", s.Label)
		}
		root := ""
		if l := s.Location[len(s.Location)-1]; len(l.Line) > 0 {
			root = l.Line[len(l.Line)-1].Function.Name
		}
		if root == "[exec]" || root == "[exiting]" {
			continue
		}
		due += s.Value[0]
		if root != "" && root[0] != '[' {
			whole += s.Value[0]
		}
	}
	t.Logf("%d processes, %d samples, %d of them outside execve and exit, %d whole", len(pids), samples, due, whole)
	if samples < int64(5*len(pids)) || whole < due*9/10 {
		t.Errorf("%d samples of %d processes of 30 ms at 997 Hz, %d of %d whole; stacks %v", samples, len(pids), whole, due, p.Stats().Stacks["cpu"])
	}
}

// Samples carry the container, and its sampled CPU time is what the kernel accounts to it.
func TestKernelContainer(t *testing.T) {
	kerneltest.Require(t)
	kerneltest.MeasureLock(t)
	p, _ := sampling(t, 997, time.Hour)
	const container = "0a1b2c3d4e5f"
	program := workload.Build(t, workload.Burn)
	pid := inCgroup(t, testID, program, "1", "60").Process.Pid
	await(t, "program in the container", func() bool { return cpuOf(p, container) > 100*time.Millisecond })
	sampled, accounted, host := cpuOf(p, container), processTime(t, pid), kerneltest.ReadHostCPU(t)
	got, err := p.Capture(context.Background(), Request{Duration: 4 * time.Second, Filter: Filter{PIDs: []uint32{uint32(pid)}}})
	if err != nil {
		t.Fatal(err)
	}
	sampled, accounted = cpuOf(p, container)-sampled, processTime(t, pid)-accounted
	for _, s := range got.Sample {
		if c := s.Label["container"]; c[0] != container {
			t.Errorf("container %q, want %q", c, container)
		}
	}
	if total(got) < 100 {
		t.Errorf("%d samples", total(got))
	}
	ratio := sampled.Seconds() / accounted.Seconds()
	// The timer goes on in what is stolen, the kernel's account does not.
	most := time.Duration(float64(accounted) * kerneltest.ReadHostCPU(t).Since(host).Stretch())
	t.Logf("sampled %v, accounted %v, with what was stolen %v: ratio %.3f", sampled, accounted, most, ratio)
	// Both readings of the clock come soon after a drain.
	if sampled < accounted-400*time.Millisecond || sampled > most+400*time.Millisecond {
		t.Errorf("sampled %v, accounted %v to %v", sampled, accounted, most)
	}
	for _, c := range p.CPUByContainer() {
		if c.Container == container && c.User < 10*c.System {
			t.Errorf("a program that computes: %v user, %v system", c.User, c.System)
		}
	}
}

func cpuOf(p *Profiler, container string) time.Duration {
	for _, c := range p.CPUByContainer() {
		if c.Container == container {
			return c.User + c.System
		}
	}
	return 0
}

// processTime is the CPU time of a process of one thread, by the scheduler's own books.
func processTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.Fields(string(b))[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(n)
}
