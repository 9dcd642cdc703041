// SPDX-License-Identifier: Apache-2.0

package elffile

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
)

const (
	noteGNUBuildID = 3 // owner "GNU"
	noteGoBuildID  = 4 // owner "Go"

	maxNotes      = 64 << 10 // bytes read of one range of notes
	maxNoteRanges = 64
	MaxBuildID    = 64  // bytes; linkers write 8 (fast), 16 (md5, uuid) or 20 (sha1)
	MaxGoBuildID  = 256 // bytes; the go command writes four hashes, 83
)

// findBuildID returns the GNU build id in hex, else Go's, else "". The segments' notes
// come first: the kernel sees only those. The Go linker writes a GNU build id that only
// the section headers lead to.
func (m *Image) findBuildID() string {
	gnu, goID := m.buildIDs(m.Notes)
	if gnu == "" {
		secs, err := m.Sections()
		if err != nil {
			return goID
		}
		var notes []Extent
		for _, s := range secs {
			if s.Type == SHTNote {
				notes = append(notes, s.Extent)
			}
		}
		more, moreGo := m.buildIDs(notes)
		gnu, goID = more, cmp.Or(goID, moreGo)
	}
	return cmp.Or(gnu, goID)
}

func (m *Image) buildIDs(ranges []Extent) (gnu, goID string) {
	for _, r := range ranges[:min(len(ranges), maxNoteRanges)] {
		b := make([]byte, min(r.Size, maxNotes, uint64(m.Size())))
		if ReadAt(m, b, r.Off) != nil {
			continue
		}
		g, o := ParseBuildIDs(b)
		gnu, goID = cmp.Or(gnu, g), cmp.Or(goID, o)
	}
	return gnu, goID
}

// ParseBuildIDs reads a range of notes. Each is three 32-bit words (name size, descriptor
// size, type), name and descriptor, both padded to 4 bytes. Ranges aligned to 8 pad to 8
// and hold properties, never build ids (gABI, "Note Section"; .note.gnu.property).
func ParseBuildIDs(b []byte) (gnu, goID string) {
	for len(b) >= 12 {
		namesz := uint64(binary.LittleEndian.Uint32(b))
		descsz := uint64(binary.LittleEndian.Uint32(b[4:]))
		typ := binary.LittleEndian.Uint32(b[8:])
		b = b[12:]
		name, rest, ok := cutPadded(b, namesz)
		if !ok {
			break
		}
		// The last descriptor may lack its padding.
		desc, rest, ok := cutPadded(rest, descsz)
		if !ok {
			break
		}
		b = rest
		switch {
		case typ == noteGNUBuildID && string(name) == "GNU\x00" && len(desc) > 0 && len(desc) <= MaxBuildID:
			if gnu == "" {
				gnu = hex.EncodeToString(desc)
			}
		case typ == noteGoBuildID && string(name) == "Go\x00\x00" && len(desc) > 0 && len(desc) <= MaxGoBuildID && printable(desc):
			if goID == "" {
				goID = string(desc)
			}
		}
	}
	return gnu, goID
}

// cutPadded cuts n bytes off b, and what pads them to a multiple of 4 as far as it is there.
func cutPadded(b []byte, n uint64) (head, rest []byte, ok bool) {
	if n > uint64(len(b)) {
		return nil, nil, false
	}
	return b[:n], b[min((n+3)&^3, uint64(len(b))):], true
}

func printable(b []byte) bool {
	return !bytes.ContainsFunc(b, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}
