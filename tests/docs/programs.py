"""What each program that the pages call would say to its arguments, as far as that can be told without a cluster.

``check`` returns what is wrong. A program, a verb or an option that nobody has described here is wrong too: add it, with what it must satisfy.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import typer

from finetune_api import contract
from finetune_api.job import parse_job
from finetune_api.status import ConditionType
from tests.chart.helm import KUBERNETES, helm
from tests.docs import known
from tests.docs.examples import a_job_with
from tests.docs.pages import ROOT, Command

_JOBS = {contract.PLURAL, contract.KIND.lower(), "ftj"}
_LABELS = {contract.JOB_LABEL, contract.JOB_UID_LABEL, contract.RANK_LABEL, contract.GENERATION_LABEL, contract.MANAGED_BY_LABEL, contract.LEADER_LABEL, "app.kubernetes.io/name", "app.kubernetes.io/instance"}  # fmt: skip
_KUBECTL_VERBS = {"get", "logs", "apply", "wait", "patch", "create", "delete", "describe", "diff", "auth", "port-forward", "top"}  # fmt: skip
_KUBECTL_WITH_VALUE = {"-n", "--namespace", "-o", "-l", "-f", "-c", "--type", "-p", "--for", "--timeout", "--tail", "--from-literal", "-L", "--as", "--raw", "--sort-by"}  # fmt: skip
_KUBECTL_ALONE = {"-A", "--watch", "--prefix", "--server-side"}
_HELM_WITH_VALUE = {"--namespace", "--set", "--values", "--version", "--timeout"}
_HELM_ALONE = {"--create-namespace", "--wait", "--reset-then-reuse-values"}


def check(command: Command) -> list[str]:
    """Return what is wrong with a command; empty for one that would run."""
    program, *arguments = [word for word in command.words if not re.match(r"[A-Z_]+=", word)] or ["export"]
    if program not in _PROGRAMS:
        return [f"nobody has described the program {program}"]
    return [wrong for wrong in _PROGRAMS[program](command, arguments) if wrong]


def _options(arguments: list[str], with_value: set[str], alone: set[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Part options from the rest. An option that is in neither set comes with the value ``?``."""
    options, rest = [], []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("-") or word == "-":
            rest.append(word)
        elif name in with_value:
            options.append((name, value if equals else next(words, "?")))
        else:
            options.append((name, "" if name in alone else "?"))
    return options, rest


def _make(_: Command, arguments: list[str]) -> Iterator[str]:
    for target in arguments:
        if target not in known.make_targets():
            yield f"there is no make {target}"


def _kubectl(command: Command, arguments: list[str]) -> Iterator[str]:
    if arguments[0] == "finetune":
        yield from _typed("finetune_cli.jobs.commands", arguments[1:])
        return
    options, rest = _options(arguments, _KUBECTL_WITH_VALUE, _KUBECTL_ALONE)
    verb, kind = rest[0], next(iter(rest[1:]), "")
    if verb not in _KUBECTL_VERBS:
        yield f"nobody has described kubectl {verb}"
    for name, value in options:
        if value == "?":
            yield f"nobody has described kubectl's {name}"
        elif name in ("-l", "-L") and value.split("=")[0] not in _LABELS:
            yield f"no object has the label {value}"
        elif name == "-c" and value not in (contract.AGENT_CONTAINER, contract.TRAINER_CONTAINER):
            yield f"no pod has a container {value}"
        elif name == "-f" and not command.path(value).exists():
            yield f"there is no file {value}"
        elif kind in _JOBS:
            yield from _about_jobs(name, value)
    if (verb, len(rest)) == ("get", 2) and kind in _JOBS and command.output:
        header = command.output[0].split()
        yield "" if header == known.printer_columns() else f"the table has the columns {known.printer_columns()}"


def _about_jobs(name: str, value: str) -> Iterator[str]:
    if name == "-o" and value.startswith("jsonpath="):
        yield known.wrong_in_jsonpath(value.removeprefix("jsonpath="))
    elif name == "--for" and value.removeprefix("condition=") not in list(ConditionType):
        yield f"no job has what {value} waits for"
    elif name == "-p":
        parse_job(a_job_with(json.loads(value)))


def _helm(command: Command, arguments: list[str]) -> Iterator[str]:
    options, rest = _options(arguments, _HELM_WITH_VALUE, _HELM_ALONE)
    if rest[0] not in ("install", "upgrade") or len(rest) != 3:
        yield f"nobody has described helm {' '.join(rest)}"
        return
    chart = command.path(rest[2])
    if not (chart / "Chart.yaml").exists():
        yield f"there is no chart {rest[2]}"
        return
    values = []
    for name, value in options:
        if value == "?":
            yield f"nobody has described helm's {name}"
        elif name == "--set":
            values += [name, value]
    rendered = helm("template", rest[1], chart, *KUBERNETES, *values)
    yield rendered.output if rendered.code else ""


def _finetune(_: Command, arguments: list[str]) -> Iterator[str]:
    yield from _typed("finetune_cli.__main__", arguments)


def _typed(module: str, arguments: list[str]) -> Iterator[str]:
    """Let a command line read its arguments, without doing anything."""
    command: Any = typer.main.get_command(importlib.import_module(module).app)
    try:
        while True:
            context = command.make_context("finetune", list(arguments))
            if not hasattr(command, "resolve_command"):
                return
            _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
    except typer.TyperException as error:
        yield f"{error}"


def _python(command: Command, arguments: list[str]) -> Iterator[str]:
    if arguments[0] == "-m":
        yield "" if importlib.util.find_spec(arguments[1]) else f"there is no module {arguments[1]}"
        return
    file = command.path(arguments[0])
    if not file.is_file():
        yield f"there is no program {arguments[0]}"
        return
    for option in (word for word in arguments if word.startswith("--")):
        yield "" if f'"{option}"' in file.read_text() else f"{file.name} has no option {option}"


def _pip(_: Command, arguments: list[str]) -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    lists = [project["project"]["dependencies"], *extras.values(), *project["dependency-groups"].values()]
    packages = {re.split(r"[=<>\[]", requirement)[0] for requirements in lists for requirement in requirements}
    for word in arguments[1:]:
        name, _, extra = word.rstrip("]").partition("[")
        if name != "." and name not in packages:
            yield f"nothing here uses the package {name}"
        elif extra and extra not in extras:
            yield f"there is no extra {extra}"


def _docker(command: Command, arguments: list[str]) -> Iterator[str]:
    if arguments[0] not in ("build", "push", "buildx"):
        yield f"nobody has described docker {arguments[0]}"
    if "-f" in arguments and not command.path(arguments[arguments.index("-f") + 1]).is_file():
        yield "there is no such Dockerfile"


def _cosign(_: Command, arguments: list[str]) -> Iterator[str]:
    (workflow,) = re.findall(r"\.github/workflows/[\w.-]+\.yaml", " ".join(arguments))
    yield "" if (ROOT / workflow).is_file() else f"there is no {workflow}"


def _nothing(_: Command, __: list[str]) -> Iterator[str]:
    yield ""


_PROGRAMS: dict[str, Callable[[Command, list[str]], Iterator[str]]] = {
    "make": _make,
    "kubectl": _kubectl,
    "helm": _helm,
    "finetune": _finetune,
    "python": _python,
    "pip": _pip,
    "docker": _docker,
    "cosign": _cosign,
    "export": _nothing,
    "jq": _nothing,
}
