// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	profilespb "go.opentelemetry.io/proto/otlp/profiles/v1development"
	"google.golang.org/protobuf/proto"
)

// checker collects the rules of profiles.proto (v1development, proto 1.11) that a message
// breaks. The names of rules are stable: tests of the checker use them.
type checker struct {
	dict     *profilespb.ProfilesDictionary
	used     map[string]map[int32]bool // by table
	problems []string
}

func (c *checker) fail(rule, format string, args ...any) {
	c.problems = append(c.problems, rule+": "+fmt.Sprintf(format, args...))
}

// conform checks every rule on d.
func conform(d *profilespb.ProfilesData) []string {
	c := &checker{dict: d.GetDictionary(), used: map[string]map[int32]bool{}}
	if c.dict == nil {
		return []string{"dictionary: none"}
	}
	c.zeroes()
	c.duplicates()
	c.references()
	if len(d.ResourceProfiles) == 0 {
		c.fail("resource", "no resource profiles")
	}
	for _, r := range d.ResourceProfiles {
		if !hasAttribute(r.GetResource().GetAttributes(), "service.name") {
			c.fail("resource", "no service.name")
		}
		for _, s := range r.ScopeProfiles {
			if s.GetScope().GetName() == "" {
				c.fail("scope", "no name")
			}
			if len(s.Profiles) == 0 {
				c.fail("scope", "no profiles")
			}
			for _, p := range s.Profiles {
				c.profile(p)
			}
		}
	}
	c.orphans()
	return c.problems
}

func hasAttribute(attributes []*commonpb.KeyValue, key string) bool {
	for _, a := range attributes {
		if a.Key == key && a.Value.GetStringValue() != "" {
			return true
		}
	}
	return false
}

// zeroes: index 0 of every table is the zero value, and present.
func (c *checker) zeroes() {
	zero := func(table string, present bool, m proto.Message) {
		if !present {
			c.fail("zero", "%s is empty", table)
		} else if m != nil && proto.Size(m) != 0 {
			c.fail("zero", "%s[0] is %v", table, m)
		}
	}
	d := c.dict
	zero("string_table", len(d.StringTable) > 0, nil)
	if len(d.StringTable) > 0 && d.StringTable[0] != "" {
		c.fail("zero", "string_table[0] is %q", d.StringTable[0])
	}
	zero("attribute_table", len(d.AttributeTable) > 0, at(d.AttributeTable, 0))
	zero("function_table", len(d.FunctionTable) > 0, at(d.FunctionTable, 0))
	zero("mapping_table", len(d.MappingTable) > 0, at(d.MappingTable, 0))
	zero("location_table", len(d.LocationTable) > 0, at(d.LocationTable, 0))
	zero("stack_table", len(d.StackTable) > 0, at(d.StackTable, 0))
	if len(d.LinkTable) == 0 {
		c.fail("zero", "link_table is empty")
	} else if l := d.LinkTable[0]; !bytes.Equal(l.TraceId, make([]byte, 16)) || !bytes.Equal(l.SpanId, make([]byte, 8)) {
		c.fail("link", "link_table[0] is %v, not 16 and 8 zero bytes", l)
	}
}

func at[M proto.Message](table []M, i int) proto.Message {
	if i < len(table) {
		return table[i]
	}
	return nil
}

// duplicates: no table has a value twice. As each references others by index, and those
// tables have no duplicates, equal encodings are equal values.
func (c *checker) duplicates() {
	seen := map[string]bool{}
	for i, s := range c.dict.StringTable {
		if seen[s] {
			c.fail("duplicate", "string_table[%d] %q", i, s)
		}
		seen[s] = true
		if !utf8.ValidString(s) {
			c.fail("utf8", "string_table[%d] %q", i, s)
		}
	}
	unique(c, "attribute_table", c.dict.AttributeTable)
	unique(c, "function_table", c.dict.FunctionTable)
	unique(c, "mapping_table", c.dict.MappingTable)
	unique(c, "location_table", c.dict.LocationTable)
	unique(c, "stack_table", c.dict.StackTable)
	unique(c, "link_table", c.dict.LinkTable)
}

