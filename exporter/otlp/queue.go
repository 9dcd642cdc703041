// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"context"
	"sync"
)

// queue holds encoded messages, oldest first, up to a number of bytes. Safe for
// concurrent use.
type queue struct {
	limit int

	mu       sync.Mutex
	messages [][]byte
	bytes    int
	closed   bool
	changed  chan struct{} // has room for one: a message came, or close
}

func newQueue(limit int) *queue {
	return &queue{limit: limit, changed: make(chan struct{}, 1)}
}

// put appends m and returns how many messages it gave up for it, the oldest ones.
func (q *queue) put(m []byte) (dropped int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.messages = append(q.messages, m)
	q.bytes += len(m)
	for q.bytes > q.limit {
		q.removeFirst()
		dropped++
	}
	q.signal()
	return dropped
}

// putBack returns m, which next took, to the front. It reports false when the queue has
// become full: m is the oldest, so it is given up.
func (q *queue) putBack(m []byte) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.bytes+len(m) > q.limit {
		return false
	}
	q.messages = append([][]byte{m}, q.messages...)
	q.bytes += len(m)
	return true
}

// next takes the oldest message, and waits for one if need be. It reports false when the
// queue is closed and empty, or ctx has ended.
func (q *queue) next(ctx context.Context) ([]byte, bool) {
	for {
		q.mu.Lock()
		if len(q.messages) > 0 {
			m := q.messages[0]
			q.removeFirst()
			q.mu.Unlock()
			return m, true
		}
		closed := q.closed
		q.mu.Unlock()
		if closed {
			return nil, false
		}
		select {
		case <-q.changed:
		case <-ctx.Done():
			return nil, false
		}
	}
}

// close says that nothing more will be put.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.signal()
}

// clear removes all messages and returns how many they were.
func (q *queue) clear() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := len(q.messages)
	q.messages, q.bytes = nil, 0
	return n
}

func (q *queue) waiting() (messages, bytes int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.messages), q.bytes
}

func (q *queue) removeFirst() {
	q.bytes -= len(q.messages[0])
	q.messages[0] = nil
	q.messages = q.messages[1:]
}

func (q *queue) signal() {
	select {
	case q.changed <- struct{}{}:
	default:
	}
}
