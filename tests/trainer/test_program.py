"""``python -m finetune_trainer`` as an agent sees it: exit codes, beats, the error file, one line on stderr, SIGTERM."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api import contract
from finetune_api.contract import ExitCode
from finetune_api.protocol import BeatKind
from finetune_trainer.__main__ import main
from finetune_trainer.job import read_job
from tests.trainer.launch import Launcher, listening
from tests.trainer.recipes import STEPS, classification

DEADLINE_SECONDS = 300


@pytest.fixture(autouse=True)
def _own_signal_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def environment(folder: Path, recipe: Any, job: Any, **more: str) -> dict[str, str]:
    (folder / "recipe.json").write_text(recipe if isinstance(recipe, str) else json.dumps(recipe))
    (folder / "job.json").write_text(json.dumps(job))
    return {
        contract.RECIPE_FILE_VARIABLE: str(folder / "recipe.json"),
        contract.JOB_FILE_VARIABLE: str(folder / "job.json"),
        contract.GENERATION: "3",
        contract.EXPECTED_WORLD_SIZE: "1",
        contract.PROGRESS_SOCKET: str(folder / "beats"),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        **more,
    }


JOB = {"namespace": "team-a", "name": "x", "uid": "u", "jobServer": "https://h:1", "storage": {"prefix": "s3://b/p"}}
GOOD = classification(Path("/data"))

# id: (recipe, job, more environment, exit code, the line on stderr; {folder} is the test's)
ENDS_AT_START = {
    "a world of another size": (
        GOOD,
        JOB,
        {"WORLD_SIZE": "2"},
        ExitCode.WRONG_WORLD,
        "WORLD_SIZE is 2, but the job says FINETUNE_WORLD_SIZE=1",
    ),
    "a world of unknown size": (
        GOOD,
        JOB,
        {contract.EXPECTED_WORLD_SIZE: ""},
        ExitCode.WRONG_WORLD,
        "WORLD_SIZE is 1, but the job says FINETUNE_WORLD_SIZE=(unset)",
    ),
    "no generation": (
        GOOD,
        JOB,
        {contract.GENERATION: ""},
        ExitCode.BAD_CONFIG,
        "FINETUNE_GENERATION='': must be a whole number from 1; the agent sets it",
    ),
    "no recipe": (
        GOOD,
        JOB,
        {contract.RECIPE_FILE_VARIABLE: "/nowhere/recipe.json"},
        ExitCode.BAD_CONFIG,
        "/nowhere/recipe.json: cannot be read: No such file or directory",
    ),
    "a recipe that is no JSON": (
        "{",
        JOB,
        {},
        ExitCode.BAD_CONFIG,
        "{folder}/recipe.json: not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "a recipe with an unknown field": (
        GOOD | {"trainning": {}},
        JOB,
        {},
        ExitCode.BAD_CONFIG,
        "{folder}/recipe.json: recipe.trainning: Extra inputs are not permitted",
    ),
    "a recipe that breaks a rule": (
        classification(Path("/data"), training={"epochs": 1}),
        JOB,
        {},
        ExitCode.BAD_CONFIG,
        "{folder}/recipe.json: recipe.training: exactly one of epochs and steps must be set",
    ),
    "a job without storage": (
        GOOD,
        {name: value for name, value in JOB.items() if name != "storage"},
        {},
        ExitCode.BAD_CONFIG,
        "{folder}/job.json: $.storage: is missing; a recipe needs a place for its checkpoints and its model",
    ),
    "a job without name": (
        GOOD,
        {name: value for name, value in JOB.items() if name != "name"},
        {},
        ExitCode.BAD_CONFIG,
        "{folder}/job.json: $.name: is missing",
    ),
}


@pytest.mark.parametrize("end", ENDS_AT_START.values(), ids=ENDS_AT_START.keys())
def test_says_why_it_does_not_start(
    end: tuple[Any, Any, dict[str, str], ExitCode, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe, job, more, code, line = end
    line = line.replace("{folder}", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with listening(tmp_path / "beats") as listener:
        assert main(environment(tmp_path, recipe, job, **more)) == code
    assert capfd.readouterr().err == f"{code.name}: {line}\n"
    (failure,) = listener.of(BeatKind.FAILURE)
    assert (failure.generation, failure.rank, failure.exit_code, failure.message) == (
        0 if more.get(contract.GENERATION) == "" else 3,
        0,
        code,
        line,
    )
    assert line in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_sigterm_saves_the_step_and_the_next_generation_finishes(launcher: Launcher, files: Path) -> None:
    """With bad luck the signal comes after the last step; then there is nothing to stop."""
    recipe = classification(files, training={"steps": 400})
    folder = launcher.folder / "terminated"
    variables = launcher.environment(world_size=2) | launcher.write_case(folder, recipe, prefix="terminated")
    with listening(folder / "beats") as listener:
        process = launcher.start("finetune_trainer", ranks=2, environment=variables)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not listener.progress and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=DEADLINE_SECONDS)
    exits = listener.of(BeatKind.FAILURE)
    (committed,) = listener.of(BeatKind.CHECKPOINT)
    last = committed.step
    assert sorted((told.rank, told.exit_code) for told in exits) == [(0, ExitCode.SAVED), (1, ExitCode.SAVED)], stderr
    assert {told.message for told in exits} == {f"stopped on request; step {last} is saved"}
    assert listener.progress[-1].step <= last < 400
    assert f"checkpoint of step {last} committed: {launcher.bucket}/terminated/checkpoints/" in stdout
    assert stderr.count(f"SAVED: stopped on request; step {last} is saved") == 2
    assert "finetune_trainer/train.py" not in stderr  # no traceback of ours


def test_a_whole_job_under_torchrun(launcher: Launcher, files: Path) -> None:
    ended, listener = launcher.train("whole", classification(files), ranks=2)
    assert ended.code == 0, ended.stderr
    steps = [progress.step for progress in listener.progress]
    assert steps == sorted(set(steps)), "a beat that the next one replaces may be lost, and none comes twice"
    assert (steps[-1], set(steps) <= set(range(1, STEPS + 1))) == (STEPS, True)
    assert [model.uri for model in listener.of(BeatKind.MODEL)] == [f"{launcher.bucket}/whole/model"]
    assert listener.of(BeatKind.FAILURE) == []
    assert f"step {STEPS}/{STEPS}, epoch " in ended.stdout
    assert "evaluation at step 12: loss " in ended.stdout


@pytest.mark.parametrize(
    ("of_pod", "ranks", "of_rank"), [(1000, "1", 1000), (1000, "8", 125), (4, "8", 1), (None, "8", None)]
)
def test_the_ranks_of_a_pod_share_what_it_may_upload(
    tmp_path: Path, of_pod: int | None, ranks: str, of_rank: int | None
) -> None:
    job = {**JOB, "checkpoint": {"uploadBytesPerSecond": of_pod}}
    assert read_job(environment(tmp_path, GOOD, job, LOCAL_WORLD_SIZE=ranks)).upload_bytes_per_second == of_rank
