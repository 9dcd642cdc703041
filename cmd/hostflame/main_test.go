// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"hostflame": main})
}

// TestScripts runs the real main as its own process. [root] gates what needs the kernel.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			// nobody has to get to the binary too.
			return os.Chmod(env.WorkDir, 0o755)
		},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "pmu":
				_, err := os.Stat("/sys/bus/event_source/devices/cpu")
				return err == nil, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"freeaddr":    freeAddr,
			"hang":        hang,
			"ready":       ready,
			"get":         get,
			"getting":     getting,
			"certificate": certificate,
			"systemd":     systemd,
			"notified":    notified,
			"clock":       clock,
			"exitcode":    exitCode,
			"term":        term,
		},
	})
}

// freeAddr NAME sets NAME to an address on which nobody listens.
func freeAddr(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Setenv(args[0], l.Addr().String())
	ts.Check(l.Close())
}

// hang NAME sets NAME to an address that accepts connections and never answers.
func hang(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Setenv(args[0], l.Addr().String())
	go func() {
		var conns []net.Conn // referenced, so that none is closed
		for {
			c, err := l.Accept()
			if err != nil {
				for _, c := range conns {
					c.Close()
				}
				return
			}
			conns = append(conns, c)
		}
	}()
	ts.Defer(func() { l.Close() })
}

// client trusts the certificate of the test. User and password come from the URL.
var client = &http.Client{Transport: &http.Transport{
	TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true,
}}

// ready URL waits until the agent there says that it is.
func ready(ts *testscript.TestScript, _ bool, args []string) {
	last := "no try"
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		r, err := client.Get(args[0] + "/-/ready")
		if err != nil {
			last = err.Error()
			continue
		}
		r.Body.Close()
		if r.StatusCode == http.StatusOK {
			return
		}
		last = r.Status
	}
	ts.Fatalf("%s is not ready: %s", args[0], last)
}

// get URL [STATUS] fails unless the answer has the status, 200 if none is given.
func get(ts *testscript.TestScript, _ bool, args []string) {
	want := "200"
	if len(args) > 1 {
		want = args[1]
	}
	r, err := client.Get(args[0])
	ts.Check(err)
	r.Body.Close()
	if got := strconv.Itoa(r.StatusCode); got != want {
		ts.Fatalf("GET %s: %s, want %s", args[0], r.Status, want)
	}
}

// getting URL gets it in the background, whatever comes of it.
func getting(ts *testscript.TestScript, _ bool, args []string) {
	go func() {
		if r, err := client.Get(args[0]); err == nil {
			r.Body.Close()
		}
	}()
}

// certificate NAME writes a self-signed certificate, NAME.crt and NAME.key.
func certificate(ts *testscript.TestScript, _ bool, args []string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	ts.Check(err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	ts.Check(err)
	for name, block := range map[string]*pem.Block{
		".crt": {Type: "CERTIFICATE", Bytes: cert},
		".key": {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		ts.Check(os.WriteFile(ts.MkAbs(args[0]+name), pem.EncodeToMemory(block), 0o600))
	}
}

// systemd listens for notifications, as it does; notified STATE waits for one.
func systemd(ts *testscript.TestScript, _ bool, _ []string) {
	path := ts.MkAbs("notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	ts.Check(err)
	ts.Defer(func() { l.Close() })
	ts.Setenv("NOTIFY_SOCKET", path)
	sockets.Store(path, l)
}

// sockets are the listeners of systemd, by path.
var sockets sync.Map

func notified(ts *testscript.TestScript, _ bool, args []string) {
	l, _ := sockets.Load(ts.MkAbs("notify"))
	conn := l.(*net.UnixConn)
	ts.Check(conn.SetReadDeadline(time.Now().Add(time.Minute)))
	for b := make([]byte, 4096); ; {
		n, err := conn.Read(b)
		ts.Check(err)
		ts.Logf("notified: %q", b[:n])
		if slices.Contains(strings.Split(string(b[:n]), "\n"), args[0]) {
			return
		}
	}
}

// clock NAME remembers the time; clock NAME 5s fails when that is longer ago than 5s, but
// not with the race detector.
func clock(ts *testscript.TestScript, _ bool, args []string) {
	now := time.Now()
	if len(args) == 1 {
		ts.Setenv("clock_"+args[0], strconv.FormatInt(now.UnixNano(), 10))
		return
	}
	since, err := strconv.ParseInt(ts.Getenv("clock_"+args[0]), 10, 64)
	ts.Check(err)
	limit, err := time.ParseDuration(args[1])
	ts.Check(err)
	if d := now.Sub(time.Unix(0, since)); d > limit && !kerneltest.Race {
		ts.Fatalf("%s took %v, more than %v", args[0], d, limit)
	} else {
		ts.Logf("%s took %v", args[0], d)
	}
}

// term sends SIGTERM to what runs in the background (kill knows only INT and KILL).
func term(ts *testscript.TestScript, _ bool, _ []string) {
	for _, c := range ts.BackgroundCmds() {
		if err := c.Process.Signal(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
			ts.Check(err)
		}
	}
}

// exitCode CODE COMMAND... runs a command that has to end with the code.
func exitCode(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		e, ok := err.(interface{ ExitCode() int })
		if !ok {
			ts.Check(err)
		}
		got = e.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}
