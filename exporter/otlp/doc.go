// SPDX-License-Identifier: Apache-2.0

// Package otlp pushes metrics and profiles to an OpenTelemetry backend over OTLP/gRPC.
//
// Metrics are the agent's Prometheus registry, read by the OpenTelemetry SDK through the
// Prometheus bridge every OTEL_METRIC_EXPORT_INTERVAL (60 s). Names and labels are those
// of /metrics. Histograms that have native buckets arrive as exponential histograms with
// exactly those buckets: the scale is the native schema, and the zero threshold and count,
// the sum, the count and the created timestamp are the same. The bridge decides for a
// whole family by its first series, which is right because all series of our histograms
// have native buckets from the start. It drops exemplars of exponential histograms.
// Temporality is always cumulative.
//
// Profiles are the profiler's windows as v1development messages (proto 1.11). A window
// becomes one profile for each of its values that is sent (see shapes); each sample has
// one value, the sum over the window, and no timestamps. The resource is the host;
// processes, threads and containers are attributes of samples:
//
//	pprof label  OTLP attribute
//	pid          process.pid
//	comm         process.executable.name (the comm, which is at most 15 bytes)
//	tid          thread.id
//	thread       thread.name
//	container    container.id where it is one, else container (a unit, or a cgroup's path)
//	any other    the same name
//
// Locations have profile.frame.type (kernel, go, native), mappings
// process.executable.build_id.gnu or .go and what has been resolved (pprof.mapping.has_*),
// profiles pprof.profile.comment.
//
// A backend that is down, slow or hanging costs nothing but its queue: encoded profiles
// wait up to a fixed number of bytes, the oldest are given up first, and every loss is
// counted.
package otlp
