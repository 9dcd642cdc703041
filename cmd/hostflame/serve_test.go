// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/pprof/profile"
	"github.com/prometheus/exporter-toolkit/web"
	"golang.org/x/sys/unix"
)

func TestLateHandler(t *testing.T) {
	var late lateHandler
	status := func(path string) int {
		w := httptest.NewRecorder()
		late.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		return w.Code
	}
	for path, want := range map[string]int{"/-/healthy": 200, "/-/ready": 503, "/metrics": 503} {
		if got := status(path); got != want {
			t.Errorf("%s before the handler is there: %d, want %d", path, got, want)
		}
	}
	late.set(http.NotFoundHandler())
	if got := status("/-/ready"); got != 404 {
		t.Errorf("/-/ready after: %d, want what the handler says", got)
	}
}

func TestListenAllOrNone(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	var noFile string
	var noSystemd bool
	addresses := []string{free.Addr().String(), taken.Addr().String()}
	flags := &web.FlagConfig{WebListenAddresses: &addresses, WebSystemdSocket: &noSystemd, WebConfigFile: &noFile}
	if _, err := listen(flags); !errors.Is(err, unix.EADDRINUSE) {
		t.Fatalf("listen: %v, want %v", err, unix.EADDRINUSE)
	}
	again, err := net.Listen("tcp", free.Addr().String())
	if err != nil {
		t.Fatalf("the first address is still taken: %v", err)
	}
	again.Close()
}

func TestURL(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	tls := file("tls.yml", "tls_server_config:\n  cert_file: x\n")
	auth := file("auth.yml", "basic_auth_users:\n  a: b\n")
	for _, tt := range []struct {
		address net.TCPAddr
		config  string
		want    string
	}{
		{net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 4678}, "", "http://127.0.0.1:4678"},
		{net.TCPAddr{IP: net.IPv6unspecified, Port: 1}, "", "http://localhost:1"},
		{net.TCPAddr{IP: net.IPv6loopback, Port: 1}, tls, "https://[::1]:1"},
		{net.TCPAddr{IP: net.IPv6loopback, Port: 1}, auth, "http://[::1]:1"},
	} {
		if got := urlOf(listenerAt{addr: &tt.address}, tt.config); got != tt.want {
			t.Errorf("%v: %s, want %s", tt.address, got, tt.want)
		}
	}
}

type listenerAt struct {
	net.Listener
	addr net.Addr
}

func (l listenerAt) Addr() net.Addr { return l.addr }

func TestOutputIsWholeOrOld(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cpu.pb.gz")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := newOutput(path, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	err = out.commit(func(w io.Writer) error {
		io.WriteString(w, "half of the new")
		return unix.ENOSPC
	})
	out.discard()
	if !errors.Is(err, unix.ENOSPC) || !strings.HasSuffix(err.Error(), path+": no space left on device") {
		t.Errorf("commit: %v", err)
	}
	expect := func(want string) {
		t.Helper()
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
		if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
	expect("old")

	if out, err = newOutput(path, io.Discard); err != nil {
		t.Fatal(err)
	}
	if err := out.commit(func(w io.Writer) error { _, err := io.WriteString(w, "new"); return err }); err != nil {
		t.Fatal(err)
	}
	out.discard()
	expect("new")
}

func TestTopFunction(t *testing.T) {
	fn := func(name string) *profile.Location {
		return &profile.Location{Line: []profile.Line{{Function: &profile.Function{Name: name}}}}
	}
	a, b, unknown := fn("a"), fn("b"), &profile.Location{}
	p := &profile.Profile{Sample: []*profile.Sample{
		{Value: []int64{2}, Location: []*profile.Location{a, b}},
		{Value: []int64{3}, Location: []*profile.Location{b}},
		{Value: []int64{2}, Location: []*profile.Location{a}},
		{Value: []int64{1}, Location: []*profile.Location{unknown, b}},
	}}
	if name, share := topFunction(p); name != "a" || share != 0.5 {
		t.Errorf("%s, %v, want a, 0.5", name, share)
	}
	if name, _ := topFunction(&profile.Profile{}); name != "" {
		t.Errorf("%q on top of nothing", name)
	}
}
