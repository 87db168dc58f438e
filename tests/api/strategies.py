"""Valid jobs, and jobs that one edit may have spoilt."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

from tests.api.api_server import Json
from tests.api.manifests import GONE

Path = tuple[str | int, ...]

segments = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.=+,@-]{0,20}", fullmatch=True)
buckets = st.from_regex(r"[a-z0-9][a-z0-9.-]{1,20}[a-z0-9]", fullmatch=True)
labels_of_dns = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
paths = st.lists(segments, min_size=1, max_size=3).map("/".join)
roots = st.one_of(
    st.builds("s3://{}".format, buckets), st.builds("pvc://{}".format, labels_of_dns), st.just("file://")
)  # fmt: skip
places = st.builds("{}/{}".format, roots, paths)
models = st.one_of(places, st.builds("hf://{}/{}".format, segments, segments))
files = st.builds("{}.{}".format, places, st.sampled_from(["jsonl", "csv", "parquet"]))
lines = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", fullmatch=True)
fractions = st.floats(min_value=0, max_value=1, exclude_max=True)
counts = st.integers(min_value=1, max_value=100_000_000)
cores = st.one_of(st.integers(1, 512), st.sampled_from(["1", "0.5", "500m", "1.25"]))
memory = st.one_of(st.integers(1, 2**50), st.sampled_from(["512Mi", "64Gi", "1T", "1.5Gi", "1000000k"]))
staging = st.one_of(st.integers(2**20, 2**42), st.sampled_from(["1Mi", "4Ti", "1.5Gi", "2000000k", "1048576"]))
byte_rates = st.one_of(st.integers(2**20, 2**40), st.sampled_from(["1Mi", "1Ti", "0.5Gi", "100M"]))
environment_names = st.from_regex(r"[A-Z_][A-Z0-9_]{0,20}", fullmatch=True).map(lambda name: f"MY_{name}")


def optional(required: dict[str, Any], **may_be: Any) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries(required, optional=may_be)


def one_of(**choices: Any) -> st.SearchStrategy[Json]:
    return st.one_of(*(st.fixed_dictionaries({name: value}) for name, value in choices.items()))


def merged(*parts: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    return st.tuples(*parts).map(lambda drawn: {name: value for part in drawn for name, value in part.items()})


@st.composite
def recipes(draw: st.DrawFn) -> Json:
    classifies, evaluates, random = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    task: Json = {"type": "SequenceClassification" if classifies else "CausalLM"}
    if classifies:
        task["labels"] = draw(st.lists(lines, min_size=2, max_size=6, unique=True))
    data = optional(
        {"train": files.map(_source)} | ({"evaluation": files.map(_source)} if evaluates else {}),
        columns=optional({}, text=lines, label=lines),
        maxTokens=st.integers(8, 1048576),
    )
    recipe = {
        "model": {"source": draw(models)} | ({"initialization": "Random"} if random else {}),
        "task": task,
        "data": draw(data),
        "training": draw(trainings()),
    }
    if draw(st.booleans()):
        recipe["tuning"] = draw(st.just({"method": "Full"}) if random else tunings)
    if draw(st.booleans()):
        recipe["zero"] = draw(zeros)
    if evaluates:
        of_task = ["Accuracy", "MacroF1" if classifies else "Perplexity"]
        metrics = st.lists(st.sampled_from(of_task), min_size=1, max_size=2, unique=True)
        recipe["evaluation"] = draw(optional({"metrics": metrics}, everySteps=counts))
    return recipe


@st.composite
def trainings(draw: st.DrawFn) -> Json:
    micro, times = draw(st.integers(1, 1024)), draw(st.integers(1, 1024))
    length = one_of(steps=counts, epochs=st.floats(0.001, 1000))
    rest = optional(
        {"globalBatchSize": st.just(micro * times)},
        microBatchSize=st.just(micro),
        precision=st.sampled_from(["FP32", "BF16", "FP16"]),
        optimizer=optional(
            {},
            name=st.just("AdamW"),
            learningRate=st.floats(1e-9, 10),
            weightDecay=fractions,
            beta1=fractions,
            beta2=fractions,
            epsilon=st.floats(1e-12, 1),
        ),
        schedule=schedules,
        maxGradientNorm=st.floats(0, 1000),
        seed=st.integers(0, 2**32 - 1),
        gradientCheckpointing=st.booleans(),
    )
    return draw(merged(length, rest))


schedules = merged(
    optional({}, name=st.sampled_from(["Constant", "Linear", "Cosine"])),
    st.one_of(st.just({}), one_of(warmupRatio=fractions, warmupSteps=st.integers(0, 1000))),
)
tunings: st.SearchStrategy[Json] = st.one_of(
    st.just({}),
    st.just({"method": "Full"}),
    optional(
        {"method": st.just("LoRA"), "rank": st.integers(1, 1024)},
        alpha=st.floats(0.01, 1024),
        dropout=fractions,
        targets=st.lists(lines, min_size=1, max_size=4),
    ),
)
zeros = st.one_of(
    optional({}, stage=st.integers(0, 3)),
    st.fixed_dictionaries(
        {"stage": st.integers(1, 3), "offload": optional({}, optimizer=st.sampled_from(["None", "CPU"]))}
    ),
    st.just({"stage": 3, "offload": {"optimizer": "CPU", "parameters": "CPU"}}),
)
storages = merged(
    optional(
        {"uri": st.one_of(st.builds("s3://{}".format, buckets), st.builds("s3://{}/{}".format, buckets, paths))},
        endpoint=st.sampled_from(["http://store:8333", "https://s3.example.com", "http://198.18.0.254:8333"]),
    ),
    st.one_of(st.just({}), one_of(secretName=labels_of_dns, serviceAccountName=labels_of_dns)),
)
scripts = optional(
    {
        "command": st.lists(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=1, max_size=4
        ),
        "image": st.sampled_from(["train", "registry:5000/team/train:1.0", f"train@sha256:{'0' * 64}"]),
    },
    environment=st.lists(
        optional({"name": environment_names}, value=st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
        max_size=4,
        unique_by=lambda variable: variable["name"],
    ),
)
intervals = one_of(steps=counts, seconds=st.integers(10, 604800), auto=st.just(True))
checkpoints = optional(
    {}, interval=intervals, keep=st.integers(1, 100), stagingMemory=staging, uploadBytesPerSecond=byte_rates
)
resumptions = st.sampled_from(["s3://checkpoints/team-a/job-1", "s3://checkpoints/team-a/job-1@100"])
rests = optional(
    {},
    checkpoint=checkpoints,
    workers=optional(
        {},
        nodes=st.integers(1, 2048),
        processesPerNode=st.integers(1, 16),
        resources=optional({}, cpu=cores, memory=memory, gpus=st.integers(0, 16)),
        spares=st.integers(0, 64),
        profile=labels_of_dns,
    ),
    suspend=st.booleans(),
    pendingDeadlineSeconds=st.integers(1, 31536000),
    activeDeadlineSeconds=st.integers(1, 315360000),
    podTTLSecondsAfterFinished=st.integers(0, 31536000),
    ttlSecondsAfterFinished=st.integers(0, 315360000),
    recovery=optional(
        {},
        maxRestarts=st.integers(0, 10000),
        windowSeconds=st.integers(60, 31536000),
        hangSeconds=st.integers(0, 86400),
    ),
)


def jobs() -> st.SearchStrategy[Json]:
    """Whole manifests that are right."""
    with_recipe = st.fixed_dictionaries({"recipe": recipes(), "storage": storages})
    with_script = optional({"script": scripts}, storage=storages)
    return st.builds(_job, names, st.one_of(_of_a_recipe(merged(with_recipe, rests)), merged(with_script, rests)))


@st.composite
def _of_a_recipe(draw: st.DrawFn, specs: st.SearchStrategy[Json]) -> Json:
    """Add what only a job with a recipe may ask of its checkpoints."""
    spec = draw(specs)
    metrics = spec["recipe"].get("evaluation", {}).get("metrics", [])
    best = {"keepBest": st.sampled_from(metrics)} if metrics else {}
    more = draw(optional({}, resumeFrom=resumptions, **best))
    return spec | ({"checkpoint": spec.get("checkpoint", {}) | more} if more else {})


@st.composite
def edited_jobs(draw: st.DrawFn) -> Json:
    """Manifests that were right before one place in them was changed, as a careless hand might."""
    job = copy.deepcopy(draw(jobs()))
    path = draw(st.sampled_from(sorted(_paths(job["spec"], ("spec",)), key=str)))
    value = draw(st.sampled_from(CARELESS) | st.integers(-3, 5) | st.text(max_size=12))
    place: Any = job
    for part in path[:-1]:
        place = place[part]
    if value is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = copy.deepcopy(value)
    return job


CARELESS: tuple[Any, ...] = (
    GONE, "", 0, -1, 1, 1.5, 1e-3, "1", "0", "-1", "1e3", "1Gi", "m", True, False, [], {}, [""], ["a", "a"], "a b", "A", "..", "None",
    "Full", "LoRA", "CausalLM", "CPU", "s3://bucket", "s3://bucket/../a.csv", "file:///a.csv", "hf://a/b", "a\n", "\x00", "é", "٣",
    2**31, 2**63, 1e308,
)  # fmt: skip


def _paths(value: Any, path: Path) -> list[Path]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * (len(path) > 1) + [deeper for key, child in inner for deeper in _paths(child, (*path, key))]


def _source(uri: str) -> Json:
    return {"source": uri}


def _job(name: str, spec: Json) -> Json:
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
