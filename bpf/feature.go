// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Feature is one thing that the agent can use, and whether this kernel and these
// privileges let it.
type Feature struct {
	Name      string `json:"name"`
	Available bool   `json:"available"`
	Detail    string `json:"detail"`         // what was found, or why not
	Lost      string `json:"lost,omitempty"` // what is lost without it; empty when available
	Hint      string `json:"hint,omitempty"` // what to do; empty when available
}

// The features that are what the agent is for: each is one object, loaded and attached
// for a moment. Where none of them is available the agent can not serve.
const (
	FeatureCPU   = "cpu-sampling"
	FeatureSched = "runqueue-latency"
	FeatureBlock = "block-io"
)

// Probe tries everything the agent can use, by doing it: it loads, attaches and closes
// programs, and changes nothing that outlives it. It takes about a second, and needs no
// privileges: what is refused comes back as not available.
func Probe() []Feature {
	var list []Feature
	for _, p := range probes() {
		f := Feature{Name: p.name}
		detail, err := p.try()
		if f.Available = err == nil; f.Available {
			f.Detail = detail
		} else {
			f.Detail, f.Lost, f.Hint = firstLine(err), p.lost, p.hint
		}
		list = append(list, f)
	}
	return list
}

// Serves tells whether an agent here would have anything to serve.
func Serves(list []Feature) bool {
	for _, f := range list {
		switch f.Name {
		case FeatureCPU, FeatureSched, FeatureBlock:
			if f.Available {
				return true
			}
		}
	}
	return false
}

// probe is one row of the list. try returns what it found, or why it is not there.
type probe struct {
	name, lost, hint string
	try              func() (string, error)
}

const capabilityHint = "run as root, or with CAP_BPF and CAP_PERFMON (deploy/hostflame.service shows how)"

func probes() []probe {
	list := []probe{
		{FeatureCPU, "the cpu profile and hostflame_cpu_seconds_total", capabilityHint, tryCPU},
		{FeatureSched, "the scheduler's metrics: hostflame_runqueue_*, hostflame_offcpu_seconds, hostflame_preemptions_total, and those by container", capabilityHint + "; it needs BTF, and CONFIG_FAIR_GROUP_SCHED=y", trySched},
		{FeatureBlock, "the hostflame_block_io_* histograms", capabilityHint + "; it needs BTF and the block tracepoints", tryBlock},
		{"kernel", "", "", kernelRelease},
		{"btf", "all BPF programs: they find the kernel's fields by it", "use a kernel with CONFIG_DEBUG_INFO_BTF=y", tryBTF},
		{"ringbuf", "the cpu profile", "use Linux 5.8 or newer", func() (string, error) { return "", features.HaveMapType(ebpf.RingBuf) }},
		{"task-storage", "what " + FeatureSched + " needs", "use Linux 5.11 or newer", func() (string, error) { return "", features.HaveMapType(ebpf.TaskStorage) }},
		{"tp_btf", "what " + FeatureSched + " and " + FeatureBlock + " need", "use Linux 5.5 or newer with CONFIG_BPF_EVENTS=y", tryRawTracepoint},
		{"tracepoint-sched_switch", "what " + FeatureSched + " needs", "use a kernel with CONFIG_TRACEPOINTS=y", func() (string, error) { return tracepoint("sched_switch") }},
		{"tracepoint-sched_exit_tp", "the cheap way of the profiles runqueue, culprit, offcpu and wall: a kprobe does it", "Linux 6.16 and newer have it", func() (string, error) { return tracepoint("sched_exit_tp") }},
		{"tracepoint-block_io_start", "exact queue times of block I/O: a request starts at the kernel's own stamp, which is that of its allocation", "Linux 6.5 and newer have it", func() (string, error) { return tracepoint("block_io_start") }},
		{"sched-info", "the cheap way of " + FeatureSched + ": wakeups are stamped, by hooks of their own", "use a kernel with CONFIG_SCHED_INFO=y", trySchedInfo},
		{"quota-waits", "hostflame_runqueue_delay_seconds_total{cause=\"quota\"}: waits for lack of quota show as others", "use a kernel with CONFIG_CFS_BANDWIDTH=y", tryQuotaWaits},
		{"perf-cpu-clock", "the cpu profile", "run with CAP_PERFMON; a container's seccomp filter may refuse perf_event_open", func() (string, error) {
			return tryPerfEvent(unix.PERF_TYPE_SOFTWARE, unix.PERF_COUNT_SW_CPU_CLOCK)
		}},
		{"perf-cycles", "--sampling.event=cycles; cpu-clock does without", "nothing on a virtual machine without a PMU; else run with CAP_PERFMON", func() (string, error) {
			return tryPerfEvent(unix.PERF_TYPE_HARDWARE, unix.PERF_COUNT_HW_CPU_CYCLES)
		}},
		{"perf-event-paranoid", "the cpu profile", "give the agent CAP_PERFMON; Debian's kernels refuse even that at 3: set the sysctl kernel.perf_event_paranoid=2, or add CAP_SYS_ADMIN", perfEventParanoid},
		{"kprobe", "the profiles runqueue, culprit, offcpu and wall, where the tracepoint sched_exit_tp is missing too", "CONFIG_KPROBES=y, and no kernel lockdown", tryKprobe},
		{"fentry", "nothing in this version", "CONFIG_FUNCTION_TRACER=y, and no kernel lockdown", tryFentry},
		{"lockdown", "kprobe and fentry, where it is in force", "boot with lockdown=none if you need them; the agent does not", lockdown},
		{"bpf-stats", "hostflame_bpf_program_run_seconds_total; the runs are counted all the same", "run with CAP_SYS_ADMIN, or set the sysctl kernel.bpf_stats_enabled=1 (it costs some 20 ns a run)", tryStats},
		{"kallsyms", "names of kernel functions: they show as addresses", "run with CAP_SYSLOG, or set the sysctl kernel.kptr_restrict=0", tryKallsyms},
		{"map_files", "files of other mount namespaces, and deleted ones, by their mapping; /proc/PID/root is tried instead", "run with CAP_CHECKPOINT_RESTORE and CAP_SYS_PTRACE", tryMapFiles},
		{"cgroups", "containers: all CPU time is that of /", "mount /sys/fs/cgroup in the agent's mount namespace", cgroupLayout},
	}
	for _, c := range capabilities {
		list = append(list, probe{c.name, c.lost, c.hint, c.try})
	}
	return list
}

