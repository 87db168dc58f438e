"""What the pages show is so: YAML is accepted, commands could run, fields, files, tests and values that they name exist.

Nothing is run here but parsers. The commands of ``docs/checkpoints-command-line.md`` do run, in ``tests/cli/test_documentation.py``.
"""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.docs import known, pages, programs
from tests.docs.examples import check_yaml
from tests.docs.pages import PAGES, ROOT, Block, Command

JOB_PARTS = ("recipe", "script", "storage", "checkpoint", "workers", "recovery")
PARSERS: dict[str, Callable[[str], object]] = {"python": ast.parse, "json": json.loads}
LANGUAGES = {"", "yaml", "console", "sh", *PARSERS}
PATH = re.compile(
    r"((?:charts|tests|examples|docs|benchmarks|crds|operator|trainer|release|\.github|\.ci)/[\w./*-]+)(?:::(\w+))?"
)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("block", pages.all_blocks("yaml"), ids=str)
def test_yaml_is_what_it_is_said_to_be(block: Block) -> None:
    check_yaml(block)


@pytest.mark.parametrize("command", [*pages.commands(), *pages.inline_commands()], ids=str)
def test_a_command_could_run(command: Command) -> None:
    assert programs.check(command) == []


@pytest.mark.parametrize("block", pages.all_blocks(*PARSERS), ids=str)
def test_python_and_json_can_be_read(block: Block) -> None:
    PARSERS[block.language](block.text)


def test_every_block_is_of_a_language_that_is_checked() -> None:
    assert {block.language for page in PAGES for block in pages.blocks(page)} <= LANGUAGES


def wrong_names(code: set[str]) -> list[str]:
    return [text for text in sorted(code) if not _exists(text)]


def _exists(text: str) -> bool:
    """Whether what a piece of inline code names is there; what names nothing that is known here, is."""
    if found := PATH.fullmatch(text):
        path, test = found.groups()
        files = list(ROOT.glob(path.rstrip("/")))
        return bool(files) and (test is None or f"def {test}(" in files[0].read_text())
    if text.startswith("make "):
        words = [word for word in text.split()[1:] if "=" not in word]
        variables = {word.split("=")[0] for word in text.split()[1:] if "=" in word}
        return set(words) <= known.make_targets() and variables <= known.make_variables()
    if not re.fullmatch(r"[a-z]\w*(\[\])?(\.\w+(\[\])?)+", text):
        return True
    first = text.split(".", maxsplit=1)[0]
    if first in ("spec", "status"):
        return known.has_field(text)
    if first in JOB_PARTS:
        return known.has_field(f"spec.{text}") or known.has_field(f"status.{text}") or known.has_value(text)
    return first not in known.chart_values() or known.has_value(text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_names_exists(page: Path) -> None:
    assert wrong_names(pages.inline_code(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_links_to_exists(page: Path) -> None:
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in pages.anchors(target), link


# The checks themselves: each finds what it is for.


def command(text: str) -> Command:
    return Command(Block(ROOT / "README.md", 1, "console", ""), tuple(text.split(" ")))


WRONG_COMMANDS = {
    "a target that is not there": "make demonstration",
    "a field that status does not have": "kubectl get ftj x -o jsonpath={.status.progres.step}",
    "a field behind a list": "kubectl get ftj x -o jsonpath={.status.attempts.reason}",
    "a condition that no job has": 'kubectl get ftj x -o jsonpath={.status.conditions[?(@.type=="Done")].message}',
    "a condition to wait for that no job has": "kubectl wait ftj x --for=condition=Succeeded",
    "a label of nothing": "kubectl logs -l finetune.dev/name=x",
    "a container of nothing": "kubectl logs -c main",
    "a file that is not there": "kubectl apply -f examples/none.yaml",
    "an option that nobody has described": "kubectl get ftj --all",
    "a chart that is not there": "helm install x charts/none",
    "a value that the chart does not have": "helm install x charts/finetune-operator --set image.name=a",
    "a command that finetune does not have": "finetune checkpoints list s3://a/b",
    "an option that finetune does not have": "finetune checkpoints ls s3://a/b --json",
    "a program that is not there": "python examples/sentiment/train.py",
    "an option that a program does not have": "python examples/sentiment/prepare.py --url x",
    "an extra that is not there": "pip install finetune-operator[client]",
    "a value that no profile has": "helm install x charts/finetune-operator --set profiles.default.picture=a",
    "a program that nobody has described": "oc get ftj",
}


@pytest.mark.parametrize("text", WRONG_COMMANDS.values(), ids=WRONG_COMMANDS.keys())
def test_a_wrong_command_is_found(text: str) -> None:
    assert programs.check(command(text)) != []


def test_a_wrong_patch_is_found() -> None:
    patch = ("kubectl", "patch", "ftj", "x", "--type", "merge", "-p", '{"spec":{"suspended":true}}')
    with pytest.raises(ValidationError, match="suspended"):
        programs.check(Command(Block(ROOT / "README.md", 1, "console", ""), patch))


def test_a_wrong_table_is_found() -> None:
    block = Block(ROOT / "README.md", 1, "console", "")
    assert programs.check(Command(block, ("kubectl", "get", "ftj"), ("NAME  STATE",))) != []
    assert programs.check(Command(block, ("kubectl", "get", "ftj"), ("  ".join(known.printer_columns()),))) == []


WRONG_YAML = {
    "a field that a job does not have": "spec: {workers: {replicas: 2}}",
    "a value that a job does not take": "spec: {recipe: {training: {precision: INT4}}}",
    "a job without a recipe": "{kind: FineTuneJob, metadata: {name: x}, spec: {}}",
    "a value that the chart does not have": "allowedEndpoint: [amazon-s3]",
    "a right that nothing asks for": "{kind: Role, rules: [{apiGroups: [finetune.dev], resources: [profile], verbs: [use]}]}",
    "a kind that nobody has described": "{kind: Pod, metadata: {name: x}}",
}


@pytest.mark.parametrize("text", WRONG_YAML.values(), ids=WRONG_YAML.keys())
def test_wrong_yaml_is_found(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  of either kind
        check_yaml(Block(ROOT / "README.md", 1, "yaml", text))


@pytest.mark.parametrize(
    "text",
    ["status.gang.size", "workers.replicas", "charts/none/values.yaml", "tests/docs/test_pages.py::test_none",
     "make everything", "make demo CLUSTER=x", "leaderElection.seconds"],
)  # fmt: skip
def test_a_wrong_name_is_found(text: str) -> None:
    assert wrong_names({text, "status.gang.nodes", "anything.else", "silentSeconds"}) == [text]
