// SPDX-License-Identifier: Apache-2.0

// Package beat lets the periodic work of the process happen at common moments, so that an
// idle machine is woken once for all of it: what a wakeup costs (the runtime's scheduler and
// its monitor thread) is most of what periodic work costs.
package beat

import "time"

var start = time.Now()

// Until returns how long it is until the next beat: the next multiple of every since the
// process began. It is more than 0 and at most every.
func Until(every time.Duration) time.Duration { return every - time.Since(start)%every }
