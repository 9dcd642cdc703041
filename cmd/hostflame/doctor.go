// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/alecthomas/kingpin/v2"

	"github.com/hostflame/hostflame/bpf"
	"github.com/hostflame/hostflame/internal/buildinfo"
)

type doctor struct{ json *bool }

func addDoctor(app *kingpin.Application) (string, command) {
	c := app.Command("doctor", "Print what this kernel and these privileges allow, what is lost and what to do about it. Exits 1 where serve could not start.")
	return "doctor", &doctor{json: c.Flag("json", "Print JSON.").Bool()}
}

// findings is what doctor prints; its JSON form is stable.
type findings struct {
	Build    buildinfo.Info `json:"build"`
	Serves   bool           `json:"serves"` // serve would work, if degraded
	Features []bpf.Feature  `json:"features"`
}

func (d *doctor) run(_ context.Context, env environment) error {
	list := bpf.Probe()
	f := findings{Build: env.build, Serves: bpf.Serves(list), Features: list}
	write := writeText
	if *d.json {
		write = writeJSON
	}
	if err := write(env.stdout, f); err != nil {
		return fmt.Errorf("print findings: %w", err)
	}
	if !f.Serves {
		return errSilent
	}
	return nil
}

func writeJSON(w io.Writer, f findings) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(f)
}

func writeText(w io.Writer, f findings) error {
	if _, err := fmt.Fprintf(w, "%s\n\n", f.Build); err != nil {
		return err
	}
	missing := 0
	for _, x := range f.Features {
		mark := "ok"
		if !x.Available {
			mark = "--"
			missing++
		}
		line := fmt.Sprintf("%s  %-26s %s", mark, x.Name, x.Detail)
		if x.Lost != "" {
			line += "\n      lost: " + x.Lost
		}
		if x.Hint != "" {
			line += "\n      hint: " + x.Hint
		}
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " ")); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "\n%s\n", verdict(f.Serves, missing))
	return err
}

func verdict(serves bool, missing int) string {
	switch {
	case !serves:
		return "hostflame serve can not start here: none of " + bpf.FeatureCPU + ", " + bpf.FeatureSched + " and " + bpf.FeatureBlock + " works"
	case missing == 0:
		return "hostflame serve works here, with everything"
	}
	return fmt.Sprintf("hostflame serve works here; what is marked -- is missing (%d of the above)", missing)
}