func unique[M proto.Message](c *checker, table string, items []M) {
	seen := map[string]bool{}
	for i, m := range items {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			c.fail("utf8", "%s[%d]: %v", table, i, err)
		}
		if seen[string(b)] {
			c.fail("duplicate", "%s[%d] %v", table, i, m)
		}
		seen[string(b)] = true
	}
}

// ref notes a reference and tells whether it is valid.
func (c *checker) ref(table string, i int32, length int) bool {
	if i < 0 || int(i) >= length {
		c.fail("index", "%s[%d] of %d", table, i, length)
		return false
	}
	if c.used[table] == nil {
		c.used[table] = map[int32]bool{}
	}
	c.used[table][i] = true
	return true
}

func (c *checker) text(i int32) string {
	if !c.ref("string_table", i, len(c.dict.StringTable)) {
		return ""
	}
	return c.dict.StringTable[i]
}

// references: what the tables themselves refer to, and what they must hold.
func (c *checker) references() {
	d := c.dict
	for i, a := range d.AttributeTable[min(1, len(d.AttributeTable)):] {
		if c.text(a.KeyStrindex) == "" {
			c.fail("attribute", "attribute_table[%d] has no key", i+1)
		}
		if a.Value == nil || a.Value.Value == nil {
			c.fail("attribute", "attribute_table[%d] has no value", i+1)
		}
		c.text(a.UnitStrindex)
	}
	for i, f := range d.FunctionTable[min(1, len(d.FunctionTable)):] {
		if c.text(f.NameStrindex)+c.text(f.SystemNameStrindex)+c.text(f.FilenameStrindex) == "" {
			c.fail("function", "function_table[%d] has no name", i+1)
		}
	}
	for i, m := range d.MappingTable[min(1, len(d.MappingTable)):] {
		c.text(m.FilenameStrindex)
		c.attributes(m.AttributeIndices)
		if m.MemoryLimit < m.MemoryStart {
			c.fail("mapping", "mapping_table[%d] ends before it starts", i+1)
		}
	}
	for i, l := range d.LocationTable[min(1, len(d.LocationTable)):] {
		c.attributes(l.AttributeIndices)
		for _, line := range l.Lines {
			c.ref("function_table", line.FunctionIndex, len(d.FunctionTable))
		}
		if !c.ref("mapping_table", l.MappingIndex, len(d.MappingTable)) {
			continue
		}
		if m := d.MappingTable[l.MappingIndex]; l.Address != 0 && m.MemoryLimit != 0 && (l.Address < m.MemoryStart || l.Address > m.MemoryLimit) {
			c.fail("address", "location_table[%d] at %#x is outside its mapping %#x-%#x", i+1, l.Address, m.MemoryStart, m.MemoryLimit)
		}
	}
	for _, s := range d.StackTable {
		for _, l := range s.LocationIndices {
			c.ref("location_table", l, len(d.LocationTable))
		}
	}
}

// attributes: references are valid, and keys unique.
func (c *checker) attributes(indices []int32) {
	keys := map[string]bool{}
	for _, i := range indices {
		if !c.ref("attribute_table", i, len(c.dict.AttributeTable)) {
			continue
		}
		k := c.text(c.dict.AttributeTable[i].KeyStrindex)
		if i == 0 || keys[k] {
			c.fail("attribute", "key %q of %v is null or there twice", k, indices)
		}
		keys[k] = true
	}
}

