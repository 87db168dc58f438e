"""Wrong manifests, and what users must be told: one table, for the API server and for the Python types.

The two speak differently only where the words are their own (bounds, types); ``types_say`` gives Python's then. Words are
fragments, compared without regard to case; every one of them must be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.api.api_server import Json
from tests.api.manifests import GONE, changed, recipe_job, script_job


@dataclass(frozen=True, slots=True)
class Wrong:
    """A manifest that must be refused at ``path`` with a message that holds ``says``."""

    because: str
    changes: Mapping[str, Any]
    path: str
    says: tuple[str, ...]
    types_say: tuple[str, ...] | None = None
    types_path: str | None = None
    start: Json = field(default_factory=recipe_job)

    @property
    def manifest(self) -> Json:
        return changed(self.start, self.changes)


UNKNOWN = (("unknown field",), ("not permitted",))
ONE_LINE = ("one line of text without control characters",)
OBJECT_NAME = ("name of a Kubernetes object", "lower-case letters")
MODEL_URI = ("s3://bucket/path", "pvc://claim/path", "file:///path", "hf://organisation/name@revision")
DATA_URI = ("s3://bucket/path", ".jsonl, .csv or .parquet", "'..'", "'//'", "'%'", "spaces")
STORAGE_URI = ("must be s3://bucket or s3://bucket/path", "'..'", "'%'")
ENDPOINT = ("http://host[:port] or https://host[:port]", "without user, path or query")
IMAGE = ("image reference", "registry/name:tag")
RESERVED = ("cannot be set by a job", "operator, torchrun or the administrator")
LORA_ONLY = ("rank, alpha, dropout and targets are not allowed for any other method",)
STEPS_OR_EPOCHS = ("exactly one of epochs and steps must be set",)
INTERVAL = ("exactly one of steps, seconds and auto must be set",)
JOB_NAME = ("DNS label", "40 characters")
RESUME_FROM = ("s3://bucket/prefix-of-another-job", "@step", "'..'", "'%'")
STAGING, BYTE_RATE = ("at least 1Mi", "at most 4Ti"), ("bytes per second", "at least 1Mi", "at most 1Ti")
CORES, BYTES = ("positive number of cores", "500m"), ("positive number of bytes", "64Gi")


def unknown(because: str, path: str, value: object = 1, start: Json | None = None) -> Wrong:
    return Wrong(because, {path: value}, path, *UNKNOWN, start=start or recipe_job())


def model(because: str, uri: str) -> Wrong:
    return Wrong(because, {"spec.recipe.model.source": uri}, "spec.recipe.model.source", MODEL_URI)


def data(because: str, uri: str) -> Wrong:
    return Wrong(because, {"spec.recipe.data.train.source": uri}, "spec.recipe.data.train.source", DATA_URI)


def storage(because: str, uri: str) -> Wrong:
    return Wrong(because, {"spec.storage.uri": uri}, "spec.storage.uri", STORAGE_URI)


def endpoint(because: str, url: str) -> Wrong:
    return Wrong(because, {"spec.storage.endpoint": url}, "spec.storage.endpoint", ENDPOINT)


def environment(because: str, name: str, says: tuple[str, ...] = RESERVED) -> Wrong:
    variables = [{"name": "EPOCHS", "value": "3"}, {"name": name, "value": "x"}]
    return Wrong(
        because, {"spec.script.environment": variables}, "spec.script.environment[1].name", says, start=script_job()
    )


def training(because: str, changes: Mapping[str, Any], path: str, says: tuple[str, ...], **more: Any) -> Wrong:
    prefix = "spec.recipe.training"
    return Wrong(
        because,
        {f"{prefix}.{name}": value for name, value in changes.items()},
        f"{prefix}.{path}".rstrip("."),
        says,
        **more,
    )


def cores(because: str, quantity: object) -> Wrong:
    return Wrong(because, {"spec.workers.resources.cpu": quantity}, "spec.workers.resources.cpu", CORES)


def memory(because: str, quantity: object) -> Wrong:
    return Wrong(because, {"spec.workers.resources.memory": quantity}, "spec.workers.resources.memory", BYTES)


def resume_from(because: str, uri: str) -> Wrong:
    return Wrong(because, {"spec.checkpoint.resumeFrom": uri}, "spec.checkpoint.resumeFrom", RESUME_FROM)


def staging(because: str, quantity: object) -> Wrong:
    return Wrong(because, {"spec.checkpoint.stagingMemory": quantity}, "spec.checkpoint.stagingMemory", STAGING)


def byte_rate(because: str, quantity: object) -> Wrong:
    path = "spec.checkpoint.uploadBytesPerSecond"
    return Wrong(because, {path: quantity}, path, BYTE_RATE)


def name(because: str, job_name: str) -> Wrong:
    return Wrong(because, {"metadata.name": job_name}, "metadata.name", JOB_NAME)


def nothing_but(**changes: Any) -> dict[str, Any]:
    """Changes that take the evaluation out too, so that only what is meant is wrong."""
    gone = {"spec.recipe.evaluation": GONE, "spec.recipe.data.evaluation": GONE}
    return gone | {f"spec.recipe.{path.replace('__', '.')}": value for path, value in changes.items()}


# fmt: off
WRONG: tuple[Wrong, ...] = (
    # What to run
    Wrong("neither recipe nor script", {"spec.recipe": GONE}, "spec", ("exactly one of recipe and script must be set",)),
    Wrong(
        "both recipe and script",
        {"spec.script": script_job()["spec"]["script"]},
        "spec",
        ("exactly one of recipe and script must be set",),
    ),
    Wrong("no spec", {"spec": GONE}, "spec", ("required",)),
    Wrong("a recipe without storage", {"spec.storage": GONE}, "spec.storage", ("storage is required with recipe",)),
    Wrong("a recipe without a model", {"spec.recipe.model": GONE}, "spec.recipe.model", ("required",)),
    Wrong("a recipe without training data", {"spec.recipe.data.train": GONE}, "spec.recipe.data.train", ("required",)),
    training("no batch size", {"globalBatchSize": GONE}, "globalBatchSize", ("required",)),
    # Unknown fields, at every depth
    unknown("a misspelt field of spec", "spec.workres", {}),
    unknown("a field of an older draft in workers", "spec.workers.replicas"),
    unknown("a pod template in workers", "spec.workers.template", {}),
    unknown("a misspelt field of training", "spec.recipe.training.learning_rate", 0.1),
    unknown("a misspelt constant of the optimizer", "spec.recipe.training.optimizer.lr", 0.1),
    unknown("an unknown offload", "spec.recipe.zero.offload.gradients", "CPU"),
    unknown("raw DeepSpeed configuration", "spec.recipe.zero.deepspeed", {}),
    unknown("trust_remote_code", "spec.recipe.model.trustRemoteCode", True),
    unknown("a key in storage", "spec.storage.accessKey", "AKIA"),
    unknown("a volume of a script", "spec.script.volumes", [], script_job()),
    Wrong(
        "a secret reference in an environment variable",
        {"spec.script.environment": [{"name": "KEY", "valueFrom": {}}]},
        "spec.script.environment[0].valueFrom",
        *UNKNOWN,
        start=script_job(),
    ),
    # Closed words
    Wrong(
        "a task of another product", {"spec.recipe.task.type": "text-classification"}, "spec.recipe.task.type",
        ("SequenceClassification", "CausalLM"),
    ),
    Wrong("a precision in lower case", {"spec.recipe.training.precision": "bf16"}, "spec.recipe.training.precision", ("FP32", "BF16", "FP16")),
    Wrong("an unknown optimizer", {"spec.recipe.training.optimizer.name": "Adam"}, "spec.recipe.training.optimizer.name", ("AdamW",)),
    Wrong("an unknown schedule", {"spec.recipe.training.schedule.name": "Step"}, "spec.recipe.training.schedule.name", ("Constant", "Linear", "Cosine")),
    Wrong("an unknown tuning method", {"spec.recipe.tuning.method": "lora"}, "spec.recipe.tuning.method", ("Full", "LoRA")),
    Wrong("an unknown metric", {"spec.recipe.evaluation.metrics": ["F1"]}, "spec.recipe.evaluation.metrics[0]", ("Accuracy", "MacroF1")),
    Wrong("an unknown offload target", {"spec.recipe.zero.offload.optimizer": "NVMe"}, "spec.recipe.zero.offload.optimizer", ("None", "CPU")),
    Wrong("an unknown initialization", {"spec.recipe.model.initialization": "Scratch"}, "spec.recipe.model.initialization", ("Pretrained", "Random")),
    Wrong("auto turned off instead of left out", {"spec.checkpoint.interval": {"auto": False}}, "spec.checkpoint.interval.auto", ("true",)),
    # Types
    Wrong("a number of nodes in quotes", {"spec.workers.nodes": "2"}, "spec.workers.nodes", ("integer",)),
    Wrong("half a node", {"spec.workers.nodes": 1.5}, "spec.workers.nodes", ("integer",)),
    Wrong("a word for suspend", {"spec.suspend": "yes"}, "spec.suspend", ("boolean",)),
    Wrong("one label instead of a list", {"spec.recipe.task.labels": "good"}, "spec.recipe.task.labels", ("array",)),
    Wrong("a learning rate in quotes", {"spec.recipe.training.optimizer.learningRate": "2e-5"}, "spec.recipe.training.optimizer.learningRate", ("number",)),
    Wrong("a command as one string", {"spec.script.command": "python train.py"}, "spec.script.command", ("array",), start=script_job()),
    Wrong("a number as the value of a variable", {"spec.script.environment": [{"name": "EPOCHS", "value": 3}]}, "spec.script.environment[0].value", ("string",), start=script_job()),
    # Workers
    Wrong("no nodes", {"spec.workers.nodes": 0}, "spec.workers.nodes", ("greater than or equal to 1",)),
    Wrong("more nodes than we serve", {"spec.workers.nodes": 2049}, "spec.workers.nodes", ("less than or equal to 2048",)),
    Wrong("no processes", {"spec.workers.processesPerNode": 0}, "spec.workers.processesPerNode", ("greater than or equal to 1",)),
    Wrong("a negative number of GPUs", {"spec.workers.resources.gpus": -1}, "spec.workers.resources.gpus", ("greater than or equal to 0",)),
    Wrong("a negative number of spares", {"spec.workers.spares": -1}, "spec.workers.spares", ("greater than or equal to 0",)),
    Wrong("a profile that is no name", {"spec.workers.profile": "Big GPUs"}, "spec.workers.profile", OBJECT_NAME),
    Wrong(
        "an integer that no API server reads as one",
        {"spec.workers.resources.cpu": 2**63},
        "spec.workers.resources.cpu",
        ("must be of type integer",),
        ("at most 9223372036854775807",),
    ),
    cores("a negative number of cores", -1),
    cores("no cores", "0"),
    cores("cores in bytes", "1Gi"),
    cores("cores in words", "two"),
    memory("negative memory", "-1Gi"),
    memory("no memory", 0),
    memory("no memory, with a unit", "0.0Gi"),
    memory("memory with an unknown unit", "3GB"),
    memory("memory with a space", "3 Gi"),
    memory("memory in thousandths of a byte", "500m"),
    # Training
    training("no epochs and no steps", {"epochs": GONE}, "", STEPS_OR_EPOCHS),
    training("epochs and steps", {"steps": 10}, "", STEPS_OR_EPOCHS),
    training("no steps at all", {"epochs": GONE, "steps": 0}, "steps", ("greater than or equal to 1",)),
    training("negative epochs", {"epochs": -1}, "epochs", ("greater than 0",)),
    training("no epochs at all", {"epochs": 0}, "epochs", ("greater than 0",)),
    training("an empty batch", {"globalBatchSize": 0}, "globalBatchSize", ("greater than or equal to 1",)),
    training("a batch that micro-batches do not divide", {"microBatchSize": 24}, "microBatchSize", ("globalBatchSize must be a multiple of microBatchSize",)),
    training("a micro-batch larger than the batch", {"microBatchSize": 128}, "microBatchSize", ("must be a multiple",)),
    training("a negative learning rate", {"optimizer.learningRate": -0.1}, "optimizer.learningRate", ("greater than 0",)),
    training("a learning rate of zero", {"optimizer.learningRate": 0}, "optimizer.learningRate", ("greater than 0",)),
    training("negative weight decay", {"optimizer.weightDecay": -0.01}, "optimizer.weightDecay", ("greater than or equal to 0",)),
    training("a first beta of one", {"optimizer.beta1": 1.0}, "optimizer.beta1", ("less than 1",)),
    training("a second beta above one", {"optimizer.beta2": 1.5}, "optimizer.beta2", ("less than 1",)),
    training("an epsilon of zero", {"optimizer.epsilon": 0}, "optimizer.epsilon", ("greater than 0",)),
    training("a negative gradient norm", {"maxGradientNorm": -1}, "maxGradientNorm", ("greater than or equal to 0",)),
    training("a warm-up longer than training", {"schedule.warmupRatio": 1.1}, "schedule.warmupRatio", ("less than or equal to 1",)),
    training("a negative warm-up", {"schedule.warmupRatio": -0.1}, "schedule.warmupRatio", ("greater than or equal to 0",)),
    training("warmupRatio with warmupSteps", {"schedule.warmupSteps": 10}, "schedule", ("warmupRatio and warmupSteps cannot both be set",)),
    training("a negative seed", {"seed": -1}, "seed", ("greater than or equal to 0",)),
    training("a seed of more than 32 bits", {"seed": 2**32}, "seed", ("less than or equal to 4294967295",)),
    Wrong("sequences too short to mean anything", {"spec.recipe.data.maxTokens": 4}, "spec.recipe.data.maxTokens", ("greater than or equal to 8",)),
    # Tuning
    Wrong("a LoRA rank without LoRA", {"spec.recipe.tuning": {"method": "Full", "rank": 8}}, "spec.recipe.tuning", LORA_ONLY),
    Wrong("a LoRA rank and no method", {"spec.recipe.tuning": {"rank": 8}}, "spec.recipe.tuning", LORA_ONLY),
    Wrong("LoRA targets without LoRA", {"spec.recipe.tuning": {"method": "Full", "targets": ["query"]}}, "spec.recipe.tuning", LORA_ONLY),
    Wrong("LoRA without a rank", {"spec.recipe.tuning": {"method": "LoRA"}}, "spec.recipe.tuning", ("LoRA needs a rank",)),
    Wrong("a LoRA rank of zero", {"spec.recipe.tuning": {"method": "LoRA", "rank": 0}}, "spec.recipe.tuning.rank", ("greater than or equal to 1",)),
    Wrong("LoRA that drops everything", {"spec.recipe.tuning": {"method": "LoRA", "rank": 8, "dropout": 1}}, "spec.recipe.tuning.dropout", ("less than 1",)),
    Wrong("an empty list of LoRA targets", {"spec.recipe.tuning": {"method": "LoRA", "rank": 8, "targets": []}}, "spec.recipe.tuning.targets", ("at least 1 item",)),
    Wrong(
        "LoRA on random weights",
        {"spec.recipe.model.initialization": "Random", "spec.recipe.tuning": {"method": "LoRA", "rank": 8}},
        "spec.recipe.tuning",
        ("LoRA needs pretrained weights",),
    ),
    # Sharding
    Wrong("an unknown ZeRO stage", {"spec.recipe.zero.stage": 4}, "spec.recipe.zero.stage", ("less than or equal to 3",)),
    Wrong("an offloaded optimizer without sharding", {"spec.recipe.zero": {"stage": 0, "offload": {"optimizer": "CPU"}}}, "spec.recipe.zero.stage", ("offloading the optimizer needs stage 1 or higher",)),
    Wrong("offloaded parameters on stage 2", {"spec.recipe.zero.offload.parameters": "CPU"}, "spec.recipe.zero.stage", ("offloading parameters needs stage 3",)),
    # Task, data, evaluation
    Wrong("a classifier without labels", {"spec.recipe.task.labels": GONE}, "spec.recipe.task.labels", ("labels are required for SequenceClassification",)),
    Wrong("one label", {"spec.recipe.task.labels": ["good"]}, "spec.recipe.task.labels", ("at least 2 items",)),
    Wrong("a label twice", {"spec.recipe.task.labels": ["good", "bad", "good"]}, "spec.recipe.task.labels", ("labels must be unique",)),
    Wrong("an empty label", {"spec.recipe.task.labels": ["good", ""]}, "spec.recipe.task.labels[1]", ("at least 1 char",)),
    Wrong("a label of two lines", {"spec.recipe.task.labels": ["good", "bad\nworse"]}, "spec.recipe.task.labels[1]", ONE_LINE),
    Wrong("a label too long", {"spec.recipe.task.labels": ["good", "x" * 129]}, "spec.recipe.task.labels[1]", ("128",)),
    Wrong("too many labels", {"spec.recipe.task.labels": [str(i) for i in range(401)]}, "spec.recipe.task.labels", ("at most 400 items",)),
    Wrong(
        "labels for a language model",
        {**nothing_but(task={"type": "CausalLM", "labels": ["good", "bad"]})},
        "spec.recipe.task.labels",
        ("not allowed for any other type",),
    ),
    Wrong("evaluation without data", {"spec.recipe.data.evaluation": GONE}, "spec.recipe.evaluation", ("evaluation and data.evaluation must be set together",)),
    Wrong("evaluation data without evaluation", {"spec.recipe.evaluation": GONE}, "spec.recipe.evaluation", ("evaluation and data.evaluation must be set together",)),
    Wrong("the perplexity of a classifier", {"spec.recipe.evaluation.metrics": ["Perplexity"]}, "spec.recipe.evaluation", ("Perplexity for CausalLM",)),
    Wrong(
        "the F1 of a language model",
        {"spec.recipe.task": {"type": "CausalLM"}},
        "spec.recipe.evaluation",
        ("MacroF1 is for SequenceClassification",),
    ),
    Wrong("a metric twice", {"spec.recipe.evaluation.metrics": ["Accuracy", "Accuracy"]}, "spec.recipe.evaluation.metrics", ("metrics must be unique",)),
    Wrong("no metrics", {"spec.recipe.evaluation.metrics": []}, "spec.recipe.evaluation.metrics", ("at least 1 item",)),
    Wrong("an evaluation after every zero steps", {"spec.recipe.evaluation.everySteps": 0}, "spec.recipe.evaluation.everySteps", ("greater than or equal to 1",)),
    Wrong("an empty column", {"spec.recipe.data.columns.text": ""}, "spec.recipe.data.columns.text", ("at least 1 char",)),
    Wrong("a column with a tabulator", {"spec.recipe.data.columns.label": "a\tb"}, "spec.recipe.data.columns.label", ONE_LINE),
    # Where things are read from
    model("a model on the web", "http://example.com/model"),
    model("a model by its bare name", "bert-base-uncased"),
    model("a model without an organisation", "hf://bert-base-uncased"),
    model("a model in a relative file", "file://models/minilm"),
    model("a model at the root of the image", "file:///"),
    model("a model in no bucket", "s3:///minilm"),
    model("a model in a bucket and nowhere in it", "s3://models"),
    model("a model in a bucket in upper case", "s3://Models/minilm"),
    model("a model in a bucket with an underscore", "s3://my_models/minilm"),
    model("a model above its bucket", "s3://models/../minilm"),
    model("a model with a hidden segment", "s3://models/.cache/minilm"),
    model("a model with an encoded way up", "s3://models/%2e%2e/minilm"),
    model("a model with a doubled slash", "s3://models//minilm"),
    model("a model with a trailing slash", "s3://models/minilm/"),
    model("a model with a space", "s3://models/mini lm"),
    model("a model with a line end", "s3://models/minilm\n"),
    model("a model with a null byte", "file:///models/\x00"),
    model("a model with a query", "s3://models/minilm?versionId=1"),
    model("a model on a claim in upper case", "pvc://Claim/minilm"),
    model("a model above its claim", "pvc://claim/../../etc"),
    model("a model with letters that only look like ours", "s3://models/m\u0456nilm"),
    data("data in a folder", "s3://datasets/reviews"),
    data("data in a pickle", "s3://datasets/reviews.pkl"),
    data("data from the hub", "hf://organisation/reviews.jsonl"),
    data("data above its bucket", "s3://datasets/../secrets/keys.jsonl"),
    data("data with a back slash", "s3://datasets\\reviews.jsonl"),
    data("data of no name", "s3://datasets/.jsonl"),
    Wrong("evaluation data on the web", {"spec.recipe.data.evaluation.source": "https://example.com/e.jsonl"}, "spec.recipe.data.evaluation.source", DATA_URI),
    Wrong("a path longer than the store allows", {"spec.recipe.model.source": "s3://models/" + "x" * 1024}, "spec.recipe.model.source", ("1024",)),
    # Storage
    storage("checkpoints on a claim", "pvc://claim/checkpoints"),
    storage("checkpoints with a trailing slash", "s3://checkpoints/"),
    storage("checkpoints above their bucket", "s3://checkpoints/../other"),
    storage("checkpoints in a bucket in upper case", "s3://Checkpoints"),
    storage("checkpoints with an encoded slash", "s3://checkpoints/a%2fb"),
    storage("checkpoints with a line end", "s3://checkpoints\n"),
    endpoint("an endpoint without a scheme", "store:8333"),
    endpoint("an endpoint with a path", "http://store:8333/minio"),
    endpoint("an endpoint with a user", "http://key:secret@store:8333"),
    endpoint("an endpoint of another protocol", "ftp://store"),
    endpoint("an endpoint with a line end", "http://store\r\nX-Header: 1"),
    Wrong(
        "a secret and a service account",
        {"spec.storage.serviceAccountName": "trainer"},
        "spec.storage",
        ("secretName and serviceAccountName cannot both be set",),
    ),
    Wrong("a secret with a slash", {"spec.storage.secretName": "other-namespace/s3"}, "spec.storage.secretName", OBJECT_NAME),
    Wrong("an empty name of a secret", {"spec.storage.secretName": ""}, "spec.storage.secretName", ("at least 1 char",)),
    Wrong("storage without a place", {"spec.storage": {"secretName": "s3"}}, "spec.storage.uri", ("required",)),
    # Checkpoints
    Wrong("two checkpoint intervals", {"spec.checkpoint.interval": {"steps": 50, "seconds": 600}}, "spec.checkpoint.interval", INTERVAL),
    Wrong("three checkpoint intervals", {"spec.checkpoint.interval": {"steps": 50, "seconds": 600, "auto": True}}, "spec.checkpoint.interval", INTERVAL),
    Wrong("no checkpoint interval in an interval", {"spec.checkpoint.interval": {}}, "spec.checkpoint.interval", INTERVAL),
    Wrong("a checkpoint every second", {"spec.checkpoint.interval": {"seconds": 1}}, "spec.checkpoint.interval.seconds", ("greater than or equal to 10",)),
    Wrong("no checkpoint kept", {"spec.checkpoint.keep": 0}, "spec.checkpoint.keep", ("greater than or equal to 1",)),
    resume_from("continuing from a file", "file:///checkpoints/a"),
    resume_from("continuing from a step that is no number", "s3://checkpoints/a@last"),
    resume_from("continuing from two steps", "s3://checkpoints/a@1@2"),
    resume_from("continuing from a negative step", "s3://checkpoints/a@-1"),
    resume_from("continuing from a whole bucket", "s3://checkpoints"),
    resume_from("continuing from a bucket at a step", "s3://checkpoints@5"),
    resume_from("continuing from a bucket in upper case", "s3://Checkpoints/a"),
    resume_from("continuing from above the bucket", "s3://checkpoints/../secrets"),
    resume_from("continuing from an encoded way up", "s3://checkpoints/%2e%2e/secrets"),
    resume_from("continuing from a doubled slash", "s3://checkpoints//a"),
    resume_from("continuing from a trailing slash", "s3://checkpoints/a/"),
    resume_from("continuing from two lines", "s3://checkpoints/a\n@5"),
    Wrong(
        "a script that continues from a checkpoint of ours", {"spec.checkpoint.resumeFrom": "s3://checkpoints/a"}, "spec.checkpoint.resumeFrom",
        ("the checkpoints of a script are its own",), start=script_job(),
    ),
    Wrong("the best by a metric that is not measured", {"spec.recipe.evaluation.metrics": ["Accuracy"], "spec.checkpoint.keepBest": "MacroF1"}, "spec.checkpoint.keepBest", ("keepBest must be one of recipe.evaluation.metrics",)),
    Wrong("the best by a metric of another task", {"spec.checkpoint.keepBest": "Perplexity"}, "spec.checkpoint.keepBest", ("keepBest must be one of recipe.evaluation.metrics",)),
    Wrong("the best without an evaluation", nothing_but() | {"spec.checkpoint.keepBest": "Accuracy"}, "spec.checkpoint.keepBest", ("keepBest must be one of recipe.evaluation.metrics",)),
    Wrong("the best of a script", {"spec.checkpoint.keepBest": "Accuracy"}, "spec.checkpoint.keepBest", ("keepBest must be one of recipe.evaluation.metrics",), start=script_job()),
    Wrong("the best by a metric in lower case", {"spec.checkpoint.keepBest": "accuracy"}, "spec.checkpoint.keepBest", ("Accuracy", "MacroF1", "Perplexity")),
    staging("no memory for staging", 0),
    staging("staging in words", "none"),
    staging("staging with an unknown unit", "1GB"),
    staging("staging in less than any checkpoint takes", "1023Ki"),
    staging("staging in less, as a number", 1048575),
    staging("staging in more than any machine has", "5Ti"),
    staging("staging in more, as a number", 2**42 + 1),
    byte_rate("an upload that never moves", "0"),
    byte_rate("an upload of a byte a second", 1),
    byte_rate("an upload in bits", "100Mbit"),
    byte_rate("an upload faster than any network", "2P"),
    # Script
    Wrong("an empty command", {"spec.script.command": []}, "spec.script.command", ("at least 1 item",), start=script_job()),
    Wrong("an empty word in a command", {"spec.script.command": ["python", ""]}, "spec.script.command[1]", ("at least 1 char",), start=script_job()),
    Wrong("a command without end", {"spec.script.command": ["x"] * 129}, "spec.script.command", ("at most 128 items",), start=script_job()),
    Wrong("a word without end in a command", {"spec.script.command": ["python", "x" * 4097]}, "spec.script.command[1]", ("4096",), start=script_job()),
    Wrong("a script without an image", {"spec.script.image": GONE}, "spec.script.image", ("required",), start=script_job()),
    Wrong("an image that is an address", {"spec.script.image": "https://registry/train"}, "spec.script.image", IMAGE, start=script_job()),
    Wrong("an image with a space", {"spec.script.image": "train latest"}, "spec.script.image", IMAGE, start=script_job()),
    environment("a preloaded library", "LD_PRELOAD"),
    environment("another path of Python modules", "PYTHONPATH"),
    environment("another home", "HOME"),
    environment("credentials in plain sight", "AWS_SECRET_ACCESS_KEY"),
    environment("another store", "AWS_ENDPOINT_URL"),
    environment("the address of the master", "MASTER_ADDR"),
    environment("the world size", "WORLD_SIZE"),
    environment("a network plug-in", "NCCL_NET_PLUGIN"),
    environment("a tuner plug-in", "NCCL_TUNER_PLUGIN"),
    environment("one of ours", "FINETUNE_GENERATION"),
    environment("the API server", "KUBERNETES_SERVICE_HOST"),
    environment("one of torchrun's", "TORCHELASTIC_RESTART_COUNT"),
    environment("an environment name with a minus sign", "MY-EPOCHS", ("letter or underscore followed by letters",)),
    environment("an environment name with an equals sign", "A=B", ("letter or underscore followed by letters",)),
    Wrong("an environment value without end", {"spec.script.environment": [{"name": "A", "value": "x" * 4097}]}, "spec.script.environment[0].value", ("4096",), start=script_job()),
    Wrong(
        "an environment variable twice",
        {"spec.script.environment": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]},
        "spec.script.environment[1]",
        ("duplicate",),
        types_path="spec.script.environment",
        start=script_job(),
    ),
    Wrong("an environment without end", {"spec.script.environment": [{"name": f"A{i}"} for i in range(129)]}, "spec.script.environment", ("at most 128 items",), start=script_job()),
    # Limits of time
    Wrong("a deadline in the past", {"spec.activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds", ("greater than or equal to 1",)),
    Wrong("a negative deadline for placement", {"spec.pendingDeadlineSeconds": -1}, "spec.pendingDeadlineSeconds", ("greater than or equal to 1",)),
    Wrong("a negative time to live", {"spec.ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished", ("greater than or equal to 0",)),
    Wrong("a negative time to live of pods", {"spec.podTTLSecondsAfterFinished": -1}, "spec.podTTLSecondsAfterFinished", ("greater than or equal to 0",)),
    Wrong("a negative number of restarts", {"spec.recovery.maxRestarts": -1}, "spec.recovery.maxRestarts", ("greater than or equal to 0",)),
    Wrong("a window of a second", {"spec.recovery.windowSeconds": 1}, "spec.recovery.windowSeconds", ("greater than or equal to 60",)),
    Wrong("a silence of less than nothing", {"spec.recovery.hangSeconds": -1}, "spec.recovery.hangSeconds", ("greater than or equal to 0",)),
    # The object itself
    name("a name of 41 characters", "a" * 41),
    name("a name with a dot", "team.sentiment"),
    name("a name in upper case", "Sentiment"),
    name("a name that ends in a minus sign", "sentiment-"),
    Wrong("another kind", {"kind": "TrainJob"}, "kind", ("FineTuneJob",)),
)
# fmt: on
