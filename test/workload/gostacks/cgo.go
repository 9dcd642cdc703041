// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package main

/*
#cgo CFLAGS: -O2 -fomit-frame-pointer
#include <stdint.h>
uint64_t c_outer(uint64_t n);
uint64_t c_back(uint64_t n);
*/
import "C"

//go:noinline
func leafCallback(n uint64) uint64 {
	for i := n; i > 0; i-- {
		n = n*1181783497276652981 + 1
	}
	return n
}

//export goCallback
func goCallback(n C.uint64_t) C.uint64_t { return C.uint64_t(leafCallback(uint64(n)) + 1) }

//go:noinline
func callC(n uint64) uint64 { return uint64(C.c_outer(C.uint64_t(n))) + 1 }

//go:noinline
func callBack(n uint64) uint64 { return uint64(C.c_back(C.uint64_t(n))) + 1 }

func foreign(n uint64) uint64 { return callC(n) + callBack(n) }
