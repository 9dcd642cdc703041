// SPDX-License-Identifier: Apache-2.0

package dwarf

import (
	"encoding/binary"
	"os"

	"github.com/hostflame/hostflame/internal/elffile"
)

// Relocations of debug sections in files that were not linked, such as kernel modules (psABI
// of x86-64 and AArch64): absolute ones of 8 and of 4 bytes. Others are of no use to us.
const (
	relocAMD64x8, relocAMD64x4, relocAMD64x4Signed = 1, 10, 11
	relocARM64x8, relocARM64x4                     = 257, 258

	relaSize         = 24 // of 64-bit files, which alone have addends
	maxRelocSymbols  = 1 << 18
	relocationWindow = 256 << 10
)

func relocationSize(machine uint16, typ uint32) int {
	switch {
	case machine == elffile.MachineAMD64 && typ == relocAMD64x8, machine == elffile.MachineARM64 && typ == relocARM64x8:
		return 8
	case machine == elffile.MachineAMD64 && (typ == relocAMD64x4 || typ == relocAMD64x4Signed), machine == elffile.MachineARM64 && typ == relocARM64x4:
		return 4
	}
	return 0
}

// relocate makes a copy of a debug section as a linker would have it, where the file has
// relocations for it.
func relocate(m *elffile.Image, secs []elffile.Section, z *elffile.Inflater, name string, s *Section) error {
	for _, rela := range m.SectionsNamed(secs, ".rela"+name) {
		if rela.Type != elffile.SHTRela || rela.EntSize != relaSize || !m.Is64 || rela.Flags&elffile.SHFCompressed != 0 {
			continue
		}
		symbols, err := symbolValues(m, secs, rela.Link)
		if err != nil {
			return err
		}
		f, err := z.Create(int64(s.Size))
		if err != nil {
			return err
		}
		if err := copyRelocated(f, m, rela, symbols, s); err != nil {
			return err
		}
		s.Content, s.Off = linked{f, int64(s.Size)}, 0
		return nil
	}
	return nil
}

type linked struct {
	*os.File
	size int64
}

func (l linked) Size() int64 { return l.size }

// symbolValues are the addresses of the symbols of a table, by number.
func symbolValues(m *elffile.Image, secs []elffile.Section, table uint32) ([]uint64, error) {
	if uint64(table) >= uint64(len(secs)) || secs[table].Type != elffile.SHTSymtab || secs[table].Size/m.SymSize() > maxRelocSymbols {
		return nil, elffile.Errorf(elffile.Malformed, "relocations by symbols of section %d", table)
	}
	tab := secs[table]
	if tab.Size > uint64(m.Size()) {
		return nil, elffile.Errorf(elffile.Malformed, "symbol table of %d bytes", tab.Size)
	}
	b := make([]byte, tab.Size/m.SymSize()*m.SymSize())
	if err := elffile.ReadAt(m, b, tab.Off); err != nil {
		return nil, err
	}
	values := make([]uint64, uint64(len(b))/m.SymSize())
	for i := range values {
		sym := b[uint64(i)*m.SymSize():]
		section := uint64(binary.LittleEndian.Uint16(sym[6:]))
		values[i] = binary.LittleEndian.Uint64(sym[8:])
		if section < uint64(len(secs)) {
			values[i] += secs[section].Addr
		}
	}
	return values, nil
}

// copyRelocated copies s to f and applies relocations, which compilers write in order.
func copyRelocated(f *os.File, m *elffile.Image, rela elffile.Section, symbols []uint64, s *Section) error {
	if rela.Off > uint64(m.Size()) || rela.Size > uint64(m.Size())-rela.Off {
		return elffile.Errorf(elffile.Malformed, "relocations of %d bytes", rela.Size)
	}
	window := make([]byte, 0, relocationWindow)
	base := uint64(0) // of the window
	// advance writes what is before a place and has the window begin there.
	advance := func(to uint64) error {
		for base < to {
			n := min(uint64(len(window)), to-base)
			if n == 0 {
				window = window[:min(relocationWindow, s.Size-base)]
				if err := s.read(window, base); err != nil {
					return err
				}
				continue
			}
			if _, err := f.WriteAt(window[:n], int64(base)); err != nil {
				return err
			}
			window = window[:copy(window, window[n:])]
			base += n
		}
		have := uint64(len(window))
		window = window[:min(relocationWindow, s.Size-base)]
		return s.read(window[have:], base+have)
	}
	entries := make([]byte, 0, 4096*relaSize)
	for off, left := rela.Off, rela.Size/relaSize*relaSize; left > 0; {
		entries = entries[:min(uint64(cap(entries)), left)]
		if err := elffile.ReadAt(m, entries, off); err != nil {
			return err
		}
		off, left = off+uint64(len(entries)), left-uint64(len(entries))
		for b := entries; len(b) > 0; b = b[relaSize:] {
			at, typ, symbol := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])
			n := uint64(relocationSize(m.Machine, typ))
			if n == 0 {
				continue
			}
			if at < base || at > s.Size || n > s.Size-at || uint64(symbol) >= uint64(len(symbols)) {
				return elffile.Errorf(elffile.Malformed, "relocation of %#x by symbol %d", at, symbol)
			}
			if at+n > base+uint64(len(window)) {
				if err := advance(at); err != nil {
					return err
				}
			}
			value := symbols[symbol] + binary.LittleEndian.Uint64(b[16:])
			if place := window[at-base:]; n == 8 {
				binary.LittleEndian.PutUint64(place, value)
			} else {
				binary.LittleEndian.PutUint32(place, uint32(value))
			}
		}
	}
	return advance(s.Size)
}
