// SPDX-License-Identifier: Apache-2.0

package bpf

// redZone is what functions may use below the stack pointer: nothing.
const redZone = 0
