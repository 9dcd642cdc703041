// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/google/pprof/profile"
)

// WriteFolded writes p as folded text: one stack a line, root first, frames separated by
// semicolons, then a space and the value. The first element is the process's comm; the
// kernel's frames end in "_[k]". sampleIndex picks the value, by the name of its sample
// type or by number; the first is taken where it is empty. Lines are sorted, stacks that
// read the same are one line, and zero values are left out.
func WriteFolded(w io.Writer, p *profile.Profile, sampleIndex string) error {
	index, err := valueIndex(p, sampleIndex)
	if err != nil {
		return err
	}
	values := map[string]int64{}
	var b strings.Builder
	for _, s := range p.Sample {
		b.Reset()
		b.WriteString(foldedFrame(firstLabel(s, "comm", "[unknown]")))
		for _, l := range slices.Backward(s.Location) {
			writeFoldedLocation(&b, l)
		}
		values[b.String()] += s.Value[index]
	}
	stacks := make([]string, 0, len(values))
	for stack, value := range values {
		if value != 0 {
			stacks = append(stacks, stack)
		}
	}
	slices.Sort(stacks)
	out := bufio.NewWriter(w)
	for _, stack := range stacks {
		out.WriteString(stack)
		out.WriteByte(' ')
		out.WriteString(strconv.FormatInt(values[stack], 10))
		out.WriteByte('\n')
	}
	return out.Flush()
}

// valueIndex is the position of a sample type, given by name or number.
func valueIndex(p *profile.Profile, sampleIndex string) (int, error) {
	if sampleIndex == "" {
		sampleIndex = "0"
	}
	var names []string
	for i, t := range p.SampleType {
		if t.Type == sampleIndex {
			return i, nil
		}
		names = append(names, t.Type)
	}
	if i, err := strconv.Atoi(sampleIndex); err == nil && i >= 0 && i < len(names) {
		return i, nil
	}
	return 0, fmt.Errorf("sample_index %q is not one of %s", sampleIndex, strings.Join(names, ", "))
}

func firstLabel(s *profile.Sample, key, otherwise string) string {
	if v := s.Label[key]; len(v) > 0 {
		return v[0]
	}
	return otherwise
}

func writeFoldedLocation(b *strings.Builder, l *profile.Location) {
	suffix := ""
	if l.Mapping != nil && l.Mapping.Start >= kernelHalf {
		suffix = "_[k]"
	}
	if len(l.Line) == 0 {
		name := "[unknown]"
		if l.Mapping != nil && l.Mapping.File != "" {
			// What stackcollapse-perf prints for a frame of which only the file is known.
			name = "[" + strings.Trim(path.Base(l.Mapping.File), "[]") + "]"
		}
		b.WriteByte(';')
		b.WriteString(foldedFrame(name))
		b.WriteString(suffix)
		return
	}
	for _, line := range slices.Backward(l.Line) {
		name := "[unknown]"
		if line.Function != nil {
			name = line.Function.Name
		}
		b.WriteByte(';')
		b.WriteString(foldedFrame(name))
		b.WriteString(suffix)
	}
}

var foldedReplacer = strings.NewReplacer(";", ":", "\n", " ", "\r", " ")

// foldedFrame is a name without what separates frames and lines.
func foldedFrame(name string) string {
	if name == "" {
		return "[unknown]"
	}
	return foldedReplacer.Replace(name)
}
