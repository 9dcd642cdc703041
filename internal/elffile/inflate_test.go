// SPDX-License-Identifier: Apache-2.0

package elffile

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"
)

func zlibOf(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := zlib.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zstdOf(t *testing.T, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(b, nil)
}

// chdr is a header of a compressed section of a 64-bit file.
func chdr(typ uint32, size uint64, packed []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, typ)
	b = binary.LittleEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint64(b, size)
	b = binary.LittleEndian.AppendUint64(b, 1)
	return append(b, packed...)
}

// TestInflate: what is compressed comes out whole, in memory or in a file; what says another
// size than it has, or would be too much, does not, and takes no memory for it.
func TestInflate(t *testing.T) {
	text := []byte(strings.Repeat("hostflame ", 5000))
	zeros := make([]byte, 64<<20)
	size := uint64(len(text))
	old := append(binary.BigEndian.AppendUint64([]byte(zdebugMagic), size), zlibOf(t, text)...)
	for _, tt := range []struct {
		name, section string
		data          []byte
		memory, disk  int64
		reason        Reason
	}{
		{name: "zlib", data: chdr(compressZlib, size, zlibOf(t, text)), memory: 1 << 20},
		{name: "zstd", data: chdr(compressZstd, size, zstdOf(t, text)), memory: 1 << 20},
		{name: "zlib into a file", data: chdr(compressZlib, size, zlibOf(t, text)), disk: 1 << 20},
		{name: "zstd into a file", data: chdr(compressZstd, size, zstdOf(t, text)), disk: 1 << 20},
		{name: "old", section: ".zdebug_info", data: old, memory: 1 << 20},
		{name: "no room", data: chdr(compressZlib, size, zlibOf(t, text)), memory: 100, disk: 100, reason: TooLarge},
		{name: "bomb", data: chdr(compressZlib, uint64(len(zeros)), zlibOf(t, zeros)), memory: 1 << 20, disk: 1 << 20, reason: TooLarge},
		{name: "bomb for which there is room", data: chdr(compressZstd, 80<<20, zstdOf(t, make([]byte, 80<<20))), disk: 1 << 30, reason: TooLarge},
		{name: "bomb that says it is small", data: chdr(compressZstd, 100, zstdOf(t, zeros)), memory: 1 << 20},
		{name: "less than it says", data: chdr(compressZlib, size+1, zlibOf(t, text)), memory: 1 << 20, reason: Malformed},
		{name: "more than can be", data: chdr(compressZlib, 1<<50, zlibOf(t, text)), memory: 1 << 60, disk: 1 << 60, reason: Malformed},
		{name: "garbage", data: chdr(compressZlib, 100, []byte("this is not zlib")), memory: 1 << 20, reason: Malformed},
		{name: "zstd garbage", data: chdr(compressZstd, 100, []byte("this is not zstd")), memory: 1 << 20, reason: Malformed},
		{name: "unknown", data: chdr(9, 100, text), memory: 1 << 20, reason: Unsupported},
		{name: "too short", data: make([]byte, 10), memory: 1 << 20, reason: Malformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := &Image{Content: FromBytes(tt.data), Is64: true}
			s := Section{Extent: Extent{0, uint64(len(tt.data))}, Flags: SHFCompressed}
			if tt.section != "" {
				s.Flags = 0
			}
			z := &Inflater{Dir: t.TempDir(), Memory: tt.memory, Disk: tt.disk}
			defer z.Close()
			c, off, n, err := z.Section(m, s, tt.section)
			if tt.reason != "" {
				if !ReasonIs(err, tt.reason) {
					t.Errorf("%v, want %s", err, tt.reason)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, n)
			if err := ReadAt(c, got, off); err != nil {
				t.Fatal(err)
			}
			if want := text[:min(uint64(len(text)), n)]; tt.name != "bomb that says it is small" && !bytes.Equal(got, want) {
				t.Error("other bytes come out")
			}
		})
	}
}
