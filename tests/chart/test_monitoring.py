"""The chart's alerts and dashboard, before a real Prometheus: by promtool, and while it scrapes two real operator processes."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from finetune_api.contract import ORDER_PATH
from finetune_operator.kube.api import JOBS
from tests.chart.helm import OPERATOR, RELEASE, ROOT, example, find, render
from tests.cluster import Cluster
from tests.cluster.binaries import ensure_prometheus, sources
from tests.cluster.console import ClusterError
from tests.operator.documents import job_body
from tests.operator.fake_api import FakeKubeApi
from tests.operator.http_api import HttpApi
from tests.operator.test_process import Scene, free_port

RUNBOOKS = "docs/runbooks.md"
MONITORS = {"servicemonitors": "ServiceMonitor", "prometheusrules": "PrometheusRule"}
METRIC = re.compile(r"\b(?:finetune_operator|process)_\w+")


def needs_prometheus(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test as one of those before which Prometheus is built, which takes minutes the first time."""
    return pytest.mark.cluster(pytest.mark.long(test))


@cache
def documents() -> list[dict[str, Any]]:
    enabled = [f"metrics.{part}.enabled=true" for part in ("serviceMonitor", "rules", "dashboard")]
    return render(OPERATOR, "--values", example("minimal"), *(word for one in enabled for word in ("--set", one)))


def groups() -> list[dict[str, Any]]:
    spec: list[dict[str, Any]] = find(documents(), "PrometheusRule", RELEASE)["spec"]["groups"]
    return spec


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in groups() for rule in group["rules"]}


def panels() -> dict[str, list[str]]:
    text = find(documents(), "ConfigMap", f"{RELEASE}-dashboard")["data"]["finetune-operator.json"]
    shown = [panel for panel in json.loads(text)["panels"] if panel["type"] != "row"]
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in shown}


# What the chart renders


def test_nothing_that_needs_the_prometheus_operator_is_made_unasked() -> None:
    kinds = {item["kind"] for item in render(OPERATOR, "--values", example("minimal"))}
    assert not kinds & {"ServiceMonitor", "PrometheusRule"}
    with_dashboard = [item["metadata"]["name"] for item in documents() if item["kind"] == "ConfigMap"]
    assert f"{RELEASE}-dashboard" in with_dashboard


def test_the_monitor_finds_the_service_and_that_every_replica() -> None:
    monitor = find(documents(), "ServiceMonitor", RELEASE)["spec"]
    services = [item for item in documents() if item["kind"] == "Service"]
    chosen = [
        service
        for service in services
        if monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ]
    assert [service["metadata"]["name"] for service in chosen] == [f"{RELEASE}-metrics"], "and not the job server's"
    (port,) = chosen[0]["spec"]["ports"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] == port["name"]
    deployment = find(documents(), "Deployment", RELEASE)["spec"]
    assert chosen[0]["spec"]["selector"] == deployment["selector"]["matchLabels"], "whether it leads or not"
    container = deployment["template"]["spec"]["containers"][0]
    assert port["targetPort"] in {entry["name"] for entry in container["ports"]}


def test_labels_and_the_place_of_the_runbooks_are_the_administrators() -> None:
    everything = render(OPERATOR, "--values", example("everything"))
    for kind in ("ServiceMonitor", "PrometheusRule"):
        (item,) = (item for item in everything if item["kind"] == kind)
        assert item["metadata"]["labels"]["release"] == "prometheus"
    (rule,) = (item for item in everything if item["kind"] == "PrometheusRule")
    links = [rule["annotations"]["runbook_url"] for group in rule["spec"]["groups"] for rule in group["rules"]]
    assert links[0] == "https://wiki.example.com/finetune/runbooks#finetuneoperatorabsent"


