// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"bytes"
	"errors"
	"fmt"
	"html/template"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/pprof/driver"
	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/profiler"
)

// ui serves google/pprof's own pages for the newest window. Each window gets its own
// driver instance, made when somebody looks at it.
//
// The driver is a command turned into a library. What would reach outside this process
// is taken away from it: it fetches nothing, executes nothing and writes nothing. Its
// views of source and machine code would read files of this host whose names come from
// the profiled binaries, its graph executes graphviz, and its saved settings are a file:
// these pages do not exist here, and neither do their menu entries.
type ui struct {
	capturer Capturer
	types    []profiler.Type
	none     error // why there is nothing to show
	host     string
	logger   *slog.Logger
	reports  chan struct{}

	mu     sync.Mutex
	window *profiler.Window
	pages  map[string]map[string]http.Handler // of window, by type and path
}

func newUI(cfg HandlerConfig) *ui {
	return &ui{
		capturer: cfg.Capturer,
		types:    cfg.Types,
		none:     cfg.NoProfiles,
		host:     cfg.Host,
		logger:   cfg.Logger,
		reports:  make(chan struct{}, maxReports),
	}
}

// uiPolicy allows what pprof's pages are made of, all of it inline.
const uiPolicy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// notHere says why pages of pprof are missing, and how to get them.
const notHere = `this page of pprof needs graphviz or the profiled binaries, which the agent does not touch; see it on your own machine:
go tool pprof -http=: '%s/pprof/%s?seconds=10'`

func (u *ui) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	if u.none != nil {
		http.Error(w, fmt.Sprintf(noProfiles, u.none), http.StatusServiceUnavailable)
		return
	}
	window := u.capturer.Newest()
	if window == nil {
		u.waiting(w)
		return
	}
	typ, page, up := u.path(r.PathValue("page"))
	of := window.Of(typ)
	if of == nil {
		http.Error(w, fmt.Sprintf("there are no profiles of type %s", typ), http.StatusNotFound)
		return
	}
	switch page {
	case "":
		w.Header().Set("Location", "flamegraph")
		w.WriteHeader(http.StatusFound)
		return
	case "download":
		pp, err := of.Pprof()
		if err != nil {
			u.fail(w, err)
			return
		}
		attachment(w, u.host, typ, window.End)
		if r.Method == http.MethodHead {
			return
		}
		if err := pp.Write(w); err != nil {
			u.logger.Debug("send window failed", "err", err)
		}
		return
	case "flamegraph", "top", "peek":
	case "graph", "source", "disasm":
		http.Error(w, fmt.Sprintf(notHere, baseURL(r), typ), http.StatusNotFound)
		return
	default:
		http.Error(w, "no such page: there are flamegraph, top, peek and download", http.StatusNotFound)
		return
	}
	select {
	case u.reports <- struct{}{}:
		defer func() { <-u.reports }()
	default:
		unavailable(w, time.Second, "%d pages are being made, which is the limit: try again", cap(u.reports))
		return
	}
	handler, err := u.page(window, of, page)
	if err != nil {
		u.fail(w, err)
		return
	}
	answer := &recorder{header: http.Header{}, status: http.StatusOK}
	handler.ServeHTTP(answer, r)
	u.send(w, answer, up)
}

func (u *ui) fail(w http.ResponseWriter, err error) {
	u.logger.Error("make web UI failed", "err", err)
	http.Error(w, fmt.Sprintf("make web UI: %v", err), http.StatusInternalServerError)
}

// path takes apart what follows /ui/: the first profile type has its pages there, each other
// below its name. up leads to the landing page.
func (u *ui) path(path string) (typ, page, up string) {
	for _, t := range u.types[1:] {
		if page, ok := strings.CutPrefix(path, t.Name+"/"); ok {
			return t.Name, page, "../../"
		}
	}
	return u.types[0].Name, path, "../"
}

