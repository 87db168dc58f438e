"""The charts' READMEs: every value that there is, as values.yaml says it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
import yaml

from finetune_operator.settings import Profile
from tests.chart.helm import CHARTS, CRDS, OPERATOR


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", CHARTS / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_they_are_fresh() -> None:
    ran = subprocess.run([sys.executable, CHARTS / "readme.py", "--check"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("chart", [CRDS, OPERATOR], ids=lambda chart: chart.name)
def test_every_value_is_there(chart) -> None:
    text = (chart / "README.md").read_text()
    for name in yaml.safe_load((chart / "values.yaml").read_text()):
        assert f"| `{name}" in text


def test_every_field_of_a_profile_is_there() -> None:
    text = (OPERATOR / "README.md").read_text()
    for field in Profile.model_fields.values():
        assert f"| `profiles.default.{field.alias}`" in text


def test_what_is_written_where() -> None:
    assert generator().tables("""\
# Above one.
one: 1  # and behind it

# Of the parent | and <its> first key.
two:
  inner: {a: [1]}
  # second: x    that may be set
# A title -----------

three: ""  # last
# four: 4    another
""") == (
        "| Value | Default | Meaning |\n|---|---|---|\n"
        "| `one` | `1` | Above one. And behind it |\n"
        '| `two.inner` | `{"a": [1]}` | Of the parent \\| and &lt;its> first key. |\n'
        "| `two.second` | not set, e.g. `x` | That may be set |\n"
        "\n### A title\n\n| Value | Default | Meaning |\n|---|---|---|\n"
        '| `three` | `""` | Last |\n'
        "| `four` | not set, e.g. `4` | Another |\n"
    )


def test_a_value_without_a_word_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"says nothing of a\.b"):
        generator().tables("a:\n  b: 1\n")
