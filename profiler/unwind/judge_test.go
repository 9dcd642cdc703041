// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"
)

var workDir string

func TestMain(m *testing.M) {
	flag.Parse()
	dir, err := os.MkdirTemp("", "unwind")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	workDir = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func run(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, stderr.Bytes())
	}
	return out
}

// judge is a program that evaluates call frame information by elfutils: testdata/judge.c.
var judge = sync.OnceValues(func() (string, error) {
	path := filepath.Join(workDir, "judge")
	out, err := exec.Command("gcc", "-O2", "-o", path, "testdata/judge.c", "-ldw", "-lelf").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the judge: %w\n%s", err, out)
	}
	return path, nil
})

// judged is what the judge says of a range of addresses.
type judged struct {
	start, end                  uint64
	none                        bool // it knows nothing; end is 0
	signal                      bool
	cfa, fp, second, ra, sp, in string
}

func judgeFile(t testing.TB, path string, flags ...string) (rows []judged) {
	t.Helper()
	bin, err := judge()
	if err != nil {
		t.Fatal(err)
	}
	sc := bufio.NewScanner(bytes.NewReader(run(t, bin, append(flags, path)...)))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		switch {
		case f[0] == "file":
		case f[0] == "error":
			rows = append(rows, judged{start: parseHex(t, f[1]), none: true})
		default:
			rows = append(rows, judged{
				start: parseHex(t, f[0]), end: parseHex(t, f[1]), signal: f[2] == "1",
				cfa: f[3], fp: f[4], second: f[5], ra: f[6], sp: f[7], in: sc.Text(),
			})
		}
	}
	sort.SliceStable(rows, func(i, j int) bool { return rows[i].start < rows[j].start })
	return rows
}

