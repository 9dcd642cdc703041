// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// hintError is an error that says what to do about it.
type hintError struct {
	err   error
	hint  string
	usage bool // the command line is wrong
}

func (e *hintError) Error() string { return e.err.Error() }
func (e *hintError) Unwrap() error { return e.err }

// hintf returns an error with a hint.
func hintf(hint, format string, args ...any) error {
	return &hintError{err: fmt.Errorf(format, args...), hint: hint}
}

// usagef is hintf for a wrong command line.
func usagef(hint, format string, args ...any) error {
	return &hintError{err: fmt.Errorf(format, args...), hint: hint, usage: true}
}

// errSilent ends a command with exit code 1 after it has said why itself.
var errSilent = errors.New("said already")

// report writes err as the command's last words and returns the exit code.
func report(w io.Writer, err error) int {
	code, hint := 1, ""
	if e, ok := errors.AsType[*hintError](err); ok {
		hint = e.hint
		if e.usage {
			code = 2
		}
	}
	if !errors.Is(err, errSilent) {
		fmt.Fprintf(w, "hostflame: error: %s\n", withoutGuess(err))
	}
	if hint != "" {
		fmt.Fprintf(w, "hostflame: hint: %s\n", hint)
	}
	return code
}

// withoutGuess is the text of err without what the BPF library guesses about
// RLIMIT_MEMLOCK, which no kernel since 5.11 looks at.
func withoutGuess(err error) string {
	return strings.ReplaceAll(err.Error(), " (MEMLOCK may be too low, consider rlimit.RemoveMemlock)", "")
}
