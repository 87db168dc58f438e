"""The state machine, without processes: what it does about what it hears."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from finetune_agent.agent import (
    ECHO_SECONDS,
    SETTLE_SECONDS,
    Agent,
    Ask,
    Gone,
    Identity,
    LauncherEnded,
    NotStarted,
    Ordered,
    Persist,
    Quit,
    Start,
    Terminate,
    Tick,
)
from finetune_agent.beats import Levels, WorkerEnded, WorkerStarted
from finetune_agent.journal import Journal, Record
from finetune_agent.launcher import LauncherEnd
from finetune_api.protocol import (
    Action,
    AgentState,
    Checkpoint,
    CheckpointWish,
    Exit,
    Heartbeat,
    Order,
    Phase,
    Progress,
    Resumed,
    ResumeSource,
    Saves,
)

IDENTITY = Identity("uid", "instance", "10.0.0.1")
CHECKPOINT = Checkpoint(5, "s3://b/c", 1, "2026-01-01T00:00:00Z")
SAVES = Saves(saving_step=7, saving_since="2026-01-01T00:00:00Z")
RESUMED = Resumed(5, ResumeSource.STORAGE)


def agent(record: Record | None = None, *, zero_means_done: bool = True, previous_end: str = "") -> Agent:
    return Agent(
        identity=IDENTITY,
        record=record or Record(),
        port=20000,
        previous_end=previous_end,
        grace_seconds=25,
        zero_means_done=zero_means_done,
    )


def order(action: Action, generation: int, **fields) -> Ordered:
    return Ordered(Order(action, generation, **{"nodes": 1, "processes_per_node": 2, **fields}))


RUN, WAIT, STOP, FINISH = Action.RUN, Action.WAIT, Action.STOP, Action.FINISH
BEGIN = [Gone(), order(RUN, 1)]
BOTH_RUN = [*BEGIN, WorkerStarted(1, 0, 100), WorkerStarted(1, 1, 101)]


def ended(rank: int, code: int | None, *, signal: int | None = None, generation: int = 1) -> WorkerEnded:
    return WorkerEnded(Exit(generation, rank, code, signal))


def drive(machine: Agent, events, now: float = 0.0) -> list:
    """Feed events (a number is time that passes); return the effects without ``Persist``."""
    effects = []
    for event in events:
        if isinstance(event, (int, float)):
            now += event
        else:
            effects += [effect for effect in machine.handle(event, now) if not isinstance(effect, Persist)]
    return effects


@pytest.mark.parametrize(
    ("events", "state", "effects"),
    [
        pytest.param([Tick()], AgentState.IDLE, ["Kill"], id="a new agent first ends what a former one may have left"),
        pytest.param([order(RUN, 1), Tick()], AgentState.IDLE, ["Kill", "Kill"], id="nothing starts before all of that is gone"),
        pytest.param([order(RUN, 1), order(RUN, 2), Gone()], AgentState.RUNNING, ["Kill", "Kill", "Start 2"], id="the newest order starts"),
        pytest.param([*BEGIN, order(RUN, 1)], AgentState.RUNNING, ["Start 1"], id="a generation starts once"),
        pytest.param([*BEGIN, order(RUN, 0)], AgentState.RUNNING, ["Start 1"], id="a lower generation is not obeyed"),
        pytest.param([Gone(), order(WAIT, 5), order(RUN, 4)], AgentState.IDLE, [], id="nor is one lower than any order heard"),
        pytest.param([Gone(), order(WAIT, 5), order(RUN, 5)], AgentState.RUNNING, ["Start 5"], id="wait, then run"),
        pytest.param([*BOTH_RUN, order(RUN, 2)], AgentState.RUNNING, ["Start 1", "Kill"], id="a higher generation ends the lower at once"),
        pytest.param([*BOTH_RUN, order(RUN, 2), Gone()], AgentState.RUNNING, ["Start 1", "Kill", "Start 2"], id="and then starts"),
        pytest.param([*BOTH_RUN, order(WAIT, 1)], AgentState.RUNNING, ["Start 1"], id="wait for the one that runs changes nothing"),
        pytest.param([*BOTH_RUN, order(WAIT, 2), Gone()], AgentState.STOPPED, ["Start 1", "Kill"], id="wait for a higher one ends it"),
        pytest.param([*BOTH_RUN, order(RUN, 2), order(WAIT, 2), Gone()], AgentState.STOPPED, ["Start 1", "Kill", "Kill"], id="wait takes back run"),
        pytest.param([*BOTH_RUN, ended(0, 0)], AgentState.RUNNING, ["Start 1"], id="one zero is no success"),
        pytest.param([*BOTH_RUN, ended(0, 0), ended(1, 0)], AgentState.SUCCEEDED, ["Start 1"], id="zero from all is, and the launcher may go on"),
        pytest.param([*BOTH_RUN, ended(0, 0), ended(1, 0), LauncherEnded(1, LauncherEnd(1))], AgentState.SUCCEEDED, ["Start 1", "Kill"], id="whatever the launcher says later"),
        pytest.param([*BOTH_RUN, ended(0, 0), ended(1, 0), order(STOP, 1)], AgentState.SUCCEEDED, ["Start 1", "Kill"], id="success stays success"),
        pytest.param([*BOTH_RUN, ended(1, 1)], AgentState.FAILED, ["Start 1"], id="one bad end fails at once, its peers may tell theirs"),
        pytest.param([*BOTH_RUN, ended(1, 1), ECHO_SECONDS, Tick()], AgentState.FAILED, ["Start 1", "Kill"], id="for a moment"),
        pytest.param([*BOTH_RUN, ended(1, 1), ended(0, 1)], AgentState.FAILED, ["Start 1", "Kill"], id="or until all have"),
        pytest.param([*BOTH_RUN, ended(1, 75), 24, Tick()], AgentState.FAILED, ["Start 1"], id="one that has saved because another pod must go lets its peers save too"),
        pytest.param([*BOTH_RUN, ended(1, 75), 25, Tick()], AgentState.FAILED, ["Start 1", "Kill"], id="within the grace period"),
        pytest.param([*BOTH_RUN, ended(1, 75), ended(0, 75)], AgentState.FAILED, ["Start 1", "Kill"], id="and when all have, it is over"),
        pytest.param([*BOTH_RUN, ended(1, 75), ended(0, 1)], AgentState.FAILED, ["Start 1", "Kill"], id="or when one could not"),
        pytest.param([*BOTH_RUN, ended(1, 75), Terminate()], AgentState.FAILED, ["Start 1", "Ask [100]"], id="SIGTERM does not disturb a save that has begun"),
        pytest.param([*BOTH_RUN, ended(1, 1), Terminate()], AgentState.FAILED, ["Start 1", "Kill"], id="but after a bad end there is nothing to save"),
        pytest.param([*BOTH_RUN, ended(1, 1), order(RUN, 2)], AgentState.FAILED, ["Start 1", "Kill"], id="a new generation need not wait for echoes"),
        pytest.param([*BOTH_RUN, LauncherEnded(1, LauncherEnd(0))], AgentState.RUNNING, ["Start 1"], id="a launcher's zero says nothing yet"),
        pytest.param([*BOTH_RUN, LauncherEnded(1, LauncherEnd(0)), SETTLE_SECONDS, Tick()], AgentState.FAILED, ["Start 1", "Kill"], id="nor without its workers' words"),
        pytest.param([*BOTH_RUN, LauncherEnded(1, LauncherEnd(0)), ended(0, 0), ended(1, 0)], AgentState.SUCCEEDED, ["Start 1", "Kill"], id="which may come late"),
        pytest.param([*BEGIN, LauncherEnded(1, LauncherEnd(78, message="no torch"))], AgentState.FAILED, ["Start 1", "Kill"], id="a launcher that starts no worker fails at once"),
        pytest.param([*BEGIN, NotStarted("port", 74)], AgentState.FAILED, ["Start 1", "Kill"], id="what cannot be started has failed"),
        pytest.param([*BOTH_RUN, ended(0, 1, generation=0)], AgentState.RUNNING, ["Start 1"], id="an end of another generation is not this one's"),
        pytest.param([*BOTH_RUN, ended(7, 1)], AgentState.RUNNING, ["Start 1"], id="nor is another rank's"),
        pytest.param([*BEGIN, WorkerStarted(1, 7, 107), 0.05, Tick(), Terminate()], AgentState.RUNNING, ["Start 1", "Kill"], id="nor is another rank's start"),
        pytest.param([*BOTH_RUN, order(STOP, 1, grace_seconds=9)], AgentState.RUNNING, ["Start 1", "Ask [100, 101]"], id="stop asks the workers"),
        pytest.param([*BOTH_RUN, order(STOP, 1, grace_seconds=9), 8.9, Tick()], AgentState.RUNNING, ["Start 1", "Ask [100, 101]"], id="and waits"),
        pytest.param([*BOTH_RUN, order(STOP, 1, grace_seconds=9), 9, Tick(), Gone()], AgentState.STOPPED, ["Start 1", "Ask [100, 101]", "Kill"], id="but not for ever"),
        pytest.param([*BOTH_RUN, order(STOP, 1, grace_seconds=9), ended(0, 75), ended(1, 75), Gone()], AgentState.STOPPED, ["Start 1", "Ask [100, 101]", "Kill"], id="until all have saved"),
        pytest.param([*BOTH_RUN, order(STOP, 1, grace_seconds=9), ended(0, 0), ended(1, 0)], AgentState.SUCCEEDED, ["Start 1", "Ask [100, 101]", "Kill"], id="or are done"),
        pytest.param([*BOTH_RUN, order(STOP, 1, grace_seconds=9), order(RUN, 2), Gone()], AgentState.RUNNING, ["Start 1", "Ask [100, 101]", "Kill", "Start 2"], id="a new generation cuts a stop short"),
        pytest.param([*BEGIN, order(STOP, 1, grace_seconds=9), Gone()], AgentState.STOPPED, ["Start 1", "Kill"], id="workers that have not begun have nothing to save"),
        pytest.param([*BEGIN, WorkerStarted(1, 0, 100), order(STOP, 1, grace_seconds=9), WorkerStarted(1, 1, 101)], AgentState.RUNNING, ["Start 1", "Ask [100]", "Ask [101]"], id="one that begins late is asked too"),
        pytest.param([*BOTH_RUN, order(RUN, 1, checkpoint=CheckpointWish(interval_steps=7))], AgentState.RUNNING, ["Start 1"], id="what is wished for the next generation changes nothing of this one"),
        pytest.param([*BOTH_RUN, order(WAIT, 2)], AgentState.RUNNING, ["Start 1", "Kill"], id="what is not gone has not stopped"),
        pytest.param([*BOTH_RUN, order(FINISH, 0), Gone()], AgentState.STOPPED, ["Start 1", "Kill", "Quit 0"], id="finish ends all, whatever its generation"),
        pytest.param([Gone(), order(FINISH, 0)], AgentState.IDLE, ["Quit 0"], id="finish of an idle agent"),
        pytest.param([*BOTH_RUN, Terminate(), ended(0, 75), ended(1, 75), Gone()], AgentState.STOPPED, ["Start 1", "Ask [100, 101]", "Kill", "Quit 75"], id="SIGTERM: saved"),
        pytest.param([*BOTH_RUN, Terminate(), ended(0, 75), 25, Tick(), Gone()], AgentState.STOPPED, ["Start 1", "Ask [100, 101]", "Kill", "Quit 143"], id="SIGTERM: not all saved"),
        pytest.param([*BOTH_RUN, Terminate(), order(RUN, 2), ended(0, 1), ended(1, 1), Gone()], AgentState.STOPPED, ["Start 1", "Ask [100, 101]", "Kill", "Quit 143"], id="after SIGTERM nothing starts"),
        pytest.param([*BOTH_RUN, Terminate(), order(FINISH, 1), Gone()], AgentState.STOPPED, ["Start 1", "Ask [100, 101]", "Kill", "Quit 0"], id="after SIGTERM finish is obeyed"),
        pytest.param([Gone(), Terminate()], AgentState.IDLE, ["Quit 143"], id="SIGTERM of an idle agent"),
    ],
)  # fmt: skip
def test_events_lead_to(events, state, effects):
    machine = agent()
    happened = drive(machine, events)
    assert (machine.report().state, [in_words(effect) for effect in happened]) == (state, effects)


def in_words(effect) -> str:
    match effect:
        case Start(given):
            return f"Start {given.generation}"
        case Ask(pids):
            return f"Ask {pids}"
        case Quit(code):
            return f"Quit {code}"
    return type(effect).__name__


def test_a_script_that_ends_with_zero_after_sigterm_has_not_succeeded():
    machine = agent(zero_means_done=False)
    drive(machine, [*BOTH_RUN, order(STOP, 1, grace_seconds=9), ended(0, 0), ended(1, 0), Gone()])
    assert machine.report().state is AgentState.STOPPED


def test_an_agent_that_was_told_to_go_says_so_and_one_whose_job_is_over_has_nobody_to_tell():
    machine = agent()
    drive(machine, [*BOTH_RUN])
    assert not machine.report().leaving
    drive(machine, [Terminate()])
    assert machine.report().leaving
    finished = agent()
    drive(finished, [*BOTH_RUN, order(FINISH, 1)])
    assert not finished.report().leaving


def test_exits_are_told_in_the_order_in_which_they_came_and_once_for_each_rank():
    machine = agent()
    drive(machine, [*BOTH_RUN, ended(1, None, signal=9), ended(0, 1), ended(1, 1)])
    assert [(end.rank, end.exit_code, end.signal) for end in machine.report().exits] == [(1, None, 9), (0, 1, None)]


def test_a_worker_that_had_to_be_killed_is_told():
    machine = agent()
    drive(machine, [*BOTH_RUN, order(STOP, 1, grace_seconds=9), ended(0, 75), 9, Tick()])
    assert [(end.rank, end.exit_code, end.signal) for end in machine.report().exits] == [(0, 75, None), (1, None, 9)]


def test_what_only_the_launcher_knows_of_a_worker_is_told():
    machine = agent()
    end = LauncherEnd(1, message="torchrun: workers failed", failures=[Exit(1, 0, None, 9), Exit(1, 1, None, 15)])
    drive(machine, [*BOTH_RUN, ended(0, 3), LauncherEnded(1, end), SETTLE_SECONDS, Tick()])
    assert [(e.rank, e.exit_code, e.signal) for e in machine.report().exits] == [(0, 3, None), (1, None, 15)]


def test_a_new_generation_forgets_progress_and_exits_but_not_what_is_committed():
    machine = agent()
    levels = Levels(Heartbeat(Phase.TRAINING, 7), Progress(7), checkpoint=CHECKPOINT, saves=SAVES, resumed=RESUMED)
    drive(machine, [*BOTH_RUN, levels, ended(0, 1), ended(1, 1), Gone()])
    report = machine.report()
    assert (report.saves, report.resumed) == (SAVES, RESUMED), "an ended generation is still told of"
    drive(machine, [order(RUN, 2)])
    report = machine.report()
    assert (report.heartbeat, report.progress, report.exits, report.checkpoint) == (None, None, [], CHECKPOINT)
    assert (report.saves, report.resumed) == (None, None)


def test_where_a_generation_started_stays_known_when_later_levels_do_not_repeat_it_and_how_saving_goes_does_not():
    machine = agent()
    drive(machine, [*BOTH_RUN, Levels(saves=SAVES, resumed=RESUMED), Levels(progress=Progress(8))])
    assert (machine.report().saves, machine.report().resumed) == (None, RESUMED)


def test_the_record_is_on_disk_before_the_start_that_it_tells_of():
    machine = agent()
    machine.handle(Gone(), 0)
    persist, start = machine.handle(order(RUN, 3), 0)
    assert persist == Persist(Record(started=3, obeyed=3, state=AgentState.RUNNING))
    assert isinstance(start, Start)


def test_a_new_instance_answers_for_the_generation_that_ran():
    machine = agent(
        Record(started=4, obeyed=5, state=AgentState.RUNNING, resumed=RESUMED, checkpoint=CHECKPOINT),
        previous_end="signal 9",
    )
    (persist, _) = machine.handle(Tick(), 0)
    report = machine.report()
    assert (report.state, report.generation, report.checkpoint) == (AgentState.FAILED, 4, CHECKPOINT)
    assert report.resumed == RESUMED, "what that generation has lost can still be told"
    assert report.exits == [Exit(4, -1, message="the agent process ended while this generation ran (signal 9)")]
    assert persist.record.state is AgentState.FAILED
    assert drive(machine, [Gone(), order(RUN, 4), order(RUN, 5)]) == [Start(order(RUN, 5).order)]


@pytest.mark.parametrize("state", [AgentState.SUCCEEDED, AgentState.FAILED, AgentState.STOPPED])
def test_a_new_instance_keeps_what_had_come_to_an_end(state):
    record = Record(started=4, obeyed=4, state=state, exits=[Exit(4, 0, 1)] if state is AgentState.FAILED else [])
    assert (agent(record).report().state, agent(record).report().exits) == (state, record.exits)


def test_the_journal_returns_what_was_written_and_refuses_what_it_did_not_write(tmp_path):
    journal = Journal(tmp_path)
    assert journal.read() == Record()
    record = Record(3, 4, AgentState.FAILED, [Exit(3, 1, None, 9, "message", "tail")], RESUMED, checkpoint=CHECKPOINT)
    journal.write(replace(record, started=2))
    journal.write(record)
    assert Journal(tmp_path).read() == record
    (tmp_path / "journal.json").write_text('{"started": 1')
    with pytest.raises(ValueError, match=r"journal\.json cannot be read"):
        journal.read()


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Whatever happens: generations start upwards, each once, on a clean pod, after they are on disk."""

    def __init__(self):
        super().__init__()
        self.disk = Record()
        self.started: list[int] = []
        self.clean = False
        self.quit = False
        self.now = 0.0
        self.machine = agent()

    def feed(self, event):
        if self.quit:
            return
        before = self.machine.report()
        for effect in self.machine.handle(event, self.now):
            if isinstance(effect, Persist):
                self.disk = effect.record
            elif isinstance(effect, Start):
                assert self.clean
                assert self.disk.started == effect.order.generation > max(self.started, default=0)
                self.started.append(effect.order.generation)
                self.clean = False
            elif isinstance(effect, Quit):
                assert self.clean
                self.quit = True
        after = self.machine.report()
        if before.generation == after.generation and before.state in (AgentState.SUCCEEDED, AgentState.FAILED):
            assert after.state is before.state

    @rule(action=st.sampled_from([RUN, RUN, RUN, WAIT, STOP]), generation=st.integers(0, 6))
    def hear_an_order(self, action, generation):
        self.feed(order(action, generation, grace_seconds=5))

    @rule(rank=st.integers(0, 2), generation=st.integers(0, 6))
    def start_a_worker(self, rank, generation):
        self.feed(WorkerStarted(generation, rank, 1000 + rank))

    @rule(rank=st.integers(0, 2), code=st.sampled_from([0, 0, 0, 1, 75]), generation=st.integers(1, 6))
    def end_a_worker(self, rank, code, generation):
        self.feed(ended(rank, code, generation=generation))

    @rule(code=st.sampled_from([0, 1]), generation=st.integers(1, 6))
    def end_a_launcher(self, code, generation):
        self.feed(LauncherEnded(generation, LauncherEnd(code)))

    @rule(seconds=st.sampled_from([0.05, 1, 30]))
    def let_time_pass(self, seconds):
        self.now += seconds
        self.feed(Tick())

    @rule()
    def find_nothing_left(self):
        self.clean = True
        self.feed(Gone())

    @rule()
    @precondition(lambda self: not self.quit)
    def lose_the_agent(self):
        self.machine, self.clean = agent(self.disk), False

    @rule(event=st.sampled_from([Terminate(), order(FINISH, 0), NotStarted("no")]), luck=st.integers(0, 20))
    def end_it_all_rarely(self, event, luck):
        if luck == 0:
            self.feed(event)

    @invariant()
    def what_is_reported_is_what_was_started(self):
        assert self.machine.report().generation == max(self.started, default=0)

    def teardown(self):
        """It settles: given time and a clean pod, a run order of a new generation starts it."""
        if not self.quit and self.machine._verdict is None:
            self.feed(order(RUN, 99))
            self.find_nothing_left()
            assert self.started[-1] == 99


AnyOrderOfEvents.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
