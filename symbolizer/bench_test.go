// SPDX-License-Identifier: Apache-2.0

package symbolizer

import "testing"

// BenchmarkSymbolizeObject looks all functions of libc up, warm and in random order.
func BenchmarkSymbolizeObject(b *testing.B) {
	path := libc(b)
	o := openObject(b, newSymbolizer(b, Config{}), path)
	var addrs []uint64
	for _, s := range nmText(b, path, "-D") {
		addrs = append(addrs, s.addr+s.size/2)
	}
	shuffle(addrs)
	o.Symbolize(addrs)
	b.ReportAllocs()
	measure(b, len(addrs), func() { o.Symbolize(addrs) })
}

// BenchmarkFirstSymbolize opens libc and answers one address.
func BenchmarkFirstSymbolize(b *testing.B) {
	path := libc(b)
	addr := []uint64{nmText(b, path, "-D")[100].addr}
	b.ReportAllocs()
	measure(b, 1, func() {
		s := New(Config{})
		if openObject(b, s, path).Symbolize(addr)[0].Lines == nil {
			b.Fatal("not found")
		}
		s.Close()
	})
}

// BenchmarkGo looks functions of the go command up, in random order: again, and for the
// first time.
func BenchmarkGo(b *testing.B) {
	path := string(run(b, ".", nil, "go", "env", "GOROOT"))
	path = path[:len(path)-1] + "/bin/go"
	o := openObject(b, newSymbolizer(b, Config{}), path)
	var addrs []uint64
	for i, f := range goFunctions(b, path) {
		if i%20 == 0 {
			addrs = append(addrs, f.addr+f.size/2)
		}
	}
	shuffle(addrs)
	o.Symbolize(addrs)
	b.Run("again", func(b *testing.B) {
		b.ReportAllocs()
		measure(b, len(addrs), func() { o.Symbolize(addrs) })
	})
	b.Run("first", func(b *testing.B) {
		b.ReportAllocs()
		measure(b, len(addrs), func() {
			o.tables.Load().byKind[tableGo].(*goTable).forget()
			o.Symbolize(addrs)
		})
	})
}

// TestTableMemory holds the tables to what they are said to take.
func TestTableMemory(t *testing.T) {
	s := newSymbolizer(t, Config{})
	path := libc(t)
	syms := nmText(t, path, "-D")
	var o *Object
	heap := heapOf(func() {
		o = openObject(t, s, path)
		o.Symbolize([]uint64{syms[0].addr})
	})
	table := s.Stats().TableBytes
	t.Logf("libc: %d symbols, table %d bytes, heap %d", len(syms), table, heap)
	if heap > 300<<10 || table > 300<<10 {
		t.Errorf("libc's table takes %d bytes, of the heap %d, want at most 300 KiB", table, heap)
	}
	// All functions seen: what is accounted is what the heap holds, within a third.
	var addrs []uint64
	for _, sym := range syms {
		addrs = append(addrs, sym.addr)
	}
	heap += heapOf(func() { o.Symbolize(addrs) })
	table = s.Stats().TableBytes
	t.Logf("libc with all names: table %d bytes, heap %d", table, heap)
	if heap > table*4/3 {
		t.Errorf("accounted %d bytes, the heap holds %d", table, heap)
	}
}
