// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/hostflame/hostflame/internal/elffile"
)

const (
	debugSuffix = ".debug"

	fetchAtOnce     = 2
	maxFetches      = 4096 // build ids remembered
	notThereFor     = time.Hour
	failedFor       = 5 * time.Minute
	connectTimeout  = 10 * time.Second
	maxFetchedBytes = 4 << 30
)

// Debuginfod is where debug files are fetched from that are not on the host, by build id
// (debuginfod(8), "GET /buildid/BUILDID/debuginfo"). They are kept in the Cache.
type Debuginfod struct {
	URLs     []string      // asked in this order
	MaxBytes int64         // of a file; 1 GiB
	Timeout  time.Duration // of a file; 2 minutes
}

// fetch is a debug file that is being looked for. path is set when done is closed, and is
// empty where there is none.
type fetch struct {
	done  chan struct{}
	path  string
	until time.Time // when it is worth another try; zero: it is there
}

type fetcher struct {
	cfg    Debuginfod
	cache  *indexCache
	client *http.Client
	slots  chan struct{}
	ctx    context.Context
	cancel context.CancelFunc
	idle   sync.WaitGroup

	mu   sync.Mutex
	byID map[string]*fetch
}

func (f *fetcher) init(cfg Config) {
	f.cfg, f.cache = cfg.Debuginfod, cfg.Cache.indexes()
	if f.cfg.MaxBytes <= 0 {
		f.cfg.MaxBytes = 1 << 30
	}
	if f.cfg.Timeout <= 0 {
		f.cfg.Timeout = 2 * time.Minute
	}
	f.client = &http.Client{Transport: &http.Transport{
		Proxy: http.ProxyFromEnvironment, ResponseHeaderTimeout: connectTimeout, TLSHandshakeTimeout: connectTimeout,
		MaxIdleConnsPerHost: fetchAtOnce, IdleConnTimeout: time.Minute,
	}}
	f.slots = make(chan struct{}, fetchAtOnce)
	f.byID = map[string]*fetch{}
	f.ctx, f.cancel = context.WithCancel(context.Background())
}

func (f *fetcher) close() {
	f.cancel()
	f.idle.Wait()
	f.client.CloseIdleConnections()
}

// request starts to look for a debug file, or joins who does; nil where there is nobody to
// ask. What was not there is not asked for again for an hour.
func (f *fetcher) request(id string) *fetch {
	if len(f.cfg.URLs) == 0 || f.cache == nil || elffile.BuildIDPath(id) == "" {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.byID[id]; r != nil {
		select {
		case <-r.done:
			if r.until.IsZero() || time.Now().Before(r.until) {
				return r
			}
		default:
			return r
		}
	}
	if f.ctx.Err() != nil {
		return nil
	}
	if len(f.byID) >= maxFetches {
		clear(f.byID)
	}
	r := &fetch{done: make(chan struct{})}
	f.byID[id] = r
	f.idle.Go(func() { f.run(id, r) })
	return r
}

var errNotThere = errors.New("not there")

func (f *fetcher) run(id string, r *fetch) {
	defer close(r.done)
	path := filepath.Join(f.cache.path, id+debugSuffix)
	if _, err := os.Lstat(path); err == nil {
		now := time.Now()
		_ = os.Chtimes(path, now, now)
		r.path = path
		return
	}
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	case <-f.ctx.Done():
		return
	}
	r.until = time.Now().Add(notThereFor)
	for _, url := range f.cfg.URLs {
		err := f.get(strings.TrimSuffix(url, "/")+"/buildid/"+id+"/debuginfo", id, path)
		if err == nil {
			r.path, r.until = path, time.Time{}
			return
		}
		if !errors.Is(err, errNotThere) {
			r.until = time.Now().Add(failedFor)
		}
	}
}

// get loads a file, checks that it is what was asked for, and keeps it.
func (f *fetcher) get(url, id, path string) error {
	ctx, cancel := context.WithTimeout(f.ctx, f.cfg.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotThere, err)
	}
	resp, err := f.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return errNotThere
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("get %s: %s", url, resp.Status)
	}
	limit := min(f.cfg.MaxBytes, maxFetchedBytes)
	if resp.ContentLength > limit {
		return fmt.Errorf("%w: %d bytes", errNotThere, resp.ContentLength)
	}
	file, err := f.cache.create()
	if err != nil {
		return err
	}
	defer file.Close()
	n, err := io.Copy(file, io.LimitReader(resp.Body, limit+1))
	if err == nil && n > limit {
		err = fmt.Errorf("%w: more than %d bytes", errNotThere, limit)
	}
	if err == nil {
		err = hasBuildID(wholeFile{file, n}, id)
	}
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		f.cache.discard(file)
		return err
	}
	_, err = f.cache.trim()
	return err
}

func hasBuildID(c Content, id string) error {
	m, err := elffile.Parse(c)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotThere, err)
	}
	if m.BuildID != id {
		return fmt.Errorf("%w: build id %s", errNotThere, m.BuildID)
	}
	return nil
}

// fetched takes over what was fetched, once it is there.
func (o *Object) fetched() {
	if o.fetch == nil {
		return
	}
	if o.sym.cfg.WaitForIndex {
		<-o.fetch.done
	}
	select {
	case <-o.fetch.done:
	default:
		return
	}
	path := o.fetch.path
	o.fetch = nil
	if path == "" {
		return
	}
	d, err := o.sym.object(File{Path: path, Open: func() (*os.File, error) { return os.Open(path) }, Roots: o.file.Roots}, roleDebug)
	if err == nil && d.image.BuildID == o.image.BuildID && d.image.Machine == o.image.Machine && d.image.Is64 == o.image.Is64 {
		o.debug = d
	}
}