func parseHex(t testing.TB, s string) uint64 {
	t.Helper()
	v, err := strconv.ParseUint(s, 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// op is a DWARF operation as the judge prints it.
type op struct {
	atom uint64
	n, m int64
}

func parseOps(s string) (ops []op) {
	for part := range strings.SplitSeq(s, ",") {
		f := strings.Split(part, ":")
		if len(f) != 3 {
			return nil
		}
		atom, _ := strconv.ParseUint(f[0], 16, 64)
		n, _ := strconv.ParseUint(f[1], 16, 64)
		m, _ := strconv.ParseUint(f[2], 16, 64)
		ops = append(ops, op{atom, int64(n), int64(m)})
	}
	return ops
}

// breg is the register and offset of an operation that adds them.
func (o op) breg() (reg, off int64, ok bool) {
	switch {
	case o.atom >= 0x70 && o.atom < 0x90:
		return int64(o.atom - 0x70), o.n, true
	case o.atom == 0x92:
		return o.n, o.m, true
	}
	return 0, 0, false
}

// meaning is what the judge's rules say, in words that a rule's meaning can be compared
// with: "r7+8", "[r6-8]+0", "plt 11", "c-16", "fp-8", "same", "?", or "no: ..." where it
// is nothing that tables express.
type meaning struct {
	end, signal     bool
	cfa, fp, second string
}

func (j *judged) meaning(a *arch) (m meaning) {
	ops := parseOps(j.cfa)
	reg, off, isReg := int64(0), int64(0), false
	if len(ops) > 0 {
		reg, off, isReg = ops[0].breg()
	}
	base := ""
	switch {
	case isReg && off%8 != 0:
		m.cfa = "no: cfa unaligned"
	case isReg && len(ops) == 1:
		m.cfa = fmt.Sprintf("r%d%+d", reg, off)
		base = fmt.Sprintf("r%d", reg)
	case len(ops) == 9 && a == &amd64 && strings.HasPrefix(j.cfa, "77:8:0,80:0:0,3f:0:0,1a:0:0,") && strings.HasSuffix(j.cfa, ",2a:0:0,33:0:0,24:0:0,22:0:0"):
		m.cfa = fmt.Sprintf("plt %d", ops[4].atom-0x30)
	case isReg && len(ops) == 2 && ops[1].atom == 6:
		m.cfa = fmt.Sprintf("[r%d%+d]+0", reg, off)
	case isReg && len(ops) == 3 && ops[1].atom == 6 && ops[2].atom == 0x23:
		m.cfa = fmt.Sprintf("[r%d%+d]%+d", reg, off, ops[2].n)
	case isReg && len(ops) == 4 && ops[1].atom == 6 && ops[2].atom >= 0x30 && ops[2].atom < 0x50 && ops[3].atom == 0x22:
		m.cfa = fmt.Sprintf("[r%d%+d]%+d", reg, off, ops[2].atom-0x30)
	default:
		m.cfa = "no: cfa " + j.cfa
	}
	register := func(s string) string {
		if s == "same" {
			return s
		}
		if s == "undefined" || s == "error" {
			return "?"
		}
		ops := parseOps(s)
		if len(ops) > 0 && ops[0].atom == 0x9c {
			switch {
			case len(ops) == 1:
				return "c+0"
			case len(ops) == 2 && ops[1].atom == 0x23:
				return fmt.Sprintf("c%+d", ops[1].n)
			case len(ops) == 2:
				if reg, off, ok := ops[1].breg(); ok {
					if fmt.Sprintf("r%d", reg) == base {
						_, cfaOff, _ := parseOps(j.cfa)[0].breg()
						return fmt.Sprintf("c%+d", off-cfaOff)
					}
					if reg == int64(a.fp) {
						return fmt.Sprintf("fp%+d", off)
					}
				}
			}
		}
		return "no: " + s
	}
	m.fp, m.second = register(j.fp), register(j.second)
	ra := register(j.ra)
	if a == &arm64 && j.ra != j.second {
		m.cfa = "no: ra is another register"
		return m
	}
	if a == &arm64 && strings.HasPrefix(m.cfa, "r31-") && strings.HasPrefix(m.second, "c") {
		m.cfa = "no: ra is saved below sp" // the last instruction of ld.so's resolver
	}
	m.signal = j.signal
	m.end = ra == "?" && j.ra == "undefined"
	if a == &amd64 && !m.end && !m.signal && ra != "c-8" {
		if ops := parseOps(j.ra); base != "" && len(ops) == 1 && ops[0].atom == 0x90 { // DW_OP_regx
			m.cfa += fmt.Sprintf(" ra in r%d", ops[0].n)
		} else {
			m.cfa = "no: ra " + ra
		}
	}
	if j.sp != "9c:0:0,9f:0:0" && j.sp != "same" && j.sp != "undefined" && !m.signal {
		m.cfa = "no: sp " + j.sp
	}
	return m
}

// ruleMeaning is the same of a rule.
func ruleMeaning(a *arch, r Rule) (m meaning) {
	show := func(s slot) string {
		switch s.saved {
		case savedCFA:
			return fmt.Sprintf("c%+d", -8*s.words)
		case savedNear:
			if w := r.wide(); a == &arm64 {
				return fmt.Sprintf("c%+d", 8*(s.words-w.offset))
			}
			return fmt.Sprintf("fp%+d", -8*s.words)
		case savedLost:
			return "?"
		}
		return "same"
	}
	m.fp, m.second = show(narrowSlot(r.fp())), show(narrowSlot(r.second()))
	switch r.Kind() {
	case KindNone:
		m.cfa = "none"
	case KindSP:
		m.cfa = fmt.Sprintf("r%d%+d", a.sp, 8*r.a())
	case KindFP:
		m.cfa = fmt.Sprintf("r%d%+d", a.fp, 8*r.a())
	case KindEnd:
		m.end = true
	case KindSignal:
		m.signal = true
	case KindPLT:
		m.cfa = fmt.Sprintf("plt %d", r.a())
	case KindGo:
		m.cfa = "go"
	case KindWide:
		w := r.wide()
		m.fp, m.second = show(w.fp), show(w.second)
		m.cfa = fmt.Sprintf("r%d%+d", w.base, 8*w.offset)
		if w.deref {
			m.cfa = fmt.Sprintf("[r%d%+d]%+d", w.base, 8*w.offset, 8*w.add)
		} else if w.add > 0 {
			m.cfa += fmt.Sprintf(" ra in r%d", w.add-1)
		}
	}
	return m
}

// agree says whether a rule means what the judge says; shape is of judgements that no
// rule can express.
func agree(a *arch, j *judged, r Rule) (ok bool, shape string) {
	want, got := j.meaning(a), ruleMeaning(a, r)
	if got.signal {
		return want.signal, ""
	}
	if want.end || got.end {
		return want.end == got.end, ""
	}
	if strings.HasPrefix(want.cfa, "no:") {
		return got.cfa == "none", want.cfa
	}
	register := func(want, got string) bool {
		switch {
		case want == got:
			return true
		case want == "?": // elfutils says so of registers that nothing is said of
			return got == "same"
		case strings.HasPrefix(want, "no:"), want == "c+0", a == &amd64 && strings.HasPrefix(want, "c+"):
			return got == "?" // nothing is saved above the CFA, or there
		}
		return false
	}
	if a == &arm64 && (want.second == "?" || strings.HasPrefix(want.second, "no:")) && got.cfa == "none" {
		return true, "no: ra " + want.second
	}
	return want.cfa == got.cfa && register(want.fp, got.fp) && register(want.second, got.second), ""
}

// tables are all regions of a file.
type tables struct {
	file    *File
	regions map[uint32]*Region
	rows    int
	words   int
	skipped map[Skip]int
}

func openFile(t testing.TB, path string, debug DebugFunc) *File {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	st, err := file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	f, err := Open(file, st.Size(), debug)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	return f
}

func build(t testing.TB, f *File) *tables {
	t.Helper()
	ts := &tables{file: f, regions: map[uint32]*Region{}, skipped: map[Skip]int{}}
	for _, n := range f.Regions() {
		r, err := f.Region(n)
		if err != nil {
			t.Fatalf("region %d: %v", n, err)
		}
		checkRegion(t, &r)
		ts.regions[n] = &r
		ts.rows += r.Rows
		ts.words += len(r.Words)
		for s, n := range r.Skipped {
			ts.skipped[s] += n
		}
	}
	return ts
}

// checkRegion checks the layout.
func checkRegion(t testing.TB, r *Region) {
	t.Helper()
	if len(r.Words) == 0 {
		if r.Rows != 0 || r.FirstBucket != 0 {
			t.Fatalf("no words, but %d rows from bucket %d", r.Rows, r.FirstBucket)
		}
		return
	}
	buckets := r.Buckets()
	if buckets <= 0 || int(r.FirstBucket)+buckets > RegionSize/BucketSize || len(r.Words) > maxWords || r.Rows < 1 {
		t.Fatalf("%d buckets from %d, %d rows, %d words", buckets, r.FirstBucket, r.Rows, len(r.Words))
	}
	index := r.Words[:buckets+1]
	if !slices.IsSorted(index) || int(index[buckets]) != r.Rows || index[0] != 0 {
		t.Fatalf("index %v of %d rows", index, r.Rows)
	}
	rows := r.Words[buckets+1:]
	if rows[0] != r.FirstBucket<<BucketShift {
		t.Fatalf("the first row is at %#x, the first bucket is %d", rows[0], r.FirstBucket)
	}
	for b := range buckets {
		for i := int(index[b]); i < int(index[b+1]); i++ {
			off := rows[i*rowWords]
			if off>>BucketShift != (r.FirstBucket+uint16(b))&(1<<(16-BucketShift)-1) {
				t.Fatalf("row %d at %#x is in bucket %d", i, off, int(r.FirstBucket)+b)
			}
			if i > int(index[b]) && off <= rows[(i-1)*rowWords] && Kind(rows[i*rowWords+1]&7) != KindWide {
				t.Fatalf("row %d at %#x is not after the one before", i, off)
			}
		}
	}
}

// rule is the rule for an address.
func (ts *tables) rule(addr uint64) Rule {
	off, ok := ts.offset(addr)
	if !ok {
		return 0
	}
	r := ts.regions[uint32(off>>RegionShift)]
	if r == nil {
		return 0
	}
	return r.Rule(off)
}

func (ts *tables) offset(addr uint64) (uint64, bool) {
	for _, s := range ts.file.image.Loads {
		if s.Executable && addr >= s.Vaddr && addr-s.Vaddr < s.Filesz {
			return addr - s.Vaddr + s.Offset, true
		}
	}
	return 0, false
}

// boundaries are the addresses at which rows begin.
func (ts *tables) boundaries() (addrs []uint64) {
	for _, n := range slices.Sorted(maps.Keys(ts.regions)) {
		r := ts.regions[n]
		if len(r.Words) == 0 {
			continue
		}
		buckets := r.Buckets()
		rows := r.Words[buckets+1:]
		for b := range buckets {
			for i := int(r.Words[b]); i < int(r.Words[b+1]); i++ {
				off := uint64(n)<<RegionShift + uint64(int(r.FirstBucket)+b)<<BucketShift + uint64(rows[i*rowWords])&(BucketSize-1)
				for _, s := range ts.file.image.Loads {
					if s.Executable && off >= s.Offset && off-s.Offset < s.Filesz {
						addrs = append(addrs, off-s.Offset+s.Vaddr)
						break
					}
				}
			}
		}
	}
	return addrs
}

// comparison is the result for one file.
type comparison struct {
	points, different int
	shapes            map[string]int // what no rule expresses
	examples          []string
}

// compare looks at every boundary of the judge's ranges and of our rows.
func compare(ts *tables, rows []judged, known func(addr uint64, r Rule) bool) comparison {
	a := ts.file.arch
	c := comparison{shapes: map[string]int{}}
	check := func(j *judged, addr uint64) {
		r := ts.rule(addr)
		c.points++
		ok, shape := false, ""
		if j == nil || j.none {
			for n := range uint64(padding) { // as padding before a trampoline
				ok = ok || ts.rule(addr+n).Kind() == KindSignal
			}
			ok = ok || r.Kind() == KindNone || r.Kind() == KindSignal || known != nil && known(addr, r)
		} else {
			ok, shape = agree(a, j, r)
		}
		if shape != "" {
			c.shapes[shape]++
		}
		if !ok && (known == nil || !known(addr, r)) {
			c.different++
			if len(c.examples) < 20 {
				want := "nothing"
				if j != nil && !j.none {
					want = fmt.Sprintf("%+v (%s)", j.meaning(a), j.in)
				}
				c.examples = append(c.examples, fmt.Sprintf("%#x: %v, want %s", addr, r, want))
			}
		}
	}
	next := func(i int) uint64 {
		if i+1 < len(rows) {
			return rows[i+1].start
		}
		return ^uint64(0)
	}
	for i := range rows {
		j := &rows[i]
		if j.none {
			if next(i)-j.start >= padding && next(i) != ^uint64(0) {
				check(j, j.start)
				check(j, next(i)-1)
			}
			continue
		}
		end := min(j.end, next(i)) // ranges of one record can reach into the next one's
		check(j, j.start)
		check(j, end-1)
	}
	for _, addr := range ts.boundaries() {
		i, found := slices.BinarySearchFunc(rows, addr, func(j judged, a uint64) int {
			switch {
			case j.start < a:
				return -1
			case j.start > a:
				return 1
			}
			return 0
		})
		if !found {
			i--
		}
		if i < 0 || rows[i].none && next(i)-rows[i].start < padding {
			continue
		}
		check(&rows[i], addr)
	}
	return c
}

var all = flag.Bool("all", false, "compare every ELF file in /usr/bin and /usr/lib")

// usual are files of the kinds that there are.
func usual(t testing.TB) (paths []string) {
	for _, p := range []string{
		"/lib/*-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1", "/usr/lib/*-linux-gnu/libstdc++.so.6",
		"/usr/lib/*-linux-gnu/libcrypto.so.3", "/usr/lib/*-linux-gnu/libm.so.6", "/usr/bin/bash", "/usr/bin/perl",
		"/usr/bin/python3", "/usr/bin/git", "/usr/lib/*-linux-gnu/libgcrypt.so.20",
	} {
		found, err := filepath.Glob(p)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, found...)
	}
	if len(paths) < 4 {
		t.Fatalf("only %v are here", paths)
	}
	return paths
}

// TestRowsAgreeWithElfutils compares with an independent evaluation at every boundary.
func TestRowsAgreeWithElfutils(t *testing.T) {
	paths := usual(t)
	if *all {
		paths = everyELF(t)
	}
	shapes := map[string]int{}
	skipped := map[Skip]int{}
	points, rows, words, frames, files := 0, 0, 0, uint64(0), 0
	for _, path := range paths {
		f, err := openPath(t, path)
		if err != nil {
			t.Logf("%s: %v", path, err)
			continue
		}
		files++
		ts := build(t, f)
		if f.gotab != nil && f.frames == nil {
			continue
		}
		c := compare(ts, judgeFile(t, path), goCode(f))
		points, rows, words = points+c.points, rows+ts.rows, words+ts.words
		if f.frames != nil {
			frames += f.frames.size
		}
		for s, n := range c.shapes {
			shapes[s] += n
		}
		for s, n := range ts.skipped {
			skipped[s] += n
		}
		if ts.skipped[SkipIndex] > 0 {
			t.Errorf("%s: .eh_frame_hdr is not believed", path)
		}
		if c.different > 0 {
			t.Errorf("%s: %d of %d points differ:\n\t%s", path, c.different, c.points, strings.Join(c.examples, "\n\t"))
		}
		closeFile(f)
	}
	t.Logf("%d files, %d bytes of .eh_frame, %d points, %d rows of %.2f bytes; skipped: %v",
		files, frames, points, rows, float64(2*words)/float64(max(rows, 1)), skipped)
	for _, s := range slices.Sorted(maps.Keys(shapes)) {
		t.Logf("no rule for %d points: %s", shapes[s], s)
	}
}

// goCode is where Go's own table speaks.
func goCode(f *File) func(uint64, Rule) bool {
	return func(addr uint64, r Rule) bool {
		return f.gotab != nil && addr+1 >= f.gotab.Text && addr < f.gotab.Text+f.gotab.TextEnd+padding
	}
}

func openPath(t testing.TB, path string) (*File, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := file.Stat()
	if err != nil {
		return nil, err
	}
	f, err := Open(file, st.Size(), nil)
	if err != nil {
		file.Close()
	}
	return f, err
}

func closeFile(f *File) {
	if c, ok := f.readers[0].r.(io.Closer); ok {
		c.Close()
	}
}

// everyELF finds the 64-bit executables and libraries of this machine.
func everyELF(t testing.TB) (paths []string) {
	seen := map[string]bool{}
	for _, root := range []string{"/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64", "/usr/libexec"} {
		err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil
			}
			file, err := os.Open(path)
			if err != nil {
				return nil
			}
			defer file.Close()
			var h [20]byte
			if _, err := io.ReadFull(file, h[:]); err != nil || string(h[:5]) != "\x7fELF\x02" || h[16] != 2 && h[16] != 3 || archOf(uint16(h[18])|uint16(h[19])<<8) == nil {
				return nil
			}
			if !seen[path] {
				seen[path] = true
				paths = append(paths, path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return paths
}
