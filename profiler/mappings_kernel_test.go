// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/test/workload"
)

var _ = func() bool {
	maps.Copy(loads, map[string]func() error{
		"mapping-thread": loadExecInThread,
		"mapping-remap":  loadRemap,
	})
	return true
}()

// loadExecInThread executes a program in another thread than the main one.
func loadExecInThread() error {
	failed := make(chan error)
	go func() {
		runtime.LockOSThread()
		failed <- unix.Exec("/bin/sh", []string{"sh", "-c", "read line"}, os.Environ())
	}()
	return <-failed
}

// loadRemap maps a library, moves it with mremap, which is not told, and waits.
func loadRemap() error {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	// Not where it can grow: it has to move.
	moved, err := unix.Mremap(b, 1<<20, unix.MREMAP_MAYMOVE)
	if err != nil {
		return err
	}
	fmt.Printf("%p\n", &moved[0])
	select {}
}

// follow knows the mappings of the real kernel.
func follow(t testing.TB) (*eventMappings, *bpf.Mappings) {
	t.Helper()
	kerneltest.Require(t)
	events, err := bpf.NewMappings(bpf.MappingsConfig{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := newEventMappings(events, newProcfs("/proc"), 16<<10)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.run(ctx, func() {}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		for reason, n := range events.Stats().Lost {
			if n > 0 {
				t.Errorf("%d events lost: %s", n, reason)
			}
		}
		events.Close()
	})
	return m, events
}

// sampleOf is a sample of a process that was born after a time, taken now.
func sampleOf(pid int, after time.Duration) bpf.Sample {
	return bpf.Sample{PID: uint32(pid), TID: uint32(pid), Start: uint64(after), Time: uint64(bootTime())}
}

// paths are the files of the mappings of s.
func paths(t testing.TB, m *eventMappings, s bpf.Sample) []string {
	t.Helper()
	list, err := m.mappings(&s)
	if err != nil {
		t.Errorf("process %d: %v", s.PID, err)
	}
	var names []string
	for _, v := range list {
		names = append(names, v.path)
	}
	return names
}

// awaitMapped waits until a process has mapped a file.
func awaitMapped(t *testing.T, m *eventMappings, pid int, after time.Duration, path string) {
	t.Helper()
	await(t, path, func() bool {
		s := sampleOf(pid, after)
		list, _ := m.mappings(&s)
		return slices.ContainsFunc(list, func(v vma) bool { return v.path == path })
	})
}

func resolved(t testing.TB, path string) string {
	t.Helper()
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func isLibc(path string) bool { return strings.Contains(path, "libc.so") }

// Every one of a thousand short programs is known after its end, by its own file and libc,
// and nothing is read for it.
func TestKernelMappingsStorm(t *testing.T) {
	m, events := follow(t)
	program := resolved(t, "/bin/true")
	before := events.Stats()
	reads := m.stats().Reads
	const rounds, each = 20, 50
	for range rounds {
		var samples []bpf.Sample
		for range each {
			after := bootTime()
			cmd := exec.Command(program)
			if err := cmd.Run(); err != nil {
				t.Fatal(err)
			}
			samples = append(samples, sampleOf(cmd.Process.Pid, after))
		}
		for _, s := range samples {
			if files := paths(t, m, s); !slices.Contains(files, program) || !slices.ContainsFunc(files, isLibc) || !slices.Contains(files, "[vdso]") {
				t.Fatalf("process %d: %q", s.PID, files)
			}
		}
	}
	after := events.Stats()
	mapped, executed := after.Events[bpf.MappingMap]-before.Events[bpf.MappingMap], after.Events[bpf.MappingExec]-before.Events[bpf.MappingExec]
	t.Logf("%d mappings of %d programs", mapped, executed)
	if executed < rounds*each || mapped < 4*rounds*each {
		t.Errorf("%d mappings of %d programs, want at least %d programs", mapped, executed, rounds*each)
	}
	if now := m.stats().Reads; now["unknown"] != reads["unknown"] || now["missing"] != reads["missing"] || now["lost"] != reads["lost"] {
		t.Errorf("/proc was read: %v, before %v", now, reads)
	}
}

// The ways to come to be and to map.
func TestKernelMappingsWays(t *testing.T) {
	m, _ := follow(t)
	shell := resolved(t, "/bin/sh")

	t.Run("dlopen", func(t *testing.T) {
		kerneltest.RequireTool(t, "perl")
		after := bootTime()
		cmd := exec.Command("perl", "-MPOSIX", "-e", "1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if files := paths(t, m, sampleOf(cmd.Process.Pid, after)); !slices.ContainsFunc(files, func(f string) bool { return strings.HasSuffix(f, "/POSIX.so") }) {
			t.Errorf("%q", files)
		}
	})

	t.Run("fork without exec", func(t *testing.T) {
		kerneltest.RequireTool(t, "perl")
		after := bootTime()
		out, err := exec.Command("perl", "-e", `if ($p = fork) { waitpid $p, 0; print $p }`).Output()
		if err != nil {
			t.Fatal(err)
		}
		child, err := strconv.Atoi(string(out))
		if err != nil {
			t.Fatal(err)
		}
		if files := paths(t, m, sampleOf(child, after)); !slices.Contains(files, resolved(t, "/usr/bin/perl")) || !slices.ContainsFunc(files, isLibc) {
			t.Errorf("%q", files)
		}
	})

	t.Run("exec in a thread", func(t *testing.T) {
		after := bootTime()
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{"HOSTFLAME_TEST_LOAD=mapping-thread"}
		stdin, err := cmd.StdinPipe() // the shell lives until it is closed
		if err != nil {
			t.Fatal(err)
		}
		pid := startCommand(t, cmd)
		awaitMapped(t, m, pid, after, shell)
		s := sampleOf(pid, after)
		if files := paths(t, m, s); !slices.Contains(files, shell) || slices.Contains(files, os.Args[0]) {
			t.Errorf("%q", files)
		}
		m.mu.Lock()
		if l := m.lives.find(PID(pid), s.Start); l.died != 0 || l.threads != 1 {
			t.Errorf("died %d, %d threads", l.died, l.threads)
		}
		m.mu.Unlock()
		stdin.Close()
		cmd.Wait()
		if files := paths(t, m, sampleOf(pid, after)); !slices.Contains(files, shell) {
			t.Errorf("after its end: %q", files)
		}
		m.mu.Lock()
		if l := m.lives.find(PID(pid), s.Start); l.died == 0 {
			t.Errorf("it lives, with %d threads", l.threads)
		}
		m.mu.Unlock()
	})

	t.Run("main thread gone", func(t *testing.T) {
		after := bootTime()
		pid := start(t, "leader")
		await(t, "end of the main thread", func() bool {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			return err == nil && strings.Contains(string(b), ") Z ")
		})
		if files := paths(t, m, sampleOf(pid, after)); !slices.Contains(files, resolved(t, "/proc/self/exe")) {
			t.Errorf("%q", files)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if l := m.lives.find(PID(pid), uint64(after)); l.died != 0 {
			t.Error("a process with threads passes for dead")
		}
	})

	t.Run("pid reuse", func(t *testing.T) {
		const last = "/proc/sys/kernel/ns_last_pid"
		type use struct {
			after   time.Duration
			program string
			sample  bpf.Sample
		}
		var uses []use
		pid := 0
		for n := 0; len(uses) < 4 && n < 1000; n++ {
			program := []string{"/bin/true", "/bin/sleep"}[len(uses)%2]
			if pid != 0 {
				if err := os.WriteFile(last, []byte(strconv.Itoa(pid-1)), 0); err != nil {
					t.Skip("process ids can not be chosen: ", err)
				}
			}
			after := bootTime()
			cmd := exec.Command(program, "0")
			if err := cmd.Run(); err != nil {
				t.Fatal(err)
			}
			if pid == 0 {
				pid = cmd.Process.Pid
			}
			if cmd.Process.Pid == pid {
				uses = append(uses, use{after, resolved(t, program), sampleOf(pid, after)})
			}
		}
		if len(uses) < 4 {
			t.Fatalf("an id was used %d times", len(uses))
		}
		for n, u := range uses {
			if files := paths(t, m, u.sample); !slices.Contains(files, u.program) {
				t.Errorf("use %d: %q, want %s", n, files, u.program)
			}
		}
	})

	t.Run("deleted", func(t *testing.T) {
		dir := t.TempDir()
		program := filepath.Join(dir, "deleted")
		copyFile(t, resolved(t, "/bin/sleep"), program)
		after := bootTime()
		alive := startCommand(t, exec.Command(program, "60"))
		awaitMapped(t, m, alive, after, program)
		brief := exec.Command(program, "0")
		if err := brief.Run(); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(program); err != nil {
			t.Fatal(err)
		}
		// Another file has the path now.
		write(t, program, "not it")
		for _, pid := range []int{alive, brief.Process.Pid} {
			if !opens(t, m, pid, after, program, resolved(t, "/bin/sleep")) {
				t.Errorf("process %d: its deleted file can not be opened", pid)
			}
		}
	})

	t.Run("memfd", func(t *testing.T) {
		after := bootTime()
		pid := start(t, "memfd")
		const name = "/memfd:burner (deleted)"
		awaitMapped(t, m, pid, after, name)
		if !opens(t, m, pid, after, name, "/proc/self/exe") {
			t.Error("it can not be opened")
		}
	})

	t.Run("chroot", func(t *testing.T) {
		root := t.TempDir()
		program := workload.Build(t, workload.BurnGo)
		if err := os.Mkdir(filepath.Join(root, "bin"), 0o755); err != nil {
			t.Fatal(err)
		}
		copyFile(t, program, filepath.Join(root, "bin/confined"))
		after := bootTime()
		run := func() (pid int, end func()) {
			cmd := exec.Command("/bin/confined", "1", "60")
			cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Pdeathsig: syscall.SIGKILL}
			cmd.Dir = "/"
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			end = func() {
				cmd.Process.Kill()
				cmd.Wait()
			}
			t.Cleanup(end)
			return cmd.Process.Pid, end
		}
		alive, _ := run()
		awaitMapped(t, m, alive, after, "/bin/confined")
		gone, end := run()
		awaitMapped(t, m, gone, after, "/bin/confined")
		end()
		for _, pid := range []int{alive, gone} {
			if !opens(t, m, pid, after, "/bin/confined", program) {
				t.Errorf("process %d: its file can not be opened", pid)
			}
		}
		// Read from /proc it is the same.
		r, err := newProcfs("/proc").readProcess(PID(alive), 0)
		if err != nil || !slices.ContainsFunc(r.vmas, func(v vma) bool { return v.path == "/bin/confined" }) {
			t.Errorf("%+v, %v", r.vmas, err)
		}
	})

	t.Run("mremap", func(t *testing.T) {
		after := bootTime()
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{"HOSTFLAME_TEST_LOAD=mapping-remap"}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		startCommand(t, cmd)
		var text string
		if _, err := fmt.Fscan(out, &text); err != nil {
			t.Fatal(err)
		}
		addr, err := strconv.ParseUint(strings.TrimPrefix(text, "0x"), 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		r, err := newProcfs("/proc").readProcess(PID(cmd.Process.Pid), 0)
		if err != nil {
			t.Fatal(err)
		}
		s := sampleOf(cmd.Process.Pid, after)
		s.Start, s.User = r.start*nanosPerTick, []uint64{addr | bpf.ExactAddr}
		list, err := m.mappings(&s)
		if err != nil || vmaAt(list, addr) == nil {
			t.Errorf("%x is not in %+v, %v", addr, list, err)
		}
		if n := m.stats().Reads["missing"]; n == 0 {
			t.Error("it was known without a look: the test is none")
		}
	})
}

// opens tells whether the file of that path which a process has mapped opens, and is the
// same as another file.
func opens(t *testing.T, m *eventMappings, pid int, after time.Duration, path, same string) bool {
	t.Helper()
	s := sampleOf(pid, after)
	list, err := m.mappings(&s)
	if err != nil {
		t.Errorf("process %d: %v", pid, err)
	}
	n := slices.IndexFunc(list, func(v vma) bool { return v.path == path })
	if n < 0 {
		t.Errorf("process %d: no %s in %+v", pid, path, list)
		return false
	}
	f, err := m.open(PID(pid), list[n])
	if err != nil {
		t.Logf("process %d: %v", pid, err)
		return false
	}
	defer f.Close()
	got, err1 := f.Stat()
	want, err2 := os.Stat(same)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return got.Size() == want.Size()
}

// What is known without a look agrees with /proc, for every process of the host.
func TestKernelMappingsAgreeWithProc(t *testing.T) {
	m, _ := follow(t)
	program := resolved(t, "/bin/sleep")
	for range 20 {
		startCommand(t, exec.Command(program, "60"))
	}
	await(t, "initial processes", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return len(m.initial) == 0
	})
	p := newProcfs("/proc")
	pids, err := p.pids()
	if err != nil {
		t.Fatal(err)
	}
	compared, differ := 0, 0
	for _, pid := range pids {
		r, err := p.readProcess(pid, 0)
		if err != nil || len(r.vmas) == 0 {
			continue
		}
		s := bpf.Sample{PID: uint32(pid), TID: uint32(pid), Start: r.start * nanosPerTick, Time: uint64(bootTime()), Comm: r.comm}
		known, err := m.mappings(&s)
		if err != nil {
			continue // it has ended, or executed, between the two
		}
		for _, v := range r.vmas {
			if v.start >= kernelHalf { // [vsyscall]
				continue
			}
			compared++
			k := vmaAt(known, v.start)
			if k == nil || k.path != v.path && !strings.HasPrefix(v.path, "[anon") || k.inode != v.inode || k.end < v.end || k.offset-k.start != v.offset-v.start && v.inode != 0 {
				differ++
				t.Logf("process %d %s: %+v, known %+v", pid, r.comm, v, k)
			}
		}
	}
	if compared < 60 || differ*100 > compared {
		t.Errorf("%d of %d mappings differ", differ, compared)
	}
}

// BenchmarkMappingsStorm is what a short program costs us in user space.
func BenchmarkMappingsStorm(b *testing.B) {
	kerneltest.Require(b)
	m, events := follow(b)
	before, reads := processCPU(b), events.Stats()
	cmd := exec.Command("/bin/sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do /bin/true; i=$((i+1)); done", b.N))
	if err := cmd.Run(); err != nil {
		b.Fatal(err)
	}
	m.mu.Lock()
	m.drain()
	m.mu.Unlock()
	spent := processCPU(b) - before
	var n uint64
	for kind, count := range events.Stats().Events {
		n += count - reads.Events[kind]
	}
	b.ReportMetric(float64(spent)/float64(b.N), "cpu-ns/op")
	b.ReportMetric(float64(spent)/float64(n), "cpu-ns/event")
	b.ReportMetric(float64(n)/float64(b.N), "events/op")
}

// processCPU is the CPU time of this process.
func processCPU(t testing.TB) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
