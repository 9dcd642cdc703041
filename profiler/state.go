// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/symbolizer"
)

// States tells what a thread was doing when a sample was taken of it, from the names of its
// kernel stack and from what the kernel side knows. It is for one goroutine.
type States struct {
	symbols *symbolizer.Symbolizer
	known   map[uint64]waitFrame // by address
}

// waitFrame is what a frame of a kernel stack tells.
type waitFrame struct {
	state  string // "": nothing
	accept bool   // it waits for a connection
}

// maxWaitFrames bounds the addresses that are remembered; there are some hundreds.
const maxWaitFrames = 8192

// NewStates returns States that take the names of kernel functions from symbols.
func NewStates(symbols *symbolizer.Symbolizer) *States {
	return &States{symbols, map[uint64]waitFrame{}}
}

// frame tells what is known of an address. Asking the symbolizer and the rules takes a
// hundred times as long as remembering.
func (st *States) frame(addr uint64) waitFrame {
	f, ok := st.known[addr]
	if ok {
		return f
	}
	if found := st.symbols.Kernel([]uint64{addr}); len(found[0].Lines) > 0 {
		name, _, _ := strings.Cut(found[0].Lines[0].Function, ".")
		f = waitFrame{stateByName(name), strings.Contains(name, "accept")}
	}
	if len(st.known) >= maxWaitFrames {
		clear(st.known)
	}
	st.known[addr] = f
	return f
}

const stateLabel = "state"

// The values of the label `state`.
const (
	stateCPU       = "cpu"
	stateRunqueue  = "runqueue"
	stateBlockIO   = "block_io"
	stateLock      = "lock"
	stateCondition = "condition"
	stateNetwork   = "network"
	statePoll      = "poll"
	statePipe      = "pipe"
	stateSleep     = "sleep"
	statePageFault = "page_fault"
	stateChild     = "child"
	stateSignal    = "signal"
	stateOther     = "other"
)

// stateRule names the state of threads that are blocked in a kernel function.
type stateRule struct {
	state     string
	functions []string // with a * at the end: those that begin so
}

// stateRules are tried for each frame of a kernel stack, from the leaf to the root: the
// first frame that one fits decides. Compilers append to names (.isra.0, .part.0), which does not count.
var stateRules = []stateRule{
	{statePageFault, []string{"asm_exc_page_fault", "exc_page_fault", "do_user_addr_fault", "do_page_fault", "el0_da", "el0_ia"}},
	{stateBlockIO, []string{
		"io_schedule*", "folio_wait_*", "wait_on_page_*", "blk_*", "submit_bio_wait", "jbd2_*", "ext4_sync_file",
		"xfs_log_force*", "xlog_*", "btrfs_*", "bit_wait_io*", "__wait_on_buffer", "bio_await*", "dquot_*",
		"iomap_dio_*", "__iomap_dio_rw", "sync_inodes_sb", "wb_wait_for_completion", "balance_dirty_pages*",
	}},
	{stateLock, []string{
		"__mutex_lock*", "mutex_lock*", "__ww_mutex*", "rwsem_down_*", "down_read*", "down_write*", "__down*", "down",
		"down_killable", "down_interruptible", "down_timeout", "rt_mutex_*", "__rt_mutex*", "rtlock_slowlock*",
		"percpu_rwsem_wait", "percpu_down_write", "__percpu_down_read", "fcntl_setlk*", "flock_lock_inode_wait",
		"locks_lock_inode_wait", "do_semtimedop", "__do_semtimedop",
	}},
	{statePoll, []string{
		"do_epoll_wait", "ep_poll", "do_sys_poll", "do_poll", "do_select", "core_sys_select", "io_cqring_wait", "read_events",
		"inotify_read", "eventfd_read", "timerfd_read*", "signalfd_read*", "fanotify_read", "do_mq_timedreceive", "wq_sleep",
	}},
	{statePipe, []string{"pipe_read", "pipe_write", "anon_pipe_read", "anon_pipe_write", "fifo_pipe_*", "wait_for_partner", "pipe_wait*"}},
	{stateNetwork, []string{
		"sk_wait_data", "sk_stream_wait_*", "inet_csk_accept", "inet_wait_for_connect", "inet_stream_connect", "__skb_wait_for_more_packets",
		"unix_stream_*", "unix_dgram_*", "unix_wait_for_peer", "unix_accept", "tcp_*", "udp_*", "__sys_accept4", "__sys_connect",
		"sock_read_iter", "sock_write_iter", "__sys_recvfrom", "__sys_sendto", "___sys_recvmsg", "___sys_sendmsg", "sock_recvmsg",
		"sock_sendmsg", "vsock_*", "netlink_*", "lock_sock_nested", "__lock_sock",
	}},
	{stateSleep, []string{"hrtimer_nanosleep", "do_nanosleep", "common_nsleep*", "__x64_sys_nanosleep", "__x64_sys_clock_nanosleep", "msleep*"}},
	{stateChild, []string{"do_wait", "kernel_wait4", "wait_for_vfork_done"}},
	{stateSignal, []string{"do_sigtimedwait", "sigsuspend", "do_signal_stop", "ptrace_stop", "__x64_sys_pause", "get_signal"}},
}

// waiting are the states in which a thread waits for something to do.
var waiting = map[string]bool{statePoll: true, stateSleep: true, stateCondition: true, stateChild: true, stateSignal: true}

// stateByName is the state of threads that are blocked below a kernel function, if its name
// says.
func stateByName(function string) string {
	for _, r := range stateRules {
		if fits(function, r.functions) {
			return r.state
		}
	}
	return ""
}

// fits tells whether a function is one of a list in which a * at the end stands for anything.
func fits(function string, list []string) bool {
	return slices.ContainsFunc(list, func(p string) bool {
		prefix, ok := strings.CutSuffix(p, "*")
		return p == function || ok && strings.HasPrefix(function, prefix)
	})
}

// stateOf returns the state of the thread of s. A page fault of user code is one whatever it
// waits for.
func (st *States) stateOf(s *bpf.Sample) string {
	switch s.Profile {
	case bpf.ProfileCPU:
		return stateCPU
	case bpf.ProfileRunqueue:
		return stateRunqueue
	}
	first := ""
	for _, addr := range s.Kernel {
		state := st.frame(addr).state
		if state == statePageFault {
			return statePageFault
		}
		if first == "" {
			first = state
		}
	}
	switch s.State {
	case bpf.StateBlockIO:
		return stateBlockIO
	case bpf.StateLock:
		return stateLock
	case bpf.StateCondition:
		return stateCondition
	}
	return cmp.Or(first, stateOther)
}

// idle tells whether the thread of s waits for something to do: in an event loop, a pool of
// workers, for a timer or a connection. Kernel threads do whenever they wait for neither a
// device nor a lock.
func (st *States) idle(s *bpf.Sample) bool {
	if s.Profile != bpf.ProfileOffCPU {
		return false
	}
	state := st.stateOf(s)
	if s.UserOutcome == bpf.OutcomeNone {
		return state != stateBlockIO && state != stateLock
	}
	return waiting[state] || state == stateNetwork &&
		slices.ContainsFunc(s.Kernel, func(addr uint64) bool { return st.frame(addr).accept })
}

// labels are state and idle, "true" or "false".
func (st *States) labels() []Label {
	return []Label{
		{stateLabel, st.stateOf},
		{"idle", func(s *bpf.Sample) string { return strconv.FormatBool(st.idle(s)) }},
	}
}
