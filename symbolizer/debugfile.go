// SPDX-License-Identifier: Apache-2.0

package symbolizer

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hostflame/hostflame/internal/elffile"
)

// findDebug returns the object of the first candidate that matches, nil if none does.
func (o *Object) findDebug(secs []elffile.Section) *Object {
	link, crc := o.image.DebugLink(secs)
	candidates := elffile.DebugFiles(o.file.Roots, o.file.Path, o.image.BuildID, link)
	for _, root := range o.file.Roots {
		for _, p := range o.debugPaths {
			candidates = append(candidates, elffile.DebugFile{Root: root, Path: p})
		}
	}
	for _, c := range candidates {
		d, err := o.sym.object(File{Path: c.Path, Open: c.Open, Roots: o.file.Roots}, roleDebug)
		if err != nil || d.image.Machine != o.image.Machine || d.image.Is64 != o.image.Is64 {
			continue
		}
		if o.image.BuildID != "" && d.image.BuildID == o.image.BuildID ||
			o.image.BuildID == "" && elffile.SumMatches(d.image.Content, crc) {
			return d
		}
	}
	return nil
}

// findAlt opens the file that dwz moved common debug information to: by build id, or by its
// path, which can be relative to the debug file's directory.
func (o *Object) findAlt(path, buildID string) (*os.File, error) {
	paths := []string{elffile.BuildIDPath(buildID), path}
	if !filepath.IsAbs(path) {
		paths[1] = filepath.Join(filepath.Dir(o.file.Path), path)
	}
	for _, root := range o.file.Roots {
		for _, p := range paths {
			if p == "" {
				continue
			}
			if f, err := elffile.OpenBelow(root, p, nil); err == nil {
				return f, nil
			}
		}
	}
	return nil, fmt.Errorf("open %s: %w", path, fs.ErrNotExist)
}
