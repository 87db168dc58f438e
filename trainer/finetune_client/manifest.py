"""What a user wrote, checked before anything is sent, and where in the text each field stands.

The types are those that the API server's schema is made from. YAML is read as kubectl reads it, which is not quite as PyYAML does: dates stay
text, ``2e-5`` is a number, and a key that stands twice is a fault. Of an unknown field the message says which known one is like it.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finetune_api import contract
from finetune_api.crd import build_crd
from finetune_api.job import parse_job
from finetune_client.errors import Fault, Refused

Path = tuple[str | int, ...]
DEEPEST = 32
_API_VERSION = f"{contract.GROUP}/{contract.VERSION}"
_RULE = re.compile(r"Value error, (?:(?P<field>[A-Za-z.]+): )?(?P<message>.*)", re.DOTALL)
_FIELD = re.compile(r"[^.\[\]]+")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A job as a user wrote it; ``lines`` has the line of each field by its path."""

    body: dict[str, Any]
    lines: Mapping[Path, int]

    @property
    def name(self) -> str:
        """The job's name."""
        return str(self.body["metadata"]["name"])

    @property
    def namespace(self) -> str | None:
        """The namespace that it names, if it does."""
        namespace: str | None = self.body["metadata"].get("namespace")
        return namespace


class _Loader(yaml.SafeLoader):
    """YAML as kubectl reads it."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


def read_manifests(text: str) -> list[Manifest]:
    """Return the jobs of a YAML or JSON text, all of them valid.

    Raises:
        Refused: one is not; ``faults`` has everything that is wrong with any.
    """
    manifests, faults = [], []
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            body = loader.construct_document(node)
            if body is None:  # nothing between two ---
                continue
            manifest = Manifest(body, dict(_lines(node)))
            faults += [*_repeated_keys(node), *_faults(manifest)]
            manifests.append(manifest)
    except (yaml.YAMLError, ValueError) as error:
        raise Refused("this is no YAML", [_syntax_fault(error)]) from error
    if not manifests:
        raise Refused("there is no job in it", [Fault("there is no job in it")])
    if faults:
        raise Refused("it cannot be submitted as it is written", sorted(faults, key=lambda fault: fault.line or 0))
    return manifests


def located(fault: Fault, manifest: Manifest) -> Fault:
    """Return a fault that the API server found, with its line."""
    parts = tuple(int(part) if part.isdigit() else part for part in _FIELD.findall(fault.path))
    return Fault(fault.message, fault.path, _line(manifest, parts))


def _faults(manifest: Manifest) -> list[Fault]:
    body = manifest.body
    if not isinstance(body, dict) or (body.get("apiVersion"), body.get("kind")) != (_API_VERSION, contract.KIND):
        return [
            Fault(f"must be apiVersion: {_API_VERSION}, kind: {contract.KIND}; for anything else there is kubectl", "kind",
                  _line(manifest, ("kind",)))
        ]  # fmt: skip
    try:
        parse_job(body)
    except ValidationError as error:
        return [_fault(detail, manifest) for detail in error.errors()]
    return []


def _fault(detail: ErrorDetails, manifest: Manifest) -> Fault:
    parts, message = detail["loc"], detail["msg"]
    rule = _RULE.fullmatch(message)
    if rule:
        parts = (*parts, *(rule["field"].split(".") if rule["field"] else ()))
        message = rule["message"]
    elif detail["type"] == "missing":
        message = "is required"
    elif detail["type"] == "extra_forbidden":
        message = "is no field" + _did_you_mean(parts)
    else:
        message = message[0].lower() + message[1:]
    return Fault(message, _written(parts), _line(manifest, parts))


def _did_you_mean(parts: Sequence[str | int]) -> str:
    schema = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for part in parts[:-1]:
        schema = schema["items"] if isinstance(part, int) else schema.get("properties", {}).get(part, {})
    known = {name.lower(): name for name in schema.get("properties", {})}
    near = difflib.get_close_matches(str(parts[-1]).lower(), known, n=1)
    return f"; did you mean {known[near[0]]}?" if near else ""


def _written(parts: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _line(manifest: Manifest, parts: Sequence[str | int]) -> int | None:
    """Return the line of a field, or of the innermost one around it that is written at all."""
    for length in range(len(parts), -1, -1):
        line = manifest.lines.get(tuple(parts[:length]))
        if line is not None:
            return line
    return None


def _lines(node: yaml.Node, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yield the line of each field; an alias of itself ends at a depth that no job has."""
    if len(path) == 0:
        yield path, node.start_mark.line + 1
    if len(path) >= DEEPEST:
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            where = (*path, key.value)
            yield where, key.start_mark.line + 1
            yield from _lines(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), value.start_mark.line + 1
            yield from _lines(value, (*path, index))


def _repeated_keys(node: yaml.Node, path: Path = ()) -> Iterator[Fault]:
    if isinstance(node, yaml.MappingNode) and len(path) < DEEPEST:
        seen: dict[str, int] = {}
        for key, value in node.value:
            where = (*path, key.value)
            if key.value in seen:
                message = f"stands here again, after line {seen[key.value]}"
                yield Fault(message, _written(where), key.start_mark.line + 1)
            seen[key.value] = key.start_mark.line + 1
            yield from _repeated_keys(value, where)


def _syntax_fault(error: Exception) -> Fault:
    mark = getattr(error, "problem_mark", None)
    words = getattr(error, "problem", None) or str(error)
    return Fault(" ".join(words.split()), line=mark.line + 1 if mark else None)
