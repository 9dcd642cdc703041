// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf/btf"
)

// kernelBTF is the type information of the running kernel.
const kernelBTF = "/sys/kernel/btf/vmlinux"

// requestFlags are masks of the flags in request.rq_flags that the hooks look at.
type requestFlags struct{ flushSeq, ioStat uint32 }

// Names of the enumerators with the bits.
const (
	bitFlushSeq = "__RQF_FLUSH_SEQ"
	bitIOStat   = "__RQF_IO_STAT"
)

// requestFlagsOf finds the flags' bits. They were #defines, with other values, before
// 5f89154e8e9e ("block: Use enum to define RQF_x bit indexes", 6.11), and are in enum
// rqf_flags where that has its name. In between, as in 6.12, the enum has none: CO-RE,
// which goes by names, does not find it.
func requestFlagsOf(kernel *btf.Spec, file string) (requestFlags, error) {
	bits := map[string]uint32{}
	var enum *btf.Enum
	err := kernel.TypeByName("rqf_flags", &enum)
	switch {
	case err == nil:
		for _, v := range enum.Values {
			bits[v.Name] = uint32(v.Value)
		}
	case errors.Is(err, btf.ErrNotFound):
		raw, err := os.ReadFile(file)
		if err != nil {
			return requestFlags{}, fmt.Errorf("read BTF: %w", err)
		}
		if bits, err = unnamedEnum(raw, bitIOStat); err != nil {
			return requestFlags{}, fmt.Errorf("look for %s in %s: %w", bitIOStat, file, err)
		}
		if bits == nil {
			bits = map[string]uint32{bitFlushSeq: 4, bitIOStat: 13}
		}
	default:
		return requestFlags{}, fmt.Errorf("look for rqf_flags: %w", err)
	}
	flushSeq, ok := bits[bitFlushSeq]
	ioStat, ok2 := bits[bitIOStat]
	if !ok || !ok2 {
		return requestFlags{}, fmt.Errorf("the kernel's flags of requests lack %s or %s", bitFlushSeq, bitIOStat)
	}
	return requestFlags{flushSeq: 1 << flushSeq, ioStat: 1 << ioStat}, nil
}

// The layout of BTF (Documentation/bpf/btf.rst).
type (
	btfHeader struct {
		Magic              uint16
		Version, Flags     uint8
		HeaderLen          uint32
		TypeOff, TypeLen   uint32 // from the end of the header
		StringOff, StrsLen uint32
	}
	btfType struct{ NameOff, Info, SizeOrType uint32 }
	btfEnum struct{ NameOff, Value uint32 }
)

// btfExtra is what follows a btfType, in bytes, for a kind: once, and for each of its
// members. Kinds without are not there.
var btfExtra = map[uint32]struct{ once, each int }{
	1:  {once: 4},  // INT
	3:  {once: 12}, // ARRAY
	4:  {each: 12}, // STRUCT
	5:  {each: 12}, // UNION
	6:  {each: 8},  // ENUM
	13: {each: 8},  // FUNC_PROTO
	14: {once: 4},  // VAR
	15: {each: 12}, // DATASEC
	17: {once: 4},  // DECL_TAG
	19: {each: 12}, // ENUM64
}

const btfKindEnum = 6

// unnamedEnum returns all enumerators of the first enum without a name that has this one,
// nil if there is none. It is a scan of raw BTF, in some milliseconds, because package
// btf has no index of what has no name, and decoding all types takes 30 MB and a second.
func unnamedEnum(raw []byte, enumerator string) (map[string]uint32, error) {
	short := errors.New("BTF is cut short")
	var h btfHeader
	order := binary.NativeEndian
	if _, err := binary.Decode(raw, order, &h); err != nil {
		return nil, err
	}
	if h.Magic != 0xeb9f {
		return nil, errors.New("no BTF")
	}
	section := func(off, size uint32) ([]byte, error) {
		from := uint64(h.HeaderLen) + uint64(off)
		if from+uint64(size) > uint64(len(raw)) {
			return nil, short
		}
		return raw[from : from+uint64(size)], nil
	}
	types, err := section(h.TypeOff, h.TypeLen)
	if err != nil {
		return nil, err
	}
	strings, err := section(h.StringOff, h.StrsLen)
	if err != nil {
		return nil, err
	}
	name := func(off uint32) string {
		if off >= uint32(len(strings)) {
			return ""
		}
		s, _, _ := bytes.Cut(strings[off:], []byte{0})
		return string(s)
	}
	for len(types) > 0 {
		if len(types) < 12 {
			return nil, short
		}
		t := btfType{order.Uint32(types), order.Uint32(types[4:]), order.Uint32(types[8:])}
		types = types[12:]
		kind, members := t.Info>>24&31, int(t.Info&0xffff)
		extra := btfExtra[kind].once + members*btfExtra[kind].each
		if extra > len(types) {
			return nil, short
		}
		if kind == btfKindEnum && t.NameOff == 0 {
			bits, found := map[string]uint32{}, false
			for i := range members {
				v := btfEnum{order.Uint32(types[8*i:]), order.Uint32(types[8*i+4:])}
				n := name(v.NameOff)
				bits[n] = v.Value
				found = found || n == enumerator
			}
			if found {
				return bits, nil
			}
		}
		types = types[extra:]
	}
	return nil, nil
}
