"""What is in agent.pyz, and what its source may use."""

import ast
import os
import re
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import finetune_agent
from finetune_agent.build import build_agent
from finetune_api import contract, protocol

PACKAGE = Path(finetune_agent.__file__).parent
CARRIED = [*sorted(PACKAGE.glob("*.py")), Path(contract.__file__), Path(protocol.__file__)]
# Stay within what Python 3.9 has, beyond what its parser can tell.
TOO_NEW = (
    "tomllib",
    "slots=True",
    "kw_only=True",
    "StrEnum",
    "ExceptionGroup",
    "add_note",
    "TypeAlias",
    "ParamSpec",
    "strict=",
)


def test_the_same_source_gives_the_same_bytes(tmp_path):
    files = [tmp_path / name for name in ("first.pyz", "second.pyz")]
    for file in files:
        build_agent(file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert os.access(files[0], os.X_OK)
    assert sorted(tmp_path.iterdir()) == files


def test_the_archive_holds_the_agent_and_the_two_files_of_the_api(agent_file):
    with zipfile.ZipFile(agent_file) as archive:
        names = set(archive.namelist())
    agent = {"finetune_agent/" + file.name for file in PACKAGE.glob("*.py")} - {"finetune_agent/build.py"}
    assert names == agent | {
        "__main__.py",
        "finetune_api/__init__.py",
        "finetune_api/contract.py",
        "finetune_api/protocol.py",
    }


def test_it_is_small(agent_file):
    assert agent_file.stat().st_size < 64 * 1024


@pytest.mark.parametrize("file", CARRIED, ids=lambda file: file.name)
def test_a_carried_file(file):
    text = file.read_text()
    tree = ast.parse(text, feature_version=(3, 9))
    allowed = {"finetune_agent", "finetune_api.contract", "finetune_api.protocol", "finetune_api"}
    if file.name == "torchrun_wrapper.py":
        allowed |= {"torch.distributed.run", "torch.distributed.elastic.multiprocessing.errors"}  # the image's own
    foreign = {name for name in imports(tree) if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in foreign if name not in allowed and not name.startswith("finetune_agent.")} == set()
    assert [word for word in TOO_NEW if word in text] == []
    assert not [node for node in ast.walk(tree) if is_union_by_bar(node)]


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            if node.module == "finetune_api":
                yield from ("finetune_api." + alias.name for alias in node.names)
            else:
                yield node.module


def is_union_by_bar(node) -> bool:
    annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
    return any(isinstance(part, ast.BinOp) for part in ast.walk(annotation)) if annotation is not None else False


@pytest.mark.parametrize("name", ["__init__.py", "__main__.py"])
def test_what_an_old_python_must_parse_to_be_told_so(name):
    tree = ast.parse((PACKAGE / name).read_text(), feature_version=(3, 4))
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.AnnAssign))]


def test_the_agents_version_is_the_projects():
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())["project"]
    assert finetune_agent.__version__ == project["version"]


def test_the_exit_code_that_an_old_python_gets_is_the_contracts():
    code = re.search(r"^BAD_CONFIG = (\d+)", (PACKAGE / "__main__.py").read_text(), re.MULTILINE)
    assert int(code[1]) == contract.ExitCode.BAD_CONFIG