@pytest.mark.cluster
def test_the_prometheus_operators_own_schemas_take_what_is_made(cluster: Cluster) -> None:
    schemas = sources("prometheus-operator", "github.com/prometheus-operator/prometheus-operator")
    files = [schemas / f"example/prometheus-operator-crd/monitoring.coreos.com_{name}.yaml" for name in MONITORS]
    made = [item for item in render(OPERATOR, "--values", example("everything")) if item["kind"] in MONITORS.values()]
    assert {item["kind"] for item in made} == set(MONITORS.values())
    try:
        for file in files:
            cluster.kubectl("create", "-f", str(file))
            cluster.wait_for_crd(yaml.safe_load(file.read_text())["metadata"]["name"])
        check = ("create", "--dry-run=server", "--validate=strict", "-f", "-")
        for item in made:
            there = item | {"metadata": item["metadata"] | {"namespace": "default"}}
            cluster.kubectl(*check, input=yaml.safe_dump(there))
            with pytest.raises(ClusterError, match=r'unknown field "spec\.misspelt"'):
                cluster.kubectl(*check, input=yaml.safe_dump(there | {"spec": item["spec"] | {"misspelt": 1}}))
    finally:
        for file in files:
            cluster.kubectl("delete", "--ignore-not-found", "-f", str(file))


def test_every_alert_has_a_section_in_the_runbooks_and_every_section_an_alert() -> None:
    sections = re.findall(r"^## (\w+)$", (ROOT / RUNBOOKS).read_text(), re.MULTILINE)
    assert sections == list(alerts())
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook_url"] == f"{RUNBOOKS}#{name.lower()}"
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}


# By promtool


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rules") / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": groups()}))
    return file


def promtool(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    program = ensure_prometheus()["promtool"]
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, **options)


@needs_prometheus
def test_promtool_finds_nothing_wrong_with_the_rules(rules: Path) -> None:
    ran = promtool("check", "rules", "--lint=all", "--lint-fatal", rules)
    assert ran.returncode == 0, ran.stdout + ran.stderr


REPLICA = 'namespace="finetune-system", job="finetune-operator-metrics"'
LEADS = {"leader a": "1x400", "leader b": "0x400"}


@dataclass(frozen=True)
class Case:
    """Series, a value every half minute, and what fires at a minute of them."""

    series: Mapping[str, str]
    minute: int
    fires: str | None
    led: bool = True


def bucketed(name: str, quick: str, slow: str, more: str = "") -> dict[str, str]:
    """A histogram with values up to a bound, and some above it; both bounds in the names of its buckets."""
    low, high = ("10", "30") if name == "queue_seconds" else ("1", "2.5")
    rows = {low: quick, high: slow, "+Inf": slow}
    return {f'{name}_bucket{{le="{bound}"{more}}}': values for bound, values in rows.items()}


