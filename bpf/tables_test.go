// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// newTestTables makes tables whose clock the test moves.
func newTestTables(t *testing.T, limit uint64) (*Tables, *uint64) {
	t.Helper()
	kerneltest.Require(t)
	tables, err := NewTables(limit)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		for range 2 {
			if err := tables.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	clock := uint64(1e12)
	tables.now = func() uint64 { clock += 1e6; return clock }
	tables.sleep = func(d time.Duration) { clock += uint64(d) }
	return tables, &clock
}

// testTable is a table of one bucket with n rows, whose words say seed.
func testTable(n int, seed uint16) Table {
	t := Table{Buckets: 1, Words: make([]uint16, 2+rowWords*n)}
	t.Words[1] = uint16(n)
	for i := 2; i < len(t.Words); i++ {
		t.Words[i] = seed
	}
	return t
}

// inKernel reads back the words that the kernel would use for key; nil if it has no table.
func inKernel(t *testing.T, tables *Tables, key TableKey, words int) []uint16 {
	t.Helper()
	raw := key.raw()
	var value cpuHfTable
	if err := tables.index.Lookup(&raw, &value); err != nil {
		return nil
	}
	chunk := make([]byte, chunkBytes)
	if err := tables.chunks[value.Chunk].words.Lookup(uint32(0), &chunk); err != nil {
		t.Fatal(err)
	}
	all := unsafe.Slice((*uint16)(unsafe.Pointer(unsafe.SliceData(chunk))), chunkWords)
	return all[value.Word:][:words]
}

// Whatever comes and goes, the kernel has each table whole, and the limit holds.
func TestTablesHoldWhatIsPut(t *testing.T) {
	const limit = 8 * (256 << 10)
	tables, clock := newTestTables(t, limit)
	random := rand.New(rand.NewPCG(1, 2))
	want := map[TableKey]Table{}
	for i := range 2000 {
		key := TableKey{File{Inode: random.Uint64N(200), Device: 1}, random.Uint32N(4)}
		switch random.IntN(10) {
		case 0:
			tables.Delete(key)
			delete(want, key)
		case 1:
			want[key] = Table{}
		default:
			want[key] = testTable(1+random.IntN(2000), uint16(i))
		}
		if table, ok := want[key]; ok {
			if err := tables.Put(key, table); err != nil {
				t.Fatalf("put %d: %v", i, err)
			}
		}
		*clock += 1e9
		if s := tables.Stats(); s.Memory > limit {
			t.Fatalf("%d bytes, limit %d", s.Memory, limit)
		}
	}
	held, rows, seen := 0, uint64(0), map[string]bool{}
	for key, table := range want {
		got := inKernel(t, tables, key, len(table.Words))
		if (got != nil) != tables.Has(key) {
			t.Fatalf("%v: in the kernel %t, known %t", key, got != nil, tables.Has(key))
		}
		if got == nil {
			continue
		}
		held++
		if words := string(bytesOf(table.Words)); !seen[words] {
			seen[words] = true
			rows += rowsOf(table)
		}
		for i := range got {
			if got[i] != table.Words[i] {
				t.Fatalf("%v: word %d is %d, want %d", key, i, got[i], table.Words[i])
			}
		}
	}
	s := tables.Stats()
	if s.Tables != held || s.Rows != rows || s.Evicted == 0 {
		t.Errorf("%+v, but %d tables with %d rows are in the kernel", s, held, rows)
	}
	for key := range want {
		tables.Delete(key)
	}
	*clock += 1e9
	if s := tables.Stats(); s.Memory != 0 || s.Tables != 0 || s.Rows != 0 {
		t.Errorf("after all were deleted: %+v", s)
	}
}

// Copies of a file take no room of their own, and one outlives the other.
func TestTablesShare(t *testing.T) {
	tables, clock := newTestTables(t, 4*(256<<10))
	table := testTable(5000, 7)
	for i := range 50 {
		if err := tables.Put(TableKey{File: File{Inode: uint64(i) + 1}}, table); err != nil {
			t.Fatal(err)
		}
	}
	if s := tables.Stats(); s.Tables != 50 || s.Rows != 5000 || s.Memory != chunkBytes+50*entryBytes {
		t.Errorf("50 copies of 5000 rows: %+v", s)
	}
	for i := range 49 {
		tables.Delete(TableKey{File: File{Inode: uint64(i) + 1}})
	}
	*clock += 1e9
	if err := tables.Put(TableKey{File: File{Inode: 1000}}, testTable(5000, 8)); err != nil {
		t.Fatal(err)
	}
	if got := inKernel(t, tables, TableKey{File: File{Inode: 50}}, len(table.Words)); got == nil || !slices.Equal(got, table.Words) {
		t.Error("the last copy is not whole")
	}
}

// What was sampled last stays.
func TestTablesEvictTheOldest(t *testing.T) {
	tables, clock := newTestTables(t, 4*(256<<10))
	key := func(i int) TableKey { return TableKey{File{Inode: uint64(i) + 1}, 0} }
	use := func(i int) {
		raw := key(i).raw()
		var value cpuHfTable
		if err := tables.index.Lookup(&raw, &value); err != nil {
			t.Fatalf("table %d: %v", i, err)
		}
		value.UsedNs = tables.now()
		if err := tables.index.Put(&raw, &value); err != nil {
			t.Fatal(err)
		}
	}
	const n = 100
	for i := range n {
		if err := tables.Put(key(i), testTable(5000, uint16(i))); err != nil {
			t.Fatal(err)
		}
		*clock += 1e9
		for kept := range min(i+1, 5) {
			use(kept)
		}
	}
	for i := range n {
		if has := tables.Has(key(i)); i < 5 && !has || i >= 5 && i < n/2 && has {
			t.Errorf("table %d: there %t", i, has)
		}
	}
	if !tables.Has(key(n - 1)) {
		t.Error("the newest table is not there")
	}
}

func TestTablesRefuse(t *testing.T) {
	tables, _ := newTestTables(t, 256<<10)
	sorted := testTable(2, 0)
	for name, table := range map[string]Table{
		"no rows for the index": {Buckets: 2, Words: []uint16{0, 1, 1}},
		"beyond the region":     {FirstBucket: 511, Buckets: 2, Words: make([]uint16, 6)},
		"falling index":         {Buckets: 2, Words: append([]uint16{0, 2, 1}, make([]uint16, 6)...)},
		"too few rows":          {Buckets: 1, Words: append([]uint16{0, 3}, make([]uint16, 6)...)},
		"words without buckets": {Words: sorted.Words},
		"larger than a chunk":   testTable(chunkWords/rowWords, 0),
	} {
		if err := tables.Put(TableKey{Region: 1}, table); err == nil || errors.Is(err, ErrNoRoom) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// One chunk and the index do not fit into a limit of one chunk.
	if err := tables.Put(TableKey{}, testTable(1, 0)); !errors.Is(err, ErrNoRoom) {
		t.Errorf("limit of a chunk: %v, want %v", err, ErrNoRoom)
	}
	if _, err := NewTables(1000); err == nil {
		t.Error("a limit below a chunk was taken")
	}
}
