// SPDX-License-Identifier: Apache-2.0

// Package unwind holds the user stacks that the kernel side walks against independent
// judges: elfutils, which unwinds copies of the same stacks, and programs whose stacks
// are known (test/workload). Its tests need root and libdw-dev.
//
// What elfutils can not judge: frames of code without CFI in .eh_frame or .debug_frame of
// a file on disk. That is what JIT compilers make, V8's built-in functions in node, Go
// without its symbols, and Go's switches between stacks. Known stacks are the judge there.
package unwind

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
)

// Exact is set in the address of a frame that is no caller: the leaf, or what a signal
// interrupted.
const Exact = uint64(1) << 63

// A Mapping is executable memory of a process that shows a file.
type Mapping struct {
	Start, End, Offset uint64
	Path               string // a file on disk, "[vdso]", or nothing
	Inode              uint64
}

// A Copy is what a stack can be unwound from later.
type Copy struct {
	Set     int      // index of the mappings
	Regs    []uint64 // by DWARF number; the IP behind them, on amd64 as number 16
	Address uint64   // of the first byte copied: the stack pointer
	Bytes   []byte
}

// A Verdict is what the judge says of a copy.
type Verdict struct {
	Frames   []uint64 // leaf first, with Exact
	Ended    bool     // at an outermost frame by the CFI
	Missed   bool     // stopped for want of memory outside the copy, at
	MissedAt uint64
	Error    string // why it did not end
}

// lostRegister is what elfutils says where the CFA is by rbx and the callee does not save
// rbx: a mistake in its description of amd64, up to 0.188 at least. gdb is right on those.
const lostRegister = "a register is not known"

// BuildJudge builds the judge into dir and returns its path.
func BuildJudge(dir string) (string, error) {
	_, file, _, _ := runtime.Caller(0)
	out := filepath.Join(dir, "judge")
	cmd := exec.Command("gcc", "-O2", "-g", "-o", out, filepath.Join(filepath.Dir(file), "judge/judge.c"), "-ldw", "-lelf")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the judge (needs libdw-dev): %w\n%s", err, bytes.TrimSpace(text))
	}
	return out, nil
}

// Judge unwinds the copies with the judge at path; one verdict each, in order.
func Judge(path string, sets [][]Mapping, copies []Copy) ([]Verdict, error) {
	cmd := exec.Command(path)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start the judge: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start the judge: %w", err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the judge: %w", err)
	}
	go func() {
		defer in.Close()
		w := bufio.NewWriterSize(in, 1<<20)
		for id, set := range sets {
			writeSet(w, id, set)
		}
		for i := range copies {
			writeCopy(w, &copies[i])
		}
		w.Flush() // an error shows as answers that are missing
	}()
	verdicts := make([]Verdict, 0, len(copies))
	r := bufio.NewReaderSize(out, 1<<20)
	for range copies {
		v, err := readVerdict(r)
		if err != nil {
			cmd.Process.Kill()
			cmd.Wait()
			return nil, fmt.Errorf("read answer %d of the judge: %w\n%s", len(verdicts), err, stderr.String())
		}
		verdicts = append(verdicts, v)
	}
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("judge: %w\n%s", err, stderr.String())
	}
	return verdicts, nil
}

func writeSet(w *bufio.Writer, id int, set []Mapping) {
	b := []byte{'M'}
	b = binary.LittleEndian.AppendUint32(b, uint32(id))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(set)))
	for _, m := range set {
		b = binary.LittleEndian.AppendUint64(b, m.Start)
		b = binary.LittleEndian.AppendUint64(b, m.End)
		b = binary.LittleEndian.AppendUint64(b, m.Offset)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(m.Path)))
		b = append(b, m.Path...)
	}
	w.Write(b)
}

func writeCopy(w *bufio.Writer, c *Copy) {
	b := []byte{'S'}
	b = binary.LittleEndian.AppendUint32(b, uint32(c.Set))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(c.Regs)))
	for _, r := range c.Regs {
		b = binary.LittleEndian.AppendUint64(b, r)
	}
	b = binary.LittleEndian.AppendUint64(b, c.Address)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(c.Bytes)))
	w.Write(b)
	w.Write(c.Bytes)
}

func readVerdict(r io.Reader) (v Verdict, err error) {
	var h struct {
		Ended, Missed uint8
		MissedAt      uint64
		Count         uint32
	}
	var n uint16
	errs := []error{binary.Read(r, binary.LittleEndian, &h)}
	if h.Count > 1<<16 {
		return v, fmt.Errorf("%d frames", h.Count)
	}
	v = Verdict{Frames: make([]uint64, h.Count), Ended: h.Ended != 0, Missed: h.Missed != 0, MissedAt: h.MissedAt}
	errs = append(errs, binary.Read(r, binary.LittleEndian, v.Frames), binary.Read(r, binary.LittleEndian, &n))
	text := make([]byte, n)
	_, err = io.ReadFull(r, text)
	v.Error = string(text)
	return v, errors.Join(append(errs, err)...)
}

// Mappings reads the executable mappings of a process that is alive. The vDSO's code is
// put into a file in dir, so that it can be read later as others are.
func Mappings(pid int, dir string) ([]Mapping, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, fmt.Errorf("read mappings: %w", err)
	}
	var all []Mapping
	for line := range strings.Lines(string(text)) {
		// 7f0c1e000000-7f0c1e021000 r-xp 00000000 fe:00 1234   /usr/lib/x
		f := strings.Fields(line)
		if len(f) < 5 || !strings.Contains(f[1], "x") {
			continue
		}
		var m Mapping
		start, end, _ := strings.Cut(f[0], "-")
		var errs [4]error
		m.Start, errs[0] = strconv.ParseUint(start, 16, 64)
		m.End, errs[1] = strconv.ParseUint(end, 16, 64)
		m.Offset, errs[2] = strconv.ParseUint(f[2], 16, 64)
		m.Inode, errs[3] = strconv.ParseUint(f[4], 10, 64)
		if err := errors.Join(errs[:]...); err != nil {
			return nil, fmt.Errorf("read mappings: %w", err)
		}
		if len(f) > 5 {
			m.Path = strings.TrimSuffix(strings.TrimSpace(line[strings.Index(line, f[5]):]), " (deleted)")
		}
		if m.Path == "[vdso]" {
			if m.Path, err = vdso(pid, m, dir); err != nil {
				return nil, err
			}
		}
		all = append(all, m)
	}
	return all, nil
}

// vdso writes the vDSO, which is the same in all processes, to a file in dir.
func vdso(pid int, m Mapping, dir string) (string, error) {
	path := filepath.Join(dir, "vdso.so")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return "", fmt.Errorf("copy the vDSO: %w", err)
	}
	defer f.Close()
	b := make([]byte, m.End-m.Start)
	if _, err := f.ReadAt(b, int64(m.Start)); err != nil {
		return "", fmt.Errorf("copy the vDSO: %w", err)
	}
	return path, os.WriteFile(path, b, 0o644)
}
