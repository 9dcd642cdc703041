// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/pprof/profile"
	"go.opentelemetry.io/otel/sdk/resource"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	profilespb "go.opentelemetry.io/proto/otlp/profiles/v1development"
	"google.golang.org/protobuf/proto"

	"github.com/hostflame/hostflame/internal/buildinfo"
)

// maxMessage is what a gRPC server takes by default, counted before compression.
const maxMessage = 4 << 20

// scopeName is also what some backends make the profile's name of.
const scopeName = "hostflame"

// errNoShape is returned for a profile of which nothing is sent.
var errNoShape = errors.New("no sample type that is sent by OTLP")

// converted is what a profile became.
type converted struct {
	messages [][]byte // encoded ExportProfilesServiceRequests
	tooLarge int      // samples left out because one alone fills a message
}

// convert encodes p as requests of at most limit bytes, each complete in itself: with its
// own dictionary, and a part of the samples. A profile without samples makes no request.
//
// Samples that differ in nothing that is sent are added up, since stack and attributes
// are a sample's identity. p is only read.
func convert(p *profile.Profile, r *resource.Resource, limit int) (converted, error) {
	var out converted
	c := &converter{profile: p, columns: columns(p), resource: r, limit: limit}
	if len(c.columns) == 0 {
		return out, errNoShape
	}
	c.findGo()
	c.begin()
	flush := func() error {
		if c.samples == 0 {
			return nil
		}
		b, err := proto.Marshal(c.message())
		if err != nil {
			return fmt.Errorf("encode OTLP profile: %w", err)
		}
		out.messages = append(out.messages, b)
		return nil
	}
	for _, s := range p.Sample {
		if c.add(s) {
			continue
		}
		if err := flush(); err != nil {
			return out, err
		}
		c.begin()
		if !c.add(s) {
			out.tooLarge++
			c.begin()
		}
	}
	return out, flush()
}

// converter builds one message after the other.
type converter struct {
	profile  *profile.Profile
	columns  []column
	resource *resource.Resource
	limit    int
	goCode   map[*profile.Mapping]bool // mappings with Go functions

	// Of the message that is being built:
	dict     *dictionary
	profiles []*profilespb.Profile // by column, nil until it has a sample
	known    []map[listKey]int     // by column: index in Samples by stack and attributes
	size     int                   // of all but the dictionary
	samples  int

	// What is in the tables already, by pprof's pointers: saves looking it up by value.
	mappings   map[*profile.Mapping]int32
	functions  map[*profile.Function]int32
	locations  map[*profile.Location]int32
	frameTypes map[string][]int32

	// Buffers.
	stack    []int32
	labels   []string
	identity []byte
	changes  []change
}

// begin starts a message.
func (c *converter) begin() {
	c.dict = newDictionary()
	c.profiles = make([]*profilespb.Profile, len(c.columns))
	c.known = make([]map[listKey]int, len(c.columns))
	for i := range c.known {
		c.known[i] = map[listKey]int{}
	}
	c.samples = 0
	c.mappings = map[*profile.Mapping]int32{}
	c.functions = map[*profile.Function]int32{}
	c.locations = map[*profile.Location]int32{}
	c.frameTypes = map[string][]int32{}
	c.size = proto.Size(c.message()) - proto.Size(c.dict.message()) + nesting
}

// nesting is how much the lengths of the messages around the tables and samples can grow
// as these fill: dictionary, resource profiles and scope profiles.
const nesting = 3 * 4

// profileGrowth is the same of a profile, with the count of dropped attributes.
const profileGrowth = 4 + 6

// change is a sample to be put at an index of a column's profile.
type change struct {
	column  int
	profile *profilespb.Profile
	at      int
	sample  *profilespb.Sample
}

// add adds s to every profile in which it has a value. It returns false when the message
// would become larger than the limit; the message is then as it was, and begin must follow.
func (c *converter) add(s *profile.Sample) bool {
	if !slices.ContainsFunc(c.columns, func(col column) bool { return col.value(s) != 0 }) {
		return true
	}
	before, size := c.dict.mark(), c.size
	stack := c.stackOf(s)
	attributes, dropped := c.attributesOf(s)
	c.identity = appendIndices(binary.AppendUvarint(c.identity[:0], uint64(stack)), attributes)
	c.changes = c.changes[:0]
	for i, col := range c.columns {
		value := col.value(s)
		if value == 0 {
			continue
		}
		p := c.profiles[i]
		if p == nil {
			p = c.newProfile(col)
			size += fieldSize(proto.Size(p)) + profileGrowth
		}
		at, same := c.known[i][listKey(c.identity)]
		if same {
			value += p.Samples[at].Values[0]
			size -= fieldSize(proto.Size(p.Samples[at]))
		} else {
			at = len(p.Samples)
		}
		m := &profilespb.Sample{StackIndex: stack, AttributeIndices: attributes, Values: []int64{value}}
		size += fieldSize(proto.Size(m))
		c.changes = append(c.changes, change{i, p, at, m})
	}
	if c.dict.size+size > c.limit {
		c.dict.rollback(before)
		return false
	}
	for _, ch := range c.changes {
		c.profiles[ch.column] = ch.profile
		ch.profile.DroppedAttributesCount += uint32(dropped)
		if ch.at < len(ch.profile.Samples) {
			ch.profile.Samples[ch.at] = ch.sample
			continue
		}
		ch.profile.Samples = append(ch.profile.Samples, ch.sample)
		c.known[ch.column][listKey(c.identity)] = ch.at
	}
	c.size = size
	c.samples++
	return true
}

