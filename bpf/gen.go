// SPDX-License-Identifier: Apache-2.0

package bpf

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type hf_sample -type hf_area -type hf_frame -type hf_table -type hf_table_key -type hf_unwind_size -type hf_rule_kind -type hf_saved -type hf_profile -type hf_outcome -type hf_drop -type hf_cause -type hf_state -type hf_counters -type hf_rqlength cpu cpu.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -I. -I/usr/include/x86_64-linux-gnu
