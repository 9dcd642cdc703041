// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"log/slog"
	"sync"
	"time"
)

// complaintInterval is how often the same trouble is logged.
const complaintInterval = 5 * time.Minute

// complaints logs trouble that repeats: when it begins, then now and then with a count,
// and when it ends. Safe for concurrent use.
type complaints struct {
	logger *slog.Logger

	mu     sync.Mutex
	last   time.Time // of the last log line; zero when there is no trouble
	silent int       // complaints since then
}

func (c *complaints) warn(message string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.last.IsZero() && time.Since(c.last) < complaintInterval {
		c.silent++
		return
	}
	if c.silent > 0 {
		args = append(args, "repeated", c.silent)
	}
	c.logger.Warn(message, args...)
	c.last, c.silent = time.Now(), 0
}

func (c *complaints) resolved(message string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.last.IsZero() {
		return
	}
	c.logger.Info(message, append(args, "repeated", c.silent)...)
	c.last, c.silent = time.Time{}, 0
}
