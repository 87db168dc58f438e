//go:build tools

// Package tools keeps actionlint in go.mod in go.mod; nothing here is ever compiled.
package tools

import _ "github.com/rhysd/actionlint/cmd/actionlint"
