// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"crypto/sha256"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/pprof/profile"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	profilespb "go.opentelemetry.io/proto/otlp/profiles/v1development"
	"google.golang.org/protobuf/proto"
)

// mustConvert converts p and decodes what would be sent.
func mustConvert(t testing.TB, p *profile.Profile, limit int) []*profilespb.ProfilesData {
	t.Helper()
	c, err := convert(p, testResource(t), limit)
	if err != nil {
		t.Fatal(err)
	}
	if c.tooLarge > 0 {
		t.Fatalf("%d samples are too large", c.tooLarge)
	}
	for _, b := range c.messages {
		if len(b) > limit {
			t.Errorf("a message of %d bytes, limit %d", len(b), limit)
		}
	}
	return decode(t, c)
}

func decode(t testing.TB, c converted) []*profilespb.ProfilesData {
	t.Helper()
	var all []*profilespb.ProfilesData
	for _, b := range c.messages {
		d := new(profilespb.ProfilesData)
		if err := proto.Unmarshal(b, d); err != nil {
			t.Fatal(err)
		}
		all = append(all, d)
	}
	return all
}

// reader resolves what a message refers to.
type reader struct{ *profilespb.ProfilesDictionary }

func (r reader) text(i int32) string { return r.StringTable[i] }

func (r reader) attribute(i int32) (key, unit string, value *commonpb.AnyValue) {
	a := r.AttributeTable[i]
	return r.text(a.KeyStrindex), r.text(a.UnitStrindex), a.Value
}

// attributes are key=value texts.
func (r reader) attributes(indices []int32) []string {
	var list []string
	for _, i := range indices {
		key, unit, v := r.attribute(i)
		var text string
		switch v := v.Value.(type) {
		case *commonpb.AnyValue_StringValue:
			text = v.StringValue
		case *commonpb.AnyValue_IntValue:
			text = fmt.Sprint(v.IntValue) + unit
		case *commonpb.AnyValue_BoolValue:
			text = fmt.Sprint(v.BoolValue)
		case *commonpb.AnyValue_ArrayValue:
			for _, e := range v.ArrayValue.Values {
				text += fmt.Sprintf("%q ", e.GetStringValue())
			}
		}
		list = append(list, key+"="+strings.TrimSpace(text))
	}
	return list
}

func (r reader) valueType(v *profilespb.ValueType) valueType {
	return valueType{r.text(v.TypeStrindex), r.text(v.UnitStrindex)}
}

// dump writes a message as text, for people and golden files.
func dump(w io.Writer, d *profilespb.ProfilesData) {
	r := reader{d.Dictionary}
	for _, rp := range d.ResourceProfiles {
		fmt.Fprintf(w, "resource %s\n", rp.SchemaUrl)
		for _, a := range rp.Resource.Attributes {
			// A Collector puts these strings into the dictionary.
			fmt.Fprintf(w, "  %s%s=%s%s\n", a.Key, r.text(a.KeyStrindex), a.Value.GetStringValue(), r.text(a.Value.GetStringValueStrindex()))
		}
		for _, sp := range rp.ScopeProfiles {
			fmt.Fprintf(w, "scope %s %s\n", sp.Scope.Name, sp.SchemaUrl)
			for _, p := range sp.Profiles {
				fmt.Fprintf(w, "profile %v period %d %v time %d+%d dropped %d %v\n", r.valueType(p.SampleType), p.Period,
					r.valueType(p.PeriodType), p.TimeUnixNano, p.DurationNano, p.DroppedAttributesCount, r.attributes(p.AttributeIndices))
				for _, s := range p.Samples {
					fmt.Fprintf(w, "  sample %v %s\n", s.Values, strings.Join(r.attributes(s.AttributeIndices), " "))
					for _, l := range r.StackTable[s.StackIndex].LocationIndices {
						r.dumpLocation(w, r.LocationTable[l])
					}
				}
			}
		}
	}
	for i, m := range r.MappingTable {
		fmt.Fprintf(w, "mapping %d %#x-%#x@%#x %q %v\n", i, m.MemoryStart, m.MemoryLimit, m.FileOffset,
			r.text(m.FilenameStrindex), r.attributes(m.AttributeIndices))
	}
}

func (r reader) dumpLocation(w io.Writer, l *profilespb.Location) {
	fmt.Fprintf(w, "    %#x in mapping %d %v\n", l.Address, l.MappingIndex, r.attributes(l.AttributeIndices))
	for _, line := range l.Lines {
		f := r.FunctionTable[line.FunctionIndex]
		fmt.Fprintf(w, "      %s (%s) %s:%d:%d, begins %d\n", r.text(f.NameStrindex), r.text(f.SystemNameStrindex),
			r.text(f.FilenameStrindex), line.Line, line.Column, f.StartLine)
	}
}

// toPprof makes a pprof profile of all messages of one window, with the sample types of
// the first: the reverse of convert, but written from the specification.
func toPprof(t testing.TB, messages []*profilespb.ProfilesData) *profile.Profile {
	t.Helper()
	var parts []*profile.Profile
	for _, d := range messages {
		for _, p := range d.ResourceProfiles[0].ScopeProfiles[0].Profiles {
			parts = append(parts, reader{d.Dictionary}.pprof(p))
		}
	}
	if len(parts) == 0 {
		return &profile.Profile{}
	}
	merged, err := profile.Merge(parts)
	if err != nil {
		t.Fatal(err)
	}
	return merged
}

