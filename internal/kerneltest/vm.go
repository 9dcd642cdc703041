// SPDX-License-Identifier: Apache-2.0

package kerneltest

import (
	"os"
	"os/exec"
	"testing"
)

// VMVariable names the environment variable that is set in the virtual machines of
// test/kernels.
const VMVariable = "HOSTFLAME_TEST_VM"

// InVM tells whether the test runs in a virtual machine of test/kernels: a foreign kernel,
// emulated, with no programs but those of Programs, on a machine that others share.
func InVM() bool { return os.Getenv(VMVariable) != "" }

// SkipInVM skips the test in the virtual machines of test/kernels, for a reason that
// says why their answer would mean nothing.
func SkipInVM(t testing.TB, reason string) {
	t.Helper()
	if InVM() {
		t.Skip("in a virtual machine: ", reason)
	}
}

// RequireTool fails the test where one of the programs is missing, because the packages
// of .ci/packages have them all. The virtual machines of test/kernels have no packages:
// there it skips the test.
func RequireTool(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err == nil {
			continue
		}
		if InVM() {
			t.Skipf("there is no %s in the virtual machine", name)
		}
		t.Fatalf("there is no %s: make packages installs it", name)
	}
}
