// SPDX-License-Identifier: Apache-2.0

package unwind

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// testTable is a table with n rows.
func testTable(n int) Region {
	b := builder{end: RegionSize}
	for i := range n {
		b.rows = append(b.rows, row{uint32(i * 16), narrow(KindSP, int64(1+i%100), 0, 0)})
	}
	return b.table()
}

func openCache(t *testing.T, dir string, quota int64) *Cache {
	t.Helper()
	c, err := OpenCache(dir, quota)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func put(t *testing.T, c *Cache, key CacheKey, region uint32, r Region) {
	t.Helper()
	if err := c.Put(key, region, &r); err != nil {
		t.Fatal(err)
	}
}

func sameTable(a, b Region) bool {
	return a.FirstBucket == b.FirstBucket && a.Rows == b.Rows && slices.Equal(a.Words, b.Words)
}

func TestCacheKeepsTables(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "tables")
	c := openCache(t, dir, 1<<20)
	key := CacheKey{"abcd", 1000, 5}
	want, empty := testTable(100), Region{}
	put(t, c, key, 3, want)
	put(t, c, key, 4, empty)
	for range 2 {
		if got, ok := c.Get(key, 3); !ok || !sameTable(got, want) {
			t.Errorf("%v, %+v", ok, got)
		}
		if got, ok := c.Get(key, 4); !ok || !sameTable(got, empty) {
			t.Errorf("%v, %+v", ok, got)
		}
		for _, other := range []CacheKey{{"abcd", 1000, 6}, {"abcd", 1001, 5}, {"abce", 1000, 5}, {"", 1000, 5}} {
			if _, ok := c.Get(other, 3); ok {
				t.Errorf("%+v has a table", other)
			}
		}
		if _, ok := c.Get(key, 5); ok {
			t.Error("region 5 has a table")
		}
		c.Close()
		c = openCache(t, dir, 1<<20) // a start later
	}
	st, err := os.Stat(dir)
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, error %v", st.Mode(), err)
	}
	if s := c.Stats(); s.Files != 2 || s.Bytes == 0 {
		t.Errorf("%+v", s)
	}
}

func TestCacheKeepsTheQuota(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tables")
	table := testTable(1000)
	size := int64(len(encodeTable(&table, (&CacheKey{BuildID: "x"}).header(0))))
	c := openCache(t, dir, 3*size)
	for i := range uint32(3) {
		put(t, c, CacheKey{BuildID: "x"}, i, table)
	}
	if _, ok := c.Get(CacheKey{BuildID: "x"}, 0); !ok {
		t.Fatal("evicted too early")
	}
	put(t, c, CacheKey{BuildID: "x"}, 3, table)
	for i, want := range []bool{true, false, true, true} {
		if _, ok := c.Get(CacheKey{BuildID: "x"}, uint32(i)); ok != want {
			t.Errorf("region %d: %v, want %v", i, ok, want)
		}
	}
	if s := c.Stats(); s.Evicted != 1 || s.Files != 3 || s.Bytes != 3*size {
		t.Errorf("%+v", s)
	}
	// Two of the files were last used long ago.
	names := cacheNames(t, dir)
	old := time.Now().Add(-24 * time.Hour)
	for _, name := range names[:2] {
		if err := os.Chtimes(filepath.Join(dir, name), old, old); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	c = openCache(t, dir, size)
	if left := cacheNames(t, dir); len(left) != 1 || left[0] != names[2] {
		t.Errorf("left: %v, want %v", left, names[2])
	}
	big := testTable(10000)
	put(t, c, CacheKey{BuildID: "big"}, 0, big)
	if s := c.Stats(); s.Files != 1 {
		t.Errorf("a table that is larger than the quota: %+v", s)
	}
}

func cacheNames(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestCacheRefusesDamage(t *testing.T) {
	key := CacheKey{"abcd", 1000, 5}
	table := testTable(50)
	other := encodeTable(&table, (&CacheKey{"dcba", 1000, 5}).header(0))
	for name, damage := range map[string]func(path string, b []byte) error{
		"a flipped bit": func(path string, b []byte) error { b[len(b)/2] ^= 4; return os.WriteFile(path, b, 0o600) },
		"cut":           func(path string, b []byte) error { return os.WriteFile(path, b[:len(b)-7], 0o600) },
		"empty":         func(path string, _ []byte) error { return os.WriteFile(path, nil, 0o600) },
		"longer":        func(path string, b []byte) error { return os.WriteFile(path, append(b, 0, 0), 0o600) },
		"huge":          func(path string, b []byte) error { return os.Truncate(path, 1<<40) },
		"of another file": func(path string, _ []byte) error {
			return os.WriteFile(path, other, 0o600)
		},
		"a link": func(path string, b []byte) error {
			if err := os.Rename(path, path+".real"); err != nil {
				return err
			}
			return os.Symlink(path+".real", path)
		},
		"a directory": func(path string, b []byte) error {
			if err := os.Remove(path); err != nil {
				return err
			}
			return os.Mkdir(path, 0o700)
		},
		"gone": func(path string, _ []byte) error { return os.Remove(path) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "tables")
			c := openCache(t, dir, 1<<20)
			put(t, c, key, 0, table)
			path := filepath.Join(dir, key.name(0))
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := damage(path, b); err != nil {
				t.Fatal(err)
			}
			if _, ok := c.Get(key, 0); ok {
				t.Fatal("believed")
			}
			if s := c.Stats(); s.Refused != 1 || s.Files != 0 || s.Bytes != 0 {
				t.Errorf("%+v", s)
			}
			if name == "a directory" {
				return // what is not ours stays
			}
			put(t, c, key, 0, table)
			if got, ok := c.Get(key, 0); !ok || !sameTable(got, table) {
				t.Error("not replaced")
			}
		})
	}
}

