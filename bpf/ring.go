// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
)

// rings are the sample rings, one a possible CPU. The kernel side asks for a wakeup only
// when a ring gets half full; else a drain finds the samples by the ring's own positions.
type rings struct {
	outer   *ebpf.Map
	inner   []*ebpf.Map
	readers []*ringbuf.Reader
	poller  *poller
	record  ringbuf.Record
	sample  Sample
}

// newRings makes one ring of size bytes (a power of two, at least a page) a possible CPU
// and puts them into outer.
func newRings(outer *ebpf.Map, size int) (_ *rings, err error) {
	r := &rings{outer: outer}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	if r.poller, err = newPoller("samples"); err != nil {
		return nil, err
	}
	for cpu := range outer.MaxEntries() {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "hf_ring", Type: ebpf.RingBuf, MaxEntries: uint32(size)})
		if err != nil {
			return nil, fmt.Errorf("create ring of CPU %d: %w", cpu, err)
		}
		r.inner = append(r.inner, m)
		rd, err := ringbuf.NewReader(m)
		if err != nil {
			return nil, fmt.Errorf("map ring of CPU %d: %w", cpu, err)
		}
		r.readers = append(r.readers, rd)
		// A deadline in the past makes a read return what is there, without waiting.
		rd.SetDeadline(time.Unix(1, 0))
		if err := r.poller.add(m.FD()); err != nil {
			return nil, fmt.Errorf("watch ring of CPU %d: %w", cpu, err)
		}
	}
	if err := putMaps(outer, r.inner); err != nil {
		return nil, fmt.Errorf("install rings: %w", err)
	}
	return r, nil
}

// putMaps puts the maps into an array of maps, in its order. Each change of one waits until
// no program can be using what was there (maybe_wait_bpf_programs), some 10 ms, so all are
// one change, where the kernel can do that (5.19).
func putMaps(outer *ebpf.Map, inner []*ebpf.Map) error {
	keys, fds := make([]uint32, len(inner)), make([]uint32, len(inner))
	for i, m := range inner {
		keys[i], fds[i] = uint32(i), uint32(m.FD())
	}
	_, err := outer.BatchUpdate(keys, fds, nil)
	if !errors.Is(err, ebpf.ErrNotSupported) {
		return err
	}
	for i, m := range inner {
		if err := outer.Put(uint32(i), m); err != nil {
			return err
		}
	}
	return nil
}

// drain hands every sample in the rings to fn, ring by ring; within a ring in order of
// time. The sample is valid during the call only. A record that can not be decoded is
// skipped and reported at the end.
func (r *rings) drain(fn func(*Sample)) error {
	return r.read(func(record []byte) error {
		if err := r.sample.decode(record); err != nil {
			return err
		}
		fn(&r.sample)
		return nil
	})
}

// read hands every record in the rings to fn, ring by ring; within a ring in order of time.
// The record is valid during the call only. What fn returns is reported at the end.
func (r *rings) read(fn func(record []byte) error) error {
	var errs []error
	for cpu, rd := range r.readers {
		for rd.AvailableBytes() > 0 {
			err := rd.ReadInto(&r.record)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("read ring of CPU %d: %w", cpu, err))
				break
			}
			if err := fn(r.record.RawSample); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// wait returns when a ring is half full, after d, or when ctx ends.
func (r *rings) wait(ctx context.Context, d time.Duration) error { return r.poller.wait(ctx, d) }

func (r *rings) close() error {
	var errs []error
	for _, rd := range r.readers {
		errs = append(errs, rd.Close())
	}
	for _, m := range r.inner {
		errs = append(errs, m.Close())
	}
	if r.poller != nil {
		errs = append(errs, r.poller.close())
	}
	return errors.Join(errs...)
}

// ringSize is the size in bytes of a ring: half a second of the largest samples without a stack
// copy at hz a second, which is seconds of most, so that half of it, which wakes the reader, is
// not often reached between two drains; and room for some copies, which come when new programs
// start.
func ringSize(hz int) int {
	const recordHeader = 8
	need := 2 * (recordHeader + maxSampleSize - maxStackCopy) * hz / 4
	size := 256 << 10
	for size < need && size < 16<<20 {
		size *= 2
	}
	return size
}
