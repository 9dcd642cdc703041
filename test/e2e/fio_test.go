// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fio is a run of fio's direct random reads, one at a time.
type fio struct {
	path   string // of its file
	device string // that the file is on, as the agent names it
	before reads
	cmd    *exec.Cmd
	out    bytes.Buffer
}

// startFio starts fio on a file of its own.
func startFio(t *testing.T, s *stack, d time.Duration) *fio {
	t.Helper()
	path := filepath.Join(s.dir, "fio.data")
	data := make([]byte, 64<<20)
	for i := range data {
		data[i] = byte(i >> 12)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	unix.Sync() // what is written back later would be counted as well
	f := &fio{path: path, device: deviceOf(t, path)}
	f.before = s.readReads(t, f.device)
	f.cmd = f.reads("--time_based", fmt.Sprintf("--runtime=%d", int(d.Seconds())))
	f.cmd.Stdout = &f.out
	if err := f.cmd.Start(); err != nil {
		t.Fatalf("start fio: %v", err)
	}
	t.Cleanup(func() {
		f.cmd.Process.Kill()
		f.cmd.Wait()
	})
	return f
}

// reads is a run of fio on the file.
func (f *fio) reads(args ...string) *exec.Cmd {
	return exec.Command("fio", append([]string{"--name=e2e", "--filename=" + f.path, "--size=64M", "--rw=randread", "--bs=4k",
		"--direct=1", "--ioengine=psync", "--thread", "--output-format=json"}, args...)...)
}

// deviceOf is the name of the whole device under a file.
func deviceOf(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	link, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		t.Fatalf("the test's directory is not on a block device: %v", err)
	}
	if _, err := os.Stat(filepath.Join(link, "partition")); err == nil {
		link = filepath.Dir(link)
	}
	return filepath.Base(link)
}

// reads is how many reads of a device there have been.
type reads struct {
	agent  float64 // as the agent counted them
	lost   float64 // requests whose end it did not see, by its own account
	kernel float64 // as the kernel did (Documentation/block/stat.rst)
}

func (s *stack) readReads(t *testing.T, device string) (r reads) {
	t.Helper()
	families, _ := scrape(t, s.agent)
	r.agent, _ = value(families, "hostflame_block_io_latency_seconds", map[string]string{"device": device, "operation": "read"})
	r.lost, _ = value(families, "hostflame_events_lost_total", map[string]string{"collector": "block", "reason": "no_end"})
	b, err := os.ReadFile("/sys/block/" + device + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(b), &r.kernel); err != nil {
		t.Fatalf("reads of %s: %v", device, err)
	}
	return r
}

// testBlockIO compares what the agent counted with what fio did.
func (s *stack) testBlockIO(t *testing.T) {
	if err := s.fio.cmd.Wait(); err != nil {
		t.Fatalf("fio: %v\n%s", err, s.fio.out.String())
	}
	var report struct {
		Jobs []struct {
			Read struct {
				TotalIOs float64 `json:"total_ios"`
			}
		}
	}
	if err := json.Unmarshal(s.fio.out.Bytes(), &report); err != nil || len(report.Jobs) != 1 {
		t.Fatalf("fio's report: %v\n%s", err, s.fio.out.String())
	}
	did := report.Jobs[0].Read.TotalIOs
	now := s.readReads(t, s.fio.device)
	counted, kernel := now.agent-s.fio.before.agent, now.kernel-s.fio.before.kernel
	// A loss is known when the place of the request is taken again, as all are by this.
	if out, err := s.fio.reads("--io_size=16M").CombinedOutput(); err != nil {
		t.Fatalf("fio: %v\n%s", err, out)
	}
	lost, settled := now.lost-s.fio.before.lost, s.readReads(t, s.fio.device).lost-s.fio.before.lost
	t.Logf("fio read %.0f times, the agent counted %.0f reads of %s and %.0f losses, and later %.0f, the kernel %.0f",
		did, counted, s.fio.device, lost, settled, kernel)
	// Others read from the disk too, and what they do between two readings is in one of them.
	// Losses are of all devices, and of writes too.
	const slack = 50
	if counted+settled < did-5 || counted+settled < kernel-slack || counted+lost > kernel+slack {
		t.Errorf("the agent counted %.0f reads and %.0f losses, later %.0f, the kernel %.0f, fio made %.0f", counted, lost, settled, kernel, did)
	}
	size := s.classic.soon(t, fmt.Sprintf(`hostflame_block_io_size_bytes_bucket{device=%q, operation="read", le=~"4096(.0)?"}`, s.fio.device))
	if math.IsNaN(size) || size < did*0.99 {
		t.Errorf("%.0f reads of at most 4 KiB, fio made %.0f", size, did)
	}
}
