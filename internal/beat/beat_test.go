// SPDX-License-Identifier: Apache-2.0

package beat

import (
	"testing"
	"time"
)

// Beats of different periods that begin at different moments meet.
func TestUntil(t *testing.T) {
	const short, long = 10 * time.Millisecond, 40 * time.Millisecond
	for range 100 {
		begin := time.Now()
		a, b := Until(short), Until(long)
		took := time.Since(begin)
		if a <= 0 || a > short || b <= 0 || b > long {
			t.Fatalf("%v and %v until beats every %v and %v", a, b, short, long)
		}
		if apart := (b - a + took) % short; apart > took {
			t.Fatalf("beats %v apart, asked for within %v", apart, took)
		}
		time.Sleep(3 * time.Millisecond)
	}
}
