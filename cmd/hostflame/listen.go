// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/mdlayher/vsock"
	"github.com/prometheus/exporter-toolkit/web"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// listen opens all listeners, or none.
func listen(flags *web.FlagConfig) (list []net.Listener, err error) {
	if err := web.Validate(*flags.WebConfigFile); err != nil {
		return nil, hintf("the format: https://prometheus.io/docs/prometheus/latest/configuration/https/", "read --web.config.file %s: %w", *flags.WebConfigFile, err)
	}
	if *flags.WebSystemdSocket {
		list, err := activation.Listeners()
		if err != nil {
			return nil, fmt.Errorf("take systemd's sockets: %w", err)
		}
		if len(list) == 0 {
			return nil, hintf("start it by a .socket unit, or leave --web.systemd-socket away", "take systemd's sockets: there are none")
		}
		return list, nil
	}
	defer func() {
		if err != nil {
			closeAll(list)
		}
	}()
	for _, address := range *flags.WebListenAddresses {
		l, err := listenOne(address)
		if err != nil {
			return list, hintf(listenHint(err), "listen on %s: %w", address, rootCause(err))
		}
		list = append(list, l)
	}
	return list, nil
}

func listenOne(address string) (net.Listener, error) {
	if !strings.HasPrefix(address, "vsock://") {
		return net.Listen("tcp", address)
	}
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(u.Port(), 10, 32)
	if err != nil {
		return nil, fmt.Errorf("parse port %q: %w", u.Port(), err)
	}
	return vsock.Listen(uint32(port), nil)
}

func listenHint(err error) string {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return "is another hostflame running? --web.listen-address=127.0.0.1:PORT takes another port"
	case errors.Is(err, unix.EACCES):
		return "ports below 1024 need CAP_NET_BIND_SERVICE; --web.listen-address takes another port"
	}
	return "--web.listen-address takes HOST:PORT, for example 127.0.0.1:4678 or [::1]:4678"
}

// rootCause is the kernel's own word: "address already in use" without the wrapping,
// which repeats the address.
func rootCause(err error) error {
	if e, ok := errors.AsType[*os.SyscallError](err); ok {
		return e.Err
	}
	if e, ok := errors.AsType[*net.OpError](err); ok {
		return e.Err
	}
	return err
}

func closeAll(list []net.Listener) {
	for _, l := range list {
		l.Close()
	}
}

// lateHandler serves from the first moment: until the real handler is there it answers
// that the agent is alive and not ready.
type lateHandler struct{ handler atomic.Pointer[http.Handler] }

func (l *lateHandler) set(h http.Handler) { l.handler.Store(&h) }

func (l *lateHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h := l.handler.Load(); h != nil {
		(*h).ServeHTTP(w, r)
		return
	}
	if r.URL.Path == "/-/healthy" {
		fmt.Fprintln(w, "hostflame is healthy")
		return
	}
	w.Header().Set("Retry-After", "1")
	http.Error(w, "hostflame is not ready: it attaches to the kernel", http.StatusServiceUnavailable)
}

// servers is one http.Server a listener: web.Serve changes the server that it is given.
type servers struct {
	list   []*http.Server
	group  errgroup.Group
	cancel context.CancelFunc // ends what the requests under way wait for
}

// serveHTTP serves h on all listeners, which it owns from here on. onError gets what ends
// a server before shutdown does.
func serveHTTP(listeners []net.Listener, flags *web.FlagConfig, h http.Handler, log *slog.Logger, onError func(error)) *servers {
	base, cancel := context.WithCancel(context.Background())
	s := &servers{cancel: cancel}
	for _, l := range listeners {
		server := &http.Server{
			Handler:           h,
			BaseContext:       func(net.Listener) context.Context { return base },
			ReadHeaderTimeout: 10 * time.Second,
			IdleTimeout:       2 * time.Minute,
			WriteTimeout:      time.Minute,
			MaxHeaderBytes:    64 << 10,
			ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		}
		s.list = append(s.list, server)
		s.group.Go(func() error {
			err := web.Serve(l, server, flags, log)
			if !errors.Is(err, http.ErrServerClosed) {
				onError(fmt.Errorf("serve on %s: %w", l.Addr(), err))
			}
			return nil
		})
	}
	return s
}

// shutdown answers what is under way, captures as abandoned, until ctx ends; then it
// closes the connections.
func (s *servers) shutdown(ctx context.Context) error {
	s.cancel()
	var g errgroup.Group
	for _, server := range s.list {
		g.Go(func() error {
			if err := server.Shutdown(ctx); err != nil {
				return errors.Join(err, server.Close())
			}
			return nil
		})
	}
	err := g.Wait()
	s.group.Wait()
	return err
}

// urlOf is where a person finds a listener.
func urlOf(l net.Listener, configFile string) string {
	scheme := "http"
	if hasTLS(configFile) {
		scheme = "https"
	}
	host := l.Addr().String()
	if a, ok := l.Addr().(*net.TCPAddr); ok && a.IP.IsUnspecified() {
		host = net.JoinHostPort("localhost", strconv.Itoa(a.Port))
	}
	return scheme + "://" + host
}

// hasTLS tells whether a web configuration file, which has been validated, turns TLS on.
func hasTLS(file string) bool {
	if file == "" {
		return false
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "tls_server_config:") {
			return true
		}
	}
	return false
}
