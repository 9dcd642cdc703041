// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// poller waits for the wakeups of many buffers at once. Each wakeup is told once, and while
// nobody waits they cost the process nothing. One goroutine waits; buffers may be added from
// others.
type poller struct {
	buffers *os.File        // their epoll
	gate    *os.File        // the epoll that the runtime polls: it has buffers in it while somebody waits
	conn    syscall.RawConn // of gate
	events  []unix.EpollEvent
}

func newPoller(name string) (*poller, error) {
	var fds [2]int
	for i := range fds {
		fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
		if err != nil {
			if i > 0 {
				unix.Close(fds[0])
			}
			return nil, fmt.Errorf("create epoll: %w", err)
		}
		fds[i] = fd
	}
	p := &poller{events: make([]unix.EpollEvent, 64)}
	err := unix.SetNonblock(fds[1], true)
	p.buffers, p.gate = os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name)
	if err == nil {
		err = unix.EpollCtl(fds[1], unix.EPOLL_CTL_ADD, fds[0], &unix.EpollEvent{})
	}
	if err == nil {
		p.conn, err = p.gate.SyscallConn()
	}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("watch %s: %w", name, err)
	}
	return p, nil
}

// add watches fd until it is closed.
func (p *poller) add(fd int) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(fd)}
	return unix.EpollCtl(int(p.buffers.Fd()), unix.EPOLL_CTL_ADD, fd, &ev)
}

// open lets wakeups through the gate, or not.
func (p *poller) open(events uint32) error {
	var err error
	if cerr := p.conn.Control(func(gate uintptr) {
		err = unix.EpollCtl(int(gate), unix.EPOLL_CTL_MOD, int(p.buffers.Fd()), &unix.EpollEvent{Events: events})
	}); cerr != nil {
		return cerr
	}
	return err
}

// wait returns when a buffer asks for a drain, after d, or when ctx ends. It can return
// for nothing, and a wakeup that comes between two waits can be missed.
func (p *poller) wait(ctx context.Context, d time.Duration) error {
	if err := p.gate.SetReadDeadline(time.Now().Add(d)); err != nil {
		return fmt.Errorf("wait for %s: %w", p.gate.Name(), err)
	}
	stop := context.AfterFunc(ctx, func() { p.gate.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := p.open(unix.EPOLLIN); err != nil {
		return fmt.Errorf("wait for %s: %w", p.gate.Name(), err)
	}
	woken := false
	err := p.conn.Read(func(uintptr) bool {
		// A perf event tells of a wakeup once: to the runtime's poller, if that asked first.
		n, err := unix.EpollWait(int(p.buffers.Fd()), p.events, 0)
		ready := woken || n > 0 || (err != nil && err != unix.EINTR)
		woken = true
		return ready
	})
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		if err := p.open(0); err != nil && ctx.Err() == nil {
			return fmt.Errorf("wait for %s: %w", p.gate.Name(), err)
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("wait for %s: %w", p.gate.Name(), err)
	}
	return nil
}

func (p *poller) close() error { return errors.Join(p.gate.Close(), p.buffers.Close()) }
