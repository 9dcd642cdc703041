// SPDX-License-Identifier: Apache-2.0

// Command hostflame is the agent: it serves what burns CPU, who waits for a CPU and which
// I/O is slow, as Prometheus metrics and pprof profiles. `hostflame help` lists the
// subcommands.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/common/promslog"
	promslogflag "github.com/prometheus/common/promslog/flag"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/buildinfo"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// command is a parsed subcommand. It returns when it is done or ctx has ended, which the
// first SIGINT or SIGTERM does.
type command interface {
	run(ctx context.Context, env environment) error
}

// environment is what all subcommands get.
type environment struct {
	stdout, stderr io.Writer
	log            *promslog.Config
	build          buildinfo.Info
}

// run is main, with its exit code: 0, 1 for an error, 2 for a command line that is wrong.
func run(args []string, stdout, stderr io.Writer) int {
	env := environment{stdout: stdout, stderr: stderr, log: &promslog.Config{Writer: stderr}, build: buildinfo.Publish()}
	app := kingpin.New("hostflame", "What burns CPU, who waits for a CPU, and which I/O is slow: always on, as Prometheus histograms and flame graphs.")
	app.UsageWriter(stdout).ErrorWriter(stderr)
	app.Version(env.build.String())
	app.HelpFlag.Short('h')
	promslogflag.AddFlags(app, env.log)
	commands := map[string]command{}
	for _, add := range []func(*kingpin.Application) (string, command){addServe, addRecord, addSymbolize, addDoctor} {
		name, c := add(app)
		commands[name] = c
	}

	// kingpin takes "no subcommand" for a wish for help and exits 0.
	if parsed, err := app.ParseContext(args); err == nil && parsed.SelectedCommand == nil && !asksForHelp(app, parsed) {
		app.UsageWriter(stderr)
		app.Usage(args)
		return 2
	}
	selected, err := app.Parse(args)
	if err != nil {
		report(stderr, usagef("hostflame help lists the subcommands, hostflame help serve the flags of one", "%w", err))
		return 2
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	// After the first signal the default action is back: a second one ends the process.
	context.AfterFunc(ctx, stop)
	if err := commands[selected].run(ctx, env); err != nil {
		return report(stderr, err)
	}
	return 0
}

// asksForHelp tells whether --help or --version is on the command line.
func asksForHelp(app *kingpin.Application, parsed *kingpin.ParseContext) bool {
	for _, e := range parsed.Elements {
		if f, ok := e.Clause.(*kingpin.FlagClause); ok && (f == app.HelpFlag || f == app.VersionFlag) {
			return true
		}
	}
	return false
}

// bannerf writes a line for people; logs have their own writer.
func bannerf(w io.Writer, format string, args ...any) {
	fmt.Fprintf(w, "hostflame: "+format+"\n", args...)
}
