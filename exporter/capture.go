// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/profiler"
)

const (
	defaultSeconds = 10
	maxSeconds     = 3600
	maxPID         = 1 << 22 // PID_MAX_LIMIT
	maxComm        = 15      // TASK_COMM_LEN less the zero
	maxFilter      = 256     // values of one filter
)

// filters are the parameters of all types that may be given several times; those of a
// type's labels come to them.
var filters = []string{"pid", "comm", "container"}

// parameters are what /pprof/<type> takes, and which of it several times.
func parameters(t *profiler.Type) (allowed, repeatable []string) {
	repeatable = slices.Clone(filters)
	for _, l := range t.Labels {
		repeatable = append(repeatable, l.Name)
	}
	allowed = append([]string{"seconds"}, repeatable...)
	if t.Least != nil {
		allowed = append(allowed, t.Least.Parameter)
	}
	return append(allowed, "format", "sample_index"), repeatable
}

// captureQuery is a request for a profile, checked.
type captureQuery struct {
	profiler.Request
	folded      bool
	sampleIndex string
}

// parseCapture reads the query of /pprof/<type>. Errors are for the client.
func parseCapture(t *profiler.Type, query string) (captureQuery, error) {
	sampleTypes := t.SampleTypes()
	q := captureQuery{
		Request:     profiler.Request{Type: t.Name, Duration: defaultSeconds * time.Second},
		sampleIndex: sampleTypes[0],
	}
	params, err := url.ParseQuery(query)
	if err != nil {
		return q, fmt.Errorf("the query can not be parsed: %w", err)
	}
	allowed, repeatable := parameters(t)
	for _, name := range sortedKeys(params) {
		if !slices.Contains(allowed, name) {
			return q, fmt.Errorf("unknown parameter %q: allowed are %s", name, strings.Join(allowed, ", "))
		}
		switch n := len(params[name]); {
		case slices.Contains(repeatable, name) && n > maxFilter:
			return q, fmt.Errorf("%s is given %d times: at most %d are allowed", name, n, maxFilter)
		case !slices.Contains(repeatable, name) && n > 1:
			return q, fmt.Errorf("%s is given %d times: want it once", name, n)
		}
	}
	if params.Has("seconds") {
		n, err := strconv.Atoi(params.Get("seconds"))
		if err != nil || n < 1 || n > maxSeconds {
			return q, fmt.Errorf("seconds=%q: want a whole number from 1 to %d", params.Get("seconds"), maxSeconds)
		}
		q.Duration = time.Duration(n) * time.Second
	}
	for _, v := range params["pid"] {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > maxPID {
			return q, fmt.Errorf("pid=%q: want a process id, a whole number from 1 to %d", v, maxPID)
		}
		q.Filter.PIDs = append(q.Filter.PIDs, uint32(n))
	}
	for _, v := range params["comm"] {
		if v == "" || len(v) > maxComm {
			return q, fmt.Errorf("comm=%q: want 1 to %d bytes, as /proc/PID/comm shows it", v, maxComm)
		}
		q.Filter.Comms = append(q.Filter.Comms, v)
	}
	for _, v := range params["container"] {
		if v == "" {
			return q, errors.New("container is empty: want a container id of 12 hex digits, a systemd unit or a cgroup path; the root is /")
		}
		q.Filter.Containers = append(q.Filter.Containers, v)
	}
	for _, l := range t.Labels {
		for _, v := range params[l.Name] {
			if v == "" {
				return q, fmt.Errorf("%s is empty", l.Name)
			}
			if err := l.Check(v); err != nil {
				return q, err
			}
			if q.Filter.Labels == nil {
				q.Filter.Labels = map[string][]string{}
			}
			q.Filter.Labels[l.Name] = append(q.Filter.Labels[l.Name], v)
		}
	}
	if t.Least != nil && params.Has(t.Least.Parameter) {
		v := params.Get(t.Least.Parameter)
		d, err := time.ParseDuration(v)
		if err != nil || d < 0 {
			return q, fmt.Errorf("%s=%q: want a duration with a unit, such as 500us or 10ms", t.Least.Parameter, v)
		}
		q.Filter.Least = uint64(d)
	}
	switch format := params.Get("format"); {
	case format == "folded":
		q.folded = true
	case params.Has("format") && format != "pprof":
		return q, fmt.Errorf("format=%q: want pprof or folded", format)
	}
	if params.Has("sample_index") {
		if !q.folded {
			return q, errors.New("sample_index needs format=folded: a pprof profile holds all values")
		}
		q.sampleIndex = params.Get("sample_index")
		if !slices.Contains(sampleTypes, q.sampleIndex) {
			return q, fmt.Errorf("sample_index=%q: want %s", q.sampleIndex, strings.Join(sampleTypes, " or "))
		}
	}
	return q, nil
}

