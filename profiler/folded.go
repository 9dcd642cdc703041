// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"io"

	"github.com/google/pprof/profile"
)

// WriteFolded writes p as folded text.
func WriteFolded(w io.Writer, p *profile.Profile, sampleIndex string) error { return nil }
