// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/hostflame/hostflame/internal/dwarf"
	"github.com/hostflame/hostflame/internal/elffile"
)

// kernelModules finds lines and inlined functions of kernel modules: the kernel tells a
// module's build id and where it has put each section, and a file with that build id and debug
// information is where distributions have it. Modules are not linked: the index is by the
// addresses that elffile.Image.Sections gives to sections.
type kernelModules struct {
	loads  uint64 // of kallsyms, that byName is of
	byName map[string]*kernelModule
	files  map[string]string // paths of those that are loaded, from the host's root
}

type kernelModule struct {
	object *Object // nil: there is none
	code   []loadedSection
}

// loadedSection is a section of code: where the kernel has it, and where the file.
type loadedSection struct{ loaded, addr, size uint64 }

// find looks for the file of one of the modules that are loaded, once for each reading of
// kallsyms.
func (k *kernelModules) find(s *Symbolizer, loaded []string, loads uint64, name string) *kernelModule {
	if k.byName == nil || k.loads != loads {
		k.byName, k.loads = map[string]*kernelModule{}, loads
		k.files = moduleFiles(s, loaded)
	}
	m := k.byName[name]
	if m == nil {
		m = openModule(s, name, k.files[name])
		k.byName[name] = m
	}
	return m
}

func openModule(s *Symbolizer, name, file string) *kernelModule {
	m := &kernelModule{}
	if strings.Contains(name, "/") {
		return m
	}
	dir := filepath.Join(s.cfg.Sys, "module", name)
	notes, err := os.ReadFile(filepath.Join(dir, "notes/.note.gnu.build-id"))
	if err != nil {
		return m
	}
	id, _ := elffile.ParseBuildIDs(notes)
	for _, p := range modulePaths(file, id) {
		o, err := s.object(File{
			Path:  p,
			Open:  func() (*os.File, error) { return elffile.OpenBelow(s.cfg.Root, p, nil) },
			Roots: []string{s.cfg.Root},
		}, roleModule)
		if err != nil || id == "" || o.image.BuildID != id || !o.image.Relocatable {
			continue
		}
		secs, err := o.image.Sections()
		if err != nil || !dwarf.Has(o.image, secs) {
			continue
		}
		m.object, m.code = o, loadedCode(o.image, secs, filepath.Join(dir, "sections"))
		return m
	}
	return m
}

// modulePaths are where the debug file of a module can be that is in file.
func modulePaths(file, id string) (paths []string) {
	if p := elffile.BuildIDPath(id); p != "" {
		paths = append(paths, p)
	}
	if file != "" {
		paths = append(paths, "/usr/lib/debug"+file, "/usr/lib/debug"+file+".debug", file)
	}
	return paths
}

// moduleFiles are the files of modules by name, without what they are compressed with.
func moduleFiles(s *Symbolizer, loaded []string) map[string]string {
	files := map[string]string{}
	release, err := os.ReadFile(s.proc("sys/kernel/osrelease"))
	if err != nil {
		return files
	}
	modules := path.Join("/lib/modules", strings.TrimSpace(string(release)))
	f, err := elffile.OpenBelow(s.cfg.Root, path.Join(modules, "modules.dep"), nil)
	if err != nil {
		return files
	}
	defer f.Close()
	wanted := map[string]bool{}
	for _, m := range loaded {
		wanted[strings.Trim(m, "[]")] = true
	}
	const most = 16 << 20 // bytes
	for sc := bufio.NewScanner(io.LimitReader(f, most)); sc.Scan(); {
		// "kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz ..."
		file, _, ok := strings.Cut(sc.Text(), ":")
		stem, _, isModule := strings.Cut(path.Base(file), ".ko")
		name := strings.ReplaceAll(stem, "-", "_")
		if ok && isModule && wanted[name] && files[name] == "" {
			files[name] = path.Join(modules, path.Dir(file), stem+".ko")
		}
	}
	return files
}

// loadedCode reads where the kernel has a module's sections.
func loadedCode(m *elffile.Image, secs []elffile.Section, dir string) (code []loadedSection) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		loaded, n := parseHex(bytes.TrimPrefix(bytes.TrimSpace(b), []byte("0x")))
		if n == 0 || loaded < kernelHalf {
			continue // hidden, for want of CAP_SYSLOG
		}
		for _, s := range m.SectionsNamed(secs, e.Name()) {
			if s.Executable() && s.Addr > 0 {
				code = append(code, loadedSection{loaded, s.Addr, s.Size})
			}
		}
	}
	return code
}

// addLines adds inlined functions and lines to what kallsyms says of modules.
func (k *kernelModules) addLines(s *Symbolizer, loaded []string, loads uint64, addrs []uint64, results []Result) {
	type question struct {
		addrs []uint64
		at    []int
	}
	questions := map[*kernelModule]*question{}
	for i, addr := range addrs {
		name := strings.Trim(results[i].Module, "[]")
		if name == "" || results[i].Module == kernelFile || name == "bpf" {
			continue
		}
		m := k.find(s, loaded, loads, name)
		if m.object == nil {
			continue
		}
		for _, c := range m.code {
			if addr >= c.loaded && addr-c.loaded < c.size {
				q := questions[m]
				if q == nil {
					q = &question{}
					questions[m] = q
				}
				q.addrs, q.at = append(q.addrs, addr-c.loaded+c.addr), append(q.at, i)
			}
		}
	}
	for m, q := range questions {
		for i, r := range m.object.debugLines(q.addrs) {
			results[q.at[i]].takeLines(r)
		}
	}
}

// takeLines takes inlined functions and lines over from what debug information says.
func (r *Result) takeLines(from Result) {
	r.Provisional = from.Provisional
	if n := len(from.Lines); n > 0 && from.Lines[n-1].File != "" {
		lines := append([]Line(nil), from.Lines...)
		lines[n-1].Function, lines[n-1].SystemName = r.Lines[0].Function, r.Lines[0].SystemName
		r.Lines = lines
	}
}
