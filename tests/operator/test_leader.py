"""Who leads: taking, renewing, losing and giving back the lease. Orders of events by the thousand: test_leader_machine."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from finetune_operator.kube.api import LEASES
from finetune_operator.kube.errors import Conflict, NotFound, Unavailable
from finetune_operator.kube_object import KubeObject
from finetune_operator.leader import Campaign, Candidate, Lease, OwnPod, identity_of, own_pod
from finetune_operator.settings import LeaderElection
from tests.operator.fake_api import FakeKubeApi
from tests.operator.test_workqueue import VirtualTime

NAMESPACE, NAME = "finetune-system", "finetune-operator"
TIMES = LeaderElection()


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Replica:
    """One candidate, with its own view of the time."""

    def __init__(self, api: FakeKubeApi, clock: Callable[[], float], identity: str, times: LeaderElection = TIMES):
        self.lease = Lease(clock)
        self.candidate = Candidate(
            api=api, lease=self.lease, namespace=NAMESPACE, name=NAME, identity=identity, times=times
        )

    async def tries(self) -> bool:
        await self.candidate.try_once()
        return self.lease.has_time()


def stored(api: FakeKubeApi) -> KubeObject:
    return api.objects[LEASES.plural, NAMESPACE, NAME]


@pytest.fixture
def api() -> FakeKubeApi:
    return FakeKubeApi()


@pytest.fixture
def clock() -> Clock:
    return Clock()


# Taking and keeping it.


async def test_the_first_makes_the_lease_and_leads(api: FakeKubeApi, clock: Clock) -> None:
    first = Replica(api, clock, "a")
    assert not first.lease.has_time()
    assert await first.tries()
    spec = stored(api)["spec"]
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("a", 15, 1)
    assert spec["acquireTime"] == spec["renewTime"]
    assert spec["renewTime"].endswith("Z")


async def test_of_two_that_make_it_at_once_one_leads(api: FakeKubeApi, clock: Clock) -> None:
    first, second = Replica(api, clock, "a"), Replica(api, clock, "b")
    create = api.create

    async def slow(*arguments: Any) -> KubeObject:
        api.create = create
        assert await second.tries()
        return await create(*arguments)

    api.create = slow
    with pytest.raises(Conflict):
        await first.tries()
    assert not first.lease.has_time()
    assert not await first.tries()


async def test_the_leader_renews_with_one_request_and_keeps_its_term(api: FakeKubeApi, clock: Clock) -> None:
    leader = Replica(api, clock, "a")
    await leader.tries()
    taken = stored(api)["spec"]
    reads: list[Any] = []
    api.get = reads.append
    for _ in range(10):
        clock.now += 9
        assert await leader.tries()
    spec = stored(api)["spec"]
    assert (spec["acquireTime"], spec["leaseTransitions"]) == (taken["acquireTime"], 1)
    assert spec["renewTime"] > taken["renewTime"]
    assert (len(api.writes), reads) == (11, [])


async def test_time_is_counted_from_the_asking_and_runs_out_by_itself(api: FakeKubeApi, clock: Clock) -> None:
    leader = Replica(api, clock, "a")
    create = api.create

    async def slow(*arguments: Any) -> KubeObject:
        answer = await create(*arguments)
        clock.now += 4
        return answer

    api.create = slow
    await leader.tries()
    assert leader.lease.seconds_left() == 6
    clock.now += 6
    assert not leader.lease.has_time()


async def test_another_takes_a_lease_that_has_not_changed_for_as_long_as_it_lasts(
    api: FakeKubeApi, clock: Clock
) -> None:
    leader, other = Replica(api, clock, "a"), Replica(api, clock, "b")
    await leader.tries()
    clock.now += 100  # nobody looked: how old it was when first seen is not known
    assert not await other.tries()
    clock.now += 14.9
    assert not await other.tries()
    clock.now += 0.1
    assert await other.tries()
    spec = stored(api)["spec"]
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("b", 2)


async def test_what_is_seen_is_as_new_as_the_answer(api: FakeKubeApi, clock: Clock) -> None:
    """A request that travels for long may come back with a lease that was renewed on its way."""
    leader, other = Replica(api, clock, "a"), Replica(api, clock, "b")
    await leader.tries()
    get = api.get

    async def slow(*arguments: Any) -> KubeObject:
        clock.now += 9
        await leader.tries()
        return await get(*arguments)

    api.get = slow
    assert not await other.tries()
    api.get = get
    clock.now += 9
    assert leader.lease.has_time()
    assert not await other.tries()


async def test_every_renewal_is_a_sign_of_life_whatever_clocks_say(api: FakeKubeApi, clock: Clock) -> None:
    leader, other = Replica(api, clock, "a"), Replica(api, clock, "b")
    for _ in range(5):
        await leader.tries()
        stored(api)["spec"]["renewTime"] = "1970-01-01T00:00:00.000000Z"
        clock.now += 9
        assert not await other.tries()


async def test_the_holder_says_how_long_it_lasts(api: FakeKubeApi, clock: Clock) -> None:
    """During a rolling update the two have different settings."""
    patient = LeaderElection(lease_seconds=60, renew_seconds=40.0)
    leader, other = Replica(api, clock, "a", patient), Replica(api, clock, "b")
    await leader.tries()
    await other.tries()
    clock.now += 39
    assert leader.lease.has_time()
    assert not await other.tries()
    clock.now += 21
    assert await other.tries()


async def test_a_container_that_starts_again_in_its_pod_waits_for_nobody(api: FakeKubeApi, clock: Clock) -> None:
    await Replica(api, clock, "pod-a_uid").tries()
    assert await Replica(api, clock, "pod-a_uid").tries()
    assert stored(api)["spec"]["leaseTransitions"] == 1


@pytest.mark.parametrize("spec", [None, {}, {"holderIdentity": ""}], ids=["no spec", "an empty spec", "no holder"])
async def test_a_lease_that_nobody_holds_is_taken_at_once(api: FakeKubeApi, clock: Clock, spec: Any) -> None:
    body = {"metadata": {"name": NAME, "namespace": NAMESPACE}} | ({} if spec is None else {"spec": spec})
    api.store(LEASES, body)
    assert await Replica(api, clock, "a").tries()


async def test_what_others_have_written_on_the_lease_stays(api: FakeKubeApi, clock: Clock) -> None:
    labels = {"app.kubernetes.io/part-of": "training"}
    api.store(LEASES, {"metadata": {"name": NAME, "namespace": NAMESPACE, "labels": labels}})
    leader = Replica(api, clock, "a")
    assert await leader.tries()
    assert stored(api)["metadata"]["labels"] == labels
    api.store(LEASES, stored(api))  # a write of somebody else's between two renewals
    with pytest.raises(Conflict):
        await leader.tries()
    assert await leader.tries()


async def test_a_lease_that_somebody_deletes_is_its_holder_s_to_make_again(api: FakeKubeApi, clock: Clock) -> None:
    leader, other = Replica(api, clock, "a"), Replica(api, clock, "b")
    await leader.tries()
    await other.tries()
    clock.now += 2
    del api.objects[LEASES.plural, NAMESPACE, NAME]
    assert not await other.tries()
    with pytest.raises(NotFound):
        await leader.tries()
    assert await leader.tries()
    clock.now += 9
    assert not await other.tries()
    assert leader.lease.has_time()
    del api.objects[LEASES.plural, NAMESPACE, NAME]
    clock.now += 15
    assert await other.tries(), "it is gone with its holder"


# Losing it.


async def test_without_an_answer_it_leads_until_its_time_is_over(api: FakeKubeApi, clock: Clock) -> None:
    leader = Replica(api, clock, "a")
    await leader.tries()
    api.fail_next = "refused"
    clock.now += 9
    with pytest.raises(Unavailable):
        await leader.tries()
    assert leader.lease.has_time()
    clock.now += 1
    assert not leader.lease.has_time()


async def test_a_renewal_whose_answer_was_lost_counts_for_nothing_and_is_no_obstacle(
    api: FakeKubeApi, clock: Clock
) -> None:
    leader = Replica(api, clock, "a")
    await leader.tries()
    clock.now += 5
    api.fail_next = "lost"
    with pytest.raises(Unavailable):
        await leader.tries()
    assert leader.lease.seconds_left() == 5
    assert await leader.tries()
    assert leader.lease.seconds_left() == 10


async def test_whoever_sees_that_another_holds_it_leads_no_more(api: FakeKubeApi, clock: Clock) -> None:
    """It should have no time left by then, unless a person has written the lease."""
    leader = Replica(api, clock, "a")
    await leader.tries()
    body = stored(api)
    api.store(LEASES, body | {"spec": body["spec"] | {"holderIdentity": "b"}})
    with pytest.raises(Conflict):
        await leader.tries()
    assert not await leader.tries()


async def test_what_is_given_back_is_free_at_once(api: FakeKubeApi, clock: Clock) -> None:
    leader, other = Replica(api, clock, "a"), Replica(api, clock, "b")
    await leader.tries()
    assert not await other.tries()
    leader.lease.close()
    await leader.candidate.release()
    assert "holderIdentity" not in stored(api)["spec"]
    assert not leader.lease.has_time()
    assert await other.tries()


async def test_who_holds_nothing_gives_nothing_back(api: FakeKubeApi, clock: Clock) -> None:
    leader, other = Replica(api, clock, "a"), Replica(api, clock, "b")
    await leader.tries()
    await other.tries()
    await other.candidate.release()
    assert stored(api)["spec"]["holderIdentity"] == "a"


async def test_a_lease_that_is_closed_stays_so(api: FakeKubeApi, clock: Clock) -> None:
    leader = Replica(api, clock, "a")
    leader.lease.close()
    assert not await leader.tries()


# The thread that does all that, in virtual time: its loop is the test's.


class Connection(FakeKubeApi):
    """An API server that may hang, and a connection to it that must be closed."""

    def __init__(self, objects: dict[Any, KubeObject] | None = None) -> None:
        super().__init__()
        if objects is not None:
            self.objects = objects
        self.hangs = self.closed = False

    async def get(self, *arguments: Any) -> KubeObject:
        await self._arrive()
        return await super().get(*arguments)

    async def replace(self, *arguments: Any) -> KubeObject:
        await self._arrive()
        return await super().replace(*arguments)

    async def _arrive(self) -> None:
        while self.hangs:
            await asyncio.sleep(1)

    async def close(self) -> None:
        self.closed = True


class Told:
    """A campaign, and what it has told."""

    def __init__(self, api: Connection, clock: Callable[[], float], identity: str = "a", **arguments: Any) -> None:
        self.events: list[tuple[str, float]] = []
        self.lease = Lease(clock)

        async def connect() -> Connection:
            return api

        self.campaign = Campaign(
            connect=arguments.get("connect", connect),
            lease=self.lease,
            namespace=NAMESPACE,
            name=NAME,
            identity=identity,
            times=arguments.get("times", TIMES),
            on_leading=lambda: self.events.append(("leading", clock())),
            on_lost=lambda: self.events.append(("lost", clock())),
        )


def in_virtual_time(test: Callable[[], Any]) -> None:
    loop = VirtualTime()
    try:
        loop.run_until_complete(test())
    finally:
        loop.close()


def test_an_api_server_that_hangs_costs_the_lease_when_its_time_is_over() -> None:
    async def play() -> None:
        api, loop = Connection(), asyncio.get_running_loop()
        told = Told(api, loop.time)
        run = asyncio.create_task(told.campaign._run())
        await asyncio.sleep(7)
        assert told.lease.has_time()
        api.hangs = True  # the newest renewal was asked for at 6
        await run
        assert told.events == [("leading", 0.0), ("lost", pytest.approx(16.0))]
        assert api.closed

    in_virtual_time(play)


def test_an_api_server_that_hangs_for_a_while_costs_nothing_and_is_told_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def play() -> None:
        api, loop = Connection(), asyncio.get_running_loop()
        told = Told(api, loop.time)
        run = asyncio.create_task(told.campaign._run())
        for _ in range(20):
            await asyncio.sleep(3.5)
            api.hangs = True
            await asyncio.sleep(5)
            assert told.lease.has_time()
            api.hangs = False
        assert told.events == [("leading", 0.0)]
        assert caplog.text.count("the lease cannot be renewed: no answer in time") == 20
        run.cancel()

    in_virtual_time(play)


def test_a_leader_that_dies_is_followed_after_the_lease_and_one_that_goes_at_once() -> None:
    async def play() -> None:
        api, loop = Connection(), asyncio.get_running_loop()
        first, second, third = (Told(api, loop.time, identity) for identity in ("a", "b", "c"))
        dies = asyncio.create_task(first.campaign._run())
        await asyncio.sleep(5.5)
        goes = asyncio.create_task(second.campaign._run())
        await asyncio.sleep(30.5)
        dies.cancel()  # it has renewed at 36
        await asyncio.sleep(20)
        assert second.events == [("leading", pytest.approx(51.5))], "15 s after it was first seen, at the next look"
        waits = asyncio.create_task(third.campaign._run())
        await asyncio.sleep(5)
        second.campaign._stopping = True
        second.campaign._stop.set()
        left = loop.time()
        await goes
        await asyncio.sleep(2)
        assert [event for event, _ in second.events] == ["leading"], "to go is not to lose"
        assert third.events[0][1] - left <= TIMES.retry_seconds
        waits.cancel()

    in_virtual_time(play)


def test_standing_by_is_cheap_and_waiting_for_an_api_server_ends_nothing() -> None:
    async def play() -> None:
        api, loop = Connection(), asyncio.get_running_loop()
        leads, waits = Told(api, loop.time, "a"), Told(api, loop.time, "b")
        runs = [asyncio.create_task(told.campaign._run()) for told in (leads, waits)]
        await asyncio.sleep(60.5)
        assert len(api.writes) == 31, "the leader's, one every two seconds"
        api.hangs = True
        await asyncio.sleep(300)
        assert [event for event, _ in leads.events] == ["leading", "lost"]
        assert waits.events == []
        api.hangs = False
        await asyncio.sleep(4)
        assert [event for event, _ in waits.events] == ["leading"]
        runs[1].cancel()

    in_virtual_time(play)


# The thread that does all that, in its own loop.

QUICK = LeaderElection(lease_seconds=2, renew_seconds=1.6, retry_seconds=0.02)


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_blocked_main_loop_does_not_cost_the_lease() -> None:
    api = Connection()
    told = Told(api, time.monotonic, times=QUICK)
    told.campaign.start()
    wait_for(lambda: bool(told.events))
    time.sleep(2 * QUICK.renew_seconds)  # what the main loop does here
    assert told.lease.has_time()
    told.campaign.stop()
    assert not told.lease.has_time()
    assert "holderIdentity" not in stored(api)["spec"]
    assert [event for event, _ in told.events] == ["leading"]
    assert api.closed


def test_a_renewal_that_is_stuck_stops_writes_and_orders_though_nobody_notices() -> None:
    """The thread itself hangs, in a call that knows no timeout."""
    api, released = Connection(), threading.Event()
    told = Told(api, time.monotonic, times=QUICK)
    told.campaign.start()
    wait_for(lambda: bool(told.events))

    async def stuck(*_: Any) -> KubeObject:
        released.wait()
        raise Unavailable("no answer")

    api.replace = stuck
    wait_for(lambda: not told.lease.has_time())
    assert [event for event, _ in told.events] == ["leading"]
    released.set()
    wait_for(lambda: len(told.events) == 2)
    assert told.events[1][0] == "lost"


@pytest.mark.parametrize("error", [Unavailable("no way there"), ValueError("a bug")], ids=["no connection", "a bug"])
def test_a_thread_that_dies_takes_the_process_with_it(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def connect() -> Connection:
        raise error

    told = Told(Connection(), time.monotonic, connect=connect)
    told.campaign.start()
    wait_for(lambda: bool(told.events))
    assert [event for event, _ in told.events] == ["lost"]
    assert str(error) in caplog.text
    told.campaign.stop()


def test_to_stop_before_the_lease_is_there_is_to_stop() -> None:
    api = Connection()
    api.hangs = True
    told = Told(api, time.monotonic, times=QUICK)
    told.campaign.start()
    told.campaign.stop()
    assert told.events == []


def test_what_cannot_be_given_back_is_left_to_end(api: FakeKubeApi) -> None:
    connection = Connection()
    told = Told(connection, time.monotonic, times=QUICK)
    told.campaign.start()
    wait_for(lambda: bool(told.events))
    connection.fail_next = "refused"
    told.campaign.stop()
    assert [event for event, _ in told.events] == ["leading"]


# Settings and identity.


@pytest.mark.parametrize(
    "times",
    [
        {"lease_seconds": 11, "renew_seconds": 10.0},
        {"lease_seconds": 10, "renew_seconds": 15.0},
        {"lease_seconds": 15, "renew_seconds": 10.0, "retry_seconds": 4.0},
    ],
    ids=["no room for clocks", "renewed too late", "too few tries"],
)
def test_settings_under_which_two_could_lead_or_none_are_refused(times: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"leaseSeconds must be at least 1\.2 times renewSeconds"):
        LeaderElection(**times)


def test_a_pod_is_one_holder_and_a_process_outside_of_pods_another_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POD_NAME", raising=False)
    monkeypatch.delenv("POD_UID", raising=False)
    assert own_pod() is None
    assert identity_of(None) != identity_of(None)
    monkeypatch.setenv("POD_NAME", "finetune-operator-1")
    monkeypatch.setenv("POD_UID", "uid-1")
    assert own_pod() == OwnPod("finetune-operator-1", "uid-1")
    assert identity_of(own_pod()) == "finetune-operator-1_uid-1"
