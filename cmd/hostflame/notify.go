// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// notify tells systemd, if it started us, what the agent is doing (sd_notify(3)).
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("notify systemd", "err", err)
	}
}

// watchdog keeps systemd's watchdog calm as long as alive says so, until ctx ends.
func watchdog(ctx context.Context, log *slog.Logger, alive func() bool) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("read systemd's watchdog interval", "err", err)
	}
	if interval <= 0 {
		return
	}
	// sd_watchdog_enabled(3) recommends half the interval.
	tick := time.NewTicker(interval / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if alive() {
			notify(log, daemon.SdNotifyWatchdog)
		} else {
			log.Error("the drain loop does not run: leaving the watchdog to bark")
		}
	}
}
