// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/hostflame/hostflame/internal/elffile"
)

const maxVDSO = 1 << 20 // bytes; it is two pages

// VDSO returns the vDSO of the running kernel, read from the agent's own memory. It is
// the same for all processes of the agent's own word size. Its lines come from a file with
// its build id, where distributions and make vdso_install put one.
func (s *Symbolizer) VDSO() (*Object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	if s.vdso != nil {
		return s.vdso, nil
	}
	b, err := readVDSO(s.proc("self", "maps"), s.proc("self", "mem"))
	if err != nil {
		return nil, fmt.Errorf("read vDSO: %w", err)
	}
	img, err := elffile.Parse(elffile.FromBytes(b))
	if err != nil {
		return nil, fmt.Errorf("parse vDSO: %w", err)
	}
	s.vdso = &Object{sym: s, image: img, file: File{Path: "[vdso]", Roots: []string{s.cfg.Root}}}
	if release, err := os.ReadFile(s.proc("sys/kernel/osrelease")); err == nil {
		dir := "/lib/modules/" + strings.TrimSpace(string(release)) + "/vdso/"
		for _, p := range []string{"/usr/lib/debug" + dir + "vdso64.so", dir + "vdso64.so", "/usr/lib/debug" + dir + "vdso.so", dir + "vdso.so"} {
			s.vdso.debugPaths = append(s.vdso.debugPaths, p, p+".debug", p+".dbg")
		}
	}
	return s.vdso, nil
}

func readVDSO(maps, mem string) ([]byte, error) {
	f, err := os.Open(maps)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	start, end, err := mappingNamed(f, "[vdso]")
	if err != nil {
		return nil, err
	}
	m, err := os.Open(mem)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	b := make([]byte, min(end-start, maxVDSO))
	if _, err := m.ReadAt(b, int64(start)); err != nil {
		return nil, err
	}
	return b, nil
}

// mappingNamed finds a mapping by what stands in the last column of maps.
func mappingNamed(maps io.Reader, name string) (start, end uint64, err error) {
	sc := bufio.NewScanner(maps)
	for sc.Scan() {
		if !strings.HasSuffix(sc.Text(), " "+name) {
			continue
		}
		lo, n := parseHex(sc.Bytes())
		if n == 0 || n >= len(sc.Bytes()) {
			continue
		}
		if hi, m := parseHex(sc.Bytes()[n+1:]); m > 0 && lo < hi && hi < kernelHalf {
			return lo, hi, nil
		}
	}
	if err := sc.Err(); err != nil {
		return 0, 0, err
	}
	return 0, 0, errorf(ReasonNoSymbols, "no mapping %s", name)
}
