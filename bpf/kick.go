// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// kicks are rings, one a possible CPU, whose records only make their CPU interrupt itself:
// nobody reads or waits for them.
type kicks []kick

type kick struct {
	ring     *ebpf.Map
	consumer []byte // its first page is the position of the reader,
	producer []byte // its second that of the writer: kernel/bpf/ringbuf.c
}

// newKicks makes rings for so many kicks a second of a kind on each of the CPUs. They come in
// bursts, and are emptied once a second.
func newKicks(cpus, perSecond int) (_ kicks, err error) {
	const record = 16
	size, page := os.Getpagesize(), os.Getpagesize()
	for size < 8*record*perSecond && size < 16<<20 {
		size *= 2
	}
	ks := make(kicks, 0, cpus)
	defer func() {
		if err != nil {
			ks.close()
		}
	}()
	for cpu := range cpus {
		var k kick
		if k.ring, err = ebpf.NewMap(&ebpf.MapSpec{Name: "hf_kick", Type: ebpf.RingBuf, MaxEntries: uint32(size)}); err != nil {
			return nil, fmt.Errorf("create the kick of CPU %d: %w", cpu, err)
		}
		ks = append(ks, k)
		last := &ks[len(ks)-1]
		if last.consumer, err = unix.Mmap(k.ring.FD(), 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
			last.producer, err = unix.Mmap(k.ring.FD(), int64(page), page, unix.PROT_READ, unix.MAP_SHARED)
		}
		if err != nil {
			return nil, fmt.Errorf("map the kick of CPU %d: %w", cpu, err)
		}
	}
	return ks, nil
}

// empty makes room in all rings.
func (ks kicks) empty() {
	for _, k := range ks {
		written := atomic.LoadUint64((*uint64)(unsafe.Pointer(&k.producer[0])))
		atomic.StoreUint64((*uint64)(unsafe.Pointer(&k.consumer[0])), written)
	}
}

// install puts the rings to where the kernel side finds them.
func (ks kicks) install(outer *ebpf.Map) error {
	rings := make([]*ebpf.Map, len(ks))
	for i := range ks {
		rings[i] = ks[i].ring
	}
	return putMaps(outer, rings)
}

// uninstall takes them out again.
func (ks kicks) uninstall(outer *ebpf.Map) error {
	for cpu := range ks {
		if err := outer.Delete(uint32(cpu)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("take out the kick of CPU %d: %w", cpu, err)
		}
	}
	return nil
}

func (ks kicks) close() error {
	var errs []error
	for _, k := range ks {
		for _, mapped := range [][]byte{k.consumer, k.producer} {
			if mapped != nil {
				errs = append(errs, unix.Munmap(mapped))
			}
		}
		errs = append(errs, k.ring.Close())
	}
	return errors.Join(errs...)
}
