// SPDX-License-Identifier: Apache-2.0

// Package collector builds and starts a real OpenTelemetry Collector for tests, and reads
// what it received. The Collector's modules do not touch this module's go.mod.
package collector

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"golang.org/x/sys/unix"
)

//go:embed manifest.yaml
var manifest []byte

const builder = "go.opentelemetry.io/collector/cmd/builder"

// Build returns the path of the Collector of manifest.yaml. The first call on a machine
// builds it, which takes two minutes and the module proxy; then it is in the user's cache
// directory, by the hash of the manifest. Tests of several packages may call it at once.
func Build(t testing.TB) string {
	t.Helper()
	binary, err := build(manifest)
	if err != nil {
		t.Fatalf("build the OpenTelemetry Collector: %v", err)
	}
	return binary
}

func build(manifest []byte) (string, error) {
	version := regexp.MustCompile(`(?m)^  version: (\S+)$`).FindSubmatch(manifest)
	if version == nil {
		return "", errors.New("no version in manifest.yaml")
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(manifest)
	dir := filepath.Join(cache, "hostflame", fmt.Sprintf("collector-%x", sum[:8]))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	binary := filepath.Join(dir, "otelcol")
	if _, err := os.Stat(binary); !errors.Is(err, fs.ErrNotExist) {
		return binary, err
	}
	if err := os.WriteFile(filepath.Join(dir, "manifest.yaml"), manifest, 0o644); err != nil {
		return "", err
	}
	cmd := exec.Command("go", "run", builder+"@v"+string(version[1]), "--config", "manifest.yaml")
	cmd.Dir = dir // no module here: the builder's own one decides
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%v: %w\n%s", cmd.Args, err, &output)
	}
	if err := os.Rename(filepath.Join(dir, "build", "otelcol"), binary); err != nil {
		return "", err
	}
	return binary, os.RemoveAll(filepath.Join(dir, "build"))
}

// lock waits for an exclusive lock on path, which the kernel frees with the process.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX); {
		case err == nil:
			return func() { f.Close() }, nil
		case !errors.Is(err, unix.EINTR):
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
	}
}
