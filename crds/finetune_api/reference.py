"""The reference page of the API, made from the same schema as the CRD."""

import json
from typing import Any

from finetune_api.crd import build_crd
from finetune_api.schema import VALIDATIONS

Schema = dict[str, Any]


def reference_markdown() -> str:
    """Return the reference page as Markdown: one table row a field, then the rules."""
    root = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    lines = [
        "# FineTuneJob reference",
        "",
        "<!-- Generated from crds/finetune_api by `make generate`. Do not edit. -->",
        "",
        "`finetune.dev/v1alpha1`, kind `FineTuneJob`, short name `ftj`.",
    ]
    for part in ("spec", "status"):
        lines += ["", f"## {part}", "", "| Field | Type | Default | Meaning |", "|---|---|---|---|"]
        lines += list(_rows(root["properties"][part], part))
    lines += ["", "## Rules", "", "Checked by the API server when a job is created or changed.", ""]
    lines += list(_rules(root, ""))
    return "\n".join(lines) + "\n"


def _rows(schema: Schema, path: str) -> Any:
    required = schema.get("required", [])
    for name, child in schema.get("properties", {}).items():
        where = f"{path}.{name}"
        default = "required" if name in required else _code(None if "properties" in child else child.get("default"))
        yield f"| `{where}` | {_type(child)} | {default} | {child.get('description', '')} |"
        inner = child.get("items", child)
        yield from _rows(inner, where + ("[]" if "items" in child else ""))


def _type(schema: Schema) -> str:
    if "enum" in schema:
        return " \\| ".join(
            f"`{json.dumps(value) if not isinstance(value, str) else value}`" for value in schema["enum"]
        )
    if "x-kubernetes-int-or-string" in schema:
        return "quantity"
    kind = "list of " + _type(schema["items"]) if "items" in schema else str(schema["type"])
    return kind + _bounds(schema)


def _bounds(schema: Schema) -> str:
    bounds = []
    for bound, symbol in (("minimum", ">"), ("maximum", "<")):
        if bound in schema:
            equal = "" if schema.get(f"exclusive{bound.capitalize()}") else "="
            bounds.append(f"{(symbol + equal).replace('>=', '≥').replace('<=', '≤')} {schema[bound]}")
    return f" ({', '.join(bounds)})" if bounds else ""


def _code(value: object) -> str:
    return "" if value is None else f"`{json.dumps(value)}`"


def _rules(schema: Schema, path: str) -> Any:
    for rule in schema.get(VALIDATIONS, []):
        if schema.get("type") == "object":
            yield f"- `{(path + rule.get('fieldPath', '')).lstrip('.') or 'the object'}`: {rule['message']}"
        else:
            yield f"- `{path}`: {rule['message']}"
    for name, child in schema.get("properties", {}).items():
        yield from _rules(child, f"{path}.{name}".lstrip("."))
    if "items" in schema:
        yield from _rules(schema["items"], path + "[]")
