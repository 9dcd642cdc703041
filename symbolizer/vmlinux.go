// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/hostflame/hostflame/internal/dwarf"
	"github.com/hostflame/hostflame/internal/elffile"
)

// vmlinux is the running kernel's own file, where one with debug information is there.
// Distributions have it in a package of its own.
type vmlinux struct {
	looked bool
	object *Object // nil: there is none
	text   uint64  // where its .text starts
}

// vmlinuxPaths are where distributions put it; RELEASE stands for what uname -r says.
var vmlinuxPaths = []string{
	"/usr/lib/debug/boot/vmlinux-RELEASE",
	"/usr/lib/debug/lib/modules/RELEASE/vmlinux",
	"/boot/vmlinux-RELEASE",
	"/lib/modules/RELEASE/build/vmlinux",
	"/lib/modules/RELEASE/vmlinux",
}

// find looks for the file whose build id is the running kernel's: what is named like it may
// be of another build.
func (v *vmlinux) find(s *Symbolizer) {
	if v.looked {
		return
	}
	v.looked = true
	notes, err := os.ReadFile(filepath.Join(s.cfg.Sys, "kernel/notes"))
	if err != nil {
		return
	}
	id, _ := elffile.ParseBuildIDs(notes)
	release, err := os.ReadFile(s.proc("sys/kernel/osrelease"))
	if id == "" || err != nil {
		return
	}
	paths := []string{elffile.BuildIDPath(id)}
	for _, p := range vmlinuxPaths {
		paths = append(paths, strings.ReplaceAll(p, "RELEASE", strings.TrimSpace(string(release))))
	}
	for _, p := range paths {
		o, err := s.object(File{
			Path:  p,
			Open:  func() (*os.File, error) { return elffile.OpenBelow(s.cfg.Root, p, nil) },
			Roots: []string{s.cfg.Root},
		}, roleDebug)
		if err != nil || o.image.BuildID != id {
			continue
		}
		secs, err := o.image.Sections()
		if err != nil || !dwarf.Has(o.image, secs) {
			continue
		}
		for _, sec := range o.image.SectionsNamed(secs, ".text") {
			v.object, v.text = o, sec.Addr
			return
		}
	}
}

// addLines adds inlined functions and lines to what kallsyms says of the kernel's own
// functions. The kernel can have moved by where its text starts.
func (v *vmlinux) addLines(k *kernelTable, addrs []uint64, results []Result) {
	if v.object == nil || k.text == 0 {
		return
	}
	var ask []uint64
	var at []int
	for i, addr := range addrs {
		if results[i].Module == kernelFile {
			ask, at = append(ask, addr-k.text+v.text), append(at, i)
		}
	}
	for i, r := range v.object.Symbolize(ask) {
		results[at[i]].takeLines(r)
	}
}
