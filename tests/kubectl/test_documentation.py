"""The page shows commands that exist, and tells all fields of all documents."""

from __future__ import annotations

import re
import shlex

import pytest
from typer.main import get_command

from finetune_cli.jobs.commands import app
from finetune_cli.jobs.story import status_to_json
from tests.kubectl.command import ROOT
from tests.kubectl.jobs import RUNNING, a_job

PAGES = {page: (ROOT / page).read_text() for page in ("docs/command-line.md", "README.md")}
COMMANDS = [line[2:] for text in PAGES.values() for line in text.splitlines() if line.startswith("$ kubectl finetune ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line: str):
    _, _, name, *arguments = shlex.split(line.split(" < ", maxsplit=1)[0], comments=True)
    command = get_command(app).commands[name]
    command.make_context(name, arguments)


def test_all_commands_are_shown():
    assert {shlex.split(line)[2] for line in COMMANDS} == set(get_command(app).commands)


def test_all_fields_of_a_status_are_told():
    told = set(re.findall(r"`([a-zA-Z]+)(?:\[\])?`", PAGES["docs/command-line.md"]))
    document = status_to_json(a_job(RUNNING))
    assert set(document) | set(document["troubles"][0]) <= told


def test_the_program_that_is_shown_for_python_is_one():
    (program,) = re.findall(r"```python\n(.*?)```", PAGES["docs/command-line.md"], re.DOTALL)
    names = re.search(r"from finetune_client import (.*)", program)
    assert names is not None
    import finetune_client

    assert {name.strip() for name in names[1].split(",")} <= set(finetune_client.__all__)
    compile(program, "docs/command-line.md", "exec")
