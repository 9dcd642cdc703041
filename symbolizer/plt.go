// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"encoding/binary"
	"slices"

	"github.com/hostflame/hostflame/internal/elffile"
)

const (
	maxPLT       = 2 << 20 // bytes of all sections together
	maxPLTRelocs = 1 << 16

	relocGlobDatAMD64  = 6
	relocJumpSlotAMD64 = 7
	relocGlobDatARM64  = 1025
	relocJumpSlotARM64 = 1026
)

// pltTable names the stubs through which a program calls functions of other files: the
// linker writes no symbols for them. A stub jumps to where a word of the GOT says, and the
// relocation of that word has the name.
type pltTable struct {
	image *elffile.Image
	stubs []stub
	names map[uint64]elffile.Extent // by the address of the word: from where to the end of the strings
	lines map[uint64][]Line         // of those seen
	held  int64                     // bytes of lines
}

type stub struct{ start, end, word uint64 }

func (o *Object) readPLT(secs []elffile.Section) (table, error) {
	t := &pltTable{image: o.image, lines: map[uint64][]Line{}, names: map[uint64]elffile.Extent{}}
	left := uint64(maxPLT)
	for _, s := range o.image.SectionsNamed(secs, ".plt", ".plt.sec", ".plt.got") {
		if s.Type == elffile.SHTNobits || s.Size > left {
			continue
		}
		left -= s.Size
		b := make([]byte, s.Size)
		if err := elffile.ReadAt(o.image, b, s.Off); err != nil {
			return nil, err
		}
		switch o.image.Machine {
		case elffile.MachineAMD64:
			t.scanAMD64(b, s.Addr)
		case elffile.MachineARM64:
			t.scanARM64(b, s.Addr)
		}
	}
	if len(t.stubs) == 0 {
		return nil, errorf(ReasonNoSymbols, "no PLT")
	}
	if err := t.readNames(o.image, secs); err != nil {
		return nil, err
	}
	return t, nil
}

// scanAMD64 looks for jmp *word(%rip) in each slot of 16 bytes, or of 8, as .plt.got has
// them.
func (t *pltTable) scanAMD64(b []byte, addr uint64) {
	slot := 16
	if len(b) >= 8 && b[0] == 0xff && b[1] == 0x25 {
		slot = 8
	}
	for at := 0; at+slot <= len(b); at += slot {
		s := b[at : at+slot]
		for i := 0; i+6 <= len(s); i++ {
			if s[i] == 0xff && s[i+1] == 0x25 {
				next := addr + uint64(at+i+6)
				word := next + uint64(int64(int32(binary.LittleEndian.Uint32(s[i+2:]))))
				t.stubs = append(t.stubs, stub{addr + uint64(at), addr + uint64(at+slot), word})
				break
			}
		}
	}
}

// scanARM64 looks for adrp x16, page; ldr x17, [x16, #offset], with which stubs start, after
// a landing pad or not.
func (t *pltTable) scanARM64(b []byte, addr uint64) {
	const size = 16
	for at := 0; at+size <= len(b); at += 4 {
		adrp, ldr := binary.LittleEndian.Uint32(b[at:]), binary.LittleEndian.Uint32(b[at+4:])
		if adrp&0x9f00001f != 0x90000010 || ldr&0xffc003ff != 0xf9400211 {
			continue
		}
		imm := int64(int32(adrp<<8)>>13)<<2 | int64(adrp>>29&3)
		word := (addr+uint64(at))&^0xfff + uint64(imm<<12) + uint64(ldr>>10&0xfff)*8
		start := addr + uint64(at)
		if at >= 4 && binary.LittleEndian.Uint32(b[at-4:]) == 0xd503245f { // bti c
			start -= 4
		}
		t.stubs = append(t.stubs, stub{start, start + size, word})
	}
}

// readNames reads the names of the stubs' words from the relocations.
func (t *pltTable) readNames(m *elffile.Image, secs []elffile.Section) error {
	words := map[uint64]bool{}
	for _, s := range t.stubs {
		words[s.word] = true
	}
	p := elffile.Pager{Content: m}
	const entry = 24
	if !m.Is64 {
		return nil
	}
	for _, s := range secs {
		if s.Type != elffile.SHTRela || s.EntSize != entry || s.Flags&elffile.SHFAlloc == 0 || uint64(s.Link) >= uint64(len(secs)) {
			continue
		}
		symbols := secs[s.Link]
		if symbols.Type != elffile.SHTDynsym || uint64(symbols.Link) >= uint64(len(secs)) {
			continue
		}
		strtab := secs[symbols.Link]
		buf := make([]byte, entry*1024)
		for off, left := s.Off, s.Size/entry*entry; left > 0 && len(t.names) < maxPLTRelocs; {
			b := buf[:min(uint64(len(buf)), left)]
			if err := elffile.ReadAt(m, b, off); err != nil {
				return err
			}
			off, left = off+uint64(len(b)), left-uint64(len(b))
			for ; len(b) > 0; b = b[entry:] {
				word, info := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
				switch uint32(info) {
				case relocGlobDatAMD64, relocJumpSlotAMD64, relocGlobDatARM64, relocJumpSlotARM64:
				default:
					continue
				}
				if index := info >> 32; words[word] && index < symbols.Size/m.SymSize() {
					name, err := p.U32(symbols.Off + index*m.SymSize())
					if err != nil {
						return err
					}
					if uint64(name) >= strtab.Size {
						continue
					}
					t.names[word] = elffile.Extent{Off: strtab.Off + uint64(name), Size: strtab.Size - uint64(name)}
				}
			}
		}
	}
	slices.SortFunc(t.stubs, func(a, b stub) int {
		switch {
		case a.start < b.start:
			return -1
		case a.start > b.start:
			return 1
		}
		return 0
	})
	return nil
}

func (t *pltTable) lookup(addr uint64) ([]Line, error) {
	i, found := slices.BinarySearchFunc(t.stubs, addr, func(s stub, a uint64) int {
		switch {
		case s.end <= a:
			return -1
		case s.start > a:
			return 1
		}
		return 0
	})
	if !found {
		return nil, nil
	}
	word := t.stubs[i].word
	if lines := t.lines[word]; lines != nil {
		return lines, nil
	}
	at, ok := t.names[word]
	if !ok {
		return nil, nil
	}
	p := elffile.Pager{Content: t.image}
	text, err := p.CString(at.Off, at.Off+at.Size, maxName)
	name := cleanName(text)
	if name == "" || err != nil {
		return nil, err
	}
	lines := []Line{{Function: demangled(name) + "@plt", SystemName: name + "@plt"}}
	if t.held > maxHeldNames {
		clear(t.lines)
		t.held = 0
	}
	t.lines[word] = lines
	t.held += lineSize + int64(len(name)+len(lines[0].Function))
	return lines, nil
}

func (t *pltTable) bytes() int64 {
	return int64(len(t.stubs))*24 + int64(len(t.names))*48 + t.held + 256
}