var waitingPage = template.Must(template.New("waiting").Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<title>hostflame</title><style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;margin:15vh auto;max-width:32rem;padding:0 1rem}</style></head>
<body><h1>No profile yet</h1>
<p>The first window of {{.}} has not closed yet. This page looks again every two seconds.</p>
<p><a href="../">hostflame on {{.}}</a></p></body></html>
`))

// waiting is what there is to see before the first window has closed.
func (u *ui) waiting(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", uiPolicy)
	w.Header().Set("Retry-After", "2")
	w.WriteHeader(http.StatusServiceUnavailable)
	if err := waitingPage.Execute(w, u.host); err != nil {
		u.logger.Debug("send page failed", "err", err)
	}
}

// page returns pprof's handler of a page of a profile of window, the newest.
func (u *ui) page(window *profiler.Window, of *profiler.Profile, name string) (http.Handler, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.window != window {
		u.window, u.pages = window, map[string]map[string]http.Handler{}
	}
	if u.pages[of.Type] == nil {
		pp, err := of.Pprof()
		if err != nil {
			return nil, err
		}
		pages, err := newPages(u.dressed(pp), u.logger)
		if err != nil {
			return nil, err
		}
		u.pages[of.Type] = pages
	}
	h := u.pages[of.Type]["/"+name]
	if h == nil {
		return nil, fmt.Errorf("pprof has no page %q", name)
	}
	return h, nil
}

// cloneSuffix is what compilers add to the name of a copy of a function.
var cloneSuffix = regexp.MustCompile(`(\.(isra|constprop|part|cold|lto_priv|llvm)(\.\d+)*)+$`)

// dressed is a copy of p for pprof's pages. Its first mapping is the host: pprof takes
// the first mapping as the main binary, and what it calls it is the title of its pages.
// Where there is little room pprof shows what follows the last dot of a name, so the dots
// of "schedule.isra.0" become others. It writes a mapping without symbols as [name], so
// one that has brackets already, as [anon] has, does without. It colours by package, so what
// the last frames say, the states and causes, are packages.
func (u *ui) dressed(p *profile.Profile) *profile.Profile {
	p = p.Copy()
	var last uint64
	for _, m := range p.Mapping {
		last = max(last, m.ID)
		m.File = strings.TrimSuffix(strings.TrimPrefix(m.File, "["), "]")
	}
	p.Mapping = append([]*profile.Mapping{{ID: last + 1, File: u.host}}, p.Mapping...)
	for _, f := range p.Function {
		if i := cloneSuffix.FindStringIndex(f.Name); i != nil {
			f.Name = f.Name[:i[0]] + strings.ReplaceAll(f.Name[i[0]:], ".", "·")
		}
	}
	for _, s := range p.Sample {
		for _, name := range leafLabels {
			if l := s.Label[name]; len(l) > 0 {
				s.Label[name] = []string{leafFrame(l[0], s.Label["culprit"], s.Label["victim"])}
			}
		}
	}
	return p
}

// leafLabels are what the last frames of stacks say, if there is such a label: of a type one.
var leafLabels = []string{"state", "cause"}

// leafFrame is the name of a last frame: pprof takes what is before a dot or a double colon
// for the package. What follows is the first process that is known, if any.
func leafFrame(value string, processes ...[]string) string {
	for _, comm := range processes {
		if len(comm) > 0 && comm[0] != "" {
			return value + "::" + strings.NewReplacer("/", "∕", ".", "·").Replace(comm[0])
		}
	}
	return value + "."
}

// back is the way from pprof's pages to the landing page, and what hides the menu
// entries of the pages that are not here.
const (
	headerMark = `<div class="header">`
	back       = headerMark + "\n" + `  <div class="menu-item"><div class="menu-name"><a href="%s">hostflame</a></div></div>`
	headMark   = "</head>"
	hide       = `<style>#graphbtn,#list,#disasm,#config,#action-source,#action-source-tab,#action-source-tab+hr{display:none!important}</style>` + "\n" + headMark
)

// send passes on what pprof answered, its pages changed to what is here. up is the way to
// the landing page.
func (u *ui) send(w http.ResponseWriter, answer *recorder, up string) {
	body := answer.body.Bytes()
	if answer.status == http.StatusOK {
		body = bytes.Replace(body, []byte(headMark), []byte(hide), 1)
		body = bytes.Replace(body, []byte(headerMark), fmt.Appendf(nil, back, up), 1)
		w.Header().Set("Content-Security-Policy", uiPolicy)
	}
	for name, values := range answer.header {
		w.Header()[name] = values
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(answer.status)
	if _, err := w.Write(body); err != nil {
		u.logger.Debug("send page failed", "err", err)
	}
}

// recorder keeps an answer.
type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }

// driverMu guards what the driver keeps in package variables, and the environment that
// it reads, while an instance is made.
var driverMu sync.Mutex

