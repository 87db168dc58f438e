"""A job's conditions by the rules of kstatus, at every turn of its life. ``simulation`` checks them in any order of faults."""

from collections.abc import Callable

import pytest

from finetune_api.contract import ExitCode
from finetune_api.protocol import Doing, Phase, Stalled
from finetune_operator.plan.observation import Problem
from tests.operator import kstatus
from tests.operator.story import Story


def body(status: dict, **metadata: object) -> dict:
    return {"metadata": {"generation": 2, **metadata}, "status": status}


def conditions(**values: str) -> list[dict]:
    return [{"type": kind, "status": value} for kind, value in values.items()]


RULES = {
    "an object without status is current": (body({}), "Current"),
    "one that is being deleted is terminating": (body({}, deletionTimestamp="now"), "Terminating"),
    "a spec that was not looked at is in progress": (
        body({"observedGeneration": 1, "conditions": conditions(Ready="True")}),
        "InProgress",
    ),
    "reconciling is in progress": (body({"conditions": conditions(Reconciling="True")}), "InProgress"),
    "stalled has failed": (body({"conditions": conditions(Reconciling="False", Stalled="True")}), "Failed"),
    "the first that is true decides": (
        body({"conditions": conditions(Reconciling="True", Stalled="True")}),
        "InProgress",
    ),
    "neither of them, and ready, is current": (
        body({"observedGeneration": 2, "conditions": conditions(Stalled="False", Ready="True")}),
        "Current",
    ),
    "not ready is in progress": (body({"conditions": conditions(Ready="False")}), "InProgress"),
    "nor is it when nobody knows": (body({"conditions": conditions(Ready="Unknown")}), "InProgress"),
}


@pytest.mark.parametrize(("document", "status"), RULES.values(), ids=RULES.keys())
def test_the_rules(document: dict, status: str) -> None:
    assert kstatus.compute(document) == status


def judged(story: Story) -> str:
    """Go on, and return what kstatus makes of the job."""
    story.go()
    document = {
        "metadata": {"generation": story.job.metadata.generation},
        "status": story.job.status.to_wire(),
    }
    kstatus.check(document)
    return kstatus.compute(document)


def trained(*turns: Callable[[Story], object]) -> Callable[[], Story]:
    """Return a way to make a story of a job that trains, and to which then happens what ``turns`` say."""

    def tell() -> Story:
        story = Story("recovery: {maxRestarts: 0}" if turns and turns[0] is _give_up else "").trains()
        story.wait(100)
        for rank in (0, 1):
            story.report(rank)
        for turn in turns:
            turn(story)
        return story

    return tell


def _give_up(story: Story) -> None:
    _all_end(story, ExitCode.STALE)


def _all_end(story: Story, code: int) -> None:
    for rank in (0, 1):
        story.worker_ends(rank, code)


def _hang(story: Story) -> None:
    for rank in (0, 1):
        story.report(rank, stalled=Stalled(rank, Phase.TRAINING, 1, 61.0, Doing.WAITING))


def _unknown_profile() -> Story:
    story = Story()
    story.problem = Problem("UnknownProfile", "spec.workers.profile: there is no profile 'huge'")
    return story


LIVES = {
    "a new job": (Story, "InProgress"),
    "a spec that cannot be started": (_unknown_profile, "Failed"),
    "a job that trains": (trained(), "Current"),
    "a gang whose worker failed": (trained(lambda s: _all_end(s, 1)), "InProgress"),
    "a gang that hangs": (trained(_hang), "InProgress"),
    "a lost pod": (trained(lambda s: s.vanish(1)), "InProgress"),
    "a pod that must go": (trained(lambda s: s.must_go(1)), "InProgress"),
    "a gang without permission": (trained(lambda s: _all_end(s, ExitCode.NO_PERMISSION)), "Failed"),
    "a gang without the store": (trained(lambda s: _all_end(s, ExitCode.STORAGE_UNAVAILABLE)), "InProgress"),
    "a job that gave up": (trained(_give_up), "Failed"),
    "bad data": (trained(lambda s: _all_end(s, ExitCode.BAD_DATA)), "Failed"),
    "a job that is done": (trained(lambda s: s.workers_succeed()), "Current"),
    "a job that is being suspended": (trained(lambda s: s.edit(suspend=True)), "InProgress"),
    "a job whose suspension for another shape nobody saw": (
        trained(lambda s: s.change(1, shape="another")),
        "InProgress",
    ),
    "a suspended job": (trained(lambda s: s.edit(suspend=True), lambda s: s.go(), lambda s: s.vanish_all()), "Current"),
}


@pytest.mark.parametrize(("story", "status"), LIVES.values(), ids=LIVES.keys())
def test_what_kstatus_makes_of(story: Callable[[], Story], status: str) -> None:
    assert judged(story()) == status


def test_a_spec_that_was_edited_is_in_progress_until_the_operator_has_looked() -> None:
    story = Story().trains()
    story.edit(suspend=True)
    document = {"metadata": {"generation": 2}, "status": story.job.status.to_wire()}
    assert kstatus.compute(document) == "InProgress"
