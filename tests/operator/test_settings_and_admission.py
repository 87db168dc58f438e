"""What the administrator decides: read once, refused with the field's name, and what jobs may ask for."""

from pathlib import Path

import pytest

from finetune_operator.plan.admission import find_problem
from finetune_operator.settings import CONFIG_VARIABLE, read_settings
from tests.operator.documents import SCRIPT, SETTINGS, a_job, settings


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read(text: str):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        monkeypatch.setenv(CONFIG_VARIABLE, str(path))
        return read_settings()

    return read


def test_settings_are_read_from_the_file_that_the_environment_names(read) -> None:
    loaded = read(SETTINGS)
    assert loaded == settings()
    assert loaded.job_server_url == "https://finetune-operator.finetune-system.svc:9443"


WRONG = {
    "a name that is none of ours": (SETTINGS + "\nworker: 3", "worker"),
    "a number out of range": (SETTINGS + "\nworkers: 0", "workers"),
    "no profiles": (SETTINGS.partition("profiles")[0], "profiles"),
    "a profile without an image": (
        SETTINGS.partition("profiles")[0] + "profiles: {default: {}}",
        "profiles.default.image",
    ),
    "an amount of shared memory that is none": (
        SETTINGS.partition("profiles")[0] + "profiles: {default: {image: x, sharedMemory: 1GiB}}",
        "sharedMemory",
    ),
    "a profile that replaces what jobs ask for": (
        SETTINGS.partition("profiles")[0]
        + "profiles: {default: {image: x, gpuResource: amd.com/gpu, resources: {memory: 1Gi, amd.com/gpu: '1'}}}",
        "amd.com/gpu, memory is for the job to ask for",
    ),
    "a device of which there is no number": (
        SETTINGS.partition("profiles")[0] + "profiles: {default: {image: x, resources: {rdma/hca: some}}}",
        "profiles.default.resources.rdma/hca",
    ),
    "a profile that speaks for the operator": (
        SETTINGS.partition("profiles")[0]
        + "profiles: {default: {image: x, environment: {FINETUNE_POD_UID: x, AWS_ACCESS_KEY_ID: x, AWS_REGION: x}}}",
        "environment: AWS_ACCESS_KEY_ID, FINETUNE_POD_UID is set by the operator",
    ),
    "a range of addresses to ask for names that is none": (SETTINGS + "\ndnsCidrs: [169.254.20.10/33]", "dnsCidrs"),
    "a range of addresses that is none": (SETTINGS + "\nstorageCidrs: [10.0.0.0/33]", "storageCidrs"),
    "a range of addresses with host bits": (SETTINGS + "\nstorageCidrs: [10.0.0.1/8]", "storageCidrs"),
    "a prefix to resume from that is none": (
        SETTINGS + "\nallowedResumePrefixes: ['s3://shared/']",
        "allowedResumePrefixes",
    ),
    "a prefix to resume from without a bucket": (
        SETTINGS + "\nallowedResumePrefixes: ['team-*']",
        "allowedResumePrefixes",
    ),
    "no document": ("", ""),
    "no YAML": ("a: [", "config.yaml"),
}


@pytest.mark.parametrize(("text", "field"), WRONG.values(), ids=WRONG.keys())
def test_settings_that_are_refused_by_the_name_of_their_field(read, text: str, field: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  the message is looked at
        read(text)
    assert field in str(refusal.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://169.254.169.254",
        "http://2852039166",
        "http://0xA9FEA9FE:80",
        "http://127.0.0.1:9000",
        "http://127.1",
        "http://localhost:9000",
        "http://s3.localhost",
        "http://metadata.google.internal",
    ],
)
def test_no_store_is_the_node_itself(read, endpoint: str) -> None:
    with pytest.raises(ValueError, match="allowedEndpoints"):
        read(f"{SETTINGS}\nallowedEndpoints: ['{endpoint}']")


def test_a_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, "/nowhere/config.yaml")
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        read_settings()


ADMITTED = {
    "a job as the documents show it": a_job(),
    "another profile": a_job("workers: {profile: fabric}"),
    "Amazon, when the administrator allows it": a_job("storage: {uri: s3://bucket}"),
    "a script without storage": a_job(base=SCRIPT),
    "the interval that loses least": a_job("checkpoint: {interval: {auto: true}}"),
    "a checkpoint of the namespace's own": a_job(
        "checkpoint: {resumeFrom: 's3://checkpoints/team-a/team-a/old-12345678@50'}"
    ),
}