// newProfile is an empty profile of one column. Its id is that of this message's part:
// the parts of a window are profiles of their own.
func (c *converter) newProfile(col column) *profilespb.Profile {
	id := make([]byte, 16)
	rand.Read(id) // never fails
	p := &profilespb.Profile{
		SampleType:   c.valueType(col.sample),
		PeriodType:   c.valueType(col.period),
		Period:       col.periodOf(c.profile),
		TimeUnixNano: uint64(c.profile.TimeNanos),
		DurationNano: uint64(c.profile.DurationNanos),
		ProfileId:    id,
	}
	if len(c.profile.Comments) > 0 {
		p.AttributeIndices = []int32{c.dict.linesAttribute(key(semconv.PprofProfileCommentKey), c.profile.Comments)}
	}
	return p
}

func (c *converter) valueType(v valueType) *profilespb.ValueType {
	return &profilespb.ValueType{TypeStrindex: c.dict.text(v.name), UnitStrindex: c.dict.text(v.unit)}
}

// message is the request as it is now: a ProfilesData has the same encoding.
func (c *converter) message() *profilespb.ProfilesData {
	return &profilespb.ProfilesData{
		ResourceProfiles: []*profilespb.ResourceProfiles{{
			Resource:  resourceMessage(c.resource),
			SchemaUrl: c.resource.SchemaURL(),
			ScopeProfiles: []*profilespb.ScopeProfiles{{
				Scope:     &commonpb.InstrumentationScope{Name: scopeName, Version: buildinfo.Read().Version},
				SchemaUrl: semconv.SchemaURL,
				Profiles:  slices.DeleteFunc(slices.Clone(c.profiles), func(p *profilespb.Profile) bool { return p == nil }),
			}},
		}},
		Dictionary: c.dict.message(),
	}
}

// stackOf puts the stack of s into the dictionary.
func (c *converter) stackOf(s *profile.Sample) int32 {
	c.stack = c.stack[:0]
	for _, l := range s.Location { // leaf first in pprof too
		c.stack = append(c.stack, c.location(l))
	}
	return c.dict.stack(c.stack)
}

// attributesOf puts the labels of s into the dictionary, in the order of their names.
// An attribute has one value: of labels with several the first is kept, and how many were
// not is returned.
func (c *converter) attributesOf(s *profile.Sample) (indices []int32, dropped int) {
	indices = make([]int32, 0, len(s.Label)+len(s.NumLabel))
	c.labels = slices.AppendSeq(c.labels[:0], maps.Keys(s.Label))
	slices.Sort(c.labels)
	for _, label := range c.labels {
		values := s.Label[label]
		if len(values) == 0 {
			continue
		}
		dropped += len(values) - 1
		name := attributeName(label, values[0])
		if name == "" || c.dict.hasKey(indices, name) {
			dropped++
			continue
		}
		indices = append(indices, c.dict.stringAttribute(name, values[0]))
	}
	c.labels = slices.AppendSeq(c.labels[:0], maps.Keys(s.NumLabel))
	slices.Sort(c.labels)
	for _, label := range c.labels {
		values, unit := s.NumLabel[label], ""
		if len(values) == 0 {
			continue
		}
		dropped += len(values) - 1
		name := attributeName(label, "")
		if name == "" || c.dict.hasKey(indices, name) {
			dropped++
			continue
		}
		if units := s.NumUnit[label]; len(units) > 0 {
			unit = units[0]
		}
		indices = append(indices, c.dict.intAttribute(name, unit, values[0]))
	}
	return indices, dropped
}

// attributeName is the semantic convention's name of a pprof label, or the label itself
// where there is none; empty for what is not sent. "container" is container.id only if it is one: elsewhere it holds
// a systemd unit or a cgroup path.
func attributeName(label, value string) string {
	switch label {
	case "pid":
		return key(semconv.ProcessPIDKey)
	case "comm":
		return key(semconv.ProcessExecutableNameKey)
	case "tid":
		return key(semconv.ThreadIDKey)
	case "thread":
		return key(semconv.ThreadNameKey)
	case "queue_ns", "device_ns":
		return "" // nearly each sample has others, and they are values of their own (shapes)
	case "container":
		if isContainerID(value) {
			return key(semconv.ContainerIDKey)
		}
	}
	return label
}

// isContainerID tells whether s is the 12 hex digits that a container is called by.
func isContainerID(s string) bool {
	return len(s) == 12 && isHex(s)
}

func isHex(s string) bool {
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
