// SPDX-License-Identifier: Apache-2.0

package buildinfo

import (
	"runtime/debug"
	"testing"
)

func TestRead(t *testing.T) {
	recorded := &debug.BuildInfo{
		Main: debug.Module{Version: "v0.2.0"},
		Settings: []debug.BuildSetting{
			{Key: "vcs.revision", Value: "abc123"},
			{Key: "vcs.modified", Value: "true"},
		},
	}
	for _, tt := range []struct {
		name, version, revision string
		recorded                *debug.BuildInfo
		wantVersion, wantRev    string
	}{
		{"linked wins", "0.1.0", "def456", recorded, "0.1.0", "def456"},
		{"go install", "", "", recorded, "v0.2.0", "abc123-modified"},
		{"go run", "", "", &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, "devel", "unknown"},
		{"stripped", "", "", nil, "devel", "unknown"},
	} {
		got := read(tt.version, tt.revision, tt.recorded)
		if got.Version != tt.wantVersion || got.Revision != tt.wantRev {
			t.Errorf("%s: %s, %s, want %s, %s", tt.name, got.Version, got.Revision, tt.wantVersion, tt.wantRev)
		}
	}
}
