"""The YAML of the pages, as what it is: whole jobs, pieces of jobs, values of the chart, manifests of others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import yaml

from finetune_api.job import parse_job
from tests.api.manifests import recipe_job, script_job
from tests.docs import known
from tests.docs.pages import ROOT, Block

OTHERS = {"PyTorchJob", "TrainJob"}  # shown for comparison, and only parsed


def a_job_with(piece: Mapping[str, Any]) -> dict[str, Any]:
    """Put a piece of a job into a whole one."""
    base = script_job() if "script" in piece.get("spec", {}) else recipe_job()
    return _merged(base, piece)


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, Mapping):
        return new
    # Of several ways to say one thing (an interval), the piece's is meant.
    if len(old) == 1 and len(new) == 1 and old.keys() != new.keys():
        return dict(new)
    return old | {name: _merged(old.get(name), value) for name, value in new.items()}


def check_yaml(block: Block) -> None:
    """Raise for YAML that would not do what the page says of it."""
    for document in yaml.safe_load_all(block.text):
        if not isinstance(document, dict):
            raise ValueError(f"{block}: no object: {document!r}")
        kind = document.get("kind")
        if kind == "FineTuneJob":
            parse_job(document)
        elif kind is None and document.keys() <= {"metadata", "spec"}:
            parse_job(a_job_with(document))
        elif kind is None:
            unknown = [name for name in document if name not in known.chart_values()]
            if unknown:
                raise ValueError(f"{block}: neither a piece of a job nor values of the chart: {unknown}")
        elif kind == "Role":
            _check_role(block, document)
        elif kind not in OTHERS:
            raise ValueError(f"{block}: nobody has said how to check a {kind}")


def _check_role(block: Block, role: Mapping[str, Any]) -> None:
    """Profiles are no objects: the name stands for them in the chart's policy, and a wrong one would grant nothing."""
    policy = (ROOT / "charts/finetune-operator/templates/admission-policy.yaml").read_text()
    for rule in role["rules"]:
        for group, resource, verb in itertools.product(rule["apiGroups"], rule["resources"], rule["verbs"]):
            if f"group('{group}').resource('{resource}')" not in policy or f"check('{verb}')" not in policy:
                raise ValueError(f"{block}: admission asks for no right to {verb} {resource} of {group!r}")
