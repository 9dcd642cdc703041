// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"cmp"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/pprof/profile"
	profilespb "go.opentelemetry.io/proto/otlp/profiles/v1development"
)

// blockIO takes a profile of block I/O and holds it against what was asked for.
func (s *stack) blockIO(t *testing.T, device, operation string, least time.Duration) *profile.Profile {
	t.Helper()
	status, body, err := s.agent.Get("/pprof/blockio?" + url.Values{
		"seconds": {"3"}, "device": {device}, "operation": {operation}, "min_latency": {least.String()},
	}.Encode())
	if err != nil || status != http.StatusOK {
		t.Fatalf("status %d, %v: %s", status, err, body)
	}
	p, err := profile.ParseData(body)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.CheckValid(); err != nil {
		t.Error(err)
	}
	var types []string
	for _, st := range p.SampleType {
		types = append(types, st.Type+"/"+st.Unit)
	}
	if want := []string{"requests/count", "latency/nanoseconds", "bytes/bytes"}; !slices.Equal(types, want) {
		t.Fatalf("sample types %v, want %v", types, want)
	}
	for _, sample := range p.Sample {
		if d, op := sample.Label["device"], sample.Label["operation"]; !slices.Equal(d, []string{device}) || !slices.Equal(op, []string{operation}) {
			t.Errorf("asked for %s of %s, got %s of %s", operation, device, op, d)
		}
		// A sample is of requests that are each as long.
		if sample.Value[0] <= 0 || sample.Value[1] < sample.Value[0]*int64(least) {
			t.Errorf("%d requests took %d ns, want at least %v each", sample.Value[0], sample.Value[1], least)
		}
		queue, onDevice := sample.NumLabel["queue_ns"], sample.NumLabel["device_ns"]
		if len(queue) != 1 || len(onDevice) != 1 {
			t.Fatalf("numeric labels %v", sample.NumLabel)
		}
		// Both are means, which are rounded down.
		if sum := (queue[0] + onDevice[0]) * sample.Value[0]; sum > sample.Value[1] || sum+2*sample.Value[0] < sample.Value[1] {
			t.Errorf("%d requests took %d ns, of which each waited %d and was %d on the device", sample.Value[0], sample.Value[1], queue[0], onDevice[0])
		}
	}
	return p
}

// testBlockIOProfile takes profiles while fio reads.
func (s *stack) testBlockIOProfile(t *testing.T) {
	// It has read its own pages then, which are not direct reads.
	eventually(t, 30*time.Second, func() error {
		if n := s.fio.account(t, "syscr"); n < 1000 {
			return fmt.Errorf("fio has called read %d times", n)
		}
		return nil
	})
	t.Run("Reads", parallel(s.testBlockIOReads))
	t.Run("Writes", parallel(func(t *testing.T) {
		if list := s.fio.samples(s.blockIO(t, s.fio.device, "write", 0)); len(list) > 0 {
			t.Errorf("%d samples of writes by fio, who reads", len(list))
		}
	}))
	t.Run("OtherDevice", parallel(func(t *testing.T) {
		if p := s.blockIO(t, "none", "read", 0); len(p.Sample) > 0 {
			t.Errorf("%d samples of a device that there is not", len(p.Sample))
		}
	}))
}

