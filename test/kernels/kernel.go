// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A target is a kernel to test on.
type target struct {
	version string // 6.1, 6.12
	arch    string // in Go's and Debian's words, which are the same for both
}

func (t target) String() string { return t.version + "/" + t.arch }

// pattern matches the names of its packages. The names have the full version, and old
// versions leave the mirrors.
func (t target) pattern() string {
	return `^linux-image-` + regexp.QuoteMeta(t.version) + `\.[0-9][^ ]*-cloud-` + t.arch + `$`
}

// A kernel is an unpacked package.
type kernel struct {
	target
	dir string // has boot and lib/modules
}

// apt is Debian's package manager with a state of its own: it knows both architectures
// whatever this machine is, installs nothing, and needs no root.
type apt struct {
	dir     string
	options []string
	fresh   bool // its lists are of this run
}

func newApt(dir string) (*apt, error) {
	for _, d := range []string{"lists/partial", "archives/partial", "sources"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "status"), nil, 0o644); err != nil {
		return nil, err
	}
	return &apt{dir: dir, options: []string{
		"-qq",
		"-o", "Dir::State=" + dir,
		"-o", "Dir::State::status=" + filepath.Join(dir, "status"),
		"-o", "Dir::Cache=" + dir,
		"-o", "Dir::Etc::sourcelist=/dev/null",
		"-o", "Dir::Etc::sourceparts=" + filepath.Join(dir, "sources"),
		"-o", "APT::Architectures=amd64,arm64",
		"-o", "APT::Sandbox::User=root", // the user that apt changes to may not read here
		"-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
	}}, nil
}

// debianSource matches what is a source of Debian itself: others have no kernels, and not
// every architecture.
var debianSource = regexp.MustCompile(`(?m)^(URIs:|deb ).*/debian(-security)?/?(\s|$)`)

// copySources takes the sources that this machine has configured.
func (a *apt) copySources() error {
	dir := filepath.Join(a.dir, "sources")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	files, err := filepath.Glob("/etc/apt/sources.list.d/*")
	if err != nil {
		return err
	}
	found := false
	for _, file := range append(files, "/etc/apt/sources.list") {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if !debianSource.Match(b) {
			continue
		}
		found = true
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(file)), b, 0o644); err != nil {
			return err
		}
	}
	if !found {
		return errors.New("no source of Debian in /etc/apt: the kernels are Debian's packages")
	}
	return nil
}

func (a *apt) run(name string, args ...string) (string, error) {
	cmd := exec.Command(name, append(slices.Clone(a.options), args...)...)
	cmd.Dir = filepath.Join(a.dir, "archives")
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

func (a *apt) update() error {
	if a.fresh {
		return nil
	}
	if err := a.copySources(); err != nil {
		return err
	}
	if _, err := a.run("apt-get", "update"); err != nil {
		return err
	}
	a.fresh = true
	return nil
}

// newest returns the name of the newest package of t.
func (a *apt) newest(t target) (string, error) {
	out, err := a.run("apt-cache", "pkgnames", "linux-image-"+t.version)
	if err != nil {
		return "", err
	}
	pattern := regexp.MustCompile(t.pattern())
	var names []string
	for _, name := range strings.Fields(out) {
		if pattern.MatchString(name) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return "", fmt.Errorf("the sources in /etc/apt have no package %s", t.pattern())
	}
	return slices.MaxFunc(names, func(a, b string) int { return slices.Compare(numbers(a), numbers(b)) }), nil
}

// numbers are the numbers in a name, by which versions sort.
func numbers(name string) (list []int) {
	for _, digits := range regexp.MustCompile(`[0-9]+`).FindAllString(name, -1) {
		n, err := strconv.Atoi(digits)
		if err != nil {
			n = 0
		}
		list = append(list, n)
	}
	return list
}

// fetch returns a kernel for t, from the cache where it has one, unless the newest is
// wanted. apt holds what it downloads against the signed lists.
func fetch(cache string, a *apt, t target, newest bool) (kernel, error) {
	k := kernel{target: t, dir: filepath.Join(cache, t.version+"-"+t.arch)}
	if _, err := os.Stat(k.dir); err == nil && !newest {
		return k, nil
	}
	if err := a.update(); err != nil {
		return kernel{}, err
	}
	name, err := a.newest(t)
	if err != nil {
		return kernel{}, err
	}
	fmt.Println("downloading", name)
	if _, err := a.run("apt-get", "download", name+":"+t.arch); err != nil {
		return kernel{}, err
	}
	debs, err := filepath.Glob(filepath.Join(a.dir, "archives", name+"_*.deb"))
	if err != nil {
		return kernel{}, err
	}
	if len(debs) != 1 {
		return kernel{}, fmt.Errorf("downloaded %s: %d files", name, len(debs))
	}
	defer os.Remove(debs[0])
	unpacked, err := os.MkdirTemp(cache, "unpack")
	if err != nil {
		return kernel{}, err
	}
	defer os.RemoveAll(unpacked)
	if out, err := exec.Command("dpkg-deb", "--extract", debs[0], unpacked).CombinedOutput(); err != nil {
		return kernel{}, fmt.Errorf("unpack %s: %w\n%s", debs[0], err, out)
	}
	if err := os.RemoveAll(k.dir); err != nil {
		return kernel{}, err
	}
	return k, os.Rename(unpacked, k.dir)
}

// image returns the file of the kernel itself, and the release that it calls itself.
func (k kernel) image() (file, release string, err error) {
	files, err := filepath.Glob(filepath.Join(k.dir, "boot", "vmlinuz-*"))
	if err != nil {
		return "", "", err
	}
	if len(files) != 1 {
		return "", "", fmt.Errorf("%s has %d kernels", k.dir, len(files))
	}
	return files[0], strings.TrimPrefix(filepath.Base(files[0]), "vmlinuz-"), nil
}

// modules returns the named modules and those that they need, before them. A name that
// the package does not have is built in, or there is none: the tests will tell.
func (k kernel) modules(names []string) (list []module, err error) {
	files := map[string]string{}
	err = filepath.WalkDir(k.dir, func(path string, e fs.DirEntry, err error) error {
		if name, ext, ok := strings.Cut(filepath.Base(path), ".ko"); ok && err == nil && (ext == "" || ext == ".xz") {
			files[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		name = strings.ReplaceAll(name, "-", "_")
		path, ok := files[name]
		if seen[name] || !ok {
			return nil
		}
		seen[name] = true
		data, err := readModule(path)
		if err != nil {
			return fmt.Errorf("read module %s: %w", path, err)
		}
		needs, err := moduleNeeds(data)
		if err != nil {
			return fmt.Errorf("read module %s: %w", path, err)
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return err
			}
		}
		list = append(list, module{name, data})
		return nil
	}
	for _, name := range names {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return list, nil
}

type module struct {
	name string
	data []byte
}

func readModule(path string) ([]byte, error) {
	if filepath.Ext(path) == ".xz" {
		return exec.Command("xz", "--decompress", "--stdout", path).Output()
	}
	return os.ReadFile(path)
}

// moduleNeeds reads the dependencies from the module itself: modules.dep is made only
// when a package is installed.
func moduleNeeds(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("no .modinfo")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	for _, field := range strings.Split(string(info), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
