// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
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
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"freeport": freePort,
			"hang":     hang,
			"ready":    ready,
			"get":      get,
			"clock":    clock,
			"exitcode": exitCode,
		},
	})
}

// freePort NAME sets NAME to the port of an address on which nobody listens.
func freePort(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Setenv(args[0], strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	ts.Check(l.Close())
}

// hang NAME listens on the port NAME, accepts connections and never answers.
func hang(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Setenv(args[0], strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
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

// ready PORT waits until an agent on the port says that it is.
func ready(ts *testscript.TestScript, _ bool, args []string) {
	url := "http://127.0.0.1:" + args[0] + "/-/ready"
	last := "no try"
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		r, err := http.Get(url)
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
	ts.Fatalf("%s: %s", url, last)
}

// get PORT PATH fails unless the answer is 200; with ! unless it is not.
func get(ts *testscript.TestScript, neg bool, args []string) {
	r, err := http.Get("http://127.0.0.1:" + args[0] + args[1])
	ts.Check(err)
	r.Body.Close()
	if (r.StatusCode == http.StatusOK) == neg {
		ts.Fatalf("GET %s: %s", args[1], r.Status)
	}
}

// clock NAME remembers the time; clock NAME 5s fails when that is longer ago than 5s.
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
	if d := now.Sub(time.Unix(0, since)); d > limit {
		ts.Fatalf("%s took %v, more than %v", args[0], d, limit)
	} else {
		ts.Logf("%s took %v", args[0], d)
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
