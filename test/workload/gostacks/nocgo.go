// SPDX-License-Identifier: Apache-2.0

//go:build !cgo

package main

func foreign(n uint64) uint64 { return n }
