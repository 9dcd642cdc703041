// SPDX-License-Identifier: Apache-2.0

// Gostacks burns CPU on the kinds of stacks that Go has: `gostacks SECONDS`. Known
// stacks, below runtime.goexit > main.worker:
//
//	main.called > main.(*shape).visit > main.called.func1 > main.leafGo
//	main.deep (20 times) > main.leafDeep
//	main.panics > main.panicking > ... > main.panics.func1 > main.leafDefer
//	main.grows > ... (the allocator and, now and then, the stack of the thread)
//
// and where cgo is there:
//
//	main.callC > ... > c_outer > c_inner > leaf_c
//	main.callBack > ... > c_back > c_back_inner > ... > main.goCallback > main.leafCallback
package main

import (
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

var sink atomic.Uint64

// One leaf a kind. The factors differ, so that the linker does not fold them.

//go:noinline
func leafGo(n uint64) uint64 {
	for i := n; i > 0; i-- {
		n = n*6364136223846793005 + 1
	}
	return n
}

//go:noinline
func leafDeep(n uint64) uint64 {
	for i := n; i > 0; i-- {
		n = n*2862933555777941757 + 1
	}
	return n
}

//go:noinline
func leafDefer(n uint64) uint64 {
	for i := n; i > 0; i-- {
		n = n*3935559000370003845 + 1
	}
	return n
}

type visitor interface {
	visit(func(uint64) uint64) uint64
}

type shape struct{ n uint64 }

//go:noinline
func (s *shape) visit(f func(uint64) uint64) uint64 { return f(s.n) + 1 }

//go:noinline
func called(v visitor, n uint64) uint64 {
	return v.visit(func(m uint64) uint64 { return leafGo(m+n) + n }) + 1
}

//go:noinline
func deep(level int, n uint64) uint64 {
	var local [16]uint64
	local[n%16] = n
	if level == 1 {
		n = leafDeep(n)
	} else {
		n = deep(level-1, n)
	}
	return n + local[n%16]
}

//go:noinline
func panicking(n uint64) { panic(n) }

//go:noinline
func panics(n uint64) (result uint64) {
	defer func() {
		recover()
		result = leafDefer(n) + 1
	}()
	panicking(n)
	return 0
}

// grows keeps the allocator and the garbage collector busy.
//
//go:noinline
func grows(n int) (result uint64) {
	var all [][]byte
	for i := range n {
		all = append(all, make([]byte, 100+i%5000))
	}
	return uint64(len(all[n/2]))
}

func worker(end time.Time, done *sync.WaitGroup) {
	defer done.Done()
	var total uint64
	for n := uint64(0); time.Now().Before(end); n++ {
		total += called(&shape{50000}, n%100)
		total += deep(20, 50000+n%100)
		total += panics(50000 + n%100)
		total += grows(500)
		total += foreign(50000 + n%100)
	}
	sink.Add(total)
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: gostacks SECONDS")
		os.Exit(2)
	}
	seconds, err := strconv.ParseFloat(os.Args[1], 64)
	if err != nil {
		fmt.Fprintln(os.Stderr, "gostacks:", err)
		os.Exit(2)
	}
	fmt.Println("ready")
	end := time.Now().Add(time.Duration(seconds * float64(time.Second)))
	var done sync.WaitGroup
	for range 3 {
		done.Add(1)
		go worker(end, &done)
	}
	done.Wait()
	fmt.Println("sum", sink.Load())
}
