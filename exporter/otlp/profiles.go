// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"go.opentelemetry.io/otel/sdk/resource"
	profilespb "go.opentelemetry.io/proto/otlp/collector/profiles/v1development"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/hostflame/hostflame/profiler"
)

const (
	// queueLimit is the memory for messages that wait, in bytes: some ten minutes of
	// windows of a small host.
	queueLimit = 16 << 20
	// windowsWaiting is how many windows wait to be converted, which takes milliseconds.
	windowsWaiting = 4

	retryFirst = time.Second
	retryMax   = 30 * time.Second

	exportMethod = "/opentelemetry.proto.collector.profiles.v1development.ProfilesService/Export"
)

// profiles pushes windows. It converts a window when it comes and keeps it encoded, which
// takes a tenth of the memory of a parsed profile.
type profiles struct {
	*observer
	resource *resource.Resource
	signal   Signal
	conn     *grpc.ClientConn
	limit    int // of a message, in bytes
	retry    time.Duration
	windows  chan *profiler.Window
	queue    *queue
	bad      complaints
}

func newProfiles(s Signal, r *resource.Resource, logger *slog.Logger) (*profiles, error) {
	p := &profiles{
		observer: newObserver(signalProfiles, logger),
		resource: r,
		signal:   s,
		limit:    maxMessage,
		retry:    retryFirst,
		windows:  make(chan *profiler.Window, windowsWaiting),
		queue:    newQueue(queueLimit),
		bad:      complaints{logger: logger},
	}
	var err error
	p.conn, err = dial(s, p.observe)
	return p, err
}

// push hands w over without waiting; when too many wait, the oldest is given up.
func (p *profiles) push(w *profiler.Window) {
	for {
		select {
		case p.windows <- w:
			return
		default:
		}
		select {
		case <-p.windows:
			p.drop(dropQueueFull, 1)
		default:
		}
	}
}

// convert turns windows into messages until ctx ends and those that came before are done.
func (p *profiles) convert(ctx context.Context) {
	defer p.queue.close()
	for {
		select {
		case w := <-p.windows:
			p.enqueue(w)
			continue
		case <-ctx.Done():
		}
		for {
			select {
			case w := <-p.windows:
				p.enqueue(w)
			default:
				return
			}
		}
	}
}

func (p *profiles) enqueue(w *profiler.Window) {
	for _, of := range w.Profiles {
		var c converted
		pp, err := of.Pprof()
		if err == nil {
			c, err = convert(pp, p.resource, p.limit)
		}
		if err != nil {
			p.drop(dropUnsupported, 1)
			p.bad.warn("profile not sent by OTLP", "type", of.Type, "err", err)
		}
		p.drop(dropTooLarge, c.tooLarge)
		for _, m := range c.messages {
			p.drop(dropQueueFull, p.queue.put(m))
		}
	}
}

// send sends what is in the queue until it is closed and empty, or until hard ends. What
// fails for now is tried again, after a pause that grows; once soft has ended, only if
// the server said when.
func (p *profiles) send(soft, hard context.Context) {
	defer func() { p.drop(dropShutdown, p.queue.clear()) }()
	pause := p.retry
	for {
		m, ok := p.queue.next(hard)
		if !ok {
			return
		}
		kind, asked := classify(p.export(hard, m))
		switch {
		case kind == outcomeSuccess:
			pause = p.retry
			continue
		case kind == outcomeRefused:
			p.drop(dropRefused, 1)
			continue
		case soft.Err() != nil && asked == 0:
			p.drop(dropShutdown, 1)
			continue
		case !p.queue.putBack(m):
			p.drop(dropQueueFull, 1)
		}
		interrupt := soft
		if asked > 0 {
			interrupt = hard
		}
		sleep(interrupt, max(asked, jitter(pause)))
		pause = min(2*pause, retryMax)
	}
}

func (p *profiles) export(ctx context.Context, m []byte) error {
	ctx, cancel := context.WithTimeout(ctx, p.signal.Timeout)
	defer cancel()
	ctx = metadata.NewOutgoingContext(ctx, metadata.New(p.signal.Headers))
	var reply profilespb.ExportProfilesServiceResponse
	return p.conn.Invoke(ctx, exportMethod, m, &reply, grpc.ForceCodecV2(encodedCodec{}))
}

// jitter is d give or take a half, so that a fleet does not come back all at once.
func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d)
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// encodedCodec sends requests that are encoded already and decodes replies.
type encodedCodec struct{}

var _ encoding.CodecV2 = encodedCodec{}

func (encodedCodec) Name() string { return "proto" }

func (encodedCodec) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.([]byte)
	if !ok {
		return nil, fmt.Errorf("encode %T: not an encoded message", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

func (encodedCodec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(proto.Message)
	if !ok {
		return errors.New("decode reply: not a message")
	}
	return proto.Unmarshal(data.Materialize(), m)
}
