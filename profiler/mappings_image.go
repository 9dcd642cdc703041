// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"slices"
	"sort"

	"github.com/hostflame/hostflame/bpf"
)

// image is what a process has mapped between two calls of execve.
type image struct {
	since    uint64 // boot clock: samples and events from then on are of this image
	comm     bpf.Comm
	vmas     []vma // executable, by address, none over another
	shared   bool  // vmas is in other hands too: it is not changed any more
	complete bool  // nothing is missing in vmas, unless it was mapped by means that are not told
	epoch    uint64
	former   []formerVMA
	previous *image // before execve, or of the parent

	next    uint64 // boot clock: when it may be read again
	backoff uint64 // since reading did not help
}

// formerVMA is a mapping that another one took the place of.
type formerVMA struct {
	vma
	until uint64 // boot clock
}

// maxFormer bounds the former mappings of an image.
const maxFormer = 32

// fork returns the image that a child has at first.
func (i *image) fork(at uint64) *image {
	i.shared = true
	return &image{since: at, comm: i.comm, vmas: i.vmas, shared: true, complete: i.complete, epoch: i.epoch}
}

// hand returns the mappings, for a caller who keeps but does not change them.
func (i *image) hand(at uint64) []vma {
	if n := len(i.former); n > 0 && i.former[n-1].until > at {
		return i.asOf(at)
	}
	i.shared = true
	return i.vmas
}

// asOf returns the mappings as they were, as far as is known.
func (i *image) asOf(at uint64) []vma {
	past := image{vmas: slices.Clone(i.vmas)}
	for _, f := range slices.Backward(i.former) {
		if f.until > at {
			past.put(f.vma, 0)
		}
	}
	return past.vmas
}

// put maps v. What was there is not any more; what is left of mappings that v is only a part
// of stays. It returns false if there are too many mappings.
func (i *image) put(v vma, at uint64) bool {
	lo := sort.Search(len(i.vmas), func(n int) bool { return i.vmas[n].end > v.start })
	hi := lo + sort.Search(len(i.vmas)-lo, func(n int) bool { return i.vmas[lo+n].start >= v.end })
	if hi == lo+1 && i.vmas[lo] == v {
		return true
	}
	var buf [3]vma
	with := buf[:0]
	if lo < hi && i.vmas[lo].start < v.start {
		left := i.vmas[lo]
		left.end = v.start
		with = append(with, left)
	}
	with = append(with, v)
	if lo < hi && i.vmas[hi-1].end > v.end {
		right := i.vmas[hi-1]
		if right.inode != 0 {
			right.offset += v.end - right.start
		}
		right.start = v.end
		with = append(with, right)
	}
	if len(i.vmas)-(hi-lo)+len(with) > maxVMAs {
		return false
	}
	for _, old := range i.vmas[lo:hi] {
		i.retire(old, v, at)
	}
	if i.shared {
		i.vmas = slices.Clone(i.vmas)
		i.shared = false
	}
	i.vmas = slices.Replace(i.vmas, lo, hi, with...)
	return true
}

// retire remembers a mapping whose place v takes for samples that are older, unless v
// continues it.
func (i *image) retire(old, v vma, at uint64) {
	if at == 0 || old.inode == v.inode && old.path == v.path && old.offset-old.start == v.offset-v.start ||
		old.inode == 0 && v.inode == 0 {
		return
	}
	if len(i.former) == maxFormer {
		i.former = slices.Delete(i.former, 0, 1)
	}
	i.former = append(i.former, formerVMA{old, at})
}

// misses tells whether s shows memory that is not in vmas, or is something else there.
func misses(vmas []vma, s *bpf.Sample) bool {
	for i := range s.Areas {
		a := &s.Areas[i]
		if v := vmaAt(vmas, a.Start); v == nil || !v.is(a) {
			return true
		}
	}
	return slices.ContainsFunc(s.User, func(addr uint64) bool {
		const lowest = 4096
		addr &^= bpf.ExactAddr
		if addr < lowest || addr >= kernelHalf || areaIn(s, addr) >= 0 || vmaAt(vmas, addr) != nil {
			return false
		}
		return vmaAt(vmas, addr-1) == nil // a return address can be the end of a mapping
	})
}

func vmaAt(vmas []vma, addr uint64) *vma {
	n := sort.Search(len(vmas), func(n int) bool { return vmas[n].end > addr })
	if n == len(vmas) || vmas[n].start > addr {
		return nil
	}
	return &vmas[n]
}

// is tells whether an area of a sample, which begins in v, can be of what v is of.
func (v *vma) is(a *bpf.Area) bool {
	if a.File == bpf.VDSO || a.File.Inode == 0 || v.inode == 0 {
		return (v.inode == 0) == (a.File == bpf.VDSO || a.File.Inode == 0)
	}
	return v.offset-v.start == a.Offset-a.Start
}
