// SPDX-License-Identifier: Apache-2.0

// Package guest is what test/kernels and the init of its virtual machines say to each
// other.
package guest

// PlanFile is where the host leaves the plan, in JSON, in the initramfs.
const PlanFile = "/plan.json"

// Mark starts the lines that init prints for the host.
const Mark = "hostflame-vm: "

// A Plan is what init does, in this order, before it powers the machine off.
type Plan struct {
	Modules  []string // files, in the order in which they load
	CgroupV1 []string // controllers that get a v1 hierarchy beside v2
	Env      []string
	Commands []Command
}

// A Command is one test binary.
type Command struct {
	Name string // the package
	Dir  string
	Args []string // with the file of the program
}

// A Verdict follows Mark, in JSON, after each command.
type Verdict struct {
	Name    string
	Error   string  // how the command ended, if not well
	Seconds float64 // by the machine's own clock
	Kernel  []string
}
