// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"encoding/binary"
	"slices"
	"strings"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	profilespb "go.opentelemetry.io/proto/otlp/profiles/v1development"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// table is one table of a dictionary: every value once, the zero value at index 0.
type table[K comparable, V any] struct {
	index map[K]int32
	keys  []K
	items []V
}

func newTable[K comparable, V any](zero V) table[K, V] {
	var k K
	return table[K, V]{index: map[K]int32{k: 0}, keys: []K{k}, items: []V{zero}}
}

// add appends item, which find did not find, and returns its index.
func (t *table[K, V]) add(k K, item V) int32 {
	i := int32(len(t.items))
	t.index[k] = i
	t.keys = append(t.keys, k)
	t.items = append(t.items, item)
	return i
}

// truncate removes all but the first n items.
func (t *table[K, V]) truncate(n int) {
	for _, k := range t.keys[n:] {
		delete(t.index, k)
	}
	t.keys = t.keys[:n]
	t.items = t.items[:n]
}

// Keys are what makes a value of a table the same as another. They hold indices of
// values that are in their tables already, so that equal means equal recursively.
type (
	attributeKey struct {
		key, unit int32
		kind      valueKind
		text      string
		number    int64
	}
	functionKey struct {
		name, systemName, file int32
		startLine              int64
	}
	// Locations, mappings and stacks have lists in them: their key is the encoded list.
	listKey string
)

type valueKind uint8

const (
	kindString valueKind = iota + 1
	kindInt
	kindTrue
	kindLines // an array of strings: the lines of text
)

// dictionary builds the tables of one message and knows how large they are when encoded.
type dictionary struct {
	strings    table[string, string]
	attributes table[attributeKey, *profilespb.KeyValueAndUnit]
	functions  table[functionKey, *profilespb.Function]
	mappings   table[listKey, *profilespb.Mapping]
	locations  table[listKey, *profilespb.Location]
	stacks     table[listKey, *profilespb.Stack]

	size    int // of all items, encoded, with their tags and lengths
	scratch []byte
}

func newDictionary() *dictionary {
	d := &dictionary{
		strings:    newTable[string](""),
		attributes: newTable[attributeKey](&profilespb.KeyValueAndUnit{}),
		functions:  newTable[functionKey](&profilespb.Function{}),
		mappings:   newTable[listKey](&profilespb.Mapping{}),
		locations:  newTable[listKey](&profilespb.Location{}),
		stacks:     newTable[listKey](&profilespb.Stack{}),
		scratch:    make([]byte, 0, 1024),
	}
	d.size = proto.Size(d.message())
	return d
}

// message is the dictionary as it is now; it shares the tables.
func (d *dictionary) message() *profilespb.ProfilesDictionary {
	return &profilespb.ProfilesDictionary{
		StringTable:    d.strings.items,
		AttributeTable: d.attributes.items,
		FunctionTable:  d.functions.items,
		MappingTable:   d.mappings.items,
		LocationTable:  d.locations.items,
		StackTable:     d.stacks.items,
		LinkTable:      []*profilespb.Link{{TraceId: make([]byte, 16), SpanId: make([]byte, 8)}},
	}
}

// mark is a state of a dictionary that it can go back to.
type mark struct {
	strings, attributes, functions, mappings, locations, stacks, size int
}

func (d *dictionary) mark() mark {
	return mark{
		len(d.strings.items), len(d.attributes.items), len(d.functions.items),
		len(d.mappings.items), len(d.locations.items), len(d.stacks.items), d.size,
	}
}

func (d *dictionary) rollback(m mark) {
	d.strings.truncate(m.strings)
	d.attributes.truncate(m.attributes)
	d.functions.truncate(m.functions)
	d.mappings.truncate(m.mappings)
	d.locations.truncate(m.locations)
	d.stacks.truncate(m.stacks)
	d.size = m.size
}

// fieldSize is the encoded size of n bytes as a field, whose number is below 16.
func fieldSize(n int) int { return 1 + protowire.SizeBytes(n) }

// text returns the index of s, in which bytes that are not UTF-8 (comms and symbol names
// are just bytes) become U+FFFD: protobuf strings must be UTF-8.
func (d *dictionary) text(s string) int32 {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if i, ok := d.strings.index[s]; ok {
		return i
	}
	d.size += fieldSize(len(s))
	return d.strings.add(s, s)
}