func tryCPU() (string, error) {
	const hz = 99
	c, err := NewCPU(CPUConfig{Frequency: hz, CgroupV1: CPUControllerV1()})
	if err != nil {
		return "", err
	}
	n := len(c.links)
	return fmt.Sprintf("%s at %d Hz on %d CPUs", EventCPUClock, hz, n), c.Close()
}

func trySched() (string, error) {
	s, err := NewSched(SchedConfig{CgroupV1: CPUControllerV1()})
	if err != nil {
		return "", err
	}
	detail := "sched_switch; waits from sched_info"
	if s.stamps {
		detail = "sched_switch, sched_wakeup, sched_wakeup_new; waits from stamps"
	}
	return detail, s.Close()
}

func tryBlock() (string, error) {
	b, err := NewBlock(BlockConfig{})
	if err != nil {
		return "", err
	}
	detail := "block_io_start, block_rq_issue, block_rq_complete"
	if !b.OwnStart() {
		detail = "block_rq_issue, block_rq_complete; starts are the kernel's stamps"
	}
	return detail, b.Close()
}

func kernelRelease() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:]), nil
}

func tryBTF() (string, error) {
	_, err := btf.LoadKernelSpec()
	return "/sys/kernel/btf/vmlinux", err
}

// returnZero is the body of the programs that only try whether the kernel takes them.
var returnZero = asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}

func tryRawTracepoint() (string, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "hf_probe", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp,
		AttachTo: "sched_switch", Instructions: returnZero, License: "Dual BSD/GPL",
	})
	if err != nil {
		return "", fmt.Errorf("load program: %w", err)
	}
	return "", p.Close()
}

// tracepoint finds a tracepoint in BTF and lists its arguments.
func tracepoint(name string) (string, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return "", err
	}
	var td *btf.Typedef
	if err := spec.TypeByName("btf_trace_"+name, &td); err != nil {
		return "", fmt.Errorf("not in this kernel's BTF: %w", err)
	}
	ptr, ok := td.Type.(*btf.Pointer)
	if !ok {
		return "", fmt.Errorf("btf_trace_%s is not a pointer", name)
	}
	proto, ok := ptr.Target.(*btf.FuncProto)
	if !ok || len(proto.Params) == 0 {
		return "", fmt.Errorf("btf_trace_%s is not a function with arguments", name)
	}
	var args []string
	for _, p := range proto.Params[1:] { // the first is the probe's own data
		args = append(args, typeName(p.Type))
	}
	return "(" + strings.Join(args, ", ") + ")", nil
}

// typeName spells a type as C does, as far as tracepoint arguments need it.
func typeName(t btf.Type) string {
	switch t := t.(type) {
	case *btf.Pointer:
		return typeName(t.Target) + " *"
	case *btf.Const:
		return "const " + typeName(t.Type)
	case *btf.Struct:
		return "struct " + t.Name
	case *btf.Void:
		return "void"
	}
	return t.TypeName()
}

