// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"context"
	"os"
	"runtime"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/resource"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"

	"github.com/hostflame/hostflame/internal/buildinfo"
)

// newResource describes this host. OTEL_RESOURCE_ATTRIBUTES overrides any attribute and
// OTEL_SERVICE_NAME the service name.
//
// service.instance.id is the host name, not a random id: backends that tell series apart
// by it (Prometheus makes it the instance label) must not mix hosts up, nor begin new
// series at each start.
func newResource() (*resource.Resource, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, err // wrapped by the os package: "uname: ..."
	}
	r, err := resource.New(context.Background(),
		resource.WithSchemaURL(semconv.SchemaURL),
		resource.WithAttributes(
			semconv.ServiceName("hostflame"),
			semconv.ServiceVersion(buildinfo.Read().Version),
			semconv.ServiceInstanceID(host),
			semconv.HostName(host),
			semconv.HostArchKey.String(runtime.GOARCH), // amd64 and arm64 are semconv's names too
			semconv.OSTypeLinux,
		),
		resource.WithFromEnv(),
	)
	if err != nil {
		return nil, &ConfigError{"OTEL_RESOURCE_ATTRIBUTES", os.Getenv("OTEL_RESOURCE_ATTRIBUTES"),
			"not a list of key=value pairs", "for example deployment.environment.name=prod,host.name=web-1"}
	}
	return r, nil
}

// resourceMessage is r on the wire. All attributes are strings.
func resourceMessage(r *resource.Resource) *resourcepb.Resource {
	m := new(resourcepb.Resource)
	for kv := r.Iter(); kv.Next(); {
		m.Attributes = append(m.Attributes, &commonpb.KeyValue{
			Key:   string(kv.Attribute().Key),
			Value: stringValue(kv.Attribute().Value.String()),
		})
	}
	return m
}

func stringValue(s string) *commonpb.AnyValue {
	return &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: s}}
}

// key is a semantic convention's name as a string.
func key(k attribute.Key) string { return string(k) }
