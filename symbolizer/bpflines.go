// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Limits of what the kernel is asked for.
const (
	maxBPFPrograms = 4096
	maxBPFLines    = 1 << 16 // of a program
	maxBTF         = 16 << 20
)

// bpfLines knows the source lines of BPF programs, from the line information that compilers
// leave in BTF. Programs of others are shown to CAP_SYS_ADMIN only; without, there are no
// lines.
type bpfLines struct {
	loads uint64 // the reading of kallsyms for which programs were read
	rows  []bpfRow
	files []string

	// What the kernel writes into: its address goes into a structure as a number, so it must
	// not be on a stack, which can move.
	info [infoSize]byte
	btf  btfInfo
}

// btfInfo is the kernel's struct bpf_btf_info, as far as we want it.
type btfInfo struct {
	data     uint64
	size, id uint32
}

// bpfRow says that from addr on, until the next row, code is of a line; line 0 ends it.
type bpfRow struct {
	addr uint64
	file uint32
	line uint32
}

// Offsets of the kernel's struct bpf_prog_info (linux/bpf.h).
const (
	infoKsymCount      = 104
	infoLengthCount    = 108
	infoKsyms          = 112
	infoLengths        = 120
	infoBTF            = 128
	infoLineCount      = 148
	infoLines          = 152
	infoJitedLines     = 160
	infoJitedLineCount = 168
	infoLineSize       = 172
	infoJitedLineSize  = 176
	infoSize           = 192

	bpfLineSize    = 16 // struct bpf_line_info
	bpfColumnBits  = 10
	btfHeaderBytes = 24
)

// update reads the programs, if kallsyms was read anew since the last time.
func (b *bpfLines) update(loads uint64) {
	if b.loads == loads {
		return
	}
	*b = bpfLines{loads: loads}
	id := uint32(0)
	for range maxBPFPrograms {
		attr := struct{ start, next, flags uint32 }{start: id}
		if !bpf(unix.BPF_PROG_GET_NEXT_ID, unsafe.Pointer(&attr), unsafe.Sizeof(attr)) {
			break
		}
		id = attr.next
		if fd, ok := bpfFD(unix.BPF_PROG_GET_FD_BY_ID, id); ok {
			b.program(fd)
			unix.Close(fd)
		}
	}
	slices.SortStableFunc(b.rows, func(x, y bpfRow) int { return cmp.Compare(x.addr, y.addr) })
}

func bpf(cmd uintptr, attr unsafe.Pointer, size uintptr) bool {
	_, _, errno := unix.Syscall(unix.SYS_BPF, cmd, uintptr(attr), size)
	return errno == 0
}

func bpfFD(cmd uintptr, id uint32) (int, bool) {
	attr := struct{ id, next, flags uint32 }{id: id}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, cmd, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	return int(fd), errno == 0
}

