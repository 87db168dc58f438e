"""The manifests of ``examples/gitops`` are what Argo CD, Flux and kustomize take, and what they name is there.

The types below hold the fields that the examples use, as the CRDs of Argo CD 3 and Flux 2 have them. Extra fields are an error, as they would be
there: a misspelt ``selfHeal`` is otherwise not noticed before something drifts.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.alias_generators import to_camel

from finetune_api.job import FineTuneJob, parse_job
from tests.chart.helm import render
from tests.gitops import argo

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/gitops"


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Closed):
    name: str
    namespace: Literal["argocd", "flux-system"]
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Values(Closed):
    values_object: dict[str, Any]


class ApplicationSource(Closed):
    repo_url: str = Field(alias="repoURL")
    target_revision: str
    path: str
    helm: Values | None = None


class Destination(Closed):
    server: str
    namespace: str


class Automated(Closed):
    prune: bool
    self_heal: bool


class SyncPolicy(Closed):
    automated: Automated
    sync_options: list[Literal["CreateNamespace=true", "ServerSideApply=true"]]


class ApplicationSpec(Closed):
    project: str
    source: ApplicationSource
    destination: Destination
    sync_policy: SyncPolicy


class Application(Closed):
    api_version: Literal["argoproj.io/v1alpha1"]
    kind: Literal["Application"]
    metadata: Metadata
    spec: ApplicationSpec


class ConfigMap(Closed):
    api_version: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, str]


class GitReference(Closed):
    branch: str | None = None
    tag: str | None = None


class GitSpec(Closed):
    interval: str
    url: str
    ref: GitReference


class GitRepository(Closed):
    api_version: Literal["source.toolkit.fluxcd.io/v1"]
    kind: Literal["GitRepository"]
    metadata: Metadata
    spec: GitSpec


class SourceReference(Closed):
    kind: Literal["GitRepository"]
    name: str


class KustomizationSpec(Closed):
    interval: str
    target_namespace: str
    source_ref: SourceReference
    path: str
    prune: bool
    wait: bool
    timeout: str


class FluxKustomization(Closed):
    api_version: Literal["kustomize.toolkit.fluxcd.io/v1"]
    kind: Literal["Kustomization"]
    metadata: Metadata
    spec: KustomizationSpec


class ChartSpec(Closed):
    chart: str
    source_ref: SourceReference


class Chart(Closed):
    spec: ChartSpec


class Install(Closed):
    create_namespace: bool


class Dependency(Closed):
    name: str


class HelmReleaseSpec(Closed):
    interval: str
    release_name: str
    target_namespace: str
    chart: Chart
    install: Install | None = None
    depends_on: list[Dependency] = []
    values: dict[str, Any] = {}


class HelmRelease(Closed):
    api_version: Literal["helm.toolkit.fluxcd.io/v2"]
    kind: Literal["HelmRelease"]
    metadata: Metadata
    spec: HelmReleaseSpec


class Kustomization(Closed):
    api_version: Literal["kustomize.config.k8s.io/v1beta1"]
    kind: Literal["Kustomization"]
    resources: list[str]


Manifest = Application | ConfigMap | GitRepository | FluxKustomization | HelmRelease | Kustomization
MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Annotated[Manifest, Field(union_mode="left_to_right")])


def documents(file: Path) -> list[Any]:
    return list(yaml.safe_load_all(file.read_text()))


def read(file: Path) -> list[Manifest | FineTuneJob]:
    return [
        parse_job(document) if document["kind"] == "FineTuneJob" else MANIFEST.validate_python(document)
        for document in documents(file)
    ]


FILES = sorted(FOLDER.rglob("*.yaml"))
ALL = [manifest for file in FILES for manifest in read(file)]


def of(kind: type) -> list[Any]:
    return [manifest for manifest in ALL if isinstance(manifest, kind)]


def test_there_is_one_of_each() -> None:
    kinds = {type(manifest) for manifest in ALL}
    assert kinds == {Application, ConfigMap, GitRepository, FluxKustomization, HelmRelease, Kustomization, FineTuneJob}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_a_misspelt_field_is_noticed(file: Path) -> None:
    for document in documents(file):
        if document["kind"] != "FineTuneJob" and "spec" in document:
            with pytest.raises(ValueError, match="extra_forbidden"):
                MANIFEST.validate_python(document | {"spec": document["spec"] | {"selfheal": True}})


def releases() -> list[tuple[str, dict[str, Any]]]:
    """Each chart that is installed by the examples, with its values."""
    helm = [(release.spec.chart.spec.chart, release.spec.values) for release in of(HelmRelease)]
    sources = [application.spec.source for application in of(Application)]
    return helm + [
        (source.path, source.helm.values_object if source.helm else {})
        for source in sources
        if source.path.startswith("charts/")
    ]


def test_helm_takes_the_charts_with_the_values_that_they_are_given(tmp_path: Path) -> None:
    charts = releases()
    assert sorted(chart for chart, _ in charts) == ["charts/finetune-crds"] * 2 + ["charts/finetune-operator"] * 2
    for chart, values in charts:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        assert render(ROOT / chart, "--values", file)


def test_the_folders_and_files_that_they_name_exist() -> None:
    paths = [application.spec.source.path for application in of(Application)]
    paths += [kustomization.spec.path for kustomization in of(FluxKustomization)]
    paths += [f"examples/gitops/jobs/{name}" for kustomization in of(Kustomization) for name in kustomization.resources]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_job_of_the_folder_is_in_its_kustomization() -> None:
    (kustomization,) = of(Kustomization)
    jobs = {file.name for file in (FOLDER / "jobs").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization.resources) == jobs


def test_what_flux_takes_from_a_repository_is_a_repository_here() -> None:
    repositories = {repository.metadata.name for repository in of(GitRepository)}
    used = {release.spec.chart.spec.source_ref.name for release in of(HelmRelease)}
    used |= {kustomization.spec.source_ref.name for kustomization in of(FluxKustomization)}
    assert used == repositories


def test_jobs_are_never_pruned_and_say_nothing_about_suspend() -> None:
    """A job that is pruned ends; a ``suspend`` in Git undoes what an action or a person has set."""
    (kustomization,) = of(FluxKustomization)
    jobs = next(each for each in of(Application) if each.spec.source.path == "examples/gitops/jobs")
    assert not kustomization.spec.prune
    assert not jobs.spec.sync_policy.automated.prune
    written = [document for file in (FOLDER / "jobs").glob("*.yaml") for document in documents(file)]
    assert all("suspend" not in job["spec"] for job in written if job["kind"] == "FineTuneJob")


def test_the_configuration_is_for_our_kind_alone() -> None:
    (configuration,) = of(ConfigMap)
    assert configuration.metadata.name == "argocd-cm"
    assert len(configuration.data) == 2
    assert argo.CONFIGURATION in FILES