func (r reader) pprof(p *profilespb.Profile) *profile.Profile {
	sample, period := r.valueType(p.SampleType), r.valueType(p.PeriodType)
	out := &profile.Profile{
		SampleType: []*profile.ValueType{{Type: sample.name, Unit: sample.unit}},
		PeriodType: &profile.ValueType{Type: period.name, Unit: period.unit},
		Period:     p.Period, TimeNanos: int64(p.TimeUnixNano), DurationNanos: int64(p.DurationNano),
	}
	for i, f := range r.FunctionTable[1:] {
		out.Function = append(out.Function, &profile.Function{ID: uint64(i + 1), Name: r.text(f.NameStrindex),
			SystemName: r.text(f.SystemNameStrindex), Filename: r.text(f.FilenameStrindex), StartLine: f.StartLine})
	}
	for i, m := range r.MappingTable[1:] {
		pm := &profile.Mapping{ID: uint64(i + 1), Start: m.MemoryStart, Limit: m.MemoryLimit,
			Offset: m.FileOffset, File: r.text(m.FilenameStrindex)}
		for _, a := range r.attributes(m.AttributeIndices) {
			key, value, _ := strings.Cut(a, "=")
			switch key {
			case "process.executable.build_id.gnu", "process.executable.build_id.go":
				pm.BuildID = value
			case "pprof.mapping.has_functions":
				pm.HasFunctions = true
			case "pprof.mapping.has_filenames":
				pm.HasFilenames = true
			case "pprof.mapping.has_line_numbers":
				pm.HasLineNumbers = true
			case "pprof.mapping.has_inline_frames":
				pm.HasInlineFrames = true
			}
		}
		out.Mapping = append(out.Mapping, pm)
	}
	for i, l := range r.LocationTable[1:] {
		pl := &profile.Location{ID: uint64(i + 1), Address: l.Address,
			IsFolded: slices.Contains(r.attributes(l.AttributeIndices), "pprof.location.is_folded=true")}
		if l.MappingIndex > 0 {
			pl.Mapping = out.Mapping[l.MappingIndex-1]
		}
		for _, line := range l.Lines {
			pl.Line = append(pl.Line, profile.Line{Function: out.Function[line.FunctionIndex-1], Line: line.Line, Column: line.Column})
		}
		out.Location = append(out.Location, pl)
	}
	for _, s := range p.Samples {
		ps := &profile.Sample{Value: s.Values, Label: map[string][]string{}, NumLabel: map[string][]int64{}, NumUnit: map[string][]string{}}
		for _, l := range r.StackTable[s.StackIndex].LocationIndices {
			ps.Location = append(ps.Location, out.Location[l-1])
		}
		for _, i := range s.AttributeIndices {
			r.label(ps, i)
		}
		out.Sample = append(out.Sample, ps)
	}
	return out
}

func (r reader) label(s *profile.Sample, i int32) {
	key, unit, v := r.attribute(i)
	if label, ok := map[string]string{
		"process.pid": "pid", "process.executable.name": "comm", "thread.id": "tid", "thread.name": "thread", "container.id": "container",
	}[key]; ok {
		key = label
	}
	if n, ok := v.Value.(*commonpb.AnyValue_IntValue); ok {
		s.NumLabel[key] = []int64{n.IntValue}
		if unit != "" {
			s.NumUnit[key] = []string{unit}
		}
		return
	}
	s.Label[key] = []string{v.GetStringValue()}
}

// canonical is what p says, independent of its ids and order: the value of column by
// stack and labels, spelled out, except that long names are shortened to a hash.
func canonical(p *profile.Profile, column int) map[string]int64 {
	locations := map[*profile.Location]string{}
	for _, l := range p.Location {
		text := spell(l)
		if len(text) > 1000 {
			text = fmt.Sprintf("%.200s... %x", text, sha256.Sum256([]byte(text)))
		}
		locations[l] = text
	}
	all := map[string]int64{}
	for _, s := range p.Sample {
		if s.Value[column] == 0 {
			continue
		}
		var b strings.Builder
		for _, l := range s.Location {
			b.WriteString(locations[l] + "\n")
		}
		for _, k := range sortedKeys(s.Label) {
			fmt.Fprintf(&b, "%s=%q\n", k, s.Label[k])
		}
		for _, k := range sortedKeys(s.NumLabel) {
			fmt.Fprintf(&b, "%s=%d %q\n", k, s.NumLabel[k], s.NumUnit[k])
		}
		all[b.String()] += s.Value[column]
	}
	return all
}

func spell(l *profile.Location) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%#x folded=%v", l.Address, l.IsFolded)
	if m := l.Mapping; m != nil {
		fmt.Fprintf(&b, " %#x-%#x@%#x %q %q %v %v %v %v", m.Start, m.Limit, m.Offset, m.File, m.BuildID,
			m.HasFunctions, m.HasFilenames, m.HasLineNumbers, m.HasInlineFrames)
	}
	for _, line := range l.Line {
		f := line.Function
		fmt.Fprintf(&b, " %q %q %q:%d:%d %d", f.Name, f.SystemName, f.Filename, line.Line, line.Column, f.StartLine)
	}
	return b.String()
}
