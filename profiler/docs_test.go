// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"math"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hostflame/hostflame/bpf"
)

// TestReasonsDocumented: docs/metrics.md explains all reasons for losses, and no others.
func TestReasonsDocumented(t *testing.T) {
	known := map[string]bool{
		"undecodable":                    true, // the profiler's
		string(bpf.MappingLossMalformed): true, string(bpf.MappingLossCPUOnline): true, string(bpf.MappingLossRingFull): true,
	}
	for reason := range bpf.DropReason(math.MaxUint8) {
		if name := reason.String(); !strings.HasPrefix(name, "reason_") {
			known[name] = true
		}
	}
	text, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	explained := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| (?:events|samples) of [^|]+ \\| `([a-z_]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		explained[row[1]] = true
	}
	if diff := cmp.Diff(known, explained); diff != "" {
		t.Errorf("docs/metrics.md differs from the reasons that there are (-real +explained):\n%s", diff)
	}
}
