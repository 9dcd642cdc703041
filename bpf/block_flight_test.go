// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/hostflame/hostflame/internal/kerneltest"
)

// What is in flight when the hooks are attached counts, with the kernel's start, but for what
// nobody saw of it; the gauge says what the device has, and nothing once it is idle.
func TestBlockInFlight(t *testing.T) {
	kerneltest.RequireTool(t, "fio")
	const depth = 32
	device, _ := loopDevice(t)
	quiesce(t, device)
	name := filepath.Base(device)
	done := make(chan fioReport)
	go func() {
		defer close(done)
		done <- fio(t, device, "--rw=randread", "--bs=4k", "--size=64M", "--direct=1", "--ioengine=libaio", "--iodepth=32",
			"--time_based", "--runtime=2", "--invalidate=0")
	}()
	before := booksOf(t, device)[bookReads]
	for end := time.Now().Add(10 * time.Second); booksOf(t, device)[bookReads] < before+1000; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("fio does not read")
		}
	}
	b := newTestBlock(t)
	var report fioReport
	most, atOnce := 0, 0
	for running := true; running; {
		select {
		case report = <-done:
			running = false
		case <-time.After(time.Millisecond):
			ended := booksOf(t, device)[bookReads]
			n, err := b.InFlight()
			if err != nil {
				t.Fatal(err)
			}
			// Of one that ends while it is read, the one that fio issues next can be counted as well.
			most = max(most, n[name])
			atOnce = max(atOnce, n[name]-int(booksOf(t, device)[bookReads]-ended))
		}
	}
	awaitIdle(t, b, device)
	s, err := b.Stats()
	if err != nil {
		t.Fatal(err)
	}
	r, hidden := seriesOf(t, b, name)["read"], hiddenSince[b].Read(t)
	n := r.Total.Count()
	unseen := n - r.DeviceTime.Count()
	mean, fios := float64(r.Total.Sum)/float64(n), report.Read.Clat.Mean
	t.Logf("%d reads of fio's %d, %d issued unseen, %.0f ns in the mean (fio %.0f), at most %d in flight; lost %v, %d hidden",
		n, report.Read.TotalIOs, unseen, mean, fios, most, s.Dropped, hidden)
	if most < 2 || atOnce > depth+int(hidden) {
		t.Errorf("at most %d in flight, want some of %d", most, depth)
	}
	if r.Queue.Count() != r.DeviceTime.Count() || unseen > n/10 || r.Size.Sum != n*4096 {
		t.Errorf("%d reads of %d bytes, %d on the device, %d in the queue; want all bytes, and few that were issued before",
			n, r.Size.Sum, r.DeviceTime.Count(), r.Queue.Count())
	}
	if n > report.Read.TotalIOs || mean < fios/100 || mean > fios {
		t.Errorf("%d reads of %.0f ns, fio made %d of %.0f ns", n, mean, report.Read.TotalIOs, fios)
	}
	for reason, lost := range s.Dropped {
		if lost > 0 && (reason != DropNoEnd || lost > hidden) {
			t.Errorf("%d lost: %v", lost, reason)
		}
	}
}
