// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// perfRing is the buffer of one perf event, shared with the kernel: it writes records and
// moves data_head behind them, we move data_tail behind what was read. Go's atomics order
// the reads of the data between the two, as the protocol asks for (perf_mmap_page in
// include/uapi/linux/perf_event.h).
type perfRing struct {
	event  *os.File
	memory []byte // a page for the positions, then data
	page   *unix.PerfEventMmapPage
	data   []byte // a power of two
	tail   uint64 // ours: what is there can be overwritten
	wrap   []byte // a record that goes on at the start of data
}

// newPerfRing maps a buffer of size bytes, a power of two of pages, to an event. It owns event then.
func newPerfRing(event *os.File, size int) (*perfRing, error) {
	page := os.Getpagesize()
	memory, err := unix.Mmap(int(event.Fd()), 0, page+size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return &perfRing{
		event:  event,
		memory: memory,
		page:   (*unix.PerfEventMmapPage)(unsafe.Pointer(&memory[0])),
		data:   memory[page:],
	}, nil
}

func (r *perfRing) head() uint64 { return atomic.LoadUint64(&r.page.Data_head) }

// errBadRing says that what lies in a ring is no chain of records.
var errBadRing = errors.New("malformed record in the ring")

// next returns the record at tail, nil if there is none before head. It is valid until the
// next call or free.
func (r *perfRing) next(head uint64) ([]byte, error) {
	left := head - r.tail
	if left == 0 {
		return nil, nil
	}
	mask := uint64(len(r.data) - 1)
	at := r.tail & mask
	if left > uint64(len(r.data)) || left < recordHeader || at%8 != 0 {
		return nil, errBadRing
	}
	// The header does not wrap: records are multiples of eight bytes.
	size := uint64(binary.NativeEndian.Uint16(r.data[at+6:]))
	if size < recordHeader || size > left || size%8 != 0 {
		return nil, errBadRing
	}
	if at+size <= uint64(len(r.data)) {
		return r.data[at : at+size], nil
	}
	r.wrap = append(r.wrap[:0], r.data[at:]...)
	r.wrap = append(r.wrap, r.data[:at+size-uint64(len(r.data))]...)
	return r.wrap, nil
}

// free gives everything before position back to the kernel.
func (r *perfRing) free(position uint64) {
	r.tail = position
	atomic.StoreUint64(&r.page.Data_tail, position)
}

// disable stops the kernel from writing. What is there can still be read.
func (r *perfRing) disable() error {
	return unix.IoctlSetInt(int(r.event.Fd()), unix.PERF_EVENT_IOC_DISABLE, 0)
}

func (r *perfRing) close() error {
	return errors.Join(unix.Munmap(r.memory), r.event.Close())
}

// openPerfRing opens a ring on a CPU. Where the kernel allows us no more locked memory
// (perf_event_mlock_kb) it tries again with half of size.
func openPerfRing(attr unix.PerfEventAttr, cpu, size int) (*perfRing, error) {
	fd, err := unix.PerfEventOpen(&attr, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open perf event on CPU %d: %w", cpu, err)
	}
	event := os.NewFile(uintptr(fd), "mapping events")
	for ; ; size /= 2 {
		r, err := newPerfRing(event, size)
		if err == nil {
			return r, nil
		}
		if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOMEM) || size <= os.Getpagesize() {
			event.Close()
			return nil, fmt.Errorf("map ring of CPU %d: %w", cpu, err)
		}
	}
}
