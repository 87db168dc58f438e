"""The table of reasons holds every reason that the operator can give, and none that it cannot.

Reasons are plain words in the source, met as arguments, in tables and as results of small functions. So every word of that form counts as
one, unless it is listed here as something else: a new reason fails the test until it is explained.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from finetune_api.reasons import GROUPS, REASONS

ROOT = Path(__file__).parents[2]
OPERATOR = ROOT / "operator" / "finetune_operator"
SAVES = ROOT / "trainer" / "finetune_trainer" / "saves.py"  # says why nothing can be committed
WORD = re.compile(r"[A-Z][a-z]+(?:[A-Z][a-z]+)*")
# Words of Kubernetes that the operator reads, or parts of the objects that it makes.
WORDS_OF_OTHERS = {
    *("ContainersReady", "DisruptionTarget", "PodScheduled", "Ready", "Unknown", "True", "False"),
    *(
        "ErrImagePull",
        "ErrImageNeverPull",
        "ImagePullBackOff",
        "ImageInspectError",
        "InvalidImageName",
        "RegistryUnavailable",
    ),
    *("CreateContainerConfigError", "PodInitializing"),
    *("Pending", "Failed"),  # phases of pods
    "Complete",  # a condition
}


def words_in(source: str) -> set[str]:
    """Return the words that could be reasons; docstrings are sentences, so they are none."""
    texts = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {text for text in texts if isinstance(text, str) and WORD.fullmatch(text)}


def reasons_in_the_source() -> set[str]:
    files = [*OPERATOR.glob("plan/*.py"), OPERATOR / "reconcile.py", SAVES]
    return set().union(*(words_in(file.read_text()) for file in files)) - WORDS_OF_OTHERS


def test_every_reason_that_the_operator_gives_is_explained():
    given = reasons_in_the_source()
    assert given - set(REASONS) == set(), "explain these in finetune_api/reasons.py"
    assert set(REASONS) - given == set(), "nobody gives these reasons"


def test_a_reason_that_is_nowhere_explained_is_found():
    source = 'def f(pod):\n    "Sentence"\n    kind = "DiskFull" if pod else "NoPermission"\n    return Problem(kind, f"{pod} is full")'
    assert words_in(source) == {"DiskFull", "NoPermission", "Sentence"}


@pytest.mark.parametrize("reason", REASONS.values(), ids=REASONS)
def test_an_explanation_is_made_of_sentences_that_fit_a_table(reason):
    for text in (reason.meaning, reason.then, *filter(None, [reason.to_do])):
        assert text.endswith(".")
        assert "|" not in text
        assert "\n" not in text


def test_no_reason_is_explained_twice():
    assert len(REASONS) == sum(len(group.reasons) for group in GROUPS)
