// SPDX-License-Identifier: Apache-2.0

package symbolizer

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

// dynamicSymbols finds .dynsym and its strings as the dynamic linker does, by PT_DYNAMIC:
// for files whose section headers were cut off. ok is false where there are none.
func (m *image) dynamicSymbols() (tab, strtab extent, ok bool) {
	b := make([]byte, min(m.dynamic.size, maxDynamic, uint64(m.Size())))
	if len(b) == 0 || readAt(m, b, m.dynamic.off) != nil {
		return tab, strtab, false
	}
	var symAddr, strAddr, strSize, symEnt, hash, gnuHash uint64
	d := decoder{b: b, is64: m.is64}
	for len(d.b) > 0 {
		tag, value := d.word(), d.word()
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
	tab, ok1 := m.fileOffset(symAddr)
	strtab, ok2 := m.fileOffset(strAddr)
	if !ok1 || !ok2 || symEnt != m.symSize() {
		return tab, strtab, false
	}
	strtab.size = min(strtab.size, strSize)
	// The table itself has no length; the hash tables know the number of symbols.
	var n uint64
	if at, found := m.fileOffset(hash); hash != 0 && found {
		n = m.hashSymbols(at)
	} else if at, found := m.fileOffset(gnuHash); gnuHash != 0 && found {
		n = m.gnuHashSymbols(at)
	}
	tab.size = min(tab.size/m.symSize(), n) * m.symSize()
	return tab, strtab, n > 0
}

// hashSymbols is the number of symbols by DT_HASH: its second word.
func (m *image) hashSymbols(at extent) uint64 {
	var b [8]byte
	if readAt(m, b[:], at.off) != nil {
		return 0
	}
	return uint64(binary.LittleEndian.Uint32(b[4:]))
}

// gnuHashSymbols is the number of symbols by DT_GNU_HASH: the last symbol is at the end of
// the chain that the highest bucket begins. A chain ends with a hash whose lowest bit is set.
func (m *image) gnuHashSymbols(at extent) uint64 {
	p := pager{content: m}
	buckets, err0 := p.u32(at.off)
	first, err1 := p.u32(at.off + 4)
	blooms, err2 := p.u32(at.off + 8)
	if err0 != nil || err1 != nil || err2 != nil {
		return 0
	}
	word := uint64(4)
	if m.is64 {
		word = 8
	}
	table := at.off + 16 + uint64(blooms)*word
	if buckets > maxBuckets {
		return 0
	}
	highest := uint32(0)
	for i := range uint64(buckets) {
		b, err := p.u32(table + i*4)
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
		h, err := p.u32(chains + (i-uint64(first))*4)
		if err != nil {
			return 0
		}
		if h&1 != 0 {
			return i + 1
		}
	}
	return 0
}
