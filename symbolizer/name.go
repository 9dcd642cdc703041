// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"cmp"
	"encoding/binary"
	"strings"
	"time"
	"unicode/utf8"
	"unsafe"

	"github.com/ianlancetaylor/demangle"
)

const (
	// maxName is where a symbol's name is cut. It bounds what the demangler gets to see:
	// that recurses by input byte, and there is no recovery from a stack overflow.
	maxName = 8 << 10
	// maxDemangled is, as a power of two, the longest result: substitutions can blow a
	// short name up.
	maxDemangled = 14
	// maxCasts is how often "cv", a conversion operator, may be in a name: for each the
	// demangler can parse the rest of the name twice, so that 25 would take it minutes.
	maxCasts = 8
	// maxHeldNames is when the names that a table has handed out are forgotten: honest
	// files do not get there.
	maxHeldNames = 8 << 20
)

// cleanName makes a name fit for profiles: valid UTF-8 without control characters, which
// would break text formats.
func cleanName(s string) string {
	if isClean(s) {
		return s
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, string(utf8.RuneError)))
}

// isClean is whether s is printable ASCII.
func isClean(s string) bool { return isCleanBytes(unsafe.Slice(unsafe.StringData(s), len(s))) }

func isCleanBytes(b []byte) bool {
	const each = 0x0101010101010101
	bad := uint64(0)
	for ; len(b) >= 8; b = b[8:] {
		// The high bit is set of what is below ' ', above '~', or not ASCII.
		x := binary.LittleEndian.Uint64(b)
		bad |= (x - ' '*each) | (x + each) | x
	}
	for _, c := range b {
		bad |= uint64((c-' ')|(c+1)|c) & 0x80
	}
	return bad&(0x80*each) == 0
}

// demangler demangles the names of one table. The time that a name takes grows with the
// square of its length if it is made for that; a table with many of those keeps its names.
type demangler struct {
	slow time.Duration // spent on names that took longer than slowName
}

const (
	slowName    = 20 * time.Millisecond // an honest one takes microseconds
	maxSlowTime = 2 * time.Second
)

func (d *demangler) name(s string) string {
	if !mangled(s) || d.slow > maxSlowTime {
		return cutVersion(s)
	}
	start := time.Now()
	out := demangled(s)
	if took := time.Since(start); took > slowName {
		d.slow += took
	}
	return out
}

// demangled is the name for people of a symbol's name: C++ and Rust demangled without
// parameters, hashes and clone suffixes; of other names the symbol version is cut off.
func demangled(name string) (out string) {
	if !mangled(name) {
		return cutVersion(name)
	}
	if len(name) >= maxName || strings.Count(name, "cv") > maxCasts {
		return name // it was cut, or is not meant to be demangled
	}
	defer func() {
		if recover() != nil {
			out = name
		}
	}()
	s, err := demangle.ToString(name, demangle.NoParams, demangle.MaxLength(maxDemangled))
	if err != nil || s == "" {
		return name
	}
	return cleanName(s)
}

func mangled(name string) bool {
	return strings.HasPrefix(name, "_Z") || strings.HasPrefix(name, "_R") ||
		strings.HasPrefix(name, "___Z") || strings.HasPrefix(name, "_GLOBAL_")
}

// cutVersion turns "clock_gettime@@GLIBC_2.17", as linkers write it into .symtab, into
// "clock_gettime".
func cutVersion(name string) string {
	i := strings.IndexByte(name, '@')
	if i <= 0 {
		return name
	}
	version := strings.TrimPrefix(name[i+1:], "@")
	if version == "" || strings.ContainsFunc(version, func(r rune) bool { return !symbolRune(r) }) ||
		strings.ContainsFunc(name[:i], func(r rune) bool { return !symbolRune(r) }) {
		return name
	}
	return name[:i]
}

func symbolRune(r rune) bool {
	return r == '_' || r == '.' || r == '$' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
}

// compareAliases orders the names of one function by what people call it: fewer leading
// underscores first, then the shorter, then by bytes.
func compareAliases(a, b string) int {
	return cmp.Or(
		cmp.Compare(leadingUnderscores(a), leadingUnderscores(b)),
		cmp.Compare(len(a), len(b)),
		strings.Compare(a, b),
	)
}

func leadingUnderscores(s string) int {
	return len(s) - len(strings.TrimLeft(s, "_"))
}