// testBlockIOReads takes the reads of fio, all and the longer ones.
func (s *stack) testBlockIOReads(t *testing.T) {
	before := s.fio.account(t, "read_bytes")
	all := s.blockIO(t, s.fio.device, "read", 0)
	did := s.fio.account(t, "read_bytes") - before
	var requests, bytes, inKernel, inUser int64
	for _, sample := range s.fio.samples(all) {
		requests += sample.Value[0]
		bytes += sample.Value[2]
		if hasFrame(sample, func(m *profile.Mapping, function string) bool {
			return m.File == "[kernel.kallsyms]" && strings.Contains(function, "submit_bio")
		}) {
			inKernel += sample.Value[0]
		}
		if hasFrame(sample, func(m *profile.Mapping, _ string) bool { return filepath.Base(m.File) == "fio" }) {
			inUser += sample.Value[0]
		}
	}
	t.Logf("%d samples: %d reads of fio, who made %d meanwhile; %d with the kernel's stack, %d with fio's",
		len(all.Sample), requests, did/4096, inKernel, inUser)
	if requests == 0 {
		t.Fatalf("no read of fio in %d samples", len(all.Sample))
	}
	// Its own count is of a little longer, ours a draw of some hundreds.
	if bytes < did/2 || bytes > did*3/2 {
		t.Errorf("%d bytes were read by fio, it says %d", bytes, did)
	}
	// A page fault of its own can be among them, and stand for many.
	if bytes < 4096*requests || bytes > 4096*requests*5/4 {
		t.Errorf("%d reads of fio have %d bytes, want 4096 each", requests, bytes)
	}
	if inKernel < requests*9/10 || inUser < requests*9/10 {
		t.Errorf("of %d reads %d have the kernel's stack and %d fio's, want nearly all", requests, inKernel, inUser)
	}

	// Half of the reads took so long or longer; the mean is of the few that took longest.
	reads := s.fio.samples(all)
	each := func(s *profile.Sample) int64 { return s.Value[1] / s.Value[0] }
	slices.SortFunc(reads, func(a, b *profile.Sample) int { return cmp.Compare(each(a), each(b)) })
	var median time.Duration
	for shorter := int64(0); 2*shorter < requests; reads = reads[1:] {
		median = time.Duration(each(reads[0]))
		shorter += reads[0].Value[0]
	}
	// That there are no shorter ones is held by blockIO.
	if long := s.fio.samples(s.blockIO(t, s.fio.device, "read", median)); len(long) == 0 {
		t.Errorf("no read of fio took %v or more, which was the median before", median)
	}
}

// samples are those of fio in a profile.
func (f *fio) samples(p *profile.Profile) (list []*profile.Sample) {
	for _, sample := range p.Sample {
		if slices.Equal(sample.NumLabel["pid"], []int64{int64(f.cmd.Process.Pid)}) {
			list = append(list, sample)
		}
	}
	return list
}

// account is what the kernel has counted of fio (proc_pid_io(5)).
func (f *fio) account(t *testing.T, name string) (n int64) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", f.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "\n"+name+": ")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		t.Fatalf("%s of fio: %v in\n%s", name, err, b)
	}
	return n
}

// hasFrame tells whether a frame of a sample is as asked for.
func hasFrame(sample *profile.Sample, is func(m *profile.Mapping, function string) bool) bool {
	return slices.ContainsFunc(sample.Location, func(loc *profile.Location) bool {
		if loc.Mapping == nil {
			return false
		}
		function := ""
		if len(loc.Line) > 0 {
			function = loc.Line[0].Function.Name
		}
		return is(loc.Mapping, function)
	})
}

// readsOf adds up the values of the samples of the reads that processes of a name made from a
// device, by the type of the profile.
func readsOf(list []*profilespb.ProfilesData, comm, device string) map[string]int64 {
	sums := map[string]int64{}
	want := map[string]string{"process.executable.name": comm, "device": device, "operation": "read"}
	for _, d := range list {
		dict := d.GetDictionary()
		text := dict.GetStringTable()
		for _, rp := range d.GetResourceProfiles() {
			for _, sp := range rp.GetScopeProfiles() {
				for _, p := range sp.GetProfiles() {
					name := text[p.GetSampleType().GetTypeStrindex()] + "/" + text[p.GetSampleType().GetUnitStrindex()]
					for _, s := range p.GetSamples() {
						matched := 0
						for _, i := range s.GetAttributeIndices() {
							a := dict.GetAttributeTable()[i]
							if v, ok := want[text[a.GetKeyStrindex()]]; ok && v == a.GetValue().GetStringValue() {
								matched++
							}
						}
						if matched == len(want) {
							sums[name] += s.GetValues()[0]
						}
					}
				}
			}
		}
	}
	return sums
}

// checkBlockIOPushed holds what the Collector has of fio's reads.
func (s *stack) checkBlockIOPushed(t *testing.T) error {
	sums := readsOf(s.collector.Profiles(t), "fio", s.fio.device)
	latency, queue, device := sums["blockio/nanoseconds"], sums["blockio_queue/nanoseconds"], sums["blockio_device/nanoseconds"]
	bytes := sums["blockio_bytes/bytes"]
	// Of samples whose numbers are near each other there are means only.
	if device == 0 || bytes == 0 || queue+device > latency || queue+device < latency*99/100 {
		return fmt.Errorf("profiles of fio's reads from %s add up to %v", s.fio.device, sums)
	}
	return nil
}