func sortedKeys(params url.Values) []string {
	names := make([]string, 0, len(params))
	for name := range params {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// captures serves /pprof/<type>.
type captures struct {
	capturer Capturer
	types    []profiler.Type
	none     error            // why there is nothing to capture
	missing  map[string]error // likewise, of a type
	host     string
	logger   *slog.Logger
	slots    slots
}

func newCaptures(cfg HandlerConfig) *captures {
	return &captures{
		capturer: cfg.Capturer,
		types:    cfg.Types,
		none:     cfg.NoProfiles,
		missing:  cfg.MissingTypes,
		host:     cfg.Host,
		logger:   cfg.Logger,
		slots:    slots{limit: cfg.MaxCaptures, ends: map[int]time.Time{}},
	}
}

func (c *captures) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	t, err := findType(c.types, r.PathValue("type"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	q, err := parseCapture(t, r.URL.RawQuery)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if why := cmp.Or(c.none, c.missing[t.Name]); why != nil {
		http.Error(w, fmt.Sprintf(noProfiles, why), http.StatusServiceUnavailable)
		return
	}
	if r.Method == http.MethodHead {
		c.headers(w, q)
		return
	}
	if !c.capturer.Ready() {
		unavailable(w, time.Second, "no profile yet: %s", notDrained)
		return
	}
	release, wait := c.slots.take(q.Duration)
	if release == nil {
		unavailable(w, wait, "%d captures are running, which is the limit: try again in %s s", c.slots.limit, seconds(wait))
		return
	}
	control := http.NewResponseController(w)
	// A writer without deadlines has nothing to lift. On HTTP/2 the deadline ends the
	// stream even while nothing is written.
	_ = control.SetWriteDeadline(time.Time{})
	p, err := c.capturer.Capture(r.Context(), q.Request)
	release()
	if s, ok := r.Context().Value(http.ServerContextKey).(*http.Server); ok && s.WriteTimeout > 0 {
		_ = control.SetWriteDeadline(time.Now().Add(s.WriteTimeout))
	}
	switch {
	case err != nil && r.Context().Err() != nil:
		// The client has left, or the agent stops; only in the second case is this read.
		unavailable(w, time.Second, "the capture was abandoned")
		return
	case err != nil:
		c.logger.Error("capture failed", "type", q.Type, "duration", q.Duration, "err", err)
		http.Error(w, fmt.Sprintf("capture failed: %v", err), http.StatusInternalServerError)
		return
	}
	var body bytes.Buffer
	if err := q.encode(&body, p); err != nil {
		c.logger.Error("encode profile failed", "type", q.Type, "err", err)
		http.Error(w, fmt.Sprintf("encode profile: %v", err), http.StatusInternalServerError)
		return
	}
	c.headers(w, q)
	w.Header().Set("Content-Length", strconv.Itoa(body.Len()))
	body.WriteTo(w)
}

func (q captureQuery) encode(w io.Writer, p *profile.Profile) error {
	if q.folded {
		return profiler.WriteFolded(w, p, q.sampleIndex)
	}
	return p.Write(w)
}

func (c *captures) headers(w http.ResponseWriter, q captureQuery) {
	w.Header().Set("Cache-Control", "no-store")
	if q.folded {
		plainText(w)
		return
	}
	attachment(w, c.host, q.Type, time.Now())
}

// attachment says that a gzip-compressed pprof profile follows.
func attachment(w http.ResponseWriter, host, profile string, at time.Time) {
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", fmt.Sprintf(`attachment; filename="hostflame-%s-%s-%s.pb.gz"`,
		fileName(host), profile, at.UTC().Format("20060102T150405Z")))
}

// fileName keeps of s what is safe in a file name and in a quoted header.
func fileName(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '.', r == '-':
			return r
		}
		return '_'
	}, s)
}

func findType(types []profiler.Type, name string) (*profiler.Type, error) {
	var names []string
	for i := range types {
		if types[i].Name == name {
			return &types[i], nil
		}
		names = append(names, types[i].Name)
	}
	have := strings.Join(names, ", ")
	if name == "" {
		return nil, fmt.Errorf("which profile? there is: %s", have)
	}
	return nil, fmt.Errorf("no profile type %q here; there is: %s", name, have)
}

// slots bounds the captures that run at once, and knows when the next one ends.
type slots struct {
	limit int

	mu   sync.Mutex
	next int
	ends map[int]time.Time
}

// take returns what gives the slot back, or nil and the time until one is free.
func (s *slots) take(d time.Duration) (release func(), wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if len(s.ends) >= s.limit {
		var first time.Time
		for _, end := range s.ends {
			if first.IsZero() || end.Before(first) {
				first = end
			}
		}
		return nil, first.Sub(now)
	}
	id := s.next
	s.next++
	s.ends[id] = now.Add(d)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.ends, id)
	}, 0
}
