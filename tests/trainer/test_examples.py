"""The examples' manifests are valid, and their data is cut as they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from finetune_api.job import FineTuneJob

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sentiment() -> ModuleType:
    return load(EXAMPLES / "sentiment" / "prepare.py")


@pytest.mark.parametrize("name", ["sentiment", "pretrain"])
def test_the_manifest_is_valid(name: str) -> None:
    manifest = yaml.safe_load((EXAMPLES / name / "job.yaml").read_text())
    assert FineTuneJob.model_validate(manifest).spec.recipe is not None


@pytest.mark.parametrize(
    ("rating", "label"),
    [
        (-4.0, "negative"),
        (-1.5, "negative"),
        (-1.49, "neutral"),
        (0.0, "neutral"),
        (1.49, "neutral"),
        (1.5, "positive"),
    ],
)
def test_ratings_become_classes(rating: float, label: str, sentiment: ModuleType) -> None:
    assert sentiment.label_of(rating) == label


def test_no_sentence_is_in_both_parts(sentiment: ModuleType) -> None:
    ratings = [(index % 9 - 4.0, f"Sentence number {index // 2}{'.' * (index % 2)}") for index in range(400)]
    train, evaluation = sentiment.split(sentiment.label_sentences(iter(ratings)))
    assert len(train) + len(evaluation) == 200
    assert len(evaluation) == 30
    assert not {e.text.rstrip(".") for e in train} & {e.text.rstrip(".") for e in evaluation}
    assert sentiment.split(train + evaluation) == sentiment.split(train + evaluation)


def test_macro_f1_is_scikit_learns(sentiment: ModuleType) -> None:
    from sklearn.metrics import f1_score

    expected = ["negative", "neutral", "positive", "positive", "neutral", "negative", "positive"]
    predicted = ["negative", "positive", "positive", "neutral", "neutral", "neutral", "positive"]
    examples = [sentiment.Example("", label) for label in expected]
    assert sentiment.macro_f1(examples, predicted) == pytest.approx(f1_score(expected, predicted, average="macro"))


def test_pretraining_reads_modules_and_leaves_tests_out(tmp_path: Path) -> None:
    pretrain = load(EXAMPLES / "pretrain" / "prepare.py")
    for name in ("ast.py", "json/decoder.py", "test/test_ast.py", "empty.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.py" else name)
    assert list(pretrain.read_sources(tmp_path)) == ["ast.py", "json/decoder.py"]
