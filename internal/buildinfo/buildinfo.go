// SPDX-License-Identifier: Apache-2.0

// Package buildinfo says which hostflame this is.
package buildinfo

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/prometheus/common/version"
)

// Info is one build.
type Info struct {
	Version   string `json:"version"`    // "0.1.0", or what the module system made of it
	Revision  string `json:"revision"`   // the commit, "-modified" behind it when the tree was; "unknown" if not recorded
	GoVersion string `json:"go_version"` // of the compiler
	Platform  string `json:"platform"`   // "linux/amd64"
}

// Read returns this binary's build. `make build` gives the linker version and commit,
// in the variables of prometheus/common/version; a plain `go build` leaves them to the
// Go toolchain's own record.
func Read() Info {
	recorded, _ := debug.ReadBuildInfo()
	return read(version.Version, version.Revision, recorded)
}

func read(linkedVersion, linkedRevision string, recorded *debug.BuildInfo) Info {
	i := Info{
		Version: linkedVersion, Revision: linkedRevision,
		GoVersion: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
	}
	if i.Version == "" && recorded != nil {
		i.Version = recorded.Main.Version
	}
	if i.Version == "" || i.Version == "(devel)" {
		i.Version = "devel"
	}
	if i.Revision == "" {
		i.Revision = revision(recorded)
	}
	return i
}

func revision(recorded *debug.BuildInfo) string {
	if recorded == nil {
		return "unknown"
	}
	rev, modified := "unknown", ""
	for _, s := range recorded.Settings {
		switch {
		case s.Key == "vcs.revision":
			rev = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			modified = "-modified"
		}
	}
	return rev + modified
}

// Publish makes the metric hostflame_build_info and the version flag tell the same: it
// writes what Read returns into prometheus/common/version. Call it first in main.
func Publish() Info {
	i := Read()
	version.Version, version.Revision = i.Version, i.Revision
	return i
}

// String is the answer to --version.
func (i Info) String() string {
	return fmt.Sprintf("hostflame %s (commit %s, %s, %s)", i.Version, i.Revision, i.GoVersion, i.Platform)
}
