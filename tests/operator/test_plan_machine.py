"""Any order of faults: hypothesis plays the cluster against the operator, and when the faults stop the job comes to an end."""

import asyncio
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune_api.job import parse_job
from finetune_api.protocol import AgentState, Checkpoint, Doing, Saves
from finetune_operator.kube.api import JOBS, PODS
from finetune_operator.kube.errors import Conflict, KubeError
from finetune_operator.plan.shape import shape_of
from finetune_operator.plan.silence import FIRST_WORD_SECONDS
from tests.operator.fake_api import Crash
from tests.operator.simulation import KEY, Cluster

pick = st.integers(0, 5)
MAX_RESTARTS = 3


class FaultsInAnyOrder(RuleBasedStateMachine):
    """One job of one to three nodes, and everything that can befall it."""

    @initialize(nodes=st.integers(1, 3), trains=st.booleans())
    def begin(self, nodes: int, trains: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self.cluster = Cluster(f"recovery: {{maxRestarts: {MAX_RESTARTS}, windowSeconds: 6000}}", nodes=nodes)
        self.generation = 0
        self.final: Any = None
        self.reshaped_at_the_end = False
        if trains:
            self.everybody_does_their_part()

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            try:
                self.faults_stop()
            finally:
                self.loop.close()

    # Most of the time most things work.

    @rule()
    def everybody_does_their_part(self) -> None:
        self.loop.run_until_complete(self.cluster.settle())

    @rule()
    def a_moment_passes(self) -> None:
        self.cluster.watch()
        self.cluster.kubelets()
        self.cluster.watch()
        self.all_agents_talk()
        self.operator_reconciles()

    @precondition(lambda self: self.cluster.agents)
    @rule(n=pick, end=st.sampled_from([(1, None), (71, None), (77, None), (79, None), (None, 11)]))
    def the_gang_fails_and_recovers(self, n: int, end: tuple[int | None, int | None]) -> None:
        self.a_worker_fails(n, end)
        self.cluster.wait(2)
        self.everybody_does_their_part()

    # The operator acts, or not quite.

    @rule()
    def operator_reconciles(self) -> None:
        try:
            self.loop.run_until_complete(self.cluster.reconcile())
        except Conflict:
            pass

    @rule(writes=st.integers(0, 3))
    def operator_dies_after_some_writes_and_a_new_one_starts(self, writes: int) -> None:
        self.cluster.api.crash_after = writes
        try:
            self.loop.run_until_complete(self.cluster.reconcile())
        except (Crash, KubeError):
            pass
        self.cluster.restart_operator()

    @rule(how=st.sampled_from(["lost", "refused"]))
    def a_write_gets_no_answer(self, how: str) -> None:
        self.cluster.api.fail_next = how
        try:
            self.loop.run_until_complete(self.cluster.reconcile())
        except KubeError:
            pass
        self.cluster.api.fail_next = None

    @rule(count=st.integers(1, 4))
    def watches_show_some_events(self, count: int) -> None:
        self.cluster.watch(count)

    @rule()
    def watches_catch_up(self) -> None:
        self.cluster.watch()

    # Pods and agents.

    def pods(self, *phases: str) -> list[str]:
        return [pod["metadata"]["uid"] for pod in self.cluster.pods() if pod["status"]["phase"] in phases]

    @precondition(lambda self: self.pods("Pending"))
    @rule(n=pick)
    def a_pod_starts(self, n: int) -> None:
        pending = self.pods("Pending")
        self.cluster.start_pod(pending[n % len(pending)])

    @rule()
    def the_next_pod_will_not_reach_the_operator(self) -> None:
        self.cluster.next_is_mute = True

    @precondition(lambda self: self.cluster.agents)
    @rule(n=pick)
    def an_agent_talks(self, n: int) -> None:
        agents = list(self.cluster.agents)
        self.cluster.talk(agents[n % len(agents)])

    @rule()
    def all_agents_talk(self) -> None:
        for uid in list(self.cluster.agents):
            self.cluster.talk(uid)

    @precondition(lambda self: self.cluster.agents)
    @rule(
        n=pick,
        end=st.sampled_from(
            [(1, None), (69, None), (71, None), (74, None), (75, None), (77, None), (79, None), (None, 9), (None, 11)]
        ),
    )
    def a_worker_fails(self, n: int, end: tuple[int | None, int | None]) -> None:
        agents = list(self.cluster.agents.values())
        agents[n % len(agents)].worker_ends(*end)

    @precondition(lambda self: self.cluster.agents)
    @rule(n=pick)
    def an_agent_begins_anew(self, n: int) -> None:
        agents = list(self.cluster.agents.values())
        agents[n % len(agents)].begins_anew()

    @precondition(lambda self: self.cluster.agents)
    @rule(n=pick)
    def a_container_exceeds_its_memory(self, n: int) -> None:
        agents = list(self.cluster.agents)
        self.cluster.out_of_memory(agents[n % len(agents)])

    @precondition(lambda self: self.cluster.agents)
    @rule(n=pick, doing=st.sampled_from(Doing))
    def the_workers_of_a_pod_fall_silent(self, n: int, doing: Doing) -> None:
        agents = list(self.cluster.agents.values())
        agents[n % len(agents)].hangs(doing)

    @rule(doing=st.sampled_from(Doing))
    def the_whole_gang_hangs(self, doing: Doing) -> None:
        for agent in self.cluster.agents.values():
            agent.hangs(doing)

    @precondition(lambda self: self.cluster.agents)
    @rule(n=pick, ahead=st.integers(-2, 2))
    def a_checkpoint_is_committed(self, n: int, ahead: int) -> None:
        agents = list(self.cluster.agents.values())
        agent = agents[n % len(agents)]
        agent.checkpoint = Checkpoint(max(0, agent.started + ahead), "s3://b/p", 1, "2026-01-01T12:00:00Z")

    @precondition(lambda self: self.cluster.agents)
    @rule(n=pick, level=st.sampled_from([Saves(), Saves(3, put_off=1), Saves(failing_since="2026-01-01T12:00:00Z")]))
    def an_agent_tells_how_saving_goes(self, n: int, level: Saves) -> None:
        agents = list(self.cluster.agents.values())
        agents[n % len(agents)].saves_now = level

    @precondition(lambda self: self.cluster.agents)
    @rule(n=pick)
    def numbers_that_going_back_does_not_mend(self, n: int) -> None:
        self.a_worker_fails(n, (76, None))

    @precondition(lambda self: self.pods("Pending", "Running"))
    @rule(n=pick, how=st.sampled_from(["evicted", "failed", "deleted", "gone"]))
    def a_pod_is_lost(self, n: int, how: str) -> None:
        alive = self.pods("Pending", "Running")
        uid = alive[n % len(alive)]
        if how == "evicted":
            self.cluster.change_pod(
                uid, conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]
            )
        if how == "failed":
            self.cluster.agents.pop(uid, None)
            self.cluster.change_pod(uid, phase="Failed", reason="UnexpectedAdmissionError")
        elif how == "gone":
            self.cluster.remove_pod(uid)
        else:
            name = next(pod["metadata"]["name"] for pod in self.cluster.pods() if pod["metadata"]["uid"] == uid)
            self.loop.run_until_complete(self.cluster.api.delete(PODS, KEY[0], name, uid=uid))

    @precondition(lambda self: self.cluster.agents)
    @rule(n=pick, told=st.booleans())
    def a_node_is_cut_off(self, n: int, told: bool) -> None:
        agents = list(self.cluster.agents)
        uid = agents[n % len(agents)]
        if told:
            self.cluster.cut(uid)
        else:
            self.cluster.agents[uid].cut = True

    @rule(seconds=st.sampled_from([16, 40]))
    def a_while_in_which_everybody_does_their_part(self, seconds: float) -> None:
        for _ in range(0, int(seconds), 8):
            self.cluster.wait(8)
            self.everybody_does_their_part()

    @precondition(lambda self: any(agent.cut for agent in self.cluster.agents.values()))
    @rule(n=pick)
    def a_node_is_back(self, n: int) -> None:
        cut = [uid for uid, agent in self.cluster.agents.items() if agent.cut]
        self.cluster.heal(cut[n % len(cut)])

    @rule()
    def kubelets_do_their_work(self) -> None:
        self.cluster.kubelets()

    @rule()
    def workers_reach_the_end(self) -> None:
        self.cluster.train()

    # People and time.

    @rule()
    def suspend_is_toggled(self) -> None:
        self.cluster.edit(suspend=not self.cluster.job["spec"].get("suspend", False))

    @rule(nodes=st.integers(1, 3), spares=st.integers(0, 2))
    def workers_are_resized(self, nodes: int, spares: int) -> None:
        self.cluster.edit(workers=self.cluster.job["spec"]["workers"] | {"nodes": nodes, "spares": spares})

    @precondition(lambda self: self.cluster.pods())
    @rule(memory=st.sampled_from(["2Gi", "6Gi", "8Gi"]), looks=st.booleans())
    def pods_are_reshaped_in_a_suspension_that_may_be_seen(self, memory: str, looks: bool) -> None:
        self.reshaped_at_the_end = any(a.state is AgentState.SUCCEEDED for a in self.cluster.agents.values())
        self.cluster.edit(suspend=True, workers=self.cluster.job["spec"]["workers"] | {"resources": {"memory": memory}})
        if looks:
            self.a_moment_passes()
        self.cluster.edit(suspend=False)

    @rule(seconds=st.sampled_from([0.5, 3.0, 30.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.wait(seconds)

    @rule(seconds=st.sampled_from([-3600.0, -40.0, -3.0, 3.0, 12.0, 40.0, 3600.0]), restarts=st.booleans())
    def the_operators_clock_is_set(self, seconds: float, restarts: bool) -> None:
        """By a time server that was away, or because the next operator runs on another node."""
        self.cluster.set_clock(timedelta(seconds=seconds))
        if restarts:
            self.cluster.restart_operator()

    # What must hold.

    @invariant()
    def promises_are_kept(self) -> None:
        if not hasattr(self, "cluster"):
            return
        self.cluster.check()
        assert self.cluster.generation >= self.generation, "generations never fall"
        self.generation = self.cluster.generation
        if self.final is not None:
            assert self.cluster.status == self.final, "the end is final"
        elif self.cluster.phase in ("Succeeded", "Failed"):
            self.final = self.cluster.status

    def faults_stop(self) -> None:
        """The job ends within a bounded number of steps, and what it leaves is right. Nodes that are cut off stay so."""
        cluster = self.cluster
        cluster.next_is_mute = False
        cluster.edit(suspend=False)
        was_over = self.final is not None
        self.pods_that_are_never_heard_are_given_up()
        for uid in [uid for uid, agent in cluster.agents.items() if agent.cut]:
            cluster.cut(uid)
        for turn in range(20):
            self.a_while_in_which_everybody_does_their_part(40)
            if turn == 1:
                self.nodes_that_are_cut_off_are_given_up()
            self.promises_are_kept()
            if cluster.phase in ("Succeeded", "Failed"):
                break
            cluster.train()
            cluster.wait(400)  # longer than the longest wait after failures
        assert cluster.phase in ("Succeeded", "Failed"), cluster.status
        reason = cluster.status["conditions"][0]["reason"]
        final = (
            "RestartsExhausted",
            "NumericFailure",
            "OutOfMemory",
            "WorkerFailed",
        )  # the last two at one step in a row
        assert cluster.phase == "Succeeded" or reason in final, "nothing else is final"
        self.what_was_lost_adds_up()
        if cluster.phase == "Succeeded" and not was_over and not self.reshaped_at_the_end:
            assert cluster.shapes[cluster.generation] == shape_of(parse_job(cluster.job)), (
                "the shape that spec asks for"
            )
        assert cluster.job["metadata"]["uid"] == cluster.job_uid
        assert [body["kind"] for body in cluster.api.bodies(JOBS)] == ["FineTuneJob"]

    def pods_that_are_never_heard_are_given_up(self) -> None:
        """The operator does so, where it can tell that they are to blame: in time some other pod of the job is heard, or none is left."""
        if not any(agent.mute for agent in self.cluster.agents.values()):
            return
        self.a_while_in_which_everybody_does_their_part(FIRST_WORD_SECONDS + 40)
        left = [self.cluster.agents[uid] for uid in self.pods("Pending", "Running") if uid in self.cluster.agents]
        if self.cluster.phase not in ("Succeeded", "Failed") and any(not agent.cut for agent in left):
            assert not [agent for agent in left if agent.mute]

    def nodes_that_are_cut_off_are_given_up(self) -> None:
        """What Kubernetes does after five minutes, and the operator where all nodes are away and it cannot tell who is to blame."""
        for pod in self.cluster.pods():
            agent = self.cluster.agents.get(pod["metadata"]["uid"])
            if agent is not None and agent.cut and "deletionTimestamp" not in pod["metadata"]:
                name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
                self.loop.run_until_complete(self.cluster.api.delete(PODS, KEY[0], name, uid=uid))

    def what_was_lost_adds_up(self) -> None:
        status = self.cluster.status
        attempts = status.get("attempts", [])
        generations = [attempt["generation"] for attempt in attempts]
        assert generations == sorted(set(generations))
        assert len(attempts) <= 10
        for attempt in attempts:
            if "lostSteps" in attempt:
                assert 0 <= attempt["lostSteps"] <= attempt["lastStep"]
        free = {"Preempted", "PortInUse", "NoPermission", "StorageUnavailable"}
        assert len((status["gang"]).get("avoidNodes", [])) <= 16
        counted = {entry["reason"] for entry in (status.get("restarts") or {}).get("byReason", ())}
        assert not counted & free, "nobody is to blame for these"
        conditions = {condition["type"]: condition["status"] for condition in status["conditions"]}
        assert conditions["CheckpointsDelayed"] == "False", "nothing is under way any more"


TestFaultsInAnyOrder = FaultsInAnyOrder.TestCase
TestFaultsInAnyOrder.settings = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
