// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io/fs"

	"github.com/alecthomas/kingpin/v2"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/bpf"
)

// maxFrequency keeps a typing slip from costing a core: at 1,000 Hz a sample of 16 us is
// 1.6 % of each busy CPU.
const maxFrequency = 1000

func samplingFlags(c *kingpin.CmdClause) (frequency *int, event *string) {
	frequency = c.Flag("sampling.frequency", "CPU samples a second on each busy CPU, 1 to 1000.").Default("99").Int()
	event = c.Flag("sampling.event", "What takes a CPU sample: cpu-clock works everywhere, cycles needs a PMU.").
		Default(string(bpf.EventCPUClock)).Enum(string(bpf.EventCPUClock), string(bpf.EventCycles))
	return frequency, event
}

func checkSampling(hz int) error {
	if hz < 1 || hz > maxFrequency {
		return usagef("99 is a good rate for always; --sampling.frequency takes 1 to 1000", "sampling frequency %d Hz is out of range", hz)
	}
	return nil
}

const privilegeHint = "run as root, or with CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE, CAP_SYSLOG, CAP_DAC_READ_SEARCH and CAP_CHECKPOINT_RESTORE as deploy/hostflame.service does; hostflame doctor tells which are missing"

// attachHint says what to do about an error of loading or attaching.
func attachHint(err error, event bpf.Event) string {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return privilegeHint
	case event == bpf.EventCycles && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP)):
		return "this machine has no PMU: use --sampling.event=cpu-clock"
	}
	return "hostflame doctor tells what this kernel allows"
}
