// SPDX-License-Identifier: Apache-2.0

package elffile

import ()

import "encoding/binary"

// Tags of the dynamic section (gABI, "Dynamic Section"; DT_GNU_HASH from elf.h).
const (
	dtNull    = 0
	dtHash    = 4
	dtStrtab  = 5
	dtSymtab  = 6
	dtStrsz   = 10
	dtSyment  = 11
	dtGNUHash = 0x6ffffef5

	maxDynamic = 64 << 10 // bytes read of the dynamic section
	maxBuckets = 1 << 20  // of DT_GNU_HASH
	maxChain   = 1 << 16  // symbols in its last bucket
)

// DynamicSymbols finds .dynsym and its strings as the dynamic linker does, by PT_DYNAMIC:
// for files whose section headers were cut off. ok is false where there are none.
func (m *Image) DynamicSymbols() (tab, strtab Extent, ok bool) {
	b := make([]byte, min(m.Dynamic.Size, maxDynamic, uint64(m.Size())))
	if len(b) == 0 || ReadAt(m, b, m.Dynamic.Off) != nil {
		return tab, strtab, false
	}
	var symAddr, strAddr, strSize, symEnt, hash, gnuHash uint64
	d := Decoder{B: b, Is64: m.Is64}
	for len(d.B) > 0 {
		tag, value := d.Word(), d.Word()
		if tag == dtNull {
			break
		}
		switch tag {
		case dtHash:
			hash = value
		case dtGNUHash:
			gnuHash = value
		case dtStrtab:
			strAddr = value
		case dtSymtab:
			symAddr = value
		case dtStrsz:
			strSize = value
		case dtSyment:
			symEnt = value
		}
	}
	tab, ok1 := m.FileOffset(symAddr)
	strtab, ok2 := m.FileOffset(strAddr)
	if !ok1 || !ok2 || symEnt != m.SymSize() {
		return tab, strtab, false
	}
	strtab.Size = min(strtab.Size, strSize)
	// The table itself has no length; the hash tables know the number of symbols.
	var n uint64
	if at, found := m.FileOffset(hash); hash != 0 && found {
		n = m.hashSymbols(at)
	} else if at, found := m.FileOffset(gnuHash); gnuHash != 0 && found {
		n = m.gnuHashSymbols(at)
	}
	tab.Size = min(tab.Size/m.SymSize(), n) * m.SymSize()
	return tab, strtab, n > 0
}

// hashSymbols is the number of symbols by DT_HASH: its second word.
func (m *Image) hashSymbols(at Extent) uint64 {
	var b [8]byte
	if ReadAt(m, b[:], at.Off) != nil {
		return 0
	}
	return uint64(binary.LittleEndian.Uint32(b[4:]))
}

// gnuHashSymbols is the number of symbols by DT_GNU_HASH: the last symbol is at the end of
// the chain that the highest bucket begins. A chain ends with a hash whose lowest bit is set.
func (m *Image) gnuHashSymbols(at Extent) uint64 {
	p := Pager{Content: m}
	buckets, err0 := p.U32(at.Off)
	first, err1 := p.U32(at.Off + 4)
	blooms, err2 := p.U32(at.Off + 8)
	if err0 != nil || err1 != nil || err2 != nil {
		return 0
	}
	word := uint64(4)
	if m.Is64 {
		word = 8
	}
	table := at.Off + 16 + uint64(blooms)*word
	if buckets > maxBuckets {
		return 0
	}
	highest := uint32(0)
	for i := range uint64(buckets) {
		b, err := p.U32(table + i*4)
		if err != nil {
			return 0
		}
		highest = max(highest, b)
	}
	if highest < first {
		return uint64(first) // only undefined symbols
	}
	chains := table + uint64(buckets)*4
	for i := uint64(highest); i < uint64(highest)+maxChain; i++ {
		h, err := p.U32(chains + (i-uint64(first))*4)
		if err != nil {
			return 0
		}
		if h&1 != 0 {
			return i + 1
		}
	}
	return 0
}
