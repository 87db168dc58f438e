"""The CustomResourceDefinition, made from the types.

A structural schema knows no references, no unions and no titles, so pydantic's JSON schema is unfolded: ``$ref`` is replaced by what
it names, ``anyOf [X, null]`` by X (absent is how Kubernetes says unset), and the default of a nested object is written out in full: the
API server runs CEL rules over a default as it stands, before it fills in the defaults below it, so ``{}`` would be refused.
"""

from typing import Any, get_args

import yaml
from pydantic import BaseModel

from finetune_api import contract
from finetune_api.job import FineTuneJob
from finetune_api.schema import DEFAULT_NOT_STORED, VALIDATIONS, ApiModel

Schema = dict[str, Any]

# What users read without -o wide. Names are short because columns are narrow.
PRINTER_COLUMNS: tuple[Schema, ...] = (
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
    {"name": "Progress", "type": "integer", "jsonPath": ".status.progress.percent", "description": "Percent of steps"},
    {"name": "Step", "type": "integer", "jsonPath": ".status.progress.step"},
    {"name": "Loss", "type": "number", "jsonPath": ".status.progress.loss"},
    {"name": "Nodes", "type": "integer", "jsonPath": ".status.gang.ready", "description": "Members that run"},
    {"name": "Restarts", "type": "integer", "jsonPath": ".status.restarts.total"},
    # A string: of a date the API server prints how long ago it was, and of one to come "<invalid>".
    {"name": "ETA", "type": "string", "jsonPath": ".status.progress.estimatedCompletionTime", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
)


def build_crd() -> Schema:
    """Return the CustomResourceDefinition of FineTuneJob as plain values."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{contract.PLURAL}.{contract.GROUP}"},
        "spec": {
            "group": contract.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": contract.KIND,
                "plural": contract.PLURAL,
                "singular": contract.KIND.lower(),
                "shortNames": ["ftj"],
                "categories": ["all", "finetune"],
            },
            "versions": [
                {
                    "name": contract.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": list(PRINTER_COLUMNS),
                    "selectableFields": [{"jsonPath": ".status.phase"}],
                    "schema": {"openAPIV3Schema": _root_schema()},
                }
            ],
        },
    }


def crd_yaml() -> str:
    """Return the CustomResourceDefinition as YAML, headed by how it was made."""
    text = yaml.safe_dump(build_crd(), sort_keys=False, width=120, allow_unicode=True)
    return "# Generated from crds/finetune_api by `make generate`. Do not edit.\n" + text


def _root_schema() -> Schema:
    schema = object_schema(FineTuneJob)
    schema["properties"]["metadata"] = {"type": "object", "properties": {"name": {"type": "string"}}}
    schema["properties"]["apiVersion"] = {"type": "string"}
    schema["properties"]["kind"] = {"type": "string"}
    schema["required"] = ["spec"]
    return schema


def object_schema(model: type[ApiModel]) -> Schema:
    """Return the structural schema of one type."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return _structural(schema, schema.get("$defs", {}), _rules_by_name(model))


def _rules_by_name(model: type[ApiModel]) -> dict[str, type[ApiModel]]:
    found: dict[str, type[ApiModel]] = {}
    pending: list[Any] = [model]
    while pending:
        hint = pending.pop()
        pending.extend(get_args(hint))
        if isinstance(hint, type) and issubclass(hint, ApiModel) and hint.__name__ not in found:
            found[hint.__name__] = hint
            pending.extend(field.annotation for field in hint.model_fields.values())
    return found


def _structural(node: Schema, definitions: Schema, models: dict[str, type[ApiModel]]) -> Schema:
    node = _resolve(node, definitions)
    result = {key: value for key, value in node.items() if key in KEPT}
    result |= _bounds(node) | _enumeration(node)
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    if "properties" in node:
        model = models[node["title"]]
        result["properties"] = {
            name: _with_nested_default(_structural(child, definitions, models), model, name)
            for name, child in node["properties"].items()
        }
        rules = [rule.as_schema() for rule in model.rules if rule.cel is not None]
        if rules:
            result[VALIDATIONS] = rules
    if "items" in node:
        result["items"] = _structural(node["items"], definitions, models)
    if "x-list-key" in node:
        result |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [node["x-list-key"]]}
    elif "items" in node:
        result["x-kubernetes-list-type"] = "atomic"
    return result


def _bounds(node: Schema) -> Schema:
    """OpenAPI v3.0 says by a flag what JSON Schema says by a number."""
    bounds: Schema = {}
    for bound in ("minimum", "maximum"):
        exclusive = f"exclusive{bound.capitalize()}"
        if exclusive in node:
            bounds |= {bound: node[exclusive], exclusive: True}
    return bounds


def _enumeration(node: Schema) -> Schema:
    values = [node["const"]] if "const" in node else node.get("enum")
    if values is None:
        return {}
    return {"type": "boolean" if isinstance(values[0], bool) else "string", "enum": values}


def _resolve(node: Schema, definitions: Schema) -> Schema:
    """Unfold references and optional types; what stands beside the reference wins."""
    while "$ref" in node or ("anyOf" in node and "x-kubernetes-int-or-string" not in node):
        outer = {key: value for key, value in node.items() if key not in ("$ref", "anyOf")}
        if "$ref" in node:
            inner = definitions[node["$ref"].rsplit("/", 1)[1]]
        else:
            (inner,) = (choice for choice in node["anyOf"] if choice != {"type": "null"})
        if outer.get("default", ...) is None:
            del outer["default"]
        outer.pop("title", None)
        node = {**inner, **outer}
    return {key: value for key, value in node.items() if not (key == "default" and value is None)}


def _with_nested_default(schema: Schema, model: type[ApiModel], wire_name: str) -> Schema:
    """Give a nested object that may be left out the defaults of its fields."""
    field = next(f for n, f in model.model_fields.items() if (f.alias or n) == wire_name)
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if field.default_factory is None or DEFAULT_NOT_STORED in extra:
        return schema
    made = field.default_factory()  # type: ignore[call-arg]
    if isinstance(made, BaseModel):
        assert made == type(made)(), f"{wire_name}: a default that its fields do not have needs {DEFAULT_NOT_STORED}"
        fields = schema["properties"].items()
        schema["default"] = {name: child["default"] for name, child in fields if "default" in child}
    return schema


KEPT = frozenset(
    {
        "type",
        "description",
        "default",
        "enum",
        "format",
        "pattern",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "required",
        "anyOf",
        "x-kubernetes-int-or-string",
        VALIDATIONS,
    }
)