func TestCacheDirectory(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCache(link, 1); err == nil {
		t.Error("a link was opened")
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCache(file, 1); err == nil {
		t.Error("a file was opened")
	}
	tables := filepath.Join(dir, "tables")
	if err := os.Mkdir(tables, 0o777); err != nil {
		t.Fatal(err)
	}
	for name, stays := range map[string]bool{"x" + cacheTemp: false, "notes.txt": true} {
		if err := os.WriteFile(filepath.Join(tables, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		defer func() {
			_, err := os.Stat(filepath.Join(tables, name))
			if stays != (err == nil) {
				t.Errorf("%s: %v", name, err)
			}
		}()
	}
	openCache(t, tables, 1)
	if st, err := os.Stat(tables); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

// TestTableLimit has more rows than a chunk of the map can take.
func TestTableLimit(t *testing.T) {
	b := builder{end: RegionSize, skipped: map[Skip]int{}}
	wide, _ := wideRule{base: 3, offset: 1}.rule()
	for i := range RegionSize / 4 {
		r := narrow(KindSP, int64(1+i%2), 0, 0)
		if i%3 == 0 {
			r = wide
		}
		b.rows = append(b.rows, row{uint32(i * 4), r})
	}
	r := b.table()
	checkRegion(t, &r)
	if b.skipped[SkipLimit] == 0 || len(r.Words) > maxWords || len(r.Words) < maxWords-16 {
		t.Errorf("%d words, %d rows, skipped %v", len(r.Words), r.Rows, b.skipped)
	}
	if got := r.Rule(RegionSize - 1); got != 0 {
		t.Errorf("the last address has %v", got)
	}
	if got := r.Rule(0); got != wide {
		t.Errorf("the first address has %v, want %v", got, wide)
	}
}

// TestRuleFields takes every field through both encodings.
func TestRuleFields(t *testing.T) {
	for _, w := range []wideRule{
		{base: 31, deref: true, offset: -1 << 19, add: -128, fp: slot{savedNear, 1<<11 - 1}, second: slot{savedCFA, 1<<12 - 1}},
		{base: 3, offset: 1<<19 - 1, add: 127, fp: slot{savedLost, 0}, second: slot{savedNear, 0}},
		{base: 6, deref: true, offset: -1, fp: slot{savedCFA, 2}},
	} {
		r, ok := w.rule()
		if !ok || r.Kind() != KindWide || r.wide() != w {
			t.Errorf("%+v: %#x, %+v", w, uint64(r), r.wide())
		}
	}
	for _, w := range []wideRule{{base: 32}, {offset: 1 << 19}, {add: 128}, {fp: slot{savedCFA, 1 << 11}}, {second: slot{savedCFA, 1 << 12}}} {
		if r, ok := w.rule(); ok {
			t.Errorf("%+v fits: %v", w, r)
		}
	}
	if r := narrow(KindFP, maxCFA, maxSlot, 5); r.Kind() != KindFP || r.a() != maxCFA || r.fp() != maxSlot || r.second() != 5 || r>>32 != 0 {
		t.Errorf("%#x", uint64(r))
	}
	for rule, want := range map[Rule]string{
		0: "none", Rule(KindEnd): "end", Rule(KindSignal): "signal", narrow(KindPLT, 11, 0, 0): "plt 11",
		narrow(KindSP, 2, 0, 3): "sp+16 second=c-24", narrow(KindFP, 2, 2, 0): "fp+16 fp=c-16", narrow(KindGo, 2, 2, 0): "go 16 fp=c-16",
	} {
		if got := rule.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	r, _ := wideRule{base: 6, deref: true, offset: -1, add: 1, fp: slot{savedNear, 0}, second: slot{saved: savedLost}}.rule()
	if got := fmt.Sprint(r); !strings.HasPrefix(got, "[r6-8]+8") {
		t.Errorf("%q", got)
	}
}
