// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"

	"github.com/hostflame/hostflame/test/kernels/guest"
)

// A machine is what QEMU emulates of an architecture.
type machine struct {
	qemu    string
	args    []string
	console string
	cross   string // before the names of the compilers that make programs for it, elsewhere
}

var machines = map[string]machine{
	"amd64": {
		qemu: "qemu-system-x86_64",
		// One thread for all CPUs: Linux patches its code while other CPUs run it, and with a
		// thread each QEMU runs an int3 that is no longer there ("Oops: int3").
		args:    []string{"-machine", "q35", "-cpu", "max", "-accel", "tcg,thread=single"},
		console: "ttyS0",
		cross:   "x86_64-linux-gnu-",
	},
	"arm64": {
		qemu: "qemu-system-aarch64",
		// The architected algorithm of pointer authentication takes half of the time.
		args:    []string{"-machine", "virt", "-cpu", "max,pauth-impdef=on"},
		console: "ttyAMA0",
		cross:   "aarch64-linux-gnu-",
	},
}

// boot runs the machine, with more parameters of the kernel, until it powers off, hands each line that it says to out, and returns
// the verdicts of init. It kills the machine when ctx ends.
func boot(ctx context.Context, m machine, kernel, initrd, disk, parameters string, out func(line string)) ([]guest.Verdict, error) {
	// A panic ends the machine: -no-reboot, and no wait before the reboot.
	// The emulated TSC follows the clock of this machine, on all CPUs alike, but does not
	// say so: the kernel would take it for unstable, and the run queues' clocks with it.
	cmdline := "console=" + m.console + " loglevel=4 oops=panic panic=-1 tsc=reliable rdinit=/init " + parameters
	args := append([]string{"-smp", "2", "-m", "2G", "-display", "none", "-nodefaults",
		"-no-reboot", "-serial", "stdio", "-kernel", kernel, "-initrd", initrd, "-append", cmdline,
		"-drive", "if=virtio,format=raw,snapshot=on,file=" + disk,
		// A second one, which has a queue for each CPU and can be taken away.
		"-drive", "if=none,id=nvme,format=raw,snapshot=on,file=" + disk, "-device", "nvme,serial=hostflame,drive=nvme"}, m.args...)
	cmd := exec.CommandContext(ctx, m.qemu, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s (make packages installs it): %w", m.qemu, err)
	}
	verdicts, scanErr := follow(stdout, out)
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return verdicts, fmt.Errorf("the machine did not end in time: %w", ctx.Err())
	case err != nil:
		return verdicts, fmt.Errorf("%s: %w\n%s", m.qemu, err, stderr.String())
	}
	return verdicts, scanErr
}

// follow hands out the lines of the console, and reads the verdicts from it.
func follow(console io.Reader, out func(line string)) (verdicts []guest.Verdict, err error) {
	lines := bufio.NewReader(console)
	for {
		line, readErr := lines.ReadString('\n')
		line = strings.TrimRight(line, "\r\n")
		// A message of the kernel can stand before it on its line.
		if _, said, ok := strings.Cut(line, guest.Mark); ok {
			var v guest.Verdict
			if jsonErr := json.Unmarshal([]byte(said), &v); jsonErr != nil {
				err = errors.Join(err, errors.New("init: "+said))
			} else {
				verdicts = append(verdicts, v)
			}
		} else if line != "" {
			out(line)
		}
		if readErr == io.EOF {
			return verdicts, err
		}
		if readErr != nil {
			return verdicts, errors.Join(err, readErr)
		}
	}
}

// judge turns the verdicts into an error, if not all commands of the plan ended well.
func judge(plan guest.Plan, verdicts []guest.Verdict) error {
	var errs []error
	for i, c := range plan.Commands {
		if i >= len(verdicts) {
			errs = append(errs, fmt.Errorf("%s: the machine ended before the tests did", c.Name))
			continue
		}
		if v := verdicts[i]; v.Error != "" {
			errs = append(errs, fmt.Errorf("%s: %s", c.Name, v.Error))
		}
		if v := verdicts[i]; len(v.Kernel) > 0 {
			errs = append(errs, fmt.Errorf("%s: the kernel complained:\n\t%s", c.Name, strings.Join(v.Kernel, "\n\t")))
		}
	}
	return errors.Join(errs...)
}
