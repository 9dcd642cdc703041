// SPDX-License-Identifier: Apache-2.0

package elffile

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
)

const maxLink = 4096 // bytes of a section that names another file

// DebugLink reads .gnu_debuglink: the name of the separate debug file, and its CRC-32. The
// name is empty where there is none, or where it is a path, which would lead elsewhere.
func (m *Image) DebugLink(secs []Section) (name string, crc uint32) {
	return ParseDebugLink(m.linkSection(secs, ".gnu_debuglink"))
}

// ParseDebugLink parses the section: a name, padded to four bytes, and the CRC.
func ParseDebugLink(b []byte) (name string, crc uint32) {
	i := bytes.IndexByte(b, 0)
	if i <= 0 || bytes.IndexByte(b[:i], '/') >= 0 || string(b[:i]) == "." || string(b[:i]) == ".." {
		return "", 0
	}
	b, name = b[min((i+4)&^3, len(b)):], string(b[:i])
	if len(b) < 4 {
		return "", 0
	}
	return name, binary.LittleEndian.Uint32(b)
}

// DebugAltLink reads .gnu_debugaltlink: the path of the file that dwz moved common debug
// information to, and its build id in hex. The path is empty where there is none.
func (m *Image) DebugAltLink(secs []Section) (path, buildID string) {
	b := m.linkSection(secs, ".gnu_debugaltlink")
	i := bytes.IndexByte(b, 0)
	if i <= 0 || len(b)-i-1 > MaxBuildID {
		return "", ""
	}
	return string(b[:i]), hex.EncodeToString(b[i+1:])
}

func (m *Image) linkSection(secs []Section, name string) []byte {
	for _, s := range m.SectionsNamed(secs, name) {
		if s.Type == SHTNobits || s.Size > maxLink || s.Flags&SHFCompressed != 0 {
			continue
		}
		b := make([]byte, s.Size)
		if ReadAt(m, b, s.Off) == nil {
			return b
		}
	}
	return nil
}
