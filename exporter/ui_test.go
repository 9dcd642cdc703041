// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/google/pprof/profile"

	"github.com/hostflame/hostflame/profiler"
)

// tab is a tab of a headless chromium whose complaints fail the test.
type tab struct {
	t   *testing.T
	ctx context.Context
}

func newTab(t *testing.T) tab {
	t.Helper()
	if testing.Short() {
		t.Skip("starts chromium")
	}
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("the pages are tested in chromium (make test installs it): %v", err)
	}
	ctx, cancel := chromedp.NewExecAllocator(context.Background(),
		chromedp.ExecPath(path),
		chromedp.NoSandbox, chromedp.Headless, chromedp.DisableGPU, chromedp.NoFirstRun,
		chromedp.UserDataDir(t.TempDir()),
		chromedp.Flag("disable-background-networking", true),
		chromedp.Flag("disable-component-update", true),
		chromedp.Flag("disable-sync", true),
		chromedp.Flag("disable-quic", true),
		chromedp.WindowSize(1280, 800),
	)
	t.Cleanup(cancel)
	ctx, cancelTab := chromedp.NewContext(ctx)
	t.Cleanup(func() {
		// Waits until the browser has ended, so that its directory can go.
		if err := chromedp.Cancel(ctx); err != nil {
			t.Logf("end chromium: %v", err)
		}
		cancelTab()
	})
	var mu sync.Mutex
	var complaints []string
	complain := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		complaints = append(complaints, fmt.Sprintf(format, args...))
	}
	if err := chromedp.Listen(ctx, func(event any) {
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			complain("exception: %s", e.ExceptionDetails.Text)
		case *runtime.EventConsoleAPICalled:
			if e.Type == runtime.ConsoleAPICalledTypeError || e.Type == runtime.ConsoleAPICalledTypeWarning {
				complain("console %s: %s", e.Type, e.Args[0].Value)
			}
		case *log.EventEntryAdded:
			// Every browser asks for a favicon.
			if e.Entry.Level == log.EntryLevelError && !strings.HasSuffix(e.Entry.URL, "/favicon.ico") {
				complain("browser log: %s %s", e.Entry.Text, e.Entry.URL)
			}
		}
	}); err != nil {
		t.Fatalf("start chromium: %v", err)
	}
	limited, cancelTime := context.WithTimeout(ctx, 90*time.Second)
	t.Cleanup(cancelTime)
	t.Cleanup(func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range complaints {
			t.Error(c)
		}
	})
	return tab{t, limited}
}

// do performs steps that have no value.
func (b tab) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b.ctx, steps...); err != nil {
		b.t.Fatal(err)
	}
}

// get is the value of a step in the tab.
func get[T any](b tab, step chromedp.Action[T]) T {
	b.t.Helper()
	v, err := chromedp.Run(b.ctx, step)
	if err != nil {
		b.t.Fatal(err)
	}
	return v
}

