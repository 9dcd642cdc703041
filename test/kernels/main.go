// SPDX-License-Identifier: Apache-2.0

// Command kernels runs the kernel tests on other kernels and architectures: it takes
// Debian's kernels, boots each under QEMU with the test binaries in its initramfs, and
// exits with 1 unless all tests passed and the kernel had nothing to complain of. It needs
// no KVM and no root, and keeps the kernels in a cache between runs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// matrix is what we promise to run on, beside the kernel of the machine.
var matrix = []target{
	{"6.1", "amd64"},
	{"6.12", "amd64"},
	{"6.1", "arm64"},
	{"6.12", "arm64"},
}

type options struct {
	targets    []target
	packages   []string
	run, skip  string
	short      bool
	verbose    bool
	newest     bool
	cgroupV1   bool
	parameters string
	timeout    time.Duration
	cache      string
}

func main() {
	o, err := parse(os.Args[1:])
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
		err = run(ctx, o)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

func parse(args []string) (o options, err error) {
	f := flag.NewFlagSet("kernels", flag.ExitOnError)
	versions := f.String("kernel", "", "`versions`, such as 6.1,6.12; all of the matrix if empty")
	archs := f.String("arch", "", "architectures, such as amd64,arm64; all if empty")
	packages := f.String("packages", "./bpf", "whose tests to run")
	f.StringVar(&o.run, "run", "", "regular expression of the tests to run, as go test has it")
	f.StringVar(&o.skip, "skip", "", "regular expression of the tests to leave out")
	f.BoolVar(&o.short, "short", false, "leave out what takes long")
	f.BoolVar(&o.verbose, "v", false, "print every line that the machines say")
	f.BoolVar(&o.newest, "update", false, "look for newer kernels than the cache has")
	f.BoolVar(&o.cgroupV1, "cgroup-v1", false, "mount v1 hierarchies beside v2")
	f.StringVar(&o.parameters, "append", "", "`parameters` of the kernel, such as preempt=full")
	f.DurationVar(&o.timeout, "timeout", 10*time.Minute, "for one machine")
	f.StringVar(&o.cache, "cache", "", "folder of the kernels; hostflame/kernels in the user's cache if empty")
	f.Parse(args)
	if o.cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return o, err
		}
		o.cache = filepath.Join(dir, "hostflame", "kernels")
	}
	o.packages = strings.Split(*packages, ",")
	listed := func(list, s string) bool { return list == "" || slices.Contains(strings.Split(list, ","), s) }
	for _, t := range matrix {
		if listed(*versions, t.version) && listed(*archs, t.arch) {
			o.targets = append(o.targets, t)
		}
	}
	if len(o.targets) == 0 {
		return o, fmt.Errorf("no kernel %s for %s; there are %v", *versions, *archs, matrix)
	}
	return o, nil
}

// testFlags are those of the test binaries.
func (o options) testFlags() []string {
	// The dump of goroutines should come before the machine is killed.
	flags := []string{"-test.v", "-test.timeout=" + (o.timeout * 9 / 10).String()}
	if o.run != "" {
		flags = append(flags, "-test.run="+o.run)
	}
	if o.skip != "" {
		flags = append(flags, "-test.skip="+o.skip)
	}
	if o.short {
		flags = append(flags, "-test.short")
	}
	return flags
}

func run(ctx context.Context, o options) error {
	root, err := kerneltest.ModuleRoot()
	if err != nil {
		return err
	}
	a, err := newApt(filepath.Join(o.cache, "apt"))
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "hostflame-kernels")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	disk := filepath.Join(tmp, "disk")
	if err := makeDisk(disk); err != nil {
		return err
	}
	lands := map[string]*userland{}
	var errs []error
	for _, t := range o.targets {
		if lands[t.arch] == nil {
			dir := filepath.Join(tmp, t.arch)
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
			if lands[t.arch], err = build(root, t.arch, dir, o.packages); err != nil {
				return err
			}
		}
		k, err := fetch(o.cache, a, t, o.newest)
		if err == nil {
			err = test(ctx, k, lands[t.arch], disk, o)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%v: %w", t, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

// test boots one kernel.
func test(ctx context.Context, k kernel, u *userland, disk string, o options) error {
	image, release, err := k.image()
	if err != nil {
		return err
	}
	initrd, plan, err := u.pack(k, o)
	if err != nil {
		return err
	}
	start := time.Now()
	fmt.Printf("=== %s\n", release)
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	var tests tally
	verdicts, err := boot(ctx, machines[k.arch], image, initrd, disk, o.parameters, func(line string) {
		if tests.count(line); o.verbose || !strings.HasPrefix(line, "=== ") {
			fmt.Println(line)
		}
	})
	word := "ok  "
	if err = errors.Join(err, judge(plan, verdicts)); err != nil {
		word = "FAIL"
	}
	fmt.Printf("%s\t%s\t%v: %v\n", word, release, time.Since(start).Round(100*time.Millisecond), tests)
	return err
}

// A tally counts tests by their last lines.
type tally struct{ passed, failed, skipped int }

func (t *tally) count(line string) {
	switch {
	case strings.HasPrefix(line, "--- PASS: "):
		t.passed++
	case strings.HasPrefix(line, "--- FAIL: "):
		t.failed++
	case strings.HasPrefix(line, "--- SKIP: "):
		t.skipped++
	}
}

func (t tally) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", t.passed, t.failed, t.skipped)
}
