// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Follow keeps the perf events on the online CPUs until ctx ends. The kernel announces
// each CPU that comes or goes (a kobject uevent); where that can not be heard the list is
// looked at once a second. onError, if not nil, gets what went wrong; sampling goes on
// with the CPUs that work.
func (c *CPU) Follow(ctx context.Context, onError func(error)) { followCPUs(ctx, c, onError) }

// cpuEvents are perf events, one a CPU.
type cpuEvents interface {
	sync() error    // opens those of the CPUs that came online, closes those of CPUs that are offline
	forget(cpu int) // closes the event of a CPU, or of all of them for -1; sync opens it again
}

func followCPUs(ctx context.Context, c cpuEvents, onError func(error)) {
	report := func(err error) {
		if err != nil && onError != nil && !errors.Is(err, os.ErrClosed) {
			onError(err)
		}
	}
	events, err := listenUevents()
	if err != nil {
		report(err)
		pollCPUs(ctx, c, report)
		return
	}
	defer events.Close()
	stop := context.AfterFunc(ctx, func() { events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	// What changed before the socket was open.
	report(c.sync())
	message := make([]byte, 8<<10)
	for {
		n, err := events.Read(message)
		if ctx.Err() != nil {
			return
		}
		switch {
		case errors.Is(err, unix.ENOBUFS): // messages were lost: any CPU may have gone and come back
			c.forget(-1)
		case err != nil:
			report(fmt.Errorf("read uevents: %w", err))
			pollCPUs(ctx, c, report)
			return
		default:
			cpu, online, ok := parseCPUUevent(message[:n])
			if !ok {
				continue
			}
			if !online {
				// The kernel has taken the event off the CPU; it does not come back with it.
				c.forget(cpu)
			}
		}
		report(c.sync())
	}
}

// pollCPUs is followCPUs without uevents. It can not see a CPU that leaves and is back
// within a second.
func pollCPUs(ctx context.Context, c cpuEvents, report func(error)) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	last := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, err := os.ReadFile(onlinePath)
		if err == nil && string(now) == last {
			continue
		}
		if err := c.sync(); err != nil {
			report(err)
			continue
		}
		last = string(now)
	}
}

// listenUevents opens the kernel's uevent multicast.
func listenUevents() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("listen for CPU hotplug: %w", err)
	}
	const kernelGroup = 1
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen for CPU hotplug: %w", err)
	}
	return os.NewFile(uintptr(fd), "uevents"), nil
}

// parseCPUUevent reads a message such as "online@/devices/system/cpu/cpu1\0ACTION=...".
func parseCPUUevent(message []byte) (cpu int, online, ok bool) {
	head, _, _ := bytes.Cut(message, []byte{0})
	action, device, found := strings.Cut(string(head), "@")
	if !found || (action != "online" && action != "offline") {
		return 0, false, false
	}
	number, found := strings.CutPrefix(device, "/devices/system/cpu/cpu")
	if !found {
		return 0, false, false
	}
	cpu, err := strconv.Atoi(number)
	if err != nil || cpu < 0 {
		return 0, false, false
	}
	return cpu, action == "online", true
}

const onlinePath = "/sys/devices/system/cpu/online"

// OnlineCPUs lists the online CPUs.
func OnlineCPUs() ([]int, error) {
	b, err := os.ReadFile(onlinePath)
	if err != nil {
		return nil, fmt.Errorf("list online CPUs: %w", err)
	}
	cpus, err := parseCPUList(string(b))
	if err != nil {
		return nil, fmt.Errorf("list online CPUs: %w", err)
	}
	return cpus, nil
}

// parseCPUList parses the kernel's list format, "0-3,8".
func parseCPUList(list string) ([]int, error) {
	var cpus []int
	for _, part := range strings.Split(strings.TrimSpace(list), ",") {
		lo, hi, ranged := strings.Cut(part, "-")
		first, err := strconv.Atoi(lo)
		if err != nil {
			return nil, fmt.Errorf("parse CPU list %q: %w", list, err)
		}
		last := first
		if ranged {
			if last, err = strconv.Atoi(hi); err != nil {
				return nil, fmt.Errorf("parse CPU list %q: %w", list, err)
			}
		}
		if first < 0 || last < first || last > 1<<20 {
			return nil, fmt.Errorf("parse CPU list %q: bad range", list)
		}
		for cpu := first; cpu <= last; cpu++ {
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}
