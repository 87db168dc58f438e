"""What the pages may name: fields of a job, values of a chart, targets of the Makefile."""

from __future__ import annotations

import functools
import re
from typing import Any

import yaml

from finetune_api.crd import crd_yaml
from finetune_api.status import ConditionType
from finetune_operator.settings import Profile
from tests.docs.pages import ROOT

_STEP = re.compile(r"\.([A-Za-z]+)|\[([^\]]*)\]")
_FILTER = re.compile(r'\?\(@\.(\w+)=="(\w+)"\)')
_INDEX = re.compile(r"\*|-?\d*(:-?\d*)?")


@functools.cache
def _crd() -> Any:
    return yaml.safe_load(crd_yaml())["spec"]["versions"][0]


def printer_columns() -> list[str]:
    """What ``kubectl get ftj`` prints above its table."""
    columns = _crd()["additionalPrinterColumns"]
    return ["NAME", *(column["name"].upper() for column in columns if not column.get("priority"))]


def wrong_in_jsonpath(expression: str) -> str:
    """Say which step of a JSONPath expression a job does not have; empty when it has them all."""
    path = expression.removeprefix("{").removesuffix("}")
    steps = list(_STEP.finditer(path))
    if "".join(step.group() for step in steps) != path:
        return f"{expression} is more than fields and filters"
    schema = _crd()["schema"]["openAPIV3Schema"]
    if steps and steps[0].group(1) == "metadata":
        return ""
    for step in steps:
        field, bracket = step.groups()
        schema = schema.get("items") if field is None else schema.get("properties", {}).get(field)
        if schema is None or not _selects(schema, bracket or ""):
            return f"{expression}: a job has nothing at {step.group()}"
    return ""


def _selects(schema: Any, bracket: str) -> bool:
    wanted = _FILTER.fullmatch(bracket)
    if wanted is None:
        return _INDEX.fullmatch(bracket) is not None
    return wanted[1] in schema["properties"] and (wanted[1] != "type" or wanted[2] in list(ConditionType))


def has_field(path: str) -> bool:
    return not wrong_in_jsonpath(f"{{.{path.replace('[]', '[0]')}}}")


@functools.cache
def chart_values() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "charts/finetune-operator/values.yaml").read_text())
    return values


def has_value(path: str) -> bool:
    """Whether the operator's chart has this value; below an empty map anything may be set, and below a profile what the operator takes."""
    place: Any = chart_values()
    if profile := re.fullmatch(r"profiles\.\w+\.(\w+)(\..*)?", path):
        return profile[1] in {field.alias for field in Profile.model_fields.values()}
    for step in path.split("."):
        if place == {}:
            return True
        if not isinstance(place, dict) or step not in place:
            return False
        place = place[step]
    return True


@functools.cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@functools.cache
def make_variables() -> set[str]:
    return set(re.findall(r"\$\((?:if \$\()?([A-Z_]+)\)", (ROOT / "Makefile").read_text()))
