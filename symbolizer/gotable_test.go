// SPDX-License-Identifier: Apache-2.0

package symbolizer

const goSource = `package main

import (
	"fmt"
	"os"
	"sort"
	"strings"
)

type tree[K comparable, V any] struct{ m map[K]V }

//go:noinline
func (t *tree[K, V]) put(k K, v V) { t.m[k] = v }

func inner(i int) int {
	if i%7 == 0 {
		return len(os.Args) * i
	}
	return i / 3
}

func middle(i int) int { return inner(i)*3 + inner(i+1) }

//go:noinline
func hot(n int) (s int) {
	for i := 0; i < n; i++ {
		s += middle(i)
	}
	return s
}

func main() {
	t := tree[string, int]{m: map[string]int{}}
	t.put(strings.Repeat("x", 3), hot(1000))
	f := func() int { return hot(3) + 1 }
	a := []int{f(), 2, 1}
	sort.Slice(a, func(i, j int) bool { return a[i] < a[j] })
	fmt.Println(t.m, a)
}
`
