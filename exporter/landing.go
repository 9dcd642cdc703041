// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
	"regexp"
	"time"

	"github.com/hostflame/hostflame/internal/buildinfo"
	"github.com/hostflame/hostflame/profiler"
)

var (
	//go:embed landing.html
	landingHTML string
	//go:embed landing.css
	landingCSS string
	//go:embed landing.js
	landingJS string
)

// landing serves the page that links all others.
type landing struct {
	cfg    HandlerConfig
	page   *template.Template
	policy string
}

// landingData is what the page is made of.
type landingData struct {
	CSS         template.CSS
	JS          template.JS
	Build       buildinfo.Info
	Host        string
	MetricsPath string
	DebugPprof  bool
	NoProfiles  error
	NotReady    bool
	Collectors  []CollectorStatus
	Window      *profiler.Window
	Profiles    []landingProfile
	Waits       bool   // there are profiles of run-queue waits
	Base        string // URL of this agent as the client reaches it
}

// landingProfile is what the page says of one type of profile.
type landingProfile struct {
	profiler.Type
	Of   *profiler.Profile // in the newest window; nil before the first
	Lost uint64
}

func newLanding(cfg HandlerConfig) (*landing, error) {
	page, err := template.New("landing").Funcs(template.FuncMap{
		"clock": func(t time.Time) string { return t.Format("15:04:05 MST") },
		"took":  func(d time.Duration) string { return d.Round(time.Microsecond).String() },
	}).Parse(landingHTML)
	if err != nil {
		return nil, fmt.Errorf("parse landing page: %w", err)
	}
	return &landing{
		cfg:  cfg,
		page: page,
		policy: fmt.Sprintf("default-src 'none'; style-src %s; script-src %s; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
			sourceHash(landingCSS), sourceHash(landingJS)),
	}, nil
}

// sourceHash is what a content security policy calls the inline text.
func sourceHash(text string) string {
	h := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(h[:]) + "'"
}

func (l *landing) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	data := landingData{
		CSS:         template.CSS(landingCSS),
		JS:          template.JS(landingJS),
		Build:       l.cfg.Build,
		Host:        l.cfg.Host,
		MetricsPath: l.cfg.MetricsPath,
		DebugPprof:  l.cfg.DebugPprof,
		NoProfiles:  l.cfg.NoProfiles,
		NotReady:    !l.cfg.Capturer.Ready(),
		Window:      l.cfg.Capturer.Newest(),
		Base:        baseURL(r),
	}
	if l.cfg.Collector != nil {
		data.Collectors = l.cfg.Collector.Status()
	}
	for _, t := range l.cfg.Types {
		p := landingProfile{Type: t}
		if data.Window != nil {
			p.Of = data.Window.Of(t.Name)
		}
		if p.Of != nil {
			for _, n := range p.Of.Lost {
				p.Lost += n
			}
		}
		data.Profiles = append(data.Profiles, p)
		data.Waits = data.Waits || t.Name == "runqueue" && l.cfg.NoProfiles == nil && l.cfg.MissingTypes[t.Name] == nil
	}
	var body bytes.Buffer
	if err := l.page.Execute(&body, data); err != nil {
		l.cfg.Logger.Error("make landing page failed", "err", err)
		http.Error(w, "make landing page failed", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", l.policy)
	w.Header().Set("Cache-Control", "no-store")
	body.WriteTo(w)
}

// plainHost is a host that can stand in a shell command without surprises.
var plainHost = regexp.MustCompile(`^[A-Za-z0-9.:\[\]_-]+$`)

// baseURL is how the client reached this agent.
func baseURL(r *http.Request) string {
	host := r.Host
	if !plainHost.MatchString(host) {
		host = "localhost:4678"
	}
	if r.TLS != nil {
		return "https://" + host
	}
	return "http://" + host
}