// attribute returns the attribute with this key, unit and value, which are in k but for
// the names.
func (d *dictionary) attribute(name, unit string, k attributeKey) int32 {
	k.key, k.unit = d.text(name), d.text(unit)
	k.text = strings.ToValidUTF8(k.text, "\uFFFD")
	if i, ok := d.attributes.index[k]; ok {
		return i
	}
	m := &profilespb.KeyValueAndUnit{KeyStrindex: k.key, UnitStrindex: k.unit, Value: k.value()}
	d.size += fieldSize(proto.Size(m))
	return d.attributes.add(k, m)
}

func (k attributeKey) value() *commonpb.AnyValue {
	switch k.kind {
	case kindInt:
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: k.number}}
	case kindTrue:
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_BoolValue{BoolValue: true}}
	case kindLines:
		list := new(commonpb.ArrayValue)
		for line := range strings.SplitSeq(k.text, "\n") {
			list.Values = append(list.Values, stringValue(line))
		}
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_ArrayValue{ArrayValue: list}}
	}
	return stringValue(k.text)
}

func (d *dictionary) stringAttribute(name, value string) int32 {
	return d.attribute(name, "", attributeKey{kind: kindString, text: value})
}

func (d *dictionary) intAttribute(name, unit string, value int64) int32 {
	return d.attribute(name, unit, attributeKey{kind: kindInt, number: value})
}

// flag returns the attribute name=true.
func (d *dictionary) flag(name string) int32 {
	return d.attribute(name, "", attributeKey{kind: kindTrue})
}

// hasKey tells whether one of the attributes has this name.
func (d *dictionary) hasKey(attributes []int32, name string) bool {
	name = strings.ToValidUTF8(name, "\uFFFD")
	for _, i := range attributes {
		if d.strings.items[d.attributes.items[i].KeyStrindex] == name {
			return true
		}
	}
	return false
}

// linesAttribute returns the attribute whose value is an array of lines.
func (d *dictionary) linesAttribute(name string, lines []string) int32 {
	return d.attribute(name, "", attributeKey{kind: kindLines, text: strings.Join(lines, "\n")})
}

// function returns 0 for a function without any name.
func (d *dictionary) function(name, systemName, file string, startLine int64) int32 {
	if name == "" && systemName == "" && file == "" {
		return 0
	}
	k := functionKey{d.text(name), d.text(systemName), d.text(file), startLine}
	if i, ok := d.functions.index[k]; ok {
		return i
	}
	m := &profilespb.Function{
		NameStrindex: k.name, SystemNameStrindex: k.systemName, FilenameStrindex: k.file, StartLine: startLine,
	}
	d.size += fieldSize(proto.Size(m))
	return d.functions.add(k, m)
}

func (d *dictionary) mapping(m *profilespb.Mapping) int32 {
	k := d.list(m.MemoryStart, m.MemoryLimit, m.FileOffset, uint64(m.FilenameStrindex))
	k = appendIndices(k, m.AttributeIndices)
	if i, ok := d.mappings.index[listKey(k)]; ok {
		return i
	}
	n := proto.Size(m)
	if n == 0 {
		return 0 // nothing is known: that is what index 0 says
	}
	d.size += fieldSize(n)
	return d.mappings.add(listKey(k), m)
}

func (d *dictionary) location(m *profilespb.Location) int32 {
	k := d.list(uint64(m.MappingIndex), m.Address, uint64(len(m.Lines)))
	for _, l := range m.Lines {
		k = binary.AppendUvarint(k, uint64(l.FunctionIndex))
		k = binary.AppendUvarint(k, uint64(l.Line))
		k = binary.AppendUvarint(k, uint64(l.Column))
	}
	k = appendIndices(k, m.AttributeIndices)
	if i, ok := d.locations.index[listKey(k)]; ok {
		return i
	}
	n := proto.Size(m)
	if n == 0 {
		return 0 // nothing is known: that is what index 0 says
	}
	d.size += fieldSize(n)
	return d.locations.add(listKey(k), m)
}

// stack returns the stack of locations, leaf first. It does not keep the slice; no
// locations are stack 0.
func (d *dictionary) stack(locations []int32) int32 {
	k := appendIndices(d.list(), locations)
	if i, ok := d.stacks.index[listKey(k)]; ok {
		return i
	}
	m := &profilespb.Stack{LocationIndices: slices.Clone(locations)}
	d.size += fieldSize(proto.Size(m))
	return d.stacks.add(listKey(k), m)
}

// list begins a key in a buffer that the next key will use again.
func (d *dictionary) list(values ...uint64) []byte {
	d.scratch = d.scratch[:0]
	for _, v := range values {
		d.scratch = binary.AppendUvarint(d.scratch, v)
	}
	return d.scratch
}

func appendIndices(b []byte, indices []int32) []byte {
	for _, i := range indices {
		b = binary.AppendUvarint(b, uint64(i))
	}
	return b
}
