// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// TestDebuginfod: a file that is nowhere on the host is loaded, checked and kept; one that is
// not there is asked for once; one that is too big or another's is not taken.
func TestDebuginfod(t *testing.T) {
	path := buildC(t, deepC, "-g", "-O2", "-Wl,--build-id=sha1")
	bare := stripped(t, path)
	debug, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	other, err := os.ReadFile(buildC(t, deepC, "-g", "-O1", "-Wl,--build-id=sha1"))
	if err != nil {
		t.Fatal(err)
	}
	addr := []uint64{addressOf(t, path, "outer")}
	const named = "outer:5<5"
	for _, tt := range []struct {
		name   string
		body   []byte
		status int
		max    int64
		found  bool
	}{
		{name: "there", body: debug, found: true},
		{name: "not there", status: http.StatusNotFound},
		{name: "broken server", status: http.StatusInternalServerError},
		{name: "too big", body: debug, max: 1000},
		{name: "of another binary", body: other},
		{name: "no ELF file", body: []byte("<html>")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var asked atomic.Int64
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				if tt.status != 0 {
					w.WriteHeader(tt.status)
				}
				w.Write(tt.body)
			}))
			defer server.Close()
			cache := openTestCache(t, filepath.Join(t.TempDir(), "cache"), 64<<20)
			cfg := Config{Cache: cache, Debuginfod: Debuginfod{URLs: []string{server.URL + "/"}, MaxBytes: tt.max}, WaitForIndex: true}
			s := newSymbolizer(t, cfg)
			o := openObject(t, s, bare)
			for range 3 {
				if got := describe(o.Symbolize(addr)[0]); (got == named) != tt.found {
					t.Errorf("%s", got)
				}
			}
			if n := asked.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
			if !tt.found {
				return
			}
			server.Close() // another start finds what was kept
			if got := describe(openObject(t, newSymbolizer(t, cfg), bare).Symbolize(addr)[0]); got != named {
				t.Errorf("from the cache: %s", got)
			}
		})
	}
}

// TestDebuginfodHangs: nobody waits for a server that does not answer, not at the end
// either.
func TestDebuginfodHangs(t *testing.T) {
	bare := stripped(t, buildC(t, deepC, "-g", "-O2", "-Wl,--build-id=sha1"))
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	defer server.Close()
	defer close(release)
	s := New(Config{Cache: openTestCache(t, filepath.Join(t.TempDir(), "cache"), 64<<20), Debuginfod: Debuginfod{URLs: []string{server.URL}}})
	start := time.Now()
	r := openObject(t, s, bare).Symbolize([]uint64{openObject(t, s, bare).Segments()[1].Vaddr + 0x100})[0]
	if !r.Provisional {
		t.Errorf("%+v, want a provisional answer", r)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("%v", took)
	}
}