@pytest.mark.parametrize("job", ADMITTED.values(), ids=ADMITTED.keys())
def test_what_may_start(job) -> None:
    assert find_problem(job, settings()) is None


PROBLEMS = {
    "a profile that there is not": (
        "workers: {profile: huge}",
        ("UnknownProfile", "spec.workers.profile: there is no profile 'huge'; known: default, fabric"),
    ),
    "an endpoint that is not allowed": (
        "storage: {uri: s3://bucket, endpoint: 'http://169.254.169.254'}",
        (
            "EndpointNotAllowed",
            "spec.storage.endpoint: http://169.254.169.254 is not allowed here; allowed: http://store.example:8333, amazon-s3",
        ),
    ),
}


@pytest.mark.parametrize(("spec", "problem"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_what_may_not_start(spec: str, problem: tuple[str, str]) -> None:
    found = find_problem(a_job(spec), settings())
    assert (found.reason, found.message) == problem


def test_amazon_is_not_allowed_unless_the_administrator_says_so() -> None:
    found = find_problem(a_job("storage: {uri: s3://bucket}"), settings("allowedEndpoints: []"))
    assert found.message == "spec.storage.endpoint: amazon-s3 is not allowed here; allowed: none"


def test_a_profile_may_narrow_where_its_jobs_store() -> None:
    narrow = settings("""
      profiles:
        default: {image: a}
        fabric: {image: a, allowedEndpoints: ["https://elsewhere.example", amazon-s3]}
        offline: {image: a, allowedEndpoints: []}
    """)
    amazon, store = "storage: {uri: s3://bucket}", "storage: {uri: s3://bucket, endpoint: 'http://store.example:8333'}"
    messages = {
        (profile, at): found.message
        for profile in ("default", "fabric", "offline")
        for at, spec in (("amazon", amazon), ("store", store))
        if (found := find_problem(a_job(f"workers: {{profile: {profile}}}\n{spec}"), narrow))
    }
    said = "spec.storage.endpoint: {} is not allowed for jobs with profile '{}'; allowed: {}"
    assert messages == {
        ("fabric", "store"): said.format("http://store.example:8333", "fabric", "amazon-s3"),
        ("offline", "amazon"): said.format("amazon-s3", "offline", "none"),
        ("offline", "store"): said.format("http://store.example:8333", "offline", "none"),
    }
    elsewhere = "workers: {profile: fabric}\nstorage: {uri: s3://bucket, endpoint: 'https://elsewhere.example'}"
    assert find_problem(a_job(elsewhere), narrow) is not None, (
        "a profile allows nothing that the administrator does not"
    )


# The job is team-a's and stores its own at s3://checkpoints/team-a/team-a/.
ELSEWHERE = {
    "another namespace's checkpoint below the same uri": "s3://checkpoints/team-a/team-b/other-12345678",
    "a namespace whose name begins alike": "s3://checkpoints/team-a/team-abc/other-12345678",
    "another uri of the same bucket": "s3://checkpoints/team-b/team-a/other-12345678@50",
    "another bucket": "s3://elsewhere/team-a/team-a/other-12345678",
    "the namespace's own place itself": "s3://checkpoints/team-a/team-a",
}


@pytest.mark.parametrize("uri", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_what_may_not_be_resumed_from_unless_the_administrator_says_so(uri: str) -> None:
    job = a_job(f"checkpoint: {{resumeFrom: '{uri}'}}")
    found = find_problem(job, settings("allowedResumePrefixes: ['s3://shared/all']"))
    assert (found.reason, found.message) == (
        "ResumeFromNotAllowed",
        f"spec.checkpoint.resumeFrom: {uri} is not allowed here; allowed is what lies below s3://checkpoints/team-a/team-a/, s3://shared/all/",
    )
    assert find_problem(job, settings("allowedResumePrefixes: ['*']")) is None


def test_a_prefix_that_the_administrator_shares_may_be_resumed_from_by_all() -> None:
    shared = settings("allowedResumePrefixes: ['s3://shared', 's3://archive/2025']")
    for uri in ("s3://shared/a", "s3://shared/a/b/c-12345678@7", "s3://archive/2025/x"):
        assert find_problem(a_job(f"checkpoint: {{resumeFrom: '{uri}'}}"), shared) is None
    assert find_problem(a_job("checkpoint: {resumeFrom: 's3://archive/2026/x'}"), shared) is not None
