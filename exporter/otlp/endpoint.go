// SPDX-License-Identifier: Apache-2.0

package otlp

import (
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// Ports of an endpoint that is a URL without one.
const (
	plainPort = "4317" // registered for OTLP/gRPC
	tlsPort   = "443"  // what https means
)

// targetSchemes are gRPC's own kinds of targets, which the specification lets through.
var targetSchemes = []string{"dns", "ipv4", "ipv6", "passthrough", "unix", "unix-abstract"}

const endpointHint = "give http://host:4317 (no TLS), https://host:4317 or host:4317 (TLS)"

// parseEndpoint makes a gRPC target of an OTLP endpoint that was given as setting.
// A URL's scheme decides about TLS; plain is for what has no http or https scheme.
func parseEndpoint(setting, endpoint string, plain bool) (target string, plainText bool, err error) {
	bad := func(problem, hint string) (string, bool, error) {
		return "", false, &ConfigError{setting, endpoint, problem, hint}
	}
	scheme, rest, found := strings.Cut(endpoint, "://")
	switch scheme = strings.ToLower(scheme); {
	case found && (scheme == "http" || scheme == "https"):
		return parseURL(setting, endpoint, scheme == "http")
	case found && !slices.Contains(targetSchemes, scheme):
		return bad("this scheme is not supported", endpointHint)
	case found && rest == "":
		return bad("nothing after the scheme", endpointHint)
	case found:
		return endpoint, plain, nil
	}
	if scheme, rest, _ := strings.Cut(endpoint, ":"); slices.Contains(targetSchemes, scheme) && strings.HasPrefix(rest, "/") {
		return endpoint, plain, nil // unix:/path
	}
	host, port, splitErr := net.SplitHostPort(endpoint)
	switch {
	case splitErr != nil:
		return bad("no host:port", endpointHint)
	case host == "":
		return bad("no host", endpointHint)
	case !validPort(port):
		return bad("no valid port", endpointHint)
	}
	return endpoint, plain, nil
}

func parseURL(setting, endpoint string, plain bool) (target string, plainText bool, err error) {
	bad := func(problem, hint string) (string, bool, error) {
		return "", false, &ConfigError{setting, endpoint, problem, hint}
	}
	if strings.Contains(endpoint, "@") {
		// The value is not repeated: it may hold a password.
		return "", false, &ConfigError{setting, "", "user and password in the URL are not supported",
			"send credentials by OTEL_EXPORTER_OTLP_HEADERS"}
	}
	u, err := url.Parse(endpoint)
	switch {
	case err != nil:
		return bad("not a URL", endpointHint)
	case u.Hostname() == "":
		return bad("no host", endpointHint)
	case u.Port() != "" && !validPort(u.Port()):
		return bad("no valid port", endpointHint)
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return bad("OTLP/gRPC has no path", "give scheme, host and port alone; a path belongs to OTLP/HTTP, which is not supported")
	}
	port := u.Port()
	switch {
	case port != "":
	case plain:
		port = plainPort
	default:
		port = tlsPort
	}
	return net.JoinHostPort(u.Hostname(), port), plain, nil
}

func validPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}
