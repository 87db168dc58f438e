"""Script jobs on the real cluster: programs that know nothing of this project."""

from typing import Any

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import submit, wait_until
from tests.cluster.training_inputs import script_spec

# Nothing but transformers' documented interface: the progress comes from its own KubeflowCallback.
UNMODIFIED_TRAINER = """
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 256
    def __getitem__(self, i): return {"input_ids": torch.tensor([i % 50] * 8), "labels": torch.tensor(i % 2)}

config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
arguments = TrainingArguments(output_dir="/scratch/out", max_steps=30, per_device_train_batch_size=4, logging_steps=5,
                              save_strategy="no", use_cpu=True, report_to=REPORT)
Trainer(BertForSequenceClassification(config), arguments, train_dataset=Rows()).train()
"""


def test_an_unmodified_transformers_script_shows_its_progress(operator: Cluster, namespace: str) -> None:
    code = UNMODIFIED_TRAINER.replace("REPORT", '["kubeflow"]')
    job = submit(operator, namespace, "plain-trainer", script_spec(operator, code))
    done = job.wait_for_phase("Succeeded")
    assert (done["progress"]["step"], done["progress"]["totalSteps"]) == (30, 30)
    job.delete()


def test_every_rank_gets_torchruns_environment_and_its_own_prefix_in_the_logs(
    operator: Cluster, namespace: str
) -> None:
    code = (
        "import os, torch.distributed as d; d.init_process_group('gloo'); "
        "print('rank', d.get_rank(), 'of', d.get_world_size(), 'user', os.getuid())"
    )
    spec = script_spec(operator, code)
    spec["workers"]["processesPerNode"] = 2
    job = submit(operator, namespace, "ranks", spec)
    job.wait_for_phase("Succeeded")
    expected = {f"rank {rank} of 4 user 65532" for rank in range(4)}

    def printed() -> str:
        return "\n".join(job.logs(pod["metadata"]["name"]) for pod in job.pods())

    wait_until("all ranks have printed", lambda: all(line in printed() for line in expected), 30)
    job.delete()


def test_an_image_without_torch_is_told_in_words(operator: Cluster, namespace: str) -> None:
    spec = script_spec(operator, "pass", nodes=1, image=operator.operator_image)
    job = submit(operator, namespace, "no-torch", spec)
    job.wait_for_phase("Failed")
    assert "torch" in job.condition("Failed")["message"]
    job.delete()


def test_an_image_that_cannot_be_pulled_is_told_and_costs_no_restart(operator: Cluster, namespace: str) -> None:
    job = submit(operator, namespace, "no-image", script_spec(operator, "pass", nodes=1, image="localhost/none:1"))
    status = job.wait("the image is missed", lambda s: _stalled(s) == "ImagePullFailed")
    assert "restarts" not in status
    job.delete()


def _stalled(status: dict[str, Any]) -> str:
    return next(
        (c["reason"] for c in status.get("conditions", []) if c["type"] == "Stalled" and c["status"] == "True"), ""
    )
