"""Two replicas, and any order of stalls, lost answers, late requests and deaths: never do both believe that they lead.

Requests and answers travel only when hypothesis says so, also long after their sender has given up or died. Clocks start anywhere and
differ in rate by up to two fifths; the defaults bear a half.
"""

from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from types import coroutine
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune_operator.kube.errors import KubeError
from finetune_operator.leader import Candidate, Lease
from finetune_operator.settings import LeaderElection
from tests.operator.fake_api import FakeKubeApi

TIMES = LeaderElection()
one = st.integers(0, 1)
some_time = st.sampled_from([0.0, 1.0, 4.0, 8.0, 12.0])


@dataclass(eq=False)
class Call:
    """A request on its way, and then its answer."""

    carry_out: Callable[[], Coroutine[Any, Any, Any]]
    answer: Any = None

    def arrives(self) -> None:
        """At the API server, which never waits for anything."""
        try:
            self.carry_out().send(None)
        except StopIteration as done:
            self.answer = done.value
        except KubeError as error:
            self.answer = error


class Wire:
    """``KubeApi``, as far as a candidate needs it: each call waits for its answer."""

    def __init__(self, api: FakeKubeApi) -> None:
        self._api = api

    async def get(self, *arguments: Any) -> Any:
        return await self._travel(lambda: self._api.get(*arguments))

    async def create(self, *arguments: Any) -> Any:
        return await self._travel(lambda: self._api.create(*arguments))

    async def replace(self, *arguments: Any) -> Any:
        return await self._travel(lambda: self._api.replace(*arguments))

    @coroutine
    def _travel(self, carry_out: Callable[[], Coroutine[Any, Any, Any]]) -> Generator[Call, Any, Any]:
        answer = yield Call(carry_out)
        if isinstance(answer, KubeError):
            raise answer
        return answer


class Process:
    """One replica's process, by its own clock."""

    def __init__(self, world: "TwoReplicas", pod: str, rate: float, offset: float) -> None:
        self.pod, self.rate, self.offset, self._world = pod, rate, offset, world
        self.lease = Lease(self.clock)
        self.candidate = Candidate(
            api=Wire(world.api), lease=self.lease, namespace="ns", name="lease", identity=pod, times=TIMES
        )
        self.call: Call | None = None
        self._running: Coroutine[Any, Any, None] | None = None

    def clock(self) -> float:
        return self.offset + self._world.now * self.rate

    def does(self, what: Coroutine[Any, Any, None]) -> None:
        """Begin something, up to its first request."""
        self._running = what
        self._go_on(lambda: what.send(None))

    def hears(self) -> None:
        """The answer is there."""
        assert self._running is not None
        assert self.call is not None
        running, answer = self._running, self.call.answer
        self._go_on(lambda: running.send(answer))

    def gives_up(self) -> None:
        """It waits no longer; the request may arrive all the same."""
        assert self._running is not None
        running = self._running
        self._go_on(lambda: running.throw(TimeoutError()))

    def _go_on(self, step: Callable[[], Call]) -> None:
        try:
            self.call = step()
        except (StopIteration, KubeError, TimeoutError):
            self.call = self._running = None
        else:
            self._world.wire.append(self.call)


class TwoReplicas(RuleBasedStateMachine):
    """Two processes at any time; each may be followed by another one, in the same pod or in a new one."""

    @initialize(
        rates=st.tuples(*2 * [st.sampled_from([1.0, 1.1, 1.25, 1.4])]), offsets=st.tuples(*2 * [st.integers(0, 10**6)])
    )
    def begin(self, rates: tuple[float, float], offsets: tuple[int, int]) -> None:
        self.now, self.pods = 0.0, 0
        self.api = FakeKubeApi()
        self.wire: list[Call] = []
        self.processes: list[Process] = []
        for rate, offset in zip(rates, offsets, strict=True):
            self.pods += 1
            self.processes.append(Process(self, f"pod-{self.pods}", rate, float(offset)))

    @rule(n=one, hops=st.integers(0, 3), arrives=st.booleans(), seconds=some_time)
    def a_replica_gets_on(self, n: int, hops: int, arrives: bool, seconds: float) -> None:
        """It hears so many answers, and then stalls: before its next request arrives, or before the answer does."""
        process = self.processes[n]
        if process.call is None:
            process.does(process.candidate.try_once())
        for _ in range(hops):
            self.an_answer_arrives(process)
        if arrives and process.call in self.wire:
            self.wire.remove(process.call)
            process.call.arrives()
        self.now += seconds

    @rule(n=one, seconds=some_time)
    def all_is_well(self, n: int, seconds: float) -> None:
        self.a_replica_gets_on(n, 3, arrives=True, seconds=seconds)

    @rule(seconds=some_time)
    def all_is_well_with_both(self, seconds: float) -> None:
        for n in (0, 1):
            self.a_replica_gets_on(n, 3, arrives=True, seconds=0.0)
        self.now += seconds

    def an_answer_arrives(self, process: Process) -> None:
        if process.call is None:
            return
        if process.call in self.wire:
            self.wire.remove(process.call)
            process.call.arrives()
        process.hears()

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), seconds=some_time)
    def a_late_request_arrives(self, data: st.DataObject, seconds: float) -> None:
        self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1))).arrives()
        self.now += seconds

    @rule(n=one, what=st.sampled_from(["gives up", "goes", "dies", "is replaced"]))
    def a_replica_ends_something(self, n: int, what: str) -> None:
        process = self.processes[n]
        if what == "gives up" and process.call is not None:
            process.gives_up()
        elif what == "goes" and process.call is None:
            process.lease.close()
            process.does(process.candidate.release())
        elif what in ("dies", "is replaced"):
            self.follow(n, new_pod=what != "dies")

    def follow(self, n: int, *, new_pod: bool) -> None:
        """A process is dead, and another one is there, on the same machine."""
        old = self.processes[n]
        self.pods += new_pod
        self.processes[n] = Process(self, f"pod-{self.pods}" if new_pod else old.pod, old.rate, old.offset)

    @invariant()
    def one_leads_at_most(self) -> None:
        leaders = [process.pod for process in getattr(self, "processes", ()) if process.lease.has_time()]
        assert len(leaders) < 2, f"{leaders} lead at {self.now}"

    def teardown(self) -> None:
        """When all is well again, somebody leads soon."""
        if not hasattr(self, "processes"):
            return
        for n in (0, 1):
            self.follow(n, new_pod=True)
        for _ in range(12):
            for n in (0, 1):
                self.all_is_well(n, 1.0)
                self.one_leads_at_most()
        assert any(process.lease.has_time() for process in self.processes)


TestTwoReplicas = TwoReplicas.TestCase
TestTwoReplicas.settings = settings(max_examples=500, stateful_step_count=50, deadline=None, print_blob=True)
