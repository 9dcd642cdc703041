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

// poller waits for the wakeups of many buffers at once. Each wakeup is told once. One
// goroutine waits; buffers may be added from others.
type poller struct {
	epoll  *os.File
	conn   syscall.RawConn // of epoll
	events []unix.EpollEvent
}

func newPoller(name string) (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set epoll non-blocking: %w", err)
	}
	p := &poller{epoll: os.NewFile(uintptr(fd), name), events: make([]unix.EpollEvent, 64)}
	if p.conn, err = p.epoll.SyscallConn(); err != nil {
		p.epoll.Close()
		return nil, fmt.Errorf("watch %s: %w", name, err)
	}
	return p, nil
}

// add watches fd until it is closed.
func (p *poller) add(fd int) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(fd)}
	var err error
	if cerr := p.conn.Control(func(epoll uintptr) {
		err = unix.EpollCtl(int(epoll), unix.EPOLL_CTL_ADD, fd, &ev)
	}); cerr != nil {
		return cerr
	}
	return err
}

// wait returns when a buffer asks for a drain, after d, or when ctx ends. It can return
// for nothing, and a wakeup that comes between two waits can be missed.
func (p *poller) wait(ctx context.Context, d time.Duration) error {
	if err := p.epoll.SetReadDeadline(time.Now().Add(d)); err != nil {
		return fmt.Errorf("wait for %s: %w", p.epoll.Name(), err)
	}
	stop := context.AfterFunc(ctx, func() { p.epoll.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	woken := false
	err := p.conn.Read(func(fd uintptr) bool {
		// A perf event tells of a wakeup once: to the runtime's poller, if that asked first.
		n, err := unix.EpollWait(int(fd), p.events, 0)
		ready := woken || n > 0 || (err != nil && err != unix.EINTR)
		woken = true
		return ready
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("wait for %s: %w", p.epoll.Name(), err)
	}
	return nil
}

func (p *poller) close() error { return p.epoll.Close() }
