// SPDX-License-Identifier: Apache-2.0

package bpf

// redZone is what functions may use below the stack pointer (x86-64 psABI, 3.2.2): it is in
// copies of stacks too.
const redZone = 128