// bpfInfo asks for what the kernel knows of a descriptor.
func bpfInfo(fd int, info unsafe.Pointer, size uintptr) bool {
	attr := struct {
		fd, size uint32
		info     uint64
	}{uint32(fd), uint32(size), uint64(uintptr(info))}
	ok := bpf(unix.BPF_OBJ_GET_INFO_BY_FD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	runtime.KeepAlive(info)
	return ok
}

// program adds the lines of one program.
func (b *bpfLines) program(fd int) {
	info := b.info[:]
	clear(info)
	if !bpfInfo(fd, unsafe.Pointer(&info[0]), infoSize) {
		return
	}
	word := func(at int) uint32 { return binary.LittleEndian.Uint32(info[at:]) }
	functions, btfID, lines := word(infoKsymCount), word(infoBTF), word(infoLineCount)
	if lines == 0 || lines > maxBPFLines || lines != word(infoJitedLineCount) || functions > maxBPFPrograms ||
		functions != word(infoLengthCount) || word(infoLineSize) < bpfLineSize || word(infoJitedLineSize) != 8 {
		return
	}
	lineSize := int(word(infoLineSize))
	starts, sizes := make([]uint64, functions+1), make([]uint32, functions+1)
	source, jited := make([]byte, int(lines)*lineSize), make([]uint64, lines)
	clear(info)
	put := func(at int, count uint32, where int, p unsafe.Pointer) {
		binary.LittleEndian.PutUint32(info[at:], count)
		binary.LittleEndian.PutUint64(info[where:], uint64(uintptr(p)))
	}
	put(infoKsymCount, functions, infoKsyms, unsafe.Pointer(&starts[0]))
	put(infoLengthCount, functions, infoLengths, unsafe.Pointer(&sizes[0]))
	put(infoLineCount, lines, infoLines, unsafe.Pointer(&source[0]))
	put(infoJitedLineCount, lines, infoJitedLines, unsafe.Pointer(&jited[0]))
	binary.LittleEndian.PutUint32(info[infoLineSize:], uint32(lineSize))
	binary.LittleEndian.PutUint32(info[infoJitedLineSize:], 8)
	if !bpfInfo(fd, unsafe.Pointer(&info[0]), infoSize) {
		return
	}
	// The kernel has written through addresses that the garbage collector takes for numbers.
	runtime.KeepAlive(starts)
	runtime.KeepAlive(sizes)
	runtime.KeepAlive(source)
	runtime.KeepAlive(jited)
	strings := b.btfStrings(btfID)
	numbers := map[uint32]uint32{}
	for i, addr := range jited {
		l := source[i*lineSize:]
		name, line := binary.LittleEndian.Uint32(l[4:]), binary.LittleEndian.Uint32(l[12:])>>bpfColumnBits
		n, ok := numbers[name]
		if !ok {
			b.files = append(b.files, btfString(strings, name))
			n = uint32(len(b.files) - 1)
			numbers[name] = n
		}
		if addr != 0 && line != 0 {
			b.rows = append(b.rows, bpfRow{addr, n, line})
		}
	}
	for i, start := range starts[:functions] {
		b.rows = append(b.rows, bpfRow{addr: start + uint64(sizes[i])})
	}
}

// btfStrings is the string section of a BTF object (Documentation/bpf/btf.rst).
func (l *bpfLines) btfStrings(id uint32) []byte {
	fd, ok := bpfFD(unix.BPF_BTF_GET_FD_BY_ID, id)
	if !ok {
		return nil
	}
	defer unix.Close(fd)
	l.btf = btfInfo{}
	if !bpfInfo(fd, unsafe.Pointer(&l.btf), unsafe.Sizeof(l.btf)) || l.btf.size < btfHeaderBytes || l.btf.size > maxBTF {
		return nil
	}
	b := make([]byte, l.btf.size)
	l.btf = btfInfo{data: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))), size: uint32(len(b))}
	ok = bpfInfo(fd, unsafe.Pointer(&l.btf), unsafe.Sizeof(l.btf))
	runtime.KeepAlive(b)
	if !ok {
		return nil
	}
	word := func(at int) uint64 { return uint64(binary.LittleEndian.Uint32(b[at:])) }
	start, size := word(4)+word(16), word(20)
	if start > uint64(len(b)) || size > uint64(len(b))-start {
		return nil
	}
	return b[start : start+size]
}

func btfString(strings []byte, off uint32) string {
	if uint64(off) >= uint64(len(strings)) {
		return ""
	}
	s := strings[off:]
	if i := bytes.IndexByte(s, 0); i >= 0 {
		s = s[:i]
	}
	return cleanName(string(s[:min(len(s), maxName)]))
}

// addLines adds lines to the results that are of BPF programs.
func (b *bpfLines) addLines(loads uint64, addrs []uint64, results []Result) {
	for i, addr := range addrs {
		if results[i].Module != bpfModule {
			continue
		}
		b.update(loads)
		at, found := slices.BinarySearchFunc(b.rows, addr, func(r bpfRow, a uint64) int { return cmp.Compare(r.addr, a) })
		// The last of those with one address: a program can begin where another ends.
		for found && at+1 < len(b.rows) && b.rows[at+1].addr == addr {
			at++
		}
		if !found {
			at--
		}
		if at < 0 || b.rows[at].line == 0 {
			continue
		}
		line := results[i].Lines[0]
		line.File, line.Line = b.files[b.rows[at].file], int64(b.rows[at].line)
		results[i].Lines = []Line{line}
	}
}

const bpfModule = "[bpf]"
