"""Memory does not grow with the model: a checkpoint and a source, each tensor of which is larger than what the program may hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_trainer.adapters import add_adapter
from finetune_trainer.checkpoint import head as heads
from finetune_trainer.checkpoint import manifest as manifests
from finetune_trainer.checkpoint.manifest import Manifest, Parameter, Position
from finetune_trainer.checkpoint.shard import Owned
from finetune_trainer.object_store import S3ObjectStore
from tests.cli.command import finetune_alone
from tests.storage.seaweedfs import S3Server
from tests.trainer.checkpoint.shards import write_shard

BOUND_MIB = 256
NUMBERS = 72 * 2**20  # of the trained weight: 288 MiB in each of three states, 864 MiB of checkpoint
ROWS, COLUMNS, RANK = 9216, 8192, 4  # of the adapted one: 288 MiB in the source

TELLS_ITS_PEAK = """
import re, sys
from finetune_cli.__main__ import run
code = run(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""


def weights() -> dict[str, torch.Tensor]:
    """The trained weight, and an adapter."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"w": (NUMBERS,), "q.a": (RANK, COLUMNS), "q.b": (ROWS, RANK)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def commit(store: S3ObjectStore, prefix: str, trained: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a checkpoint as two ranks would that share each parameter."""
    parameters = tuple(Parameter(name, value.numel()) for name, value in trained.items())
    index = {parameter.name: number for number, parameter in enumerate(parameters)}
    shards, place = [], "checkpoints/step-1/g1-a/"
    for rank in range(2):
        path = folder / f"rank-{rank:05}.safetensors"
        shards.append(write_shard(path, [half(name, value, rank) for name, value in trained.items()], index))
        store.upload_file(path, f"{prefix}/{place}{path.name}")
        path.unlink()
    body = manifests.encode(Manifest(Position(1, 1), 1, 2, 2, "recipe", parameters, {}, tuple(shards)))
    store.put(f"{prefix}/{place}manifest.json", body)
    kept = heads.Kept(1, f"{place}manifest.json", manifests.digest(body), 1, "2026-01-02T03:04:05Z")
    store.put(f"{prefix}/HEAD", heads.encode(heads.Head(1, 1, "a", (kept,))))


def half(name: str, value: torch.Tensor, rank: int) -> Owned:
    flat = value.reshape(-1)
    middle = flat.numel() // 2
    view = flat[middle:] if rank else flat[:middle]
    return Owned(name, middle if rank else 0, (view, view, view))


def plan(recipe: dict[str, Any], etag: str, size: int) -> dict[str, Any]:
    adapted = {
        "base": {"frozen": {"file": "model.safetensors", "tensor": "q"}},
        "a": {"parameter": "q.a", "dtype": "BF16"},
        "b": {"parameter": "q.b", "dtype": "BF16"},
        "rank": RANK,
        "scaling": 2.0,
        "transposed": False,
    }
    return {
        "version": 1,
        "job": {"namespace": "team-a", "name": "large", "uid": "1"},
        "recipe": recipe,
        "recipeDigest": "recipe",
        "totalSteps": 1,
        "model": {
            "uri": "s3://large/source",
            "version": "1",
            "files": [{"name": "model.safetensors", "version": etag, "sizeBytes": size}],
        },
        "data": {"train": {"uri": "s3://data/train.jsonl", "version": "1"}, "evaluation": None},
        "files": [],
        "constants": None,
        "weights": [
            {"name": "w", "dtype": "BF16", "shape": [NUMBERS // 1024, 1024], "from": {"trained": "w"}},
            {"name": "q", "dtype": "BF16", "shape": [ROWS, COLUMNS], "from": {"adapted": adapted}},
            {"name": "f", "dtype": "BF16", "shape": [ROWS, COLUMNS], "from": adapted["base"]},
        ],
        "tied": [],
        "refusal": None,
    }


@pytest.fixture(scope="module")
def large(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder, trained = tmp_path_factory.mktemp("large"), weights()
    server.create_bucket("large")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        store = S3ObjectStore(server.endpoint)
    base = torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(6))
    save_file({"q": base}, folder / "model.safetensors")
    store.upload_file(folder / "model.safetensors", "s3://large/source/model.safetensors")
    source = store.head("s3://large/source/model.safetensors")
    assert source is not None
    (folder / "model.safetensors").unlink()
    commit(store, "s3://large/job", trained, folder)
    recipe = {
        "model": {"source": "s3://large/source"},
        "task": {"type": "CausalLM"},
        "data": {"train": {"source": "s3://data/train.jsonl"}},
        "training": {"steps": 1, "globalBatchSize": 1},
    }
    document = plan(recipe, source.etag.strip('"'), source.size)
    store.put("s3://large/job/export/plan.json", json.dumps(document).encode())
    return trained | {"base": base}


def test_export_holds_no_tensor_whole(server: S3Server, large: dict[str, torch.Tensor], tmp_path: Path) -> None:
    ran = finetune_alone(server, "export", "s3://large/job", str(tmp_path / "model"), program=TELLS_ITS_PEAK)
    assert ran.code == 0, ran.stderr
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(exported["w"].reshape(-1), large["w"].bfloat16())
    assert torch.equal(exported["f"], large["base"].bfloat16())
    b, a = (large[name].bfloat16().float().numpy() for name in ("q.b", "q.a"))
    merged = add_adapter(large["base"].bfloat16().float().numpy(), b, a, 2.0)
    assert torch.equal(exported["q"], torch.from_numpy(merged).bfloat16())
    print(f"peak of export: {int(ran.stderr) // 1024} MiB")
    assert int(ran.stderr) < BOUND_MIB * 1024


def test_verify_holds_no_tensor_whole(server: S3Server, large: dict[str, torch.Tensor]) -> None:
    ran = finetune_alone(server, "verify", "s3://large/job", program=TELLS_ITS_PEAK)
    assert ran.code == 0, ran.stderr
    print(f"peak of verify: {int(ran.stderr) // 1024} MiB")
    assert int(ran.stderr) < BOUND_MIB * 1024
