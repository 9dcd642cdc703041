// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"math/rand/v2"
)

// scramble overwrites, in a 64-bit little-endian ELF image, with bytes of a fixed seed:
// the contents of notes and of unloaded symbol and string tables, then the section
// headers themselves. Offsets become anything, sizes huge, links circular.
func scramble(image []byte) error {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return err
	}
	rnd := rand.New(rand.NewPCG(7919, 104729))
	fill := func(b []byte) {
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
	}
	for _, s := range f.Sections {
		loaded := s.Flags&elf.SHF_ALLOC != 0
		switch s.Type {
		case elf.SHT_NOTE:
		case elf.SHT_SYMTAB, elf.SHT_STRTAB:
			if loaded {
				continue // the dynamic loader reads these
			}
		default:
			continue
		}
		fill(image[s.Offset : s.Offset+s.FileSize])
	}
	var h elf.Header64
	if err := binary.Read(bytes.NewReader(image), binary.LittleEndian, &h); err != nil {
		return err
	}
	headers := image[h.Shoff : h.Shoff+uint64(h.Shnum)*uint64(h.Shentsize)]
	for i := 0; i < int(h.Shnum); i++ {
		one := headers[i*int(h.Shentsize):][:h.Shentsize]
		// The name and type stay, so that a reader follows what it should not.
		fill(one[8:])
	}
	return nil
}