// noSettings makes the driver believe that its settings are in a directory where no file
// can be. It would read the settings of the user otherwise, and refuse to start where
// there is no home, as in a system service. It returns what undoes this.
func noSettings() (undo func(), err error) {
	const name = "XDG_CONFIG_HOME"
	before, set := os.LookupEnv(name)
	if err := os.Setenv(name, os.DevNull); err != nil {
		return nil, fmt.Errorf("set %s: %w", name, err)
	}
	return func() {
		if set {
			os.Setenv(name, before)
		} else {
			os.Unsetenv(name)
		}
	}, nil
}

// newPages makes a driver instance for p, which it takes over, and returns its pages by
// path.
func newPages(p *profile.Profile, logger *slog.Logger) (map[string]http.Handler, error) {
	driverMu.Lock()
	defer driverMu.Unlock()
	undo, err := noSettings()
	if err != nil {
		return nil, err
	}
	defer undo()
	var pages map[string]http.Handler
	err = driver.PProf(&driver.Options{
		Flagset:       newFlags(p),
		Fetch:         fetcher{p},
		Sym:           noSymbolizer{},
		Obj:           noObjTool{},
		UI:            console{logger},
		HTTPTransport: noTransport{},
		HTTPServer: func(args *driver.HTTPServerArgs) error {
			pages = args.Handlers
			return nil
		},
	})
	if err != nil {
		return nil, err
	}
	if pages == nil {
		return nil, errors.New("pprof did not start its web interface")
	}
	return pages, nil
}

func hasLabel(p *profile.Profile, name string) bool {
	for _, s := range p.Sample {
		if len(s.Label[name]) > 0 {
			return true
		}
	}
	return false
}

// flags is the command line "-http=localhost:1 -no_browser window" and the labels that become
// frames. The address is only parsed.
type flags struct{ root, leaf, ignore string }

func newFlags(p *profile.Profile) (f flags) {
	if hasLabel(p, "comm") {
		f.root = "comm"
	}
	for _, name := range leafLabels {
		if hasLabel(p, name) {
			f.leaf = name
		}
	}
	if hasLabel(p, "idle") {
		f.ignore = "idle=true" // it would be most of the picture; ?ti= shows it
	}
	return f
}

func (flags) Bool(name string, def bool, _ string) *bool {
	if name == "no_browser" {
		def = true
	}
	return &def
}

func (flags) Int(_ string, def int, _ string) *int             { return &def }
func (flags) Float64(_ string, def float64, _ string) *float64 { return &def }

func (f flags) String(name, def, _ string) *string {
	switch name {
	case "http":
		def = "localhost:1"
	case "symbolize":
		def = "none"
	case "tagroot":
		def = f.root
	case "tagleaf":
		def = f.leaf
	case "tagignore":
		def = f.ignore
	}
	return &def
}

func (flags) StringList(string, string, string) *[]*string { return new([]*string) }
func (flags) ExtraUsage() string                           { return "" }
func (flags) AddExtraUsage(string)                         {}
func (flags) Parse(func()) []string                        { return []string{"window"} }

// fetcher has the profile already. Its source is empty, which tells the driver that
// there is nothing to keep a copy of.
type fetcher struct{ p *profile.Profile }

func (f fetcher) Fetch(string, time.Duration, time.Duration) (*profile.Profile, string, error) {
	return f.p, "", nil
}

type noSymbolizer struct{}

func (noSymbolizer) Symbolize(string, driver.MappingSources, *profile.Profile) error { return nil }

var errNotUsed = errors.New("not used")

type noObjTool struct{}

func (noObjTool) Open(string, uint64, uint64, uint64, string) (driver.ObjFile, error) {
	return nil, errNotUsed
}

func (noObjTool) Disasm(string, uint64, uint64, bool) ([]driver.Inst, error) {
	return nil, errNotUsed
}

type noTransport struct{}

func (noTransport) RoundTrip(*http.Request) (*http.Response, error) { return nil, errNotUsed }

// console is the driver's terminal.
type console struct{ logger *slog.Logger }

func (console) ReadLine(string) (string, error)     { return "", errNotUsed }
func (console) Print(...any)                        {}
func (c console) PrintErr(args ...any)              { c.logger.Debug("pprof", "message", fmt.Sprint(args...)) }
func (console) IsTerminal() bool                    { return false }
func (console) WantBrowser() bool                   { return false }
func (console) SetAutoComplete(func(string) string) {}