// screenshot keeps the page as it is in $SCREENSHOTS, for people to look at.
func (b tab) screenshot(name string) {
	b.t.Helper()
	dir := os.Getenv("SCREENSHOTS")
	if dir == "" {
		return
	}
	if err := os.WriteFile(filepath.Join(dir, name+".png"), get(b, chromedp.FullScreenshot(100)), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// visibleLinks are the links of a page that a person can get at, menus included.
const visibleLinks = `[...document.querySelectorAll("a[href]")].filter(a => {
	for (let e = a; e; e = e.parentElement) {
		if (getComputedStyle(e).display == "none" && !e.classList.contains("submenu")) return false;
	}
	return true;
}).map(a => a.href)`

func TestFlameGraphPage(t *testing.T) {
	s := testServer(t, newFakeCapturer(t), nil)
	b := newTab(t)
	b.do(chromedp.Navigate(s.URL+"/ui/"), chromedp.WaitVisible(chromedp.CSS("#stack-chart .boxtext")))
	b.screenshot("flamegraph")
	if got, want := get(b, chromedp.Location()), s.URL+"/ui/flamegraph"; got != want {
		t.Errorf("at %s, want %s", got, want)
	}
	if got := get(b, chromedp.Title()); got != "testhost cpu" {
		t.Errorf("title %q", got)
	}
	const boxes = `[...document.querySelectorAll("#stack-chart .boxtext")].map(e => e.innerText).join("\n")`
	text := get(b, chromedp.Evaluate[string](boxes))
	for _, want := range []string{"burnKnownFunction", "knowncomm"} {
		if !strings.Contains(text, want) {
			t.Errorf("the flame graph does not show %s:\n%s", want, text)
		}
	}
	links := get(b, chromedp.Evaluate[[]string](visibleLinks))
	checkLinks(t, s.URL, links, "/", "/ui/top", "/ui/flamegraph", "/ui/peek", "/ui/download")

	// What pprof's scripts do with the pages goes on working.
	b.do(
		chromedp.Navigate(s.URL+"/ui/flamegraph?p=burnKnownFunction"),
		chromedp.WaitVisible(chromedp.CSS("#stack-chart .boxtext")),
		chromedp.Navigate(s.URL+"/ui/top"),
		chromedp.WaitVisible(chromedp.CSS("#rows tr")),
	)
	b.screenshot("top")
	if text := get(b, chromedp.Text(chromedp.CSS("#rows"))); !strings.Contains(text, "burnKnownFunction") {
		t.Errorf("the table does not show the function:\n%s", text)
	}
}

// checkLinks wants the links at least, and none that leads nowhere.
func checkLinks(t *testing.T, base string, links []string, want ...string) {
	t.Helper()
	seen := map[string]bool{}
	for _, link := range links {
		path, ours := strings.CutPrefix(link, base)
		if !ours {
			t.Errorf("a link leaves the agent: %s", link)
			continue
		}
		path, _, _ = strings.Cut(path, "#")
		bare, _, _ := strings.Cut(path, "?")
		seen[bare] = true
		// A capture is only asked whether it would be made.
		if answer, body := fetch(t, http.MethodHead, base+path); answer.StatusCode >= 400 {
			t.Errorf("link %s: %s %s", path, answer.Status, body)
		}
	}
	for _, path := range want {
		if !seen[path] {
			t.Errorf("no link to %s in %q", path, links)
		}
	}
}

func TestLandingPage(t *testing.T) {
	s := testServer(t, newFakeCapturer(t), func(c *HandlerConfig, _ *http.Server) { c.DebugPprof = true })
	b := newTab(t)
	b.do(chromedp.Navigate(s.URL+"/"), chromedp.WaitVisible(chromedp.CSS("main")))
	b.screenshot("landing")
	text := get(b, chromedp.Text(chromedp.CSS("body")))
	links := get(b, chromedp.Evaluate[[]string](visibleLinks))
	commands := get(b, chromedp.Evaluate[[]string](`[...document.querySelectorAll(".command code")].map(e => e.textContent)`))
	b.do(
		chromedp.Click(chromedp.CSS(".command button")),
		chromedp.WaitVisible(`//button[text()="Copied" or text()="Selected"]`),
	)
	for _, want := range []string{"testhost", "1.2.3", "0123456789abcdef", "cpu\twhat runs on the CPUs\t1009\t3\t", "runqueue", "block", "works"} {
		if !strings.Contains(text, want) {
			t.Errorf("the page does not say %q:\n%s", want, text)
		}
	}
	checkLinks(t, s.URL, links, "/ui/", "/ui/top", "/pprof/cpu", "/metrics", "/-/healthy", "/-/ready", "/debug/pprof/")
	if len(commands) != 4 {
		t.Errorf("%d commands", len(commands))
	}
	for _, c := range commands {
		if !strings.Contains(c, "'"+s.URL+"/pprof/cpu?") {
			t.Errorf("command %s", c)
		}
	}
}

func TestLandingPageDark(t *testing.T) {
	capturer := newFakeCapturer(t)
	capturer.newest, capturer.ready = nil, false
	s := testServer(t, capturer, nil)
	b := newTab(t)
	dark := emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: "dark"}}}
	if _, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, dark); err != nil {
		t.Fatal(err)
	}
	b.do(chromedp.Navigate(s.URL + "/"))
	b.screenshot("landing-dark")
	text := get(b, chromedp.Text(chromedp.CSS("main")))
	ground := get(b, chromedp.Evaluate[string](`getComputedStyle(document.body).backgroundColor`))
	if !strings.Contains(text, "Not ready: no samples have been drained yet") {
		t.Errorf("text:\n%s", text)
	}
	if ground != "rgb(23, 21, 20)" {
		t.Errorf("ground %s", ground)
	}
}

