//go:build tools

// Package tools keeps Prometheus' commands in go.mod; nothing here is ever compiled.
//
// go.sum has what `-tags remove_all_sd` needs and no more: `go list -mod=mod -deps -tags remove_all_sd` of both adds what a newer
// version needs, while `go mod tidy` knows no tags and would add every cloud's SDK.
package tools

import (
	_ "github.com/prometheus/prometheus/cmd/prometheus"
	_ "github.com/prometheus/prometheus/cmd/promtool"
)
