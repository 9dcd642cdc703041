// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"golang.org/x/sys/unix"

	"github.com/hostflame/hostflame/internal/elffile"
	"github.com/hostflame/hostflame/symbolizer"
)

type symbolize struct {
	exe       *string
	pid       *uint32
	addresses *[]string
	style     *string
	offsets   *bool
	cache     *string
	stats     *bool
	remote    *bool
	stdin     io.Reader
}

func addSymbolize(app *kingpin.Application) (string, command) {
	c := app.Command("symbolize", "Turn addresses of a binary into functions, inlined functions and lines, as the agent does.")
	s := &symbolize{
		exe:       c.Flag("exe", "The binary. With --pid, its path as the process sees it.").Required().String(),
		pid:       c.Flag("pid", "A process that maps the binary: it and its debug files are looked for in the root of the process first.").Uint32(),
		addresses: c.Arg("address", "ELF virtual addresses, in hex with 0x or decimal; without any, they are read from standard input, one a line.").Strings(),
		style:     c.Flag("output-style", "LLVM and JSON are what llvm-symbolizer prints.").Default(styleLLVM).Enum(styleLLVM, styleJSON),
		offsets:   c.Flag("file-offset", "The addresses are offsets of the file.").Bool(),
		cache:     c.Flag("symbols.cache-directory", "Where what was made of debug information is kept for the next time; empty for nowhere.").String(),
		stats:     c.Flag("stats", "Say on standard error what was read, how long it took, and how much memory.").Bool(),
		remote:    debuginfodFlag(c),
		stdin:     os.Stdin,
	}
	return "symbolize", s
}

const (
	styleLLVM = "LLVM"
	styleJSON = "JSON"
)

func (s *symbolize) run(ctx context.Context, env environment) error {
	start := time.Now()
	cfg := symbolizer.Config{WaitForIndex: true, IndexWorkers: runtime.GOMAXPROCS(0), Debuginfod: debuginfod(*s.remote)}
	if *s.remote && *s.cache == "" {
		return usagef("--symbols.cache-directory says where", "--symbols.debuginfod needs a directory to load into")
	}
	if *s.cache != "" {
		cache, err := symbolizer.OpenCache(*s.cache, indexCacheQuota)
		if err != nil {
			return hintf("--symbols.cache-directory takes a directory of yours", "%w", err)
		}
		cfg.Cache = cache
	}
	sym := symbolizer.New(cfg)
	defer sym.Close()
	object, err := sym.Object(s.file())
	if err != nil {
		return fmt.Errorf("read binary: %w", err)
	}
	w := bufio.NewWriterSize(env.stdout, 64<<10)
	p := &symbolPrinter{w: w, object: object, module: *s.exe, style: *s.style, offsets: *s.offsets}
	if len(*s.addresses) > 0 {
		p.list(*s.addresses)
	} else if err := p.stream(ctx, s.stdin); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if *s.stats {
		p.stats(env.stderr, sym, time.Since(start))
	}
	return nil
}

// file is the binary, and where its debug files are.
func (s *symbolize) file() symbolizer.File {
	f := symbolizer.File{Path: *s.exe, Roots: []string{"/"}}
	if abs, err := filepath.Abs(*s.exe); err == nil {
		f.Path = abs
	}
	f.Open = func() (*os.File, error) { return os.OpenFile(*s.exe, os.O_RDONLY|unix.O_NONBLOCK, 0) }
	if *s.pid != 0 {
		root := filepath.Join("/proc", strconv.FormatUint(uint64(*s.pid), 10), "root")
		f.Roots = []string{root, "/"}
		f.Open = func() (*os.File, error) { return elffile.OpenBelow(root, *s.exe, nil) }
	}
	return f
}

// symbolPrinter prints answers as llvm-symbolizer does.
type symbolPrinter struct {
	w             *bufio.Writer
	object        *symbolizer.Object
	module, style string
	offsets       bool

	asked, named, lines int
	first               time.Duration // until the first answer
}

// question is an address as it was given.
type question struct {
	text  string
	addr  uint64
	valid bool
}

func (p *symbolPrinter) parse(text string) question {
	q := question{text: text}
	v, err := strconv.ParseUint(text, 0, 64)
	if err == nil && p.offsets {
		v, q.valid = p.object.Address(v)
	} else {
		q.valid = err == nil
	}
	q.addr = v
	return q
}

// answer looks up questions.
func (p *symbolPrinter) answer(questions []question) []symbolizer.Result {
	start := time.Now()
	addrs := make([]uint64, len(questions))
	for i, q := range questions {
		addrs[i] = q.addr
	}
	results := p.object.Symbolize(addrs)
	if p.asked == 0 {
		p.first = time.Since(start)
	}
	for i, r := range results {
		p.asked++
		if !questions[i].valid {
			results[i] = symbolizer.Result{Reason: symbolizer.ReasonNotFound}
			continue
		}
		if len(r.Lines) > 0 {
			p.named++
			if r.Lines[0].Line > 0 {
				p.lines++
			}
		}
	}
	return results
}