CASES = {
    "nobody is scraped": Case({}, 6, "FineTuneOperatorAbsent", led=False),
    "nobody is scraped for a moment": Case({}, 4, None, led=False),
    "nobody leads": Case({"leader a": "0x400", "leader b": "0x400"}, 5, "FineTuneOperatorNotLed", led=False),
    "nobody leads for a moment": Case({"leader a": "0x400", "leader b": "0x400"}, 1, None, led=False),
    "one leads": Case({}, 5, None),
    "a takeover": Case({"leader a": "1x10 0x400", "leader b": "0x13 1x400"}, 7, None, led=False),
    "a bug": Case({'reconciles_total{outcome="bug"}': "0x20 1x60"}, 15, "FineTuneOperatorBug"),
    "a bug of long ago": Case({'reconciles_total{outcome="bug"}': "0x20 1x400"}, 60, None),
    "a third of what is tried fails": Case(
        {'reconciles_total{outcome="error"}': "0+10x400", 'reconciles_total{outcome="done"}': "0+20x400"},
        40,
        "FineTuneOperatorErrors",
    ),
    "conflicts, which are no errors": Case(
        {'reconciles_total{outcome="conflict"}': "0+10x400", 'reconciles_total{outcome="done"}': "0+10x400"}, 40, None
    ),
    "the API server fails now and then": Case(
        {'api_requests_total{code="none"}': "0+1x400", 'api_requests_total{code="200"}': "0+20x400"}, 40, None
    ),
    "the API server does not answer": Case(
        {'api_requests_total{code="none"}': "0+10x400", 'api_requests_total{code="200"}': "0+10x400"},
        40,
        "FineTuneOperatorApiFailing",
    ),
    "the API server is flooded": Case(
        {'api_requests_total{code="429"}': "0+10x400", 'api_requests_total{code="200"}': "0+10x400"},
        40,
        "FineTuneOperatorApiFailing",
    ),
    "the API server has errors": Case(
        {'api_requests_total{code="503"}': "0+10x400", 'api_requests_total{code="200"}': "0+10x400"},
        40,
        "FineTuneOperatorApiFailing",
    ),
    "the API server says no, which is an answer": Case(
        {'api_requests_total{code="409"}': "0+10x400", 'api_requests_total{code="404"}': "0+10x400"}, 40, None
    ),
    "jobs wait": Case(bucketed("queue_seconds", "0+5x400", "0+10x400"), 30, "FineTuneOperatorQueueSlow"),
    "jobs hardly wait": Case(bucketed("queue_seconds", "0+99x400", "0+100x400"), 30, None),
    "the event loop is late": Case(
        bucketed("event_loop_lag_seconds", "0+5x400", "0+10x400", ', pod="a"'), 30, "FineTuneOperatorEventLoopSlow"
    ),
    "the event loop is hardly late": Case(
        bucketed("event_loop_lag_seconds", "0+99x400", "0+100x400", ', pod="a"'), 30, None
    ),
    "a watch is late": Case({'watch_lag_seconds{pod="b"}': "0x10 150x20"}, 10, "FineTuneOperatorWatchLate"),
    "a watch is late for a moment": Case({'watch_lag_seconds{pod="b"}': "0x10 150x20"}, 7, None),
    "a watch is a little late": Case({'watch_lag_seconds{pod="b"}': "0x10 90x20"}, 10, None),
    "agents are refused": Case(
        {'job_server_requests_total{endpoint="/v1/report", code="401"}': "0+9x400"}, 30, "FineTuneOperatorRefusesAgents"
    ),
    "agents are sent on, and strangers refused": Case(
        {
            'job_server_requests_total{endpoint="/v1/report", code="503"}': "0+9x400",
            'job_server_requests_total{endpoint="other", code="401"}': "0+9x400",
        },
        30,
        None,
    ),
    "a job needs somebody": Case({'jobs_with_condition{condition="Stalled"}': "1x400"}, 40, "FineTuneJobsStalled"),
    "a job needs somebody for a while": Case({'jobs_with_condition{condition="Stalled"}': "1x400"}, 25, None),
    "a job has a straggler": Case({'jobs_with_condition{condition="Straggler"}': "1x400"}, 40, None),
    "checkpoints are late": Case(
        {'jobs_with_condition{condition="CheckpointsDelayed"}': "2x400"}, 40, "FineTuneCheckpointsDelayed"
    ),
    "checkpoints are late for a while": Case(
        {'jobs_with_condition{condition="CheckpointsDelayed"}': "2x400"}, 25, None
    ),
    "one reason restarts many": Case(
        {'restarts_total{reason="NodeLost"}': "0+1x15 15x400"}, 30, "FineTuneRestartsMany"
    ),
    "several reasons restart some": Case(
        {
            'restarts_total{reason="NodeLost"}': "0+1x7 7x400",
            'restarts_total{reason="WorkerFailed"}': "0+1x7 7x400",
        },
        30,
        None,
    ),
    "little of the time counts": Case({"goodput_ratio": "0.7x400"}, 90, "FineTuneGoodputLow"),
    "little of the time counts for a while": Case({"goodput_ratio": "0.7x400"}, 50, None),
    "most of the time counts": Case({"goodput_ratio": "0.85x400"}, 90, None),
}
# What holds for a moment only is no alert: the same series, seen early.
MOMENTS = {
    "a third of what is tried fails": 10,
    "the API server does not answer": 5,
    "jobs wait": 5,
    "the event loop is late": 5,
    "agents are refused": 5,
}
CASES |= {f"{name} for a moment": replace(CASES[name], minute=at, fires=None) for name, at in MOMENTS.items()}