func (c *checker) profile(p *profilespb.Profile) {
	if p.SampleType == nil || c.text(p.SampleType.TypeStrindex) == "" || c.text(p.SampleType.UnitStrindex) == "" {
		c.fail("sample_type", "not set")
	}
	if p.PeriodType == nil {
		c.fail("period_type", "not set")
	} else {
		c.text(p.PeriodType.TypeStrindex)
		c.text(p.PeriodType.UnitStrindex)
	}
	if len(p.ProfileId) != 16 || bytes.Equal(p.ProfileId, make([]byte, 16)) {
		c.fail("profile_id", "%x", p.ProfileId)
	}
	if p.TimeUnixNano == 0 || p.DurationNano == 0 {
		c.fail("time", "%d + %d", p.TimeUnixNano, p.DurationNano)
	}
	if (p.OriginalPayloadFormat == "") != (len(p.OriginalPayload) == 0) {
		c.fail("original_payload", "without its format, or the other way round")
	}
	c.attributes(p.AttributeIndices)
	if len(p.Samples) == 0 {
		c.fail("samples", "none")
	}
	identity := map[string]bool{}
	shapes := map[string]bool{}
	for i, s := range p.Samples {
		c.ref("stack_table", s.StackIndex, len(c.dict.StackTable))
		c.ref("link_table", s.LinkIndex, len(c.dict.LinkTable))
		c.attributes(s.AttributeIndices)
		set := map[int32]bool{}
		for _, a := range s.AttributeIndices {
			set[a] = true
		}
		id := fmt.Sprint(s.StackIndex, s.LinkIndex, set) // fmt sorts maps
		if identity[id] {
			c.fail("identity", "sample %d has the stack and attributes of another", i)
		}
		identity[id] = true
		shapes[c.shape(i, s)] = true
		for _, ts := range s.TimestampsUnixNano {
			if ts < p.TimeUnixNano || ts >= p.TimeUnixNano+p.DurationNano {
				c.fail("timestamp", "sample %d: %d is outside the profile", i, ts)
			}
		}
	}
	if len(shapes) > 1 {
		c.fail("shape", "of several kinds: %v", shapes)
	}
}

func (c *checker) shape(i int, s *profilespb.Sample) string {
	switch v, ts := len(s.Values), len(s.TimestampsUnixNano); {
	case v == 0 && ts > 0:
		return "timestamps"
	case v == 1 && ts == 0:
		return "aggregate"
	case v == ts && v > 0:
		return "values and timestamps"
	default:
		c.fail("shape", "sample %d has %d values and %d timestamps", i, v, ts)
		return "invalid"
	}
}

// orphans: everything but index 0 is referred to.
func (c *checker) orphans() {
	d := c.dict
	for table, n := range map[string]int{
		"string_table": len(d.StringTable), "attribute_table": len(d.AttributeTable),
		"function_table": len(d.FunctionTable), "mapping_table": len(d.MappingTable),
		"location_table": len(d.LocationTable), "stack_table": len(d.StackTable), "link_table": len(d.LinkTable),
	} {
		for i := int32(1); int(i) < n; i++ {
			if !c.used[table][i] {
				c.fail("orphan", "%s[%d]", table, i)
			}
		}
	}
}

