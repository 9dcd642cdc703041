// SPDX-License-Identifier: Apache-2.0

// Package dashboards holds the Grafana dashboard and the Prometheus rules that come with
// hostflame, and takes the queries out of them, so that tests can run each.
package dashboards

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"strings"
)

// Grafana is hostflame.json, the dashboard, in Grafana's classic model (schema version
// 41, Grafana 12 and later import it as it is).
//
//go:embed hostflame.json
var Grafana []byte

// Rules is rules.yml, the recording and alerting rules.
//
//go:embed rules.yml
var Rules []byte

// Query is one PromQL query of a panel or a variable.
type Query struct {
	Panel string // the panel's title, or the variable's name
	Ref   string // A, B, ... inside the panel
	Expr  string // as in the dashboard, with Grafana's variables
}

// Model is what this package knows of the dashboard's JSON.
type Model struct {
	Title         string
	SchemaVersion int `json:"schemaVersion"`
	Panels        []Panel
	Templating    struct{ List []Variable }
}

// Panel is a panel or a row of the dashboard.
type Panel struct {
	ID          int
	Type        string
	Title       string
	Description string
	Datasource  *Datasource
	GridPos     struct{ H, W, X, Y int } `json:"gridPos"`
	Repeat      string
	Targets     []Target
}

// Target is a query of a panel.
type Target struct {
	RefID      string `json:"refId"`
	Datasource *Datasource
	Expr       string
	Format     string
}

// Datasource is a reference to a data source.
type Datasource struct{ Type, UID string }

// Variable is a template variable of the dashboard.
type Variable struct {
	Name       string
	Type       string
	Datasource *Datasource
	Query      json.RawMessage // a string, or an object with a field query
}

// Parse reads the dashboard.
func Parse() (*Model, error) {
	m := new(Model)
	if err := json.Unmarshal(Grafana, m); err != nil {
		return nil, fmt.Errorf("parse dashboard: %w", err)
	}
	return m, nil
}

// Queries lists the queries of all panels, in the dashboard's order.
func (m *Model) Queries() []Query {
	var list []Query
	for _, p := range m.Panels {
		for _, t := range p.Targets {
			list = append(list, Query{Panel: p.Title, Ref: t.RefID, Expr: t.Expr})
		}
	}
	return list
}

// Expand replaces Grafana's variables in a query, $name and ${name}, by values. The
// built-in ones are in values too: __rate_interval and __range.
func (q Query) Expand(values map[string]string) string {
	expr := q.Expr
	// Longer names first would only matter if one began with another; none does.
	for name, value := range values {
		expr = strings.NewReplacer("${"+name+"}", value, "$"+name, value).Replace(expr)
	}
	return expr
}