def series(name: str) -> str:
    """The whole name of a series, with the labels that every scrape adds."""
    if name.startswith("leader "):
        return f'finetune_operator_leader{{{REPLICA}, pod="{name[-1]}"}}'
    metric, _, labels = name.rstrip("}").partition("{")
    return f"finetune_operator_{metric}{{{', '.join(filter(None, (REPLICA, labels)))}}}"


@needs_prometheus
def test_each_alert_fires_when_it_should_and_only_then(rules: Path, tmp_path: Path) -> None:
    tests = [
        {
            "name": sentence,
            "interval": "30s",
            "input_series": [
                {"series": series(name), "values": values}
                for name, values in ((LEADS if case.led else {}) | dict(case.series)).items()
            ],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": f"{case.minute}m",
                    "exp_samples": [{"labels": f'{{alertname="{case.fires}"}}', "value": 1}] if case.fires else [],
                }
            ],
        }
        for sentence, case in CASES.items()
    ]
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "30s", "tests": tests}))
    ran = promtool("test", "rules", file)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_of_each_alert_it_is_known_when_it_fires() -> None:
    assert {case.fires for case in CASES.values()} == {None, *alerts()}


# While it scrapes


class Prometheus:
    """A Prometheus that scrapes both replicas every second, as a ServiceMonitor would have it do."""

    def __init__(self, session: aiohttp.ClientSession, url: str, log: Path) -> None:
        self._session, self._url, self._log = session, url, log

    async def ask(self, path: str, **query: str) -> Any:
        async with self._session.get(f"{self._url}/api/v1/{path}", params=query) as answer:
            document = await answer.json()
            assert document["status"] == "success", document
            assert not document.get("warnings"), document
            return document["data"]

    async def get(self, url: str) -> str:
        """What Prometheus gets when it scrapes."""
        async with self._session.get(url) as answer:
            return await answer.text()

    async def rules(self) -> list[dict[str, Any]]:
        return [rule for group in (await self.ask("rules"))["groups"] for rule in group["rules"]]

    async def value(self, expression: str) -> float | None:
        result = (await self.ask("query", query=expression))["result"]
        return float(result[0]["value"][1]) if result else None

    async def says(self, expression: str, value: float) -> None:
        """Wait until an expression has a value: a scrape may come late."""
        await self.until(lambda: self._is(expression, value))

    async def _is(self, expression: str, value: float) -> bool:
        return await self.value(expression) == value

    async def until(self, holds: Callable[[], Any]) -> None:
        """Wait until an awaitable answer is true."""
        deadline = time.monotonic() + 60
        while True:
            try:
                if await holds():
                    return
            except aiohttp.ClientError:
                pass
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            await asyncio.sleep(0.2)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    """Two operator processes, a job that rests, and one that has lost its pods while nobody led."""
    async with HttpApi(FakeKubeApi()) as server:
        rested = {
            "phase": "Suspended",
            "goodput": {"percent": 75.0, "productiveSeconds": 60.0, "lostSeconds": {"startup": 20.0}},
        }
        resting = job_body("suspend: true", name="resting", uid="bbbbbccc-1") | {"status": rested}
        members = [{"rank": rank, "pod": f"gone-{rank}", "uid": f"gone-{rank}"} for rank in (0, 1)]
        started = "2026-01-01T12:00:00Z"
        gang = {"generation": 1, "nodes": 2, "ready": 2, "mintTime": started, "startTime": started, "members": members}
        losing = job_body(name="losing", uid="cccccddd-1") | {
            "status": {"phase": "Running", "startTime": started, "gang": gang}
        }
        server.api.store(JOBS, resting, "ADDED")
        server.api.store(JOBS, losing, "ADDED")
        scene = Scene(server, tmp_path)
        for name in ("a", "b"):
            await scene.start(name)
        await scene.until(lambda: scene.leader and all("standing by" in scene.log(name) for name in ("a", "b")))
        async with aiohttp.ClientSession() as agent:
            for ports in scene.ports.values():
                url = f"https://127.0.0.1:{ports['jobServerPort']}{ORDER_PATH}"
                async with agent.get(url, ssl=False) as answer:
                    assert answer.status in (401, 503), "without a token, or of who stands by"
        yield scene
        await _end(*scene.processes.values())