// tryQuotaWaits tells what the time that a container was throttled is read from.
func tryQuotaWaits() (string, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return "", err
	}
	for _, f := range []struct{ member, note string }{
		{"throttled_clock_self_time", ""},
		{"throttled_clock_pelt_time", ", whose clock is slower on slow CPUs"},
	} {
		if hasMember(spec, "cfs_rq", f.member) {
			return f.member + f.note, nil
		}
	}
	return "", errors.New("struct cfs_rq has no throttled time")
}

func trySchedInfo() (string, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return "", err
	}
	var info *btf.Struct
	if err := spec.TypeByName("sched_info", &info); err != nil {
		return "", fmt.Errorf("struct sched_info: %w", err)
	}
	want := map[string]bool{"run_delay": true, "last_queued": true}
	for _, m := range info.Members {
		delete(want, m.Name)
	}
	// CONFIG_SCHED_INFO off leaves the struct, empty.
	if len(want) > 0 {
		return "", errors.New("task_struct.sched_info has no run_delay or no last_queued")
	}
	return "", nil
}

func tryPerfEvent(kind uint32, config uint64) (string, error) {
	attr := unix.PerfEventAttr{
		Type: kind, Config: config, Size: uint32(unix.PERF_ATTR_SIZE_VER5),
		Sample: 1 << 30, Bits: unix.PerfBitDisabled,
	}
	cpus, err := OnlineCPUs()
	if err != nil {
		return "", err
	}
	fd, err := unix.PerfEventOpen(&attr, -1, cpus[0], -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return "", fmt.Errorf("perf_event_open on CPU %d: %w", cpus[0], err)
	}
	return "", unix.Close(fd)
}

func perfEventParanoid() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/perf_event_paranoid")
	if err != nil {
		return "", err
	}
	v := strings.TrimSpace(string(b))
	detail := "kernel.perf_event_paranoid=" + v
	if admin, err := haveCapability(unix.CAP_SYS_ADMIN); err != nil || admin {
		return detail, err
	}
	// Per-CPU events are refused at 1 and above without the capability, and above 2, which
	// only some distributions' kernels know, with it.
	perfmon, err := haveCapability(unix.CAP_PERFMON)
	switch {
	case err != nil:
		return detail, err
	case !perfmon && v != "0" && v != "-1":
		return "", errors.New(detail + " and no CAP_PERFMON")
	case perfmon && v != "0" && v != "-1" && v != "1" && v != "2":
		return "", errors.New(detail + " and no CAP_SYS_ADMIN")
	}
	return detail, nil
}

// quietFunction exists for the kernel's own BPF tests and is never called otherwise.
const quietFunction = "bpf_fentry_test1"

func tryKprobe() (string, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "hf_probe", Type: ebpf.Kprobe, Instructions: returnZero, License: "Dual BSD/GPL",
	})
	if err != nil {
		return "", fmt.Errorf("load program: %w", err)
	}
	defer p.Close()
	// Without it the library falls back to tracefs, and its error is about that.
	if _, err := os.Stat("/sys/bus/event_source/devices/kprobe"); err != nil {
		return "", fmt.Errorf("no kprobe events in this kernel: %w", err)
	}
	l, err := link.Kprobe(quietFunction, p, nil)
	if err != nil {
		return "", fmt.Errorf("attach: %w", err)
	}
	return "", l.Close()
}

func tryFentry() (string, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "hf_probe", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFEntry,
		AttachTo: quietFunction, Instructions: returnZero, License: "Dual BSD/GPL",
	})
	if err != nil {
		return "", fmt.Errorf("load program: %w", err)
	}
	defer p.Close()
	l, err := link.AttachTracing(link.TracingOptions{Program: p})
	if err != nil {
		return "", fmt.Errorf("attach: %w", err)
	}
	return "", l.Close()
}

func tryStats() (string, error) {
	const sysctl = "/proc/sys/kernel/bpf_stats_enabled"
	if b, err := os.ReadFile(sysctl); err == nil && strings.TrimSpace(string(b)) == "1" {
		return "kernel.bpf_stats_enabled=1", nil
	}
	c, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return "", fmt.Errorf("BPF_ENABLE_STATS: %w", err)
	}
	return "by BPF_ENABLE_STATS", c.Close()
}

// firstLine is the error without the verifier's log, and without the library's guess
// about RLIMIT_MEMLOCK, which no kernel since 5.11 looks at.
func firstLine(err error) string {
	s, _, _ := strings.Cut(err.Error(), "\n")
	s, _, _ = strings.Cut(s, " (MEMLOCK may be too low")
	return s
}