// TestChecker breaks a good message in one way after the other: a rule that nothing can
// break checks nothing.
func TestChecker(t *testing.T) {
	zero := func(d *profilespb.ProfilesData) *profilespb.Profile {
		return d.ResourceProfiles[0].ScopeProfiles[0].Profiles[0]
	}
	tests := []struct {
		name, rule string
		do         func(d *profilespb.ProfilesData)
	}{
		{"no dictionary", "dictionary", func(d *profilespb.ProfilesData) { d.Dictionary = nil }},
		{"string 0", "zero", func(d *profilespb.ProfilesData) { d.Dictionary.StringTable[0] = "x" }},
		{"stack 0", "zero", func(d *profilespb.ProfilesData) { d.Dictionary.StackTable[0].LocationIndices = []int32{1} }},
		{"no attributes", "zero", func(d *profilespb.ProfilesData) { d.Dictionary.AttributeTable = nil }},
		{"no links", "zero", func(d *profilespb.ProfilesData) { d.Dictionary.LinkTable = nil }},
		{"link 0", "link", func(d *profilespb.ProfilesData) { d.Dictionary.LinkTable[0].TraceId = nil }},
		{"string twice", "duplicate", func(d *profilespb.ProfilesData) {
			d.Dictionary.StringTable = append(d.Dictionary.StringTable, d.Dictionary.StringTable[1])
		}},
		{"location twice", "duplicate", func(d *profilespb.ProfilesData) {
			d.Dictionary.LocationTable = append(d.Dictionary.LocationTable, proto.CloneOf(d.Dictionary.LocationTable[1]))
		}},
		{"unused string", "orphan", func(d *profilespb.ProfilesData) {
			d.Dictionary.StringTable = append(d.Dictionary.StringTable, "nobody")
		}},
		{"unused stack", "orphan", func(d *profilespb.ProfilesData) {
			d.Dictionary.StackTable = append(d.Dictionary.StackTable, &profilespb.Stack{LocationIndices: []int32{1, 1, 1, 1, 1}})
		}},
		{"string not there", "index", func(d *profilespb.ProfilesData) { d.Dictionary.FunctionTable[1].NameStrindex = 1 << 20 }},
		{"negative stack", "index", func(d *profilespb.ProfilesData) { zero(d).Samples[0].StackIndex = -1 }},
		{"link not there", "index", func(d *profilespb.ProfilesData) { zero(d).Samples[0].LinkIndex = 1 }},
		{"function not there", "index", func(d *profilespb.ProfilesData) {
			d.Dictionary.LocationTable[1].Lines = []*profilespb.Line{{FunctionIndex: 1 << 20}}
		}},
		{"not UTF-8", "utf8", func(d *profilespb.ProfilesData) { d.Dictionary.StringTable[1] = "\xff" }},
		{"attribute without value", "attribute", func(d *profilespb.ProfilesData) { d.Dictionary.AttributeTable[1].Value = nil }},
		{"attribute without key", "attribute", func(d *profilespb.ProfilesData) { d.Dictionary.AttributeTable[1].KeyStrindex = 0 }},
		{"attribute twice", "attribute", func(d *profilespb.ProfilesData) {
			s := zero(d).Samples[0]
			s.AttributeIndices = append(s.AttributeIndices, s.AttributeIndices[0])
		}},
		{"function without a name", "function", func(d *profilespb.ProfilesData) {
			d.Dictionary.FunctionTable[1] = &profilespb.Function{StartLine: 9}
		}},
		{"mapping backwards", "mapping", func(d *profilespb.ProfilesData) { d.Dictionary.MappingTable[1].MemoryLimit = 1 }},
		{"address outside", "address", func(d *profilespb.ProfilesData) { d.Dictionary.LocationTable[1].Address = 1 }},
		{"no sample type", "sample_type", func(d *profilespb.ProfilesData) { zero(d).SampleType = nil }},
		{"no period type", "period_type", func(d *profilespb.ProfilesData) { zero(d).PeriodType = nil }},
		{"short id", "profile_id", func(d *profilespb.ProfilesData) { zero(d).ProfileId = make([]byte, 8) }},
		{"no duration", "time", func(d *profilespb.ProfilesData) { zero(d).DurationNano = 0 }},
		{"payload without format", "original_payload", func(d *profilespb.ProfilesData) { zero(d).OriginalPayload = []byte("x") }},
		{"no samples", "samples", func(d *profilespb.ProfilesData) { zero(d).Samples = nil }},
		{"sample twice", "identity", func(d *profilespb.ProfilesData) {
			zero(d).Samples = append(zero(d).Samples, proto.CloneOf(zero(d).Samples[0]))
		}},
		{"no value", "shape", func(d *profilespb.ProfilesData) { zero(d).Samples[0].Values = nil }},
		{"two shapes", "shape", func(d *profilespb.ProfilesData) {
			zero(d).Samples[0].TimestampsUnixNano = []uint64{zero(d).TimeUnixNano}
		}},
		{"timestamp too late", "timestamp", func(d *profilespb.ProfilesData) {
			zero(d).Samples[0].TimestampsUnixNano = []uint64{zero(d).TimeUnixNano + zero(d).DurationNano}
		}},
		{"no service name", "resource", func(d *profilespb.ProfilesData) { d.ResourceProfiles[0].Resource = nil }},
		{"no resource", "resource", func(d *profilespb.ProfilesData) { d.ResourceProfiles = nil }},
		{"no scope", "scope", func(d *profilespb.ProfilesData) { d.ResourceProfiles[0].ScopeProfiles[0].Scope = nil }},
	}
	good := mustConvert(t, hostProfile(), maxMessage)[0]
	if problems := conform(good); problems != nil {
		t.Fatalf("the good message is not: %s", strings.Join(problems, "\n"))
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			d := proto.CloneOf(good)
			test.do(d)
			var rules []string
			for _, p := range conform(d) {
				rule, _, _ := strings.Cut(p, ":")
				rules = append(rules, rule)
			}
			if !strings.Contains(strings.Join(rules, " "), test.rule) {
				t.Errorf("rules broken: %v, want %s", rules, test.rule)
			}
		})
	}
}
