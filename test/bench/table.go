// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// table prints a Markdown table with aligned columns.
type table struct {
	header []string
	rows   [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

func (t *table) print(w io.Writer) {
	width := make([]int, len(t.header))
	for _, row := range append([][]string{t.header}, t.rows...) {
		for i, cell := range row {
			width[i] = max(width[i], len([]rune(cell)))
		}
	}
	line := func(row []string) {
		for i, cell := range row {
			fmt.Fprintf(w, "| %s%s ", cell, strings.Repeat(" ", width[i]-len([]rune(cell))))
		}
		fmt.Fprintln(w, "|")
	}
	line(t.header)
	for _, n := range width {
		fmt.Fprintf(w, "|%s", strings.Repeat("-", n+2))
	}
	fmt.Fprintln(w, "|")
	for _, row := range t.rows {
		line(row)
	}
}

// quantile of sorted values, between neighbours by their distance.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	at := q * float64(len(sorted)-1)
	low := int(at)
	if low+1 == len(sorted) {
		return sorted[low]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}

// spread is the five numbers of a set of rounds.
type spread struct{ min, q1, median, q3, max float64 }

func spreadOf(values []float64) spread {
	s := slices.Sorted(slices.Values(values))
	return spread{quantile(s, 0), quantile(s, 0.25), quantile(s, 0.5), quantile(s, 0.75), quantile(s, 1)}
}

// medianInterval formats the median of values and the interval that has the median of what
// they are drawn from with a certainty of at least 95 %, whatever its distribution: between
// two of the sorted values that are as far from the ends, the number of values below the
// median being binomial. Fewer than six values have no such interval: then it is all of them.
func medianInterval(values []float64, format string) (median, interval string) {
	s := slices.Sorted(slices.Values(values))
	outside := math.Pow(0.5, float64(len(s))) // P(no value is below the median)
	below, skip := outside, 0
	for i := 1; i < len(s)/2; i++ {
		outside *= float64(len(s)-i+1) / float64(i)
		if below += outside; below > 0.025 {
			break
		}
		skip = i
	}
	return fmt.Sprintf(format, quantile(s, 0.5)),
		fmt.Sprintf(format+" to "+format, quantile(s[skip:], 0), quantile(s[:len(s)-skip], 1))
}
