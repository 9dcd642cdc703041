// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"path"
	"strings"

	"github.com/google/pprof/profile"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	profilespb "go.opentelemetry.io/proto/otlp/profiles/v1development"
)

// location puts l into the dictionary. Inlined functions are lines of their own, the
// innermost first, as in pprof.
func (c *converter) location(l *profile.Location) int32 {
	if i, ok := c.locations[l]; ok {
		return i
	}
	m := &profilespb.Location{MappingIndex: c.mapping(l.Mapping), Address: l.Address}
	for _, line := range l.Line {
		m.Lines = append(m.Lines, &profilespb.Line{FunctionIndex: c.function(line.Function), Line: line.Line, Column: line.Column})
	}
	if t := c.frameType(l); t != "" {
		if c.frameTypes[t] == nil {
			c.frameTypes[t] = []int32{c.dict.stringAttribute(key(semconv.ProfileFrameTypeKey), t)}
		}
		m.AttributeIndices = c.frameTypes[t] // shared by locations: has no room to append to
	}
	if l.IsFolded {
		m.AttributeIndices = append(m.AttributeIndices, c.dict.flag(key(semconv.PprofLocationIsFoldedKey)))
	}
	i := c.dict.location(m)
	c.locations[l] = i
	return i
}

func (c *converter) function(f *profile.Function) int32 {
	if f == nil {
		return 0
	}
	i, ok := c.functions[f]
	if !ok {
		i = c.dict.function(f.Name, f.SystemName, f.Filename, f.StartLine)
		c.functions[f] = i
	}
	return i
}

func (c *converter) mapping(p *profile.Mapping) int32 {
	if p == nil {
		return 0
	}
	if i, ok := c.mappings[p]; ok {
		return i
	}
	m := &profilespb.Mapping{
		MemoryStart: p.Start, MemoryLimit: p.Limit, FileOffset: p.Offset,
		FilenameStrindex: c.dict.text(p.File),
	}
	switch {
	case p.BuildID == "":
	case isHex(p.BuildID):
		m.AttributeIndices = append(m.AttributeIndices, c.dict.stringAttribute(key(semconv.ProcessExecutableBuildIDGNUKey), p.BuildID))
	default: // Go's has slashes in it
		m.AttributeIndices = append(m.AttributeIndices, c.dict.stringAttribute(key(semconv.ProcessExecutableBuildIDGoKey), p.BuildID))
	}
	for _, f := range mappingFlags {
		if f.get(p) {
			m.AttributeIndices = append(m.AttributeIndices, c.dict.flag(f.name))
		}
	}
	i := c.dict.mapping(m)
	c.mappings[p] = i
	return i
}

// mappingFlags say what has been resolved already, so that a backend need not try again.
var mappingFlags = []struct {
	name string
	get  func(*profile.Mapping) bool
}{
	{key(semconv.PprofMappingHasFunctionsKey), func(m *profile.Mapping) bool { return m.HasFunctions }},
	{key(semconv.PprofMappingHasFilenamesKey), func(m *profile.Mapping) bool { return m.HasFilenames }},
	{key(semconv.PprofMappingHasLineNumbersKey), func(m *profile.Mapping) bool { return m.HasLineNumbers }},
	{key(semconv.PprofMappingHasInlineFramesKey), func(m *profile.Mapping) bool { return m.HasInlineFrames }},
}

// findGo finds the mappings with Go functions in them.
func (c *converter) findGo() {
	c.goCode = map[*profile.Mapping]bool{}
	for _, l := range c.profile.Location {
		for _, line := range l.Line {
			if l.Mapping != nil && line.Function != nil && path.Ext(line.Function.Filename) == ".go" {
				c.goCode[l.Mapping] = true
			}
		}
	}
}

// frameType says what made the code at l: "kernel", "go" or "native", or "" where that
// is not known: code that belongs to no file (a JIT compiler's), and the frames that stand
// for something else than code, such as "[truncated]".
func (c *converter) frameType(l *profile.Location) string {
	m := l.Mapping
	switch {
	case m == nil || m.File == "" || strings.HasPrefix(m.File, "[anon"):
		return ""
	case m.Start >= kernelHalf: // kernel, modules and BPF programs, a mapping each
		return semconv.ProfileFrameTypeKernel.Value.AsString()
	case c.goCode[m] && isGo(l):
		return semconv.ProfileFrameTypeGo.Value.AsString()
	}
	return semconv.ProfileFrameTypeNative.Value.AsString()
}

// kernelHalf is where the kernel's half of the address space begins.
const kernelHalf = 1 << 63

// isGo tells whether l, in a mapping with Go functions, is Go or Go's assembly. What cgo
// compiled comes from .c and .S files.
func isGo(l *profile.Location) bool {
	for _, line := range l.Line {
		if f := line.Function; f != nil {
			if ext := path.Ext(f.Filename); ext == ".go" || ext == ".s" {
				return true
			}
		}
	}
	return false
}
