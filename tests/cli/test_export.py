"""An export of the last checkpoint is the job's own result, bit for bit; any other one is a model as well."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.command import finetune
from tests.cli.jobs import cases
from tests.storage.seaweedfs import S3Server
from tests.trainer.launch import Case

NAMES = list(cases(Path("/files"), "s3://models"))
MOUNTED = "lora-tied-bf16-zero-2-mounted"


def options(name: str, files: Path) -> tuple[str, ...]:
    return ("--model", str(files / "llama-tied")) if name == MOUNTED else ()


def own_result(server: S3Server, name: str, folder: Path) -> Path:
    client = server.client()
    folder.mkdir()
    for entry in client.list_objects_v2(Bucket="jobs", Prefix=f"{name}/model/")["Contents"]:
        file = folder / entry["Key"].rpartition("/")[2]
        file.write_bytes(client.get_object(Bucket="jobs", Key=entry["Key"])["Body"].read())
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_last_checkpoint_is_the_jobs_own_result(
    name: str, server: S3Server, jobs: dict[str, Case], files: Path, tmp_path: Path
) -> None:
    expected = own_result(server, name, tmp_path / "own")
    ran = finetune(server, "export", f"s3://jobs/{name}", str(tmp_path / "exported"), *options(name, files))
    assert (ran.code, ran.stderr) == (0, "")
    exported = tmp_path / "exported"
    assert {path.name for path in exported.iterdir()} == {path.name for path in expected.iterdir()}
    weights, own = (load_file(folder / "model.safetensors") for folder in (exported, expected))
    assert weights.keys() == own.keys()
    for key, value in own.items():
        assert weights[key].dtype == value.dtype
        assert torch.equal(weights[key].view(torch.uint8), value.view(torch.uint8)), key
    for path in expected.iterdir():
        if path.name not in {"README.md", "model.safetensors"}:
            assert (exported / path.name).read_text() == path.read_text(), path.name
