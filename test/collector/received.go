// SPDX-License-Identifier: Apache-2.0

package collector

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"testing"
	"time"

	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	profilespb "go.opentelemetry.io/proto/otlp/profiles/v1development"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// Metrics returns what the Collector has written of metrics so far, one element a request.
func (c *Collector) Metrics(t testing.TB) []*metricspb.MetricsData {
	t.Helper()
	return read(t, c.MetricsFile, func() *metricspb.MetricsData { return new(metricspb.MetricsData) })
}

// Profiles returns what the Collector has written of profiles so far, one element a request.
func (c *Collector) Profiles(t testing.TB) []*profilespb.ProfilesData {
	t.Helper()
	return read(t, c.ProfilesFile, func() *profilespb.ProfilesData { return new(profilespb.ProfilesData) })
}

// Eventually calls condition until it is true, and fails the test when it is not in time.
func Eventually(t testing.TB, within time.Duration, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !condition(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, within)
		}
	}
}

func read[M proto.Message](t testing.TB, file string, empty func() M) []M {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	var all []M
	for {
		line, rest, complete := bytes.Cut(b, []byte("\n"))
		if !complete {
			return all
		}
		b = rest
		m := empty()
		if line, err = fromOTLP(line); err == nil {
			err = protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(line, m)
		}
		if err != nil {
			t.Fatalf("read %s: %v", file, err)
		}
		all = append(all, m)
	}
}

var ids = regexp.MustCompile(`"(traceId|spanId|profileId)":"([0-9a-f]*)"`)

// fromOTLP makes protobuf's JSON of OTLP's, in which ids are hex instead of base64.
func fromOTLP(line []byte) ([]byte, error) {
	var bad error
	line = ids.ReplaceAllFunc(line, func(field []byte) []byte {
		m := ids.FindSubmatch(field)
		id, err := hex.DecodeString(string(m[2]))
		bad = errors.Join(bad, err)
		return fmt.Appendf(nil, `"%s":"%s"`, m[1], base64.StdEncoding.EncodeToString(id))
	})
	return line, bad
}
