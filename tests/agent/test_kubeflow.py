"""Progress of scripts that know transformers' KubeflowCallback and nothing of us."""

import json
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from finetune_agent.beats import Board
from finetune_agent.kubeflow import KubeflowServer
from finetune_api.protocol import Action, AgentState, Evaluation, Metric, Order, Progress

SCRIPT = Path(__file__).parent / "scripts" / "train.py"


async def test_an_unmodified_trainer_under_real_torchrun_shows_progress_and_evaluations(server, make_pod):
    pod = make_pod()
    pod.start([sys.executable, str(SCRIPT), str(pod.folder / "output")], fake_torch=False)
    await server.until(lambda: pod.report)
    await pod.run(1)
    await server.until(lambda: pod.report.state is AgentState.SUCCEEDED or pod.report.exits)
    assert pod.report.exits == []
    progress = pod.report.progress
    assert (progress.step, progress.total_steps, progress.epoch, progress.remaining_seconds) == (6, 6, 0.75, 0.0)
    assert progress.loss > 0
    assert progress.learning_rate is not None
    assert progress.gradient_norm > 0
    assert [metric.name for metric in pod.report.evaluation.metrics] == ["loss"]
    assert 0 < pod.report.evaluation.step <= 6
    await server.order(pod.uid, Order(Action.FINISH, 1))
    assert await pod.wait() == 0


@pytest.fixture
def kubeflow(tmp_path):
    """A server that expects generation 1; ``post`` posts to it."""
    board = Board(lambda: None)
    board.begin(1, range(1))
    server = KubeflowServer(board)
    token = Path(server.begin(1, tmp_path)).read_text()
    threading.Thread(target=server.run, daemon=True).start()

    def post(status, token=token):
        body = status if isinstance(status, bytes) else json.dumps({"trainerStatus": status}).encode()
        request = urllib.request.Request(server.url, body, {"Authorization": "Bearer " + token})
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return response.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    post.board, post.server = board, server
    yield post
    server._server.shutdown()
    server._server.server_close()


def metrics(**values):
    return [{"name": name, "value": str(value)} for name, value in values.items()]


def test_posts_become_progress_and_evaluation(kubeflow):
    assert kubeflow({"progressPercentage": 0, "metrics": metrics(total_steps=10)}) == 200
    assert kubeflow.board.take().progress == Progress(0, 10)
    values = metrics(
        current_step=4,
        total_steps=10,
        current_epoch=0.5,
        loss=0.7,
        learning_rate=1e-5,
        grad_norm=2.0,
        eval_loss=0.6,
        eval_runtime=3,
    )
    assert kubeflow({"progressPercentage": 40, "estimatedRemainingSeconds": 6, "metrics": values}) == 200
    levels = kubeflow.board.take()
    assert levels.progress == Progress(4, 10, 0.5, 0.7, 1e-5, 2.0, None, 6.0)
    assert levels.evaluation == Evaluation(4, [Metric("loss", 0.6)])
    assert kubeflow({"progressPercentage": 100, "metrics": metrics(train_loss=0.5)}) == 200
    assert kubeflow.board.take().progress.step == 10


def test_a_number_that_is_none_is_left_out(kubeflow):
    assert kubeflow({"metrics": metrics(current_step=1, loss="nan", grad_norm="inf", learning_rate="x")}) == 200
    assert kubeflow.board.take().progress == Progress(1)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"[]",
        b"[" * 5000,
        b'{"trainerStatus": 3}',
        b'{"trainerStatus": {"metrics": [1]}}',
        b'{"trainerStatus": {"metrics": 5}}',
    ],
)
def test_what_makes_no_sense_is_refused(kubeflow, body):
    assert kubeflow(body) == 400
    assert kubeflow.board.take().progress is None


def test_a_long_post_is_refused(kubeflow):
    assert kubeflow(b"x" * 70000) == 413


def test_a_stranger_is_refused_and_so_is_the_last_generation(kubeflow, tmp_path):
    assert kubeflow({"metrics": []}, token="guess") == 401
    kubeflow.board.begin(2, range(1))
    kubeflow.server.begin(2, tmp_path)
    assert kubeflow({"metrics": metrics(current_step=3)}) == 401
    assert kubeflow.board.take().progress is None