func (p *symbolPrinter) list(addresses []string) {
	questions := make([]question, len(addresses))
	for i, a := range addresses {
		questions[i] = p.parse(a)
	}
	results := p.answer(questions)
	if p.style == styleJSON {
		all := make([]jsonAnswer, len(results))
		for i, r := range results {
			all[i] = p.json(questions[i], r)
		}
		p.encode(all)
		return
	}
	for i, r := range results {
		p.text(questions[i], r)
	}
}

// stream answers what is read, at once while the other side waits for it.
func (p *symbolPrinter) stream(ctx context.Context, r io.Reader) error {
	const atOnce = 4096
	in := bufio.NewReaderSize(r, 64<<10)
	var batch []question
	for {
		line, err := in.ReadString('\n')
		if line = strings.TrimSpace(line); line != "" || err == nil {
			batch = append(batch, p.parse(line))
		}
		if err != nil || len(batch) == atOnce || in.Buffered() == 0 {
			for i, r := range p.answer(batch) {
				if p.style == styleJSON {
					p.encode(p.json(batch[i], r))
				} else {
					p.text(batch[i], r)
				}
			}
			batch = batch[:0]
			if err := p.w.Flush(); err != nil {
				return fmt.Errorf("write: %w", err)
			}
		}
		if errors.Is(err, io.EOF) || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read addresses: %w", err)
		}
	}
}

func (p *symbolPrinter) text(_ question, r symbolizer.Result) {
	if len(r.Lines) == 0 {
		p.w.WriteString("??\n??:0:0\n")
	}
	for _, l := range r.Lines {
		file := l.File
		if file == "" {
			file = "??"
		}
		fmt.Fprintf(p.w, "%s\n%s:%d:0\n", l.Function, file, l.Line)
	}
	p.w.WriteByte('\n')
}

// jsonAnswer is what llvm-symbolizer prints, the reason why there is nothing, and what else the
// function is called.
type jsonAnswer struct {
	Address    string
	ModuleName string
	Reason     string   `json:",omitempty"`
	Aliases    []string `json:",omitempty"`
	Symbol     []jsonSymbol
}

type jsonSymbol struct {
	Column        int
	Discriminator int
	FileName      string
	FunctionName  string
	Line          int64
	LinkageName   string `json:",omitempty"`
	StartLine     int64
}

func (p *symbolPrinter) json(q question, r symbolizer.Result) jsonAnswer {
	a := jsonAnswer{Address: q.text, ModuleName: p.module, Reason: string(r.Reason), Symbol: []jsonSymbol{}}
	if q.valid {
		a.Address = fmt.Sprintf("%#x", q.addr)
		a.Aliases = p.object.Aliases(q.addr)
	}
	for _, l := range r.Lines {
		s := jsonSymbol{FileName: l.File, FunctionName: l.Function, Line: l.Line, StartLine: l.StartLine}
		if l.SystemName != l.Function {
			s.LinkageName = l.SystemName
		}
		a.Symbol = append(a.Symbol, s)
	}
	return a
}

func (p *symbolPrinter) encode(v any) {
	e := json.NewEncoder(p.w)
	e.SetEscapeHTML(false)
	_ = e.Encode(v) // the writer keeps the error
}

// stats says what was done.
func (p *symbolPrinter) stats(w io.Writer, sym *symbolizer.Symbolizer, took time.Duration) {
	st := sym.Stats()
	bannerf(w, "%d addresses in %v: %d with names, %d with lines; first answer after %v", p.asked, took.Round(time.Microsecond), p.named, p.lines, p.first.Round(time.Microsecond))
	bannerf(w, "%d files, tables of %d bytes", st.Objects, st.TableBytes)
	if x := st.Index; x.Built+x.Loaded+x.Failed > 0 {
		bannerf(w, "debug information: %d read, %d kept from before, %d failed, in %v; %d bytes of sections, %d bytes of index, %d malformed units",
			x.Built, x.Loaded, x.Failed, x.Time.Round(time.Microsecond), x.Input, x.Bytes, x.Broken)
		if x.LastFail != nil {
			bannerf(w, "debug information: %v", x.LastFail)
		}
	}
	for _, s := range p.object.Sources() {
		bannerf(w, "source: %s", s)
	}
	heap := []metrics.Sample{{Name: "/memory/classes/total:bytes"}}
	metrics.Read(heap)
	bannerf(w, "memory: %d bytes of the runtime, %d bytes resident without files", heap[0].Value.Uint64(), anonymousBytes())
}

// anonymousBytes is the process's resident memory that is of no file, 0 if that is not told.
func anonymousBytes() uint64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "RssAnon:" {
			kb, _ := strconv.ParseUint(f[1], 10, 64)
			return kb << 10
		}
	}
	return 0
}