// TestLandingPageHost: the host that a client names ends up in a shell command.
func TestLandingPageHost(t *testing.T) {
	s := testServer(t, newFakeCapturer(t), nil)
	r, err := http.NewRequestWithContext(t.Context(), "GET", s.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Host = "a';id;'"
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	var b strings.Builder
	if err := answer.Write(&b); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(b.String(), ";id;") || !strings.Contains(b.String(), "http://localhost:4678/pprof/cpu") {
		t.Errorf("page:\n%s", b.String())
	}
}

// TestUIWindows: pages are of the newest window, and there is a page before the first.
func TestUIWindows(t *testing.T) {
	capturer := newFakeCapturer(t)
	capturer.newest = nil
	s := testServer(t, capturer, nil)
	for _, path := range []string{"/ui/", "/ui/flamegraph", "/ui/top"} {
		answer, body := fetch(t, "GET", s.URL+path)
		if answer.StatusCode != 503 || !strings.Contains(body, `http-equiv="refresh"`) || !strings.Contains(body, "testhost") {
			t.Errorf("%s before the first window: %s\n%s", path, answer.Status, body)
		}
	}
	for _, name := range []string{"first_function", "second_function"} {
		capturer.setNewest(windowOf(oneStack(name)))
		for _, path := range []string{"/ui/flamegraph", "/ui/top", "/ui/peek?f=function"} {
			answer, body := fetch(t, "GET", s.URL+path)
			if answer.StatusCode != 200 || !strings.Contains(body, name) {
				t.Errorf("%s: %s, want a page with %s", path, answer.Status, name)
			}
		}
		answer, body := fetch(t, "GET", s.URL+"/ui/download")
		p, err := profile.ParseData([]byte(body))
		if err != nil {
			t.Fatal(err)
		}
		if p.Function[0].Name != name || len(p.Mapping) != 0 {
			t.Errorf("download is not the window: %v", p)
		}
		if want := `attachment; filename="hostflame-testhost-cpu-20261122T194410Z.pb.gz"`; answer.Header.Get("Content-Disposition") != want {
			t.Errorf("disposition %s, want %s", answer.Header.Get("Content-Disposition"), want)
		}
	}
}

// oneStack is a profile without labels and mappings.
func oneStack(name string) *profile.Profile {
	f := &profile.Function{ID: 1, Name: name}
	l := &profile.Location{ID: 1, Address: 16, Line: []profile.Line{{Function: f, Line: 1}}}
	return &profile.Profile{
		SampleType: []*profile.ValueType{{Type: "samples", Unit: "count"}, {Type: "cpu", Unit: "nanoseconds"}},
		PeriodType: &profile.ValueType{Type: "cpu", Unit: "nanoseconds"},
		Period:     10_000_000,
		Sample:     []*profile.Sample{{Location: []*profile.Location{l}, Value: []int64{1, 10_000_000}}},
		Location:   []*profile.Location{l},
		Function:   []*profile.Function{f},
	}
}

// TestUICloneNames: pprof shortens names at dots, and "0" says nothing.
func TestUICloneNames(t *testing.T) {
	for name, want := range map[string]string{
		"finish_task_switch.isra.0":  "finish_task_switch·isra·0",
		"f.constprop.0.isra.12.cold": "f·constprop·0·isra·12·cold",
		"main.isra.(*T).cold":        "main.isra.(*T)·cold",
		"runtime.goexit":             "runtime.goexit",
		"github.com/a/b.part.func1":  "github.com/a/b.part.func1",
	} {
		u := &ui{host: "testhost"}
		original := oneStack(name)
		if got := u.dressed(original).Function[0].Name; got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
		if original.Function[0].Name != name || len(original.Mapping) != 0 {
			t.Errorf("the window was changed: %v", original)
		}
	}
}

// TestUILeaves: the last frames are what threads did or waited for, with the process that it
// was because of; each state and cause has a colour of its own.
func TestUILeaves(t *testing.T) {
	type labels map[string]string
	types, window := []profiler.Type{profiler.CPU("", 99)}, windowOf(oneStack("function"))
	leaves := map[string]map[string]labels{ // by type and frame
		"runqueue": {
			"other::kworker∕0:1": {"cause": "other", "culprit": "kworker/0:1"},
			"other::python3·11":  {"cause": "other", "culprit": "python3.11"},
			"own::nginx":         {"cause": "own", "culprit": "nginx"},
			"quota.":             {"cause": "quota", "culprit": ""},
		},
		"culprit": {"other::nginx": {"cause": "other", "victim": "nginx"}, "own::nginx": {"cause": "own", "victim": "nginx"}},
		"wall":    {"lock.": {"state": "lock", "idle": "false"}, "cpu.": {"state": "cpu", "idle": "false"}, "": {"state": "sleep", "idle": "true"}},
	}
	for typ, frames := range leaves {
		p := oneStack("function")
		bare := *p.Sample[0]
		p.Sample = nil
		for _, of := range frames {
			s := bare
			s.Label = map[string][]string{"comm": {"program"}}
			for name, value := range of {
				s.Label[name] = []string{value}
			}
			p.Sample = append(p.Sample, &s)
		}
		types = append(types, profiler.Type{Name: typ})
		window.Profiles = append(window.Profiles, profiler.NewProfile(typ, p, 0, nil))
	}
	capturer := newFakeCapturer(t)
	capturer.setNewest(window)
	s := testServer(t, capturer, func(c *HandlerConfig, _ *http.Server) { c.Types = types })
	for typ, frames := range leaves {
		_, body := fetch(t, "GET", s.URL+"/ui/"+typ+"/flamegraph")
		const mark = `"Sources":[{` // those of the stacks are numbers
		i := strings.Index(body, mark)
		if i < 0 {
			t.Fatalf("%s: no frames in\n%s", typ, body)
		}
		var sources []struct {
			FullName string
			Color    int
		}
		if err := json.NewDecoder(strings.NewReader(body[i+len(mark)-2:])).Decode(&sources); err != nil {
			t.Fatal(err)
		}
		got, colors := map[string]bool{}, map[int]string{}
		for _, source := range sources[1:] { // beside the root
			if source.FullName == "program" || source.FullName == "function" {
				continue
			}
			got[source.FullName] = true
			value := regexp.MustCompile(`^[a-z_]+`).FindString(source.FullName)
			if other, ok := colors[source.Color]; ok && other != value {
				t.Errorf("%s: %s and %s have one colour", typ, other, value)
			}
			colors[source.Color] = value
		}
		values := map[string]bool{}
		for frame, of := range frames {
			if frame != "" && !got[frame] {
				t.Errorf("%s: no frame %s, but %v", typ, frame, got)
			}
			if frame != "" {
				values[of["cause"]+of["state"]] = true
			}
		}
		if got[""] || got["sleep."] || len(colors) != len(values) {
			t.Errorf("%s: frames %v, colours %v", typ, got, colors)
		}
	}
}

// TestUIBrackets: what has no name is shown by its mapping, in one pair of brackets.
func TestUIBrackets(t *testing.T) {
	capturer := newFakeCapturer(t)
	p := oneStack("")
	p.Mapping = []*profile.Mapping{{ID: 1, Start: 0, Limit: 1 << 20, File: "[anon]"}}
	p.Location[0].Mapping, p.Location[0].Line, p.Function = p.Mapping[0], nil, nil
	capturer.newest = windowOf(p)
	s := testServer(t, capturer, nil)
	if _, body := fetch(t, "GET", s.URL+"/ui/top"); !strings.Contains(body, "[anon]") || strings.Contains(body, "[[anon]]") {
		t.Errorf("the page does not show [anon], or with more brackets:\n%s", body)
	}
}

// TestUIEscapes: names come from the binaries of others.
func TestUIEscapes(t *testing.T) {
	const evil = `</script><script>evil()</script><img src=x onerror=evil()>`
	capturer := newFakeCapturer(t)
	capturer.newest = windowOf(oneStack(evil))
	s := testServer(t, capturer, nil)
	for _, path := range []string{"/ui/flamegraph", "/ui/top", "/ui/peek?f=."} {
		if _, body := fetch(t, "GET", s.URL+path); strings.Contains(body, "<script>evil") || strings.Contains(body, "<img") {
			t.Errorf("%s lets a name through as markup", path)
		}
	}
}

// TestUILeavesHostAlone: the driver reads no settings and writes nothing.
func TestUILeavesHostAlone(t *testing.T) {
	home := t.TempDir()
	for _, env := range []string{"HOME", "XDG_CONFIG_HOME", "PPROF_TMPDIR"} {
		t.Setenv(env, home)
	}
	settings := filepath.Join(home, "pprof", "settings.json")
	if err := os.MkdirAll(filepath.Dir(settings), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(settings, []byte(`{"configs":[{"name":"private settings"}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	s := testServer(t, newFakeCapturer(t), nil)
	for _, path := range []string{"/ui/flamegraph", "/ui/top"} {
		if answer, body := fetch(t, "GET", s.URL+path); answer.StatusCode != 200 || strings.Contains(body, "private settings") {
			t.Errorf("%s: %s, shows the settings file: %v", path, answer.Status, strings.Contains(body, "private settings"))
		}
	}
	var files []string
	filepath.WalkDir(home, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, path)
		}
		return err
	})
	if len(files) != 1 {
		t.Errorf("files: %q", files)
	}
	if os.Getenv("XDG_CONFIG_HOME") != home {
		t.Errorf("XDG_CONFIG_HOME is left at %s", os.Getenv("XDG_CONFIG_HOME"))
	}
}

// TestUIWithoutHome: a system service has neither HOME nor XDG_CONFIG_HOME.
func TestUIWithoutHome(t *testing.T) {
	for _, env := range []string{"HOME", "XDG_CONFIG_HOME"} {
		t.Setenv(env, "")
		os.Unsetenv(env)
	}
	s := testServer(t, newFakeCapturer(t), nil)
	if answer, body := fetch(t, "GET", s.URL+"/ui/flamegraph"); answer.StatusCode != 200 {
		t.Errorf("%s %s", answer.Status, body)
	}
}

// TestUIConcurrent looks at pages while windows close; it is for the race detector.
func TestUIConcurrent(t *testing.T) {
	capturer := newFakeCapturer(t)
	s := testServer(t, capturer, nil)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 8 {
				path := []string{"/ui/flamegraph", "/ui/top", "/ui/peek?f=.", "/ui/download"}[(i+j)%4]
				answer, err := http.Get(s.URL + path)
				if err != nil {
					t.Error(err)
					return
				}
				answer.Body.Close()
				if answer.StatusCode != 200 && answer.StatusCode != 503 {
					t.Errorf("%s: %s", path, answer.Status)
				}
			}
		})
	}
	for i := range 50 {
		capturer.setNewest(windowOf(oneStack(fmt.Sprintf("function_%d", i))))
		time.Sleep(2 * time.Millisecond)
	}
	wg.Wait()
}
