// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// rawBTF encodes types, with some of all kinds before them.
func rawBTF(t testing.TB, types ...btf.Type) []byte {
	t.Helper()
	u32 := &btf.Int{Name: "u32", Size: 4}
	u64 := &btf.Enum{Name: "wide", Size: 8, Values: []btf.EnumValue{{Name: "WIDE", Value: 1 << 40}}}
	pair := []btf.Member{{Name: "a", Type: u32}, {Name: "b", Type: u64, Offset: 64}}
	proto := &btf.FuncProto{Return: u32, Params: []btf.FuncParam{{Name: "x", Type: u32}, {Name: "y", Type: u64}}}
	global := &btf.Var{Name: "global", Type: u32, Linkage: btf.GlobalVar}
	all := append([]btf.Type{
		u32, u64, proto, global,
		&btf.Struct{Name: "s", Size: 16, Members: pair, Tags: []string{"tag"}},
		&btf.Union{Name: "u", Size: 16, Members: pair},
		&btf.Array{Type: u32, Index: u32, Nelems: 3},
		&btf.Pointer{Target: u32},
		&btf.Float{Name: "double", Size: 8},
		&btf.Func{Name: "f", Type: proto},
		&btf.Datasec{Name: ".data", Size: 4, Vars: []btf.VarSecinfo{{Type: global, Size: 4}}},
		&btf.Enum{Size: 4, Values: []btf.EnumValue{{Name: "OTHER", Value: 3}}},
		&btf.Fwd{Name: "later"},
	}, types...)
	b, err := btf.NewBuilder(all, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestRequestFlags(t *testing.T) {
	enum := func(name string) *btf.Enum {
		return &btf.Enum{Name: name, Size: 4, Values: []btf.EnumValue{
			{Name: "__RQF_STARTED", Value: 0}, {Name: "__RQF_FLUSH_SEQ", Value: 1}, {Name: "__RQF_IO_STAT", Value: 8}}}
	}
	for _, tt := range []struct {
		name  string
		types []btf.Type
		want  requestFlags
	}{
		{"#defines", nil, requestFlags{1 << 4, 1 << 13}},
		{"an enum without a name", []btf.Type{enum("")}, requestFlags{1 << 1, 1 << 8}},
		{"enum rqf_flags", []btf.Type{enum("rqf_flags")}, requestFlags{1 << 1, 1 << 8}},
	} {
		raw := rawBTF(t, tt.types...)
		file := filepath.Join(t.TempDir(), "btf")
		if err := os.WriteFile(file, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		spec, err := btf.LoadSpecFromReader(bytes.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := requestFlagsOf(spec, file); got != tt.want || err != nil {
			t.Errorf("%s: %+v, %v, want %+v", tt.name, got, err, tt.want)
		}
	}
}

func FuzzUnnamedEnum(f *testing.F) {
	raw := rawBTF(f, &btf.Enum{Size: 4, Values: []btf.EnumValue{{Name: bitIOStat, Value: 8}}})
	f.Add(raw)
	f.Add(raw[:len(raw)/2])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		bits, err := unnamedEnum(raw, bitIOStat)
		if _, ok := bits[bitIOStat]; !ok && bits != nil || err != nil && bits != nil {
			t.Errorf("%v, %v", bits, err)
		}
	})
}