async def _end(*processes: asyncio.subprocess.Process) -> None:
    for process in processes:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def prometheus(scene: Scene, rules: Path, tmp_path: Path) -> AsyncIterator[Prometheus]:
    targets = [
        {
            "targets": [f"127.0.0.1:{ports['metricsPort']}"],
            "labels": {"namespace": "finetune-system", "pod": name},
        }
        for name, ports in scene.ports.items()
    ]
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "finetune-operator-metrics", "static_configs": targets}],
    }
    file, log, port = tmp_path / "prometheus.yaml", tmp_path / "prometheus.log", free_port()
    file.write_text(yaml.safe_dump(config))
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            ensure_prometheus()["prometheus"],
            f"--config.file={file}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
            cwd=tmp_path,
            stdout=output,
            stderr=output,
        )
    async with aiohttp.ClientSession() as session:
        prometheus = Prometheus(session, f"http://127.0.0.1:{port}", log)
        try:
            await prometheus.until(lambda: _scraped(prometheus))
            yield prometheus
        finally:
            await _end(process)


async def _scraped(prometheus: Prometheus) -> bool:
    """Tell whether what both replicas said is there, and the rules have been looked at."""
    rules = await prometheus.rules()
    return await prometheus.value("sum(up)") == 2 and all(rule["health"] != "unknown" for rule in rules)


@needs_prometheus
async def test_a_real_prometheus_scrapes_the_operator_and_evaluates_the_rules(
    scene: Scene, prometheus: Prometheus
) -> None:
    await prometheus.says('finetune_operator_restarts_total{reason="PodDeleted"}', 1)
    await prometheus.says("sum(finetune_operator_leader)", 1)
    await prometheus.says("sum(finetune_operator_jobs)", 2)
    await prometheus.says('finetune_operator_jobs{phase="Suspended"}', 1)
    await prometheus.says("finetune_operator_goodput_ratio", 0.75)
    await prometheus.says(
        "max(finetune_operator_watch_lag_seconds)", 0
    )  # kopf has shown all that was listed and written

    known = set(await prometheus.ask("label/__name__/values"))
    named = {name for rule in alerts().values() for name in METRIC.findall(rule["expr"])}
    shown = {name for expressions in panels().values() for one in expressions for name in METRIC.findall(one)}
    assert named | shown <= known
    served = {re.sub(r"_(bucket|count|sum)$", "", name) for name in known if name.startswith("finetune_operator_")}
    assert served == {re.sub(r"_(bucket|count|sum)$", "", name) for name in named | shown if "process" not in name}, (
        "what nobody looks at is not served"
    )
    assert len(await prometheus.ask("series", **{"match[]": '{__name__=~"finetune_operator_.*"}'})) < 1000

    for served_by in scene.ports.values():
        _check_names(await prometheus.get(f"http://127.0.0.1:{served_by['metricsPort']}/metrics"))

    for title, expressions in panels().items():
        for expression in expressions:
            assert (await prometheus.ask("query", query=expression))["resultType"] == "vector", title
    looked_at = await prometheus.rules()
    assert {(rule["name"], rule["health"], rule.get("lastError", "")) for rule in looked_at} == {
        (name, "ok", "") for name in alerts()
    }
    await prometheus.until(lambda: _active(prometheus, {"FineTuneGoodputLow"}))
    await _end(*scene.processes.values())
    await prometheus.until(lambda: _active(prometheus, {"FineTuneOperatorAbsent"}))


def _check_names(text: str) -> None:
    ran = promtool("check", "metrics", input=text)
    assert ran.returncode == 0, ran.stdout + ran.stderr


async def _active(prometheus: Prometheus, names: set[str]) -> bool:
    """Tell whether these alerts are pending or fire, and no other."""
    return {rule["name"] for rule in await prometheus.rules() if rule["state"] != "inactive"} == names
