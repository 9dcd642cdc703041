// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// diskstats are the requests that the kernel counted for a device (the fields of
// Documentation/admin-guide/iostats.rst, which numbers them from 1 after the name).
type diskstats struct {
	reads, readSectors       uint64 // fields 1, 3
	writes, writeSectors     uint64 // fields 5, 7
	discards, discardSectors uint64 // fields 12, 14
	flushes                  uint64 // field 16
}

func (d diskstats) requests() uint64 { return d.reads + d.writes + d.discards + d.flushes }

func (d diskstats) bytes() uint64 { return 512 * (d.readSectors + d.writeSectors + d.discardSectors) }

// readDiskstats parses /proc/diskstats, by name of device or partition. Fields that a
// kernel does not have are zero.
func readDiskstats(r io.Reader) (map[string]diskstats, error) {
	stats := map[string]diskstats{}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 3 {
			return nil, fmt.Errorf("parse diskstats: line %q has no device", lines.Text())
		}
		var n [20]uint64
		for i, s := range f[3:min(len(f), len(n))] {
			v, err := strconv.ParseUint(s, 10, 64)
			if err != nil {
				return nil, fmt.Errorf("parse diskstats: field %d of %s: %w", i+1, f[2], err)
			}
			n[i+1] = v
		}
		stats[f[2]] = diskstats{
			reads: n[1], readSectors: n[3],
			writes: n[5], writeSectors: n[7],
			discards: n[12], discardSectors: n[14],
			flushes: n[16],
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read diskstats: %w", err)
	}
	return stats, nil
}

// accounts compare what was counted with the kernel's books, device by device.
type accounts struct {
	last map[string]account
	BlockAccounts
}

// BlockAccounts are what was counted since NewBlock beside what the kernel keeps books of.
type BlockAccounts struct {
	Requests, KernelRequests uint64
	Bytes, KernelBytes       uint64
}

// account is what a device had at the last look.
type account struct {
	BlockAccounts
	unbooked uint64 // requests, by our count, that the kernel keeps no books of
}

// add takes the state of the devices that are there now, and of those that left and had
// requests, their kernel side zero; the first is what all others are compared with. Where the kernel's count went back the device is
// another one, and what it had since the last look is known to neither side.
func (a *accounts) add(now map[string]account) {
	for name, n := range now {
		last := a.last[name]
		if a.last == nil || n.KernelRequests < last.KernelRequests {
			continue
		}
		a.Requests += n.Requests - last.Requests
		a.KernelRequests += n.KernelRequests - last.KernelRequests
		// How many bytes the requests had that are in no books is not known.
		if n.unbooked == last.unbooked {
			a.Bytes += n.Bytes - last.Bytes
			a.KernelBytes += n.KernelBytes - last.KernelBytes
		}
	}
	a.last = now
}

// Accounting returns the requests and bytes that were counted since NewBlock, of those that
// the kernel keeps books of, and by how much the books (/proc/diskstats) grew in that time,
// over the request-based devices. What a device had between two calls does not count, on
// either side, when it has left in the meantime, nor do its bytes when some of its requests
// are not booked: passthrough, or where its queue/iostats is off.
func (b *Block) Accounting() (BlockAccounts, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f, err := os.Open("/proc/diskstats")
	if err != nil {
		return BlockAccounts{}, fmt.Errorf("open diskstats: %w", err)
	}
	defer f.Close()
	stats, err := readDiskstats(f)
	if err != nil {
		return BlockAccounts{}, err
	}
	// Empty ones as well: what they had before they get a size is not to be ours to count.
	present, err := requestDevices(sysBlock)
	if err != nil {
		return BlockAccounts{}, err
	}
	cells, err := b.read(present)
	if err != nil {
		return BlockAccounts{}, err
	}
	now := map[string]account{}
	for _, c := range cells {
		n := now[c.Device]
		n.KernelRequests, n.KernelBytes = stats[c.Device].requests(), stats[c.Device].bytes()
		n.Requests += c.Total.Count() - c.unbooked
		n.unbooked += c.unbooked
		if c.Operation != operationNames[blockHfOperationHF_OPERATION_OTHER] {
			n.Bytes += c.Size.Sum
		}
		now[c.Device] = n
	}
	b.accounts.add(now)
	return b.accounts.BlockAccounts, nil
}
