"""Save at a step, resume in new processes, and train on as if nothing had happened: two ranks under torchrun, a real S3 server.

Losses are compared as ``repr`` gives them and weights by hash: to the bit. Three launches serve all cases, since one costs more than
all that it trains.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from finetune_trainer.checkpoint.manifest import Manifest, decode
from tests.storage.seaweedfs import S3Server
from tests.trainer.checkpoint.rounds import CASES, FALLS_BACK, RESHAPES, SAVE_AT

REPOSITORY = Path(__file__).parents[3]
LAUNCH_SECONDS = 900
POSITION = [SAVE_AT, 6 * SAVE_AT, [[1, 3], [7, 8]]]


class Launches:
    """Runs rounds.py on several ranks, and reads what they saw."""

    def __init__(self, server: S3Server, folder: Path, *, bucket: str) -> None:
        self.server, self.folder = server, folder
        self.prefix = server.create_bucket(bucket)
        (self.prefix_bucket,) = self.prefix.removeprefix("s3://").split("/")

    def run(self, ranks: int, *activities: str) -> subprocess.CompletedProcess[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        arguments = ["-m", "tests.trainer.checkpoint.rounds", self.server.endpoint, self.prefix, str(self.folder)]
        roots = ("crds", "trainer", ".")
        environment = {
            **os.environ,
            **self.server.environment,
            "PYTHONPATH": os.pathsep.join(str(REPOSITORY / root) for root in roots),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, *torchrun, *arguments, *activities],
            cwd=REPOSITORY,
            env=environment,
            timeout=LAUNCH_SECONDS,
            capture_output=True,
            text=True,
            check=False,
        )

    def seen(self, activity: str, ranks: int) -> list[dict]:
        """Return what each rank saw."""
        return [json.loads((self.folder / f"{activity}-{ranks}-{rank}.json").read_text()) for rank in range(ranks)]

    def get(self, uri: str) -> bytes:
        key = uri.removeprefix(f"{self.prefix}/")
        return self.server.client().get_object(Bucket=self.prefix_bucket, Key=key)["Body"].read()

    def put(self, uri: str, body: bytes) -> None:
        self.server.client().put_object(Bucket=self.prefix_bucket, Key=uri.removeprefix(f"{self.prefix}/"), Body=body)

    def manifest(self, uri: str) -> Manifest:
        return decode(self.get(f"{uri}/manifest.json"))

    def state(self, uri: str) -> dict[tuple[str, str], np.ndarray]:
        """Put a checkpoint together from its files alone, read by the safetensors library."""
        manifest = self.manifest(uri)
        sizes = {parameter.name: parameter.numel for parameter in manifest.parameters}
        whole = {
            (name, s): np.full(n, np.nan, np.float32)
            for name, n in sizes.items()
            for s in ("fp32", "exp_avg", "exp_avg_sq")
        }
        for shard in manifest.shards:
            path = self.folder / shard.name
            path.write_bytes(self.get(f"{uri}/{shard.name}"))
            with safe_open(path, "numpy") as file:
                for key in file.keys():  # noqa: SIM118  not a dict
                    name, state, start = key.rsplit("/", 2)
                    values = file.get_tensor(key)
                    target = whole[name, state][int(start) : int(start) + len(values)]
                    assert np.isnan(target).all(), f"{key} is saved twice"
                    target[:] = values
        return whole


@pytest.fixture(scope="module")
def launches(store_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(store_server, tmp_path_factory.mktemp("rounds"), bucket="round-trips")


@pytest.fixture(scope="module")
def saved(launches: Launches) -> list[dict]:
    done = launches.run(2, "save", "die")
    assert re.search(r"local_rank: 1\)\s+exitcode\s*: -9 ", done.stderr), done.stdout + done.stderr
    return launches.seen("save", 2)


@pytest.fixture(scope="module")
def resumed(launches: Launches, saved: list[dict]) -> list[dict]:
    uri = saved[0]["falls back"]["uri"] + "/rank-00001.safetensors"
    body = launches.get(uri)
    launches.put(uri, body[:-1] + bytes([body[-1] ^ 1]))
    for ranks, activities in ((2, ["recall", "resume"]), (3, ["reshape"]), (2, ["reshape"])):
        done = launches.run(ranks, *activities)
        assert done.returncode == 0, done.stdout + done.stderr
    return launches.seen("resume", 2)


@pytest.fixture(scope="module")
def recalled(launches: Launches, resumed: list[dict]) -> list[dict]:
    return launches.seen("recall", 2)


@pytest.fixture(scope="module")
def reshaped(launches: Launches, resumed) -> dict[int, dict[str, dict]]:
    done = launches.run(1, "reshape")
    assert done.returncode == 0, done.stdout + done.stderr
    return {ranks: launches.seen("reshape", ranks)[0] for ranks in (1, 2, 3)}


@pytest.mark.parametrize("name", CASES)
def test_saving_does_not_disturb_training(saved, name):
    assert all(rank[name]["undisturbed"] for rank in saved)


@pytest.mark.parametrize("source", ["Memory", "Storage"])
@pytest.mark.parametrize("name", CASES)
def test_new_processes_train_on_bit_for_bit(saved, resumed, recalled, name, source):
    for before, after in zip(saved, recalled if source == "Memory" else resumed, strict=True):
        assert after[name]["source"] == source
        assert after[name]["position"] == POSITION
        assert after[name]["losses"] == before[name]["losses"][-len(after[name]["losses"]) :]
        assert len(after[name]["losses"]) * 2 == len(before[name]["losses"])
        assert after[name]["digest"] == before[name]["digest"]
        assert after[name]["skipped"] == before[name]["skipped"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_cases_of_fp16_skip_steps_on_overflow(saved, stage):
    """Not on stage 0: DeepSpeed 0.19.8 divides the gradients by its loss scale there, but never multiplies the loss."""
    assert 0 < saved[0][f"zero {stage} FP16"]["skipped"] < SAVE_AT, "or they would prove nothing about the loss scale"


@pytest.mark.parametrize("name", CASES)
def test_every_number_is_saved_exactly_once_in_plain_safetensors(launches, saved, name):
    state = launches.state(saved[0][name]["uri"])
    assert all(np.isfinite(values).all() for values in state.values())
    is_adapter = [("down" in parameter or "up" in parameter) for parameter, _ in state]
    assert any(is_adapter) == name.startswith("lora")


@pytest.mark.parametrize(
    ("ranks", "pair"),
    [(ranks, pair) for ranks, pairs in RESHAPES.items() for pair in pairs],
    ids=[f"{source} to {target} on {ranks}" for ranks, pairs in RESHAPES.items() for source, target in pairs],
)
def test_another_world_size_or_stage_holds_the_same_numbers(launches, saved, reshaped, ranks, pair):
    source, target = pair
    before, after = saved[0][source]["uri"], reshaped[ranks][f"{source} to {target}"]["uri"]
    expected, found = launches.state(before), launches.state(after)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[key], found[key]) for key in expected)
    assert launches.manifest(after).world_size == ranks
    assert launches.manifest(after).position == launches.manifest(before).position
    assert launches.manifest(after).scalars["parameterGroups"] == launches.manifest(before).scalars["parameterGroups"]
    assert launches.manifest(after).scalars["adamStep"] == launches.manifest(before).scalars["adamStep"]


def test_damage_that_one_rank_sees_makes_all_fall_back(launches, saved, resumed):
    for before, after in zip(saved, resumed, strict=True):
        assert after["falls back"]["position"] == POSITION
        assert after["falls back"]["losses"] == before[FALLS_BACK]["losses"][SAVE_AT:]
        assert after["falls back"]["digest"] == before[FALLS_BACK]["digest"]


def test_a_rank_killed_in_the_middle_of_a_save_leaves_the_older_checkpoint(saved, resumed):
    for before, after in zip(saved, resumed, strict=True):
        assert after["killed"]["position"] == POSITION
        assert after["killed"]["losses"] == before[FALLS_BACK]["losses"][SAVE_AT:]
        assert after["killed"]["digest"] == before[FALLS_BACK]["digest"]


def test_ranks_that_were_told_of_different_sources_take_that_of_rank_0(saved, resumed):
    """``resumeFrom`` was edited, and one of two pods made anew."""
    for before, after in zip(saved, resumed, strict=True):
        assert (after["told apart"]["source"], after["told apart"]["position"]) == ("OtherJob", POSITION)
        first, *_ = after["told apart"]["losses"]
        assert first == before[FALLS_BACK]["losses"][SAVE_AT], (
            "its weights; its optimizer's settings are not taken over"
        )
