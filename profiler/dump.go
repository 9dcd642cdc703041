// SPDX-License-Identifier: Apache-2.0

package profiler

import (
	"bytes"
	"fmt"
	"io"
)

// Dump writes, as text, the processes that are known with their mappings, and what the
// open window has aggregated, before symbols. It is for people; the form may change.
func (p *Profiler) Dump(w io.Writer) error {
	var b bytes.Buffer
	done := make(chan struct{})
	if err := p.do(func() {
		p.processes.write(&b)
		for _, agg := range p.window.aggs {
			writeRows(&b, agg.typ, agg.result())
		}
		close(done)
	}); err != nil {
		return fmt.Errorf("dump profiler: %w", err)
	}
	<-done
	_, err := w.Write(b.Bytes())
	return err
}

// write dumps the processes, the one that was sampled last first.
func (t *processTable) write(w io.Writer) {
	for el := t.recent.Front(); el != nil; el = el.Next() {
		p := el.Value.(*process)
		fmt.Fprintf(w, "pid %d start %d exec %d comm %q: %d mappings, read %d times",
			p.id.pid, p.id.start, p.id.exec, p.comm, len(p.areas), p.generation)
		if p.absence != nil {
			fmt.Fprintf(w, ", %s", p.absence.frame.note)
		}
		fmt.Fprintln(w)
		for i := range p.areas {
			a := &p.areas[i]
			fmt.Fprintf(w, "  %x-%x @%x %q", a.start, a.end, a.offset, a.path)
			if a.mapping != nil {
				fmt.Fprintf(w, " = %s", a.mapping)
			}
			fmt.Fprintln(w)
		}
	}
}

// writeRows dumps what was aggregated, before symbols.
func writeRows(w io.Writer, t *Type, rows []row) {
	for _, r := range rows {
		fmt.Fprintf(w, "pid %d tid %d comm %q thread %q container %q", r.pid, r.tid, r.comm, r.thread, r.container)
		for i, l := range t.Labels {
			fmt.Fprintf(w, " %s %q", l.Name, r.labels[i])
		}
		for i, v := range t.Values {
			fmt.Fprintf(w, ", %s %d", v.Name, r.values[i])
		}
		fmt.Fprintln(w)
		for _, l := range r.stack {
			fmt.Fprintf(w, "  %s\n", l)
		}
	}
}
