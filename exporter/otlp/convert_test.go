// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/pprof/profile"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/resource"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"google.golang.org/protobuf/proto"
)

var update = flag.Bool("update", false, "write the golden files")

func testResource(t testing.TB) *resource.Resource {
	t.Helper()
	return resource.NewWithAttributes(semconv.SchemaURL,
		attribute.String("service.name", "hostflame"), attribute.String("host.name", "db-1"))
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// hostProfile is a window as the profiler makes it: C++ with inlines, Go, the kernel, code
// of a JIT compiler, a stack that could not be walked, a process in a container and one
// that is not, and a comm that is not UTF-8.
func hostProfile() *profile.Profile {
	native := &profile.Mapping{ID: 1, Start: 0x1000, Limit: 0x9000, Offset: 0x1000, File: "/usr/bin/query",
		BuildID: "c89b11207f6479603b0d49bf291c092c2b719293", HasFunctions: true, HasFilenames: true, HasLineNumbers: true, HasInlineFrames: true}
	gobin := &profile.Mapping{ID: 2, Start: 0x400000, Limit: 0x500000, File: "/srv/api", BuildID: "foh3mEXu/kATcXlYV/WwRFB1hP/x8hMC8em", HasFunctions: true, HasFilenames: true}
	kernel := &profile.Mapping{ID: 3, Start: 0xffffffff81000000, Limit: 0xffffffffffffffff, File: "[kernel.kallsyms]", HasFunctions: true}
	module := &profile.Mapping{ID: 5, Start: 1 << 63, Limit: 0xffffffffffffffff, File: "[virtio_blk]", HasFunctions: true}
	jit := &profile.Mapping{ID: 4, Start: 0x7f0000000000, Limit: 0x7f0000010000, File: "[anon]", HasFunctions: true}
	p := &profile.Profile{
		SampleType: []*profile.ValueType{{Type: "samples", Unit: "count"}, {Type: "cpu", Unit: "nanoseconds"}},
		PeriodType: &profile.ValueType{Type: "cpu", Unit: "nanoseconds"},
		Period:     10101010, TimeNanos: 1_800_000_000_000_000_000, DurationNanos: 10_000_000_000,
		Comments: []string{"host db-1", "98.9 samples a second and CPU"},
		Mapping:  []*profile.Mapping{native, gobin, kernel, jit, module},
	}
	function := func(name, system, file string, start int64) *profile.Function {
		f := &profile.Function{ID: uint64(len(p.Function) + 1), Name: name, SystemName: system, Filename: file, StartLine: start}
		p.Function = append(p.Function, f)
		return f
	}
	location := func(m *profile.Mapping, address uint64, lines ...profile.Line) *profile.Location {
		l := &profile.Location{ID: uint64(len(p.Location) + 1), Mapping: m, Address: address, Line: lines}
		p.Location = append(p.Location, l)
		return l
	}
	sample := func(n int64, pid int64, labels map[string][]string, stack ...*profile.Location) {
		p.Sample = append(p.Sample, &profile.Sample{Value: []int64{n, n * p.Period}, Location: stack, Label: labels,
			NumLabel: map[string][]int64{"pid": {pid}, "tid": {pid + 1}}})
	}
	scan := location(native, 0x1234,
		profile.Line{Function: function("std::less<int>::operator()", "_ZNKSt4lessIiEclERKiS2_", "stl_function.h", 400), Line: 408, Column: 9},
		profile.Line{Function: function("db::scan(int)", "_ZN2db4scanEi", "scan.cc", 10), Line: 42, Column: 3})
	main := location(native, 0x1100, profile.Line{Function: function("main", "main", "main.cc", 5), Line: 17})
	unknown := location(native, 0x1900)
	serve := location(gobin, 0x401000, profile.Line{Function: function("main.(*api).serve", "main.(*api).serve", "/src/api/serve.go", 30), Line: 37})
	exit := location(gobin, 0x402000, profile.Line{Function: function("runtime.goexit", "runtime.goexit", "/usr/local/go/src/runtime/asm_amd64.s", 1693), Line: 1700})
	cgo := location(gobin, 0x403000, profile.Line{Function: function("sqlite3_step", "sqlite3_step", "sqlite3.c", 1), Line: 99})
	copyUser := location(kernel, 0xffffffff81001234, profile.Line{Function: function("copy_user", "copy_user", "[kernel.kallsyms]", 0)})
	irq := location(module, 0xffffffffc0001234, profile.Line{Function: function("virtblk_done", "virtblk_done", "", 0)})
	jitted := location(jit, 0x7f0000000123, profile.Line{Function: function("LazyCompile:~hot", "LazyCompile:~hot", "", 0)})
	truncated := location(nil, 0, profile.Line{Function: function("[truncated]", "[truncated]", "", 0)})

	query := map[string][]string{"comm": {"query"}, "thread": {"worker-1"}, "container": {"0123456789ab"}}
	sample(7, 100, query, scan, main)
	sample(2, 100, query, irq, copyUser, unknown, main)
	api := map[string][]string{"comm": {"api"}, "thread": {"api"}, "container": {"api.service"}}
	sample(3, 200, api, serve, exit)
	sample(1, 200, api, cgo, serve, exit)
	sample(1, 300, map[string][]string{"comm": {"no\xffde"}, "thread": {"node"}, "container": {"/"}}, jitted, truncated)
	return p
}

func TestConvertGolden(t *testing.T) {
	messages := mustConvert(t, hostProfile(), maxMessage)
	if len(messages) != 1 {
		t.Fatalf("%d messages", len(messages))
	}
	var got bytes.Buffer
	dump(&got, messages[0])
	if *update {
		if err := os.WriteFile(filepath.Join("testdata", "host.golden"), got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(readGolden(t, "host.golden"), got.String()); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func readGolden(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestShapes holds every row of the table of what is sent as what.
func TestShapes(t *testing.T) {
	type sent struct {
		sample, period valueType
		each           int64
		sum            int64
	}
	tests := []struct {
		name  string
		types []*profile.ValueType
		want  []sent
	}{
		{"cpu", []*profile.ValueType{{Type: "samples", Unit: "count"}, {Type: "cpu", Unit: "nanoseconds"}},
			[]sent{{valueType{"samples", "count"}, valueType{"cpu", "nanoseconds"}, 10101010, 11}}},
		{"runqueue", []*profile.ValueType{{Type: "waits", Unit: "count"}, {Type: "delay", Unit: "nanoseconds"}},
			[]sent{{valueType{"runqueue", "nanoseconds"}, valueType{"runqueue", "count"}, 1, 22}}},
		{"culprit", []*profile.ValueType{{Type: "waits", Unit: "count"}, {Type: "caused", Unit: "nanoseconds"}},
			[]sent{{valueType{"culprit", "nanoseconds"}, valueType{"culprit", "count"}, 1, 22}}},
		{"offcpu", []*profile.ValueType{{Type: "switches", Unit: "count"}, {Type: "blocked", Unit: "nanoseconds"}},
			[]sent{{valueType{"off_cpu", "nanoseconds"}, valueType{}, 0, 22}}},
		{"blockio", []*profile.ValueType{{Type: "requests", Unit: "count"}, {Type: "latency", Unit: "nanoseconds"}, {Type: "bytes", Unit: "bytes"}},
			[]sent{
				// What one request waited, times the requests, 4 and 7.
				{valueType{"blockio_queue", "nanoseconds"}, valueType{"blockio_queue", "count"}, 1, 4*30 + 7*50},
				{valueType{"blockio_device", "nanoseconds"}, valueType{"blockio_device", "count"}, 1, 4*40 + 7*60},
				{valueType{"blockio", "nanoseconds"}, valueType{"blockio", "count"}, 1, 22},
				{valueType{"blockio_bytes", "bytes"}, valueType{"blockio_bytes", "count"}, 1, 33},
			}},
		{"wall", []*profile.ValueType{{Type: "wall", Unit: "nanoseconds"}},
			[]sent{{valueType{"wall", "nanoseconds"}, valueType{"wall", "count"}, 1, 11}}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := hostProfile()
			p.SampleType = test.types
			p.Sample = p.Sample[:2]
			for i, n := range []int64{4, 7} {
				p.Sample[i].Value = []int64{n, 2 * n, 3 * n}[:len(test.types)]
				if test.name == "blockio" {
					p.Sample[i].NumLabel["queue_ns"] = []int64{int64(30 + 20*i)}
					p.Sample[i].NumLabel["device_ns"] = []int64{int64(40 + 20*i)}
				}
			}
			messages := mustConvert(t, p, maxMessage)
			if problems := conform(messages[0]); problems != nil {
				t.Error(strings.Join(problems, "\n"))
			}
			var got []sent
			r := reader{messages[0].Dictionary}
			for _, o := range messages[0].ResourceProfiles[0].ScopeProfiles[0].Profiles {
				s := sent{r.valueType(o.SampleType), r.valueType(o.PeriodType), o.Period, 0}
				for _, sample := range o.Samples {
					s.sum += sample.Values[0]
				}
				got = append(got, s)
			}
			if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(sent{}, valueType{})); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestConvertNothing(t *testing.T) {
	empty := hostProfile()
	empty.Sample = nil
	c, err := convert(empty, testResource(t), maxMessage)
	if err != nil || len(c.messages) != 0 {
		t.Errorf("no samples: %d messages, %v", len(c.messages), err)
	}
	heap := hostProfile()
	heap.SampleType = []*profile.ValueType{{Type: "inuse_space", Unit: "bytes"}, {Type: "x", Unit: "y"}}
	if _, err := convert(heap, testResource(t), maxMessage); !errors.Is(err, errNoShape) {
		t.Errorf("unknown sample type: %v", err)
	}
}

// TestConvertLabels: attributes have unique keys and one value; what is left out is counted.
func TestConvertLabels(t *testing.T) {
	p := hostProfile()
	p.Sample = p.Sample[:1]
	p.Sample[0].Label = map[string][]string{"pid": {"a string too"}, "many": {"1", "2", "3"}, "": {"nameless"}, "none": nil}
	p.Sample[0].NumLabel = map[string][]int64{"pid": {4}, "bytes": {512, 1024}}
	p.Sample[0].NumUnit = map[string][]string{"bytes": {"By", "By"}}
	d := mustConvert(t, p, maxMessage)[0]
	if problems := conform(d); problems != nil {
		t.Error(strings.Join(problems, "\n"))
	}
	o := d.ResourceProfiles[0].ScopeProfiles[0].Profiles[0]
	want := []string{"many=1", "process.pid=a string too", "bytes=512By"}
	if diff := cmp.Diff(want, reader{d.Dictionary}.attributes(o.Samples[0].AttributeIndices)); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if o.DroppedAttributesCount != 5 {
		t.Errorf("%d dropped attributes, want 5: two of many, nameless, a pid, one of bytes", o.DroppedAttributesCount)
	}
}

// TestConvertUTF8: names of symbols, files and threads are just bytes.
func TestConvertUTF8(t *testing.T) {
	p := hostProfile()
	p.Function[0].Name, p.Function[0].SystemName, p.Function[0].Filename = "n\xffame", "s\xffystem", "f\xffile"
	p.Mapping[0].File, p.Mapping[0].BuildID = "m\xffapping", "i\xffd"
	p.Comments = []string{"c\xffomment"}
	p.Sample[0].Label["l\xffabel"] = []string{"v\xffalue"}
	messages := mustConvert(t, p, maxMessage)
	if problems := conform(messages[0]); problems != nil {
		t.Error(strings.Join(problems, "\n"))
	}
	var text bytes.Buffer
	dump(&text, messages[0])
	for _, want := range []string{"n\uFFFDame (s\uFFFDystem) f\uFFFDile", "m\uFFFDapping", "=i\uFFFDd", "c\uFFFDomment", "l\uFFFDabel=v\uFFFDalue"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, text.String())
		}
	}
}

// TestConvertMerges: samples that are the same in what is sent become one.
func TestConvertMerges(t *testing.T) {
	p := hostProfile()
	again := *p.Sample[0]
	clone := *again.Location[0] // the same location with another id
	clone.ID = 99
	p.Location = append(p.Location, &clone)
	again.Location = []*profile.Location{&clone, again.Location[1]}
	again.Value = []int64{5, 5 * p.Period}
	p.Sample = append(p.Sample, &again)
	d := mustConvert(t, p, maxMessage)[0]
	if problems := conform(d); problems != nil {
		t.Error(strings.Join(problems, "\n"))
	}
	o := d.ResourceProfiles[0].ScopeProfiles[0].Profiles[0]
	if len(o.Samples) != 5 || o.Samples[0].Values[0] != 12 {
		t.Errorf("%d samples, the first %v, want 5 and 12", len(o.Samples), o.Samples[0].Values)
	}
}

// TestConvertGoProfile converts what the Go runtime measured of this test.
func TestConvertGoProfile(t *testing.T) {
	p := goProfile(t, 500*time.Millisecond)
	messages := mustConvert(t, p, maxMessage)
	for _, d := range messages {
		if problems := conform(d); problems != nil {
			t.Error(strings.Join(problems, "\n"))
		}
	}
	back := toPprof(t, messages)
	if diff := cmp.Diff(canonical(p, 0), canonical(back, 0)); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if back.Period != p.Period || back.TimeNanos != p.TimeNanos || back.DurationNanos != p.DurationNanos {
		t.Errorf("period %d at %d+%d, want %d at %d+%d",
			back.Period, back.TimeNanos, back.DurationNanos, p.Period, p.TimeNanos, p.DurationNanos)
	}
	var text bytes.Buffer
	dump(&text, messages[0])
	if !strings.Contains(text.String(), "burnPrimes") {
		t.Error("the function that burns is not there")
	}
}

// TestConvertSplits: many messages, none too large, each complete, and nothing lost. All
// but the last are full: what would have fit is not left for the next.
func TestConvertSplits(t *testing.T) {
	for _, size := range []struct{ samples, name, limit int }{{2_000, 12_000, maxMessage}, {2_000, 500, 40_000}} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			p := largeProfile(size.samples, size.name)
			messages := mustConvert(t, p, size.limit)
			if len(messages) < 2 {
				t.Fatalf("%d messages: nothing was split", len(messages))
			}
			seen := map[string]bool{}
			for i, d := range messages {
				if problems := conform(d); problems != nil {
					t.Fatal(strings.Join(problems[:min(5, len(problems))], "\n"))
				}
				if n := proto.Size(d); i < len(messages)-1 && n < size.limit*7/10 {
					t.Errorf("message %d has only %d bytes", i, n)
				}
				id := string(d.ResourceProfiles[0].ScopeProfiles[0].Profiles[0].ProfileId)
				if seen[id] {
					t.Error("the same profile id twice")
				}
				seen[id] = true
			}
			if diff := cmp.Diff(canonical(p, 0), canonical(toPprof(t, messages), 0)); diff != "" {
				t.Errorf("-want +got\n%.2000s", diff)
			}
		})
	}
}

// largeProfile has long names, as C++ templates do, and samples that share locations with
// their neighbours, as those of one process do.
func largeProfile(samples, name int) *profile.Profile {
	p := randomProfile(rand.New(rand.NewPCG(1, 2)), samples)
	for i, l := range p.Location {
		f := &profile.Function{ID: uint64(len(p.Function) + 1), Name: fmt.Sprint("std::vector<", strings.Repeat("x", name), i, ">")}
		p.Function = append(p.Function, f)
		l.Line = []profile.Line{{Function: f}}
	}
	for i, s := range p.Sample {
		for j := range s.Location {
			s.Location[j] = p.Location[(i*len(p.Location)/samples+j)%len(p.Location)]
		}
	}
	return p
}

// TestConvertTooLarge: a sample that no message can hold is left out, and changes nothing
// for those after it.
func TestConvertTooLarge(t *testing.T) {
	p := hostProfile()
	p.Function[0].Name = strings.Repeat("x", 5000) // in the first sample
	rest := hostProfile()
	rest.Sample = rest.Sample[1:4] // but for the comm that is not UTF-8
	p.Sample = p.Sample[:4]
	c, err := convert(p, testResource(t), 3000)
	if err != nil || c.tooLarge != 1 {
		t.Fatalf("%d samples too large, %v, want 1", c.tooLarge, err)
	}
	if diff := cmp.Diff(canonical(rest, 0), canonical(toPprof(t, decode(t, c)), 0)); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	for _, d := range decode(t, c) {
		if problems := conform(d); problems != nil {
			t.Error(strings.Join(problems, "\n"))
		}
	}
}

// FuzzConvert makes profiles of all kinds: any must conform, keep to the limit, and come
// back as it was.
func FuzzConvert(f *testing.F) {
	for seed := range uint64(12) {
		f.Add(seed, uint16(20*seed), uint16(4600+400*seed))
	}
	f.Fuzz(func(t *testing.T, seed uint64, samples, limit uint16) {
		p := randomProfile(rand.New(rand.NewPCG(seed, 1)), int(samples))
		messages := mustConvert(t, p, max(int(limit), 5000))
		for _, d := range messages {
			if problems := conform(d); problems != nil {
				t.Fatal(strings.Join(problems, "\n"))
			}
		}
		if diff := cmp.Diff(canonical(p, 0), canonical(toPprof(t, messages), 0)); diff != "" {
			t.Fatalf("-want +got\n%s", diff)
		}
	})
}

// randomProfile has every kind of thing that a pprof profile can hold and that has a
// place in OTLP, duplicates included.
func randomProfile(r *rand.Rand, samples int) *profile.Profile {
	p := hostProfile()
	p.Sample = nil
	names := []string{"", "a", "b", "main.run", "_ZN1a1bEv", "späť"}
	for range 30 {
		p.Function = append(p.Function, &profile.Function{ID: uint64(len(p.Function) + 1), Name: pick(r, names[1:]),
			SystemName: pick(r, names), Filename: pick(r, []string{"", "x.go", "x.c", "asm.s"}), StartLine: r.Int64N(4)})
	}
	for range 3 + samples/4 {
		l := &profile.Location{ID: uint64(len(p.Location) + 1), IsFolded: r.IntN(9) == 0}
		if r.IntN(5) > 0 {
			l.Mapping = pick(r, p.Mapping)
			l.Address = l.Mapping.Start + 1 + r.Uint64N(200)
		}
		for range r.IntN(4) {
			l.Line = append(l.Line, profile.Line{Function: pick(r, p.Function), Line: r.Int64N(500), Column: r.Int64N(3)})
		}
		if l.Mapping != nil || l.Line != nil {
			p.Location = append(p.Location, l)
		}
	}
	for range samples {
		n := r.Int64N(1000)
		s := &profile.Sample{Value: []int64{n, n * p.Period}, Label: map[string][]string{}, NumLabel: map[string][]int64{}, NumUnit: map[string][]string{}}
		for range r.IntN(25) {
			s.Location = append(s.Location, pick(r, p.Location))
		}
		for _, k := range []string{"comm", "thread", "container", "state"} {
			if r.IntN(3) > 0 {
				s.Label[k] = []string{pick(r, []string{"", "x", "worker", "0123456789ab", "a.service", fmt.Sprint(r.IntN(50))})}
			}
		}
		for _, k := range []string{"pid", "tid", "size"} {
			if r.IntN(3) > 0 {
				s.NumLabel[k] = []int64{r.Int64N(300) - 3}
			}
		}
		if s.NumLabel["size"] != nil {
			s.NumUnit["size"] = []string{"By"}
		}
		p.Sample = append(p.Sample, s)
	}
	return p
}

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

// goProfile is a CPU profile of burnPrimes by the Go runtime.
func goProfile(t testing.TB, d time.Duration) *profile.Profile {
	t.Helper()
	var b bytes.Buffer
	if err := pprof.StartCPUProfile(&b); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(d); time.Now().Before(end); {
		burnPrimes(20_000)
	}
	pprof.StopCPUProfile()
	p, err := profile.Parse(&b)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

//go:noinline
func burnPrimes(below int) {
	n := 0
	for i := 2; i < below; i++ {
		prime := true
		for j := 2; j*j <= i && prime; j++ {
			prime = i%j != 0
		}
		if prime {
			n++
		}
	}
	primes = n
}

// primes keeps the burning from being optimized away.
var primes int

func BenchmarkConvert(b *testing.B) {
	p := randomProfile(rand.New(rand.NewPCG(3, 4)), 2000)
	r := testResource(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := convert(p, r, maxMessage); err != nil {
			b.Fatal(err)
		}
	}
}
