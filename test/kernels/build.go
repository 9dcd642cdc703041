// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/hostflame/hostflame/internal/kerneltest"
	"github.com/hostflame/hostflame/test/kernels/guest"
)

// modules are what the tests need of what Debian does not build in.
var modules = []string{"virtio_pci", "virtio_blk", "ext4", "loop", "null_blk", "dm_mod", "raid1", "lzo_rle", "lzo", "zram"}

// programsDir is where the workloads of kerneltest.Programs are in the machine.
const programsDir = "/programs"

// userland is what goes into a machine of one architecture beside the modules: init, the
// test binaries and the workloads. It is the same for all kernels.
type userland struct {
	root, arch, cross string
	dir               string // for what is built
	files             map[string]string
}

// build makes everything for arch out of the module at root. dir keeps the files.
func build(root, arch, dir string, packages []string) (*userland, error) {
	u := &userland{root: root, arch: arch, dir: dir, files: map[string]string{}}
	if arch != runtime.GOARCH {
		u.cross = machines[arch].cross
	}
	init := filepath.Join(dir, "init")
	if err := u.gobuild("build", "-o", init, "./test/kernels/init"); err != nil {
		return nil, err
	}
	u.files["/init"] = init
	for _, p := range packages {
		bin := filepath.Join(dir, testBinary(p))
		if err := u.gobuild("test", "-c", "-o", bin, p); err != nil {
			return nil, err
		}
		u.files[path.Join(packageDir(p), testBinary(p))] = bin
	}
	for _, p := range kerneltest.Programs {
		if p.Arch != "" && p.Arch != arch {
			continue
		}
		bin, err := p.Build(root, arch, u.cross, dir)
		if err != nil {
			return nil, err
		}
		u.files[path.Join(programsDir, p.Name)] = bin
		if err := u.addLibraries(bin); err != nil {
			return nil, fmt.Errorf("libraries of program %s: %w", p.Name, err)
		}
	}
	return u, nil
}

// packageDir is where the tests of a package run, in the machine.
func packageDir(p string) string { return path.Join("/src", p) }

func testBinary(p string) string { return strings.ReplaceAll(path.Clean(p), "/", "-") + ".test" }

func (u *userland) gobuild(args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Dir = u.root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+u.arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s for %s: %w\n%s", strings.Join(cmd.Args, " "), u.arch, err, out)
	}
	return nil
}

// addLibraries adds what a program that is not static needs: the loader at its path, and
// the libraries, theirs included, where the loader looks.
func (u *userland) addLibraries(file string) error {
	f, err := elf.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		name := make([]byte, p.Filesz)
		if _, err := p.ReadAt(name, 0); err != nil {
			return err
		}
		loader := string(bytes.TrimRight(name, "\x00"))
		if err := u.addLibrary(loader, path.Base(loader)); err != nil {
			return err
		}
	}
	needed, err := f.ImportedLibraries()
	if err != nil && !errors.Is(err, elf.ErrNoSymbols) {
		return err
	}
	for _, name := range needed {
		if err := u.addLibrary(path.Join("/lib", name), name); err != nil {
			return err
		}
	}
	return nil
}

func (u *userland) addLibrary(to, name string) error {
	if _, ok := u.files[to]; ok {
		return nil
	}
	// Where the compiler links from.
	out, err := exec.Command(u.cross+"gcc", "-print-file-name="+name).Output()
	if err != nil {
		return fmt.Errorf("find library %s: %w", name, err)
	}
	file := strings.TrimSpace(string(out))
	if !filepath.IsAbs(file) {
		return fmt.Errorf("find library %s: %w", name, fs.ErrNotExist)
	}
	u.files[to] = file
	return u.addLibraries(file)
}

// makeDisk makes the image of a disk with an empty file system.
func makeDisk(file string) error {
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(file, 1<<30); err != nil {
		return err
	}
	if out, err := exec.Command("/sbin/mkfs.ext4", "-q", file).CombinedOutput(); err != nil {
		return fmt.Errorf("make file system: %w\n%s", err, out)
	}
	return nil
}

// pack writes the initramfs for a kernel, and returns its file and the plan in it.
func (u *userland) pack(k kernel, o options) (string, guest.Plan, error) {
	plan := guest.Plan{Env: []string{
		"PATH=" + programsDir,
		"HOME=/tmp",
		"TMPDIR=/var/tmp", // on a disk
		kerneltest.VMVariable + "=1",
		kerneltest.ProgramsVariable + "=" + programsDir,
	}}
	if o.cgroupV1 {
		plan.CgroupV1 = []string{"cpu", "cpuacct", "blkio"}
	}
	a := initramfs{mtime: time.Now()}
	a.mkdir("/dev")
	for to, file := range u.files {
		if err := a.addFile(to, file); err != nil {
			return "", plan, err
		}
	}
	mods, err := k.modules(modules)
	if err != nil {
		return "", plan, err
	}
	for _, m := range mods {
		file := "/modules/" + m.name + ".ko"
		a.add(file, 0o644, m.data)
		plan.Modules = append(plan.Modules, file)
	}
	for _, p := range o.packages {
		err := a.addTree(path.Join(packageDir(p), "testdata"), filepath.Join(u.root, p, "testdata"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", plan, err
		}
		plan.Commands = append(plan.Commands, guest.Command{
			Name: p,
			Dir:  packageDir(p),
			Args: append([]string{"./" + testBinary(p)}, o.testFlags()...),
		})
	}
	b, err := json.Marshal(plan)
	if err != nil {
		return "", plan, err
	}
	a.add(guest.PlanFile, 0o644, b)
	file := filepath.Join(u.dir, k.version+".cpio")
	return file, plan, os.WriteFile(file, a.bytes(), 0o644)
}
