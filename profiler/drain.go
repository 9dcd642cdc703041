// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/hostflame/hostflame/internal/beat"
)

func (p *Profiler) loop(ctx context.Context) error {
	failing := false
	for ended := false; !ended; {
		err := p.wait(ctx)
		ended = ctx.Err() != nil
		p.observe(ended)
		derr := p.drain()
		if derr != nil {
			err = derr
		} else {
			p.ready.Store(true)
		}
		if errors.Is(err, os.ErrClosed) {
			return fmt.Errorf("drain samples: %w", err)
		}
		if err != nil && !failing {
			p.cfg.Logger.Error("drain samples failed", "err", err)
		}
		if failing = err != nil; failing {
			p.pause(ctx)
		}
		p.collect()
		p.afterDrain()
	}
	return nil
}

// observe makes the sources tell of what has not ended, if a window or a capture begins or
// ends with the drain that follows.
func (p *Profiler) observe(last bool) {
	p.mu.Lock()
	due := last || len(p.pending) > 0
	p.mu.Unlock()
	due = due || bootTime() >= p.window.start.boot+p.cfg.Window ||
		slices.ContainsFunc(p.captures, func(c *capture) bool { return bootTime() >= c.end() })
	if !due {
		return
	}
	for i := range p.cfg.Feeds {
		if f := &p.cfg.Feeds[i]; f.Observe != nil {
			if err := f.Observe(); err != nil {
				p.drainErrors[i].Add(1)
				p.cfg.Logger.Error("observe what has not ended", "err", err)
			}
		}
	}
}

// drain takes what all sources have.
func (p *Profiler) drain() error {
	p.stir, p.processes.grown = false, false
	if p.told != nil {
		p.told.catchUp()
	}
	var errs []error
	for i := range p.cfg.Feeds {
		if err := p.cfg.Feeds[i].Source.Drain(p.take); err != nil {
			p.drainErrors[i].Add(1)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// collect takes the samples whose stacks were finished.
func (p *Profiler) collect() {
	if p.unwinder != nil {
		for _, s := range p.unwinder.collect() {
			p.deliver(s)
		}
	}
}

// settle takes also those whose stacks are being finished, if that is soon.
func (p *Profiler) settle() {
	if p.unwinder != nil {
		p.unwinder.settle(settleWithin)
		p.collect()
	}
}

// wait waits until a drain is due.
func (p *Profiler) wait(ctx context.Context) error {
	t := time.NewTimer(p.untilDrain())
	defer t.Stop()
	for {
		select {
		case <-p.stirred:
			if !p.stir {
				p.stir = true
				t.Reset(p.untilDrain())
			}
			continue
		case err := <-p.urgent:
			return err
		case <-p.poked:
		case <-t.C:
		case <-ctx.Done():
		}
		return nil
	}
}

// untilDrain is how long the next drain can wait.
func (p *Profiler) untilDrain() time.Duration {
	every := quietInterval
	switch {
	case bootTime() < p.started+firstSecond:
		every = drainInterval / 10 // whoever starts the agent wants to see that it works
	case p.stir, p.processes.grown, p.unwinder != nil && p.unwinder.busy(), p.told == nil, !p.told.follows():
		every = drainInterval
	}
	d := beat.Until(every)
	// A window that is due already waits for the one before to be published.
	if left := p.window.start.boot + p.cfg.Window - bootTime(); left > 0 {
		d = min(d, left)
	}
	for _, c := range p.captures {
		d = min(d, c.end()-bootTime())
	}
	return max(d, 0)
}

// stirUp tells the draining goroutine that something is new.
func (p *Profiler) stirUp() {
	select {
	case p.stirred <- struct{}{}:
	default:
	}
}

// watch tells when a source can not wait for the next drain.
func (p *Profiler) watch(ctx context.Context, s Source) {
	for {
		err := s.Wait(ctx, asLongAsItTakes)
		if ctx.Err() != nil {
			return
		}
		select {
		case p.urgent <- err:
		case <-ctx.Done():
			return
		}
	}
}

// pause keeps a source that fails at once from being asked all the time.
func (p *Profiler) pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(drainInterval):
	}
}

// afterDrain does what is due between two drains.
func (p *Profiler) afterDrain() {
	p.mu.Lock()
	pending := p.pending
	p.pending = nil
	p.mu.Unlock()
	for _, fn := range pending {
		fn()
	}
	p.endCaptures()
	at := bootTime()
	due := at >= p.window.start.boot+p.cfg.Window
	// More names of a file that names were looked up in have some time.
	if len(p.fresh) > 0 && (due || p.processes.unnamed || at >= p.warmed+warmInterval) {
		select {
		case p.warming <- p.fresh:
			p.fresh, p.processes.unnamed, p.warmed = nil, false, at
		default: // it is behind: with the next
		}
	}
	if !due {
		return
	}
	// While the last window is still being published this one goes on growing.
	if len(p.closing) < cap(p.closing) {
		p.settle()
		p.closing <- p.closeWindow(time.Time{})
	}
}
