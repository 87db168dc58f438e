"""How long workers may be silent, who is blamed for it, and how their stacks are read."""

import os
import signal
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path

import pytest

from finetune_agent import hang, stacks
from finetune_agent.agent import Agent, Examine, Examined, Gone, Identity, Ordered, Tick
from finetune_agent.beats import Levels, WorkerEnded, WorkerStarted
from finetune_agent.hang import Finding, Pulse, Watch
from finetune_agent.journal import Record
from finetune_api.protocol import Action, Doing, Exit, Heartbeat, Order, Pace, Phase, Stalled
from tests.agent.pod import wait_for


def beat(step: int, at: float, phase: Phase = Phase.TRAINING, busy: float | None = None) -> Pulse:
    return Pulse(Heartbeat(phase, step, busy), at)


def watch(*pulses: Pulse, hang_seconds: int = 60, must_beat: bool = True, ranks=range(1)) -> Watch:
    """Return the watch of workers all of which have sent these heartbeats, and were started at 0."""
    watched = Watch(ranks, hang_seconds=hang_seconds, must_beat=must_beat, now=0.0)
    for pulse in pulses:
        watched.hear(dict.fromkeys(ranks, pulse))
    return watched


def limit(watched: Watch, since: float, ranks=range(1)) -> float:
    """Return for how long after ``since`` the workers may be silent, to a tenth of a second."""
    return next(tenths / 10 for tenths in range(1, 200_000) if watched.are_silent(ranks, since + tenths / 10 + 1e-6))


def steps(*seconds: float, start: float = 0.0) -> list[Pulse]:
    """Return the heartbeats of steps of so many seconds."""
    times = [start + sum(seconds[:count]) for count in range(len(seconds) + 1)]
    return [beat(step, at) for step, at in enumerate(times)]


QUICK = steps(*[1.0] * 10)
LIMITS = {
    "quick steps get what the job says": (QUICK, 60.0),
    "slow ones five medians": (steps(*[20.0] * 10), 100.0),
    "one slow step among quick ones moves no median": (steps(1, 1, 40, 1, 1), 80.0),
    "but twice the longest of late is no hang": (steps(*[20.0] * 6, 70, 20), 140.0),
    "what was long ago is forgotten": (steps(70, *[20.0] * 40), 100.0),
    "the first steps may take long": (steps(1.0, 1.0), 1800.0),
    "three are enough to learn from": (steps(1.0, 1.0, 1.0), 60.0),
    "heartbeats between steps are no steps": ([*QUICK, beat(10, 10.5), beat(10, 11.0)], 60.0),
    "a save is no step": ([*steps(*[30.0] * 4), beat(4, 121, Phase.CHECKPOINTING), beat(4, 500), beat(5, 530)], 150.0),
    "a heartbeat that was lost counts for two steps": ([beat(0, 0), beat(2, 40), beat(4, 80), beat(6, 120)], 100.0),
    "initializing": ([beat(0, 0, Phase.INITIALIZING)], 7200.0),
    "evaluating has a limit of its own, whatever steps take": ([*QUICK, beat(10, 11, Phase.EVALUATING)], 1800.0),
    "saving too": ([*QUICK, beat(10, 11, Phase.CHECKPOINTING)], 1800.0),
    "handing over the result too": ([*QUICK, beat(10, 11, Phase.FINISHING)], 7200.0),
}  # fmt: skip


@pytest.mark.parametrize(("pulses", "seconds"), LIMITS.values(), ids=LIMITS.keys())
def test_how_long_a_worker_may_be_silent(pulses: list[Pulse], seconds: float) -> None:
    assert limit(watch(*pulses), pulses[-1].at) == pytest.approx(seconds, abs=0.11)


def test_our_trainer_must_speak_in_time_and_a_script_need_not_ever() -> None:
    assert limit(watch(), 0.0) == pytest.approx(hang.FIRST_BEAT_SECONDS, abs=0.11)
    assert not watch(must_beat=False).are_silent(range(1), 1e9)


def test_a_job_that_wants_none_of_it_is_never_silent() -> None:
    assert not watch(*QUICK, hang_seconds=0).are_silent(range(1), 1e9)


def test_a_pod_is_silent_when_all_its_workers_are() -> None:
    watched = watch(*QUICK, ranks=range(2, 4))
    watched.hear({3: beat(10, 50.0)})
    assert not watched.are_silent([2, 3], 71.0)
    assert watched.are_silent([2, 3], 111.0)
    assert watched.are_silent([2], 71.0), "one that has ended has nothing to say"
    assert not watched.are_silent([], 1e9)


def test_of_a_script_those_count_that_have_spoken() -> None:
    watched = Watch(range(2), hang_seconds=60, must_beat=False, now=0.0)
    for pulse in QUICK:
        watched.hear({0: pulse})
    assert watched.are_silent([0, 1], 71.0)


def test_what_a_worker_tells_when_it_is_not_one_of_this_generation_is_ignored() -> None:
    watched = watch(*QUICK)
    watched.hear({7: beat(1, 1.0)})
    assert watched.are_silent([0], 71.0)


IN_ORDER_OF_SUSPICION = [
    Stalled(4, Phase.TRAINING, 9, 60.0, Doing.STOPPED),
    Stalled(3, Phase.TRAINING, 7, 60.0, Doing.WAITING),
    Stalled(2, Phase.TRAINING, 8, 60.0, Doing.WORKING),
    Stalled(1, Phase.TRAINING, 8, 60.0, Doing.UNKNOWN),
    Stalled(0, Phase.TRAINING, 8, 61.0, Doing.WAITING),
    Stalled(5, Phase.TRAINING, 8, 60.0, Doing.WAITING),
]


def test_the_likeliest_cause() -> None:
    """A stopped process, fewer steps, own work, no alibi, the longest silence: in this order."""
    for some in permutations(IN_ORDER_OF_SUSPICION, 3):
        first = min(some, key=IN_ORDER_OF_SUSPICION.index)
        assert min(some, key=lambda suspect: suspect.innocence) == first


def test_the_pace_of_a_rank_is_told_when_enough_steps_are_known() -> None:
    busy = [0.25, 0.125, 0.5]
    pulses = [beat(step, step * 2.0, busy=busy[step % 3]) for step in range(17)]
    assert watch(*pulses[:-1]).paces() == []
    assert watch(*pulses, ranks=[2, 3]).paces() == [Pace(2, 2.0, 0.25), Pace(3, 2.0, 0.25)]


# The agent.


def an_agent(command: bool = False) -> Agent:
    agent = Agent(
        identity=Identity("uid", "instance", "10.0.0.1"),
        record=Record(),
        port=20000,
        previous_end="",
        grace_seconds=25,
        zero_means_done=not command,
    )
    agent.handle(Gone(), 0.0)
    agent.handle(Ordered(Order(Action.RUN, 1, nodes=1, processes_per_node=2)), 0.0)
    for rank in (0, 1):
        agent.handle(WorkerStarted(1, rank, 100 + rank), 0.0)
    for pulse in QUICK:
        agent.handle(Levels(pulses={0: pulse, 1: pulse}), pulse.at)
    return agent


FOUND = {0: Finding(Doing.WAITING, "a.py:1 in f"), 1: Finding(Doing.WORKING, "b.py:2 in g")}


def test_silent_workers_are_looked_at_once_and_the_likeliest_cause_is_reported() -> None:
    agent = an_agent()
    assert agent.tick_seconds == 1.0
    assert agent.handle(Tick(), 70.0) == []
    assert agent.handle(Tick(), 70.1) == [Examine(1, {0: 100, 1: 101})]
    assert agent.handle(Tick(), 71.1) == []
    assert agent.report().stalled is None
    assert agent.handle(Examined(1, FOUND), 72.0) == []
    assert agent.report().stalled == Stalled(1, Phase.TRAINING, 10, 62.0, Doing.WORKING, "b.py:2 in g")
    assert agent.report().state.value == "Running", "whether the gang hangs is not one pod's to say"


def test_a_worker_that_speaks_again_takes_it_back() -> None:
    agent = an_agent()
    agent.handle(Tick(), 70.1)
    agent.handle(Examined(1, FOUND), 72.0)
    agent.handle(Levels(pulses={0: beat(11, 73.0), 1: QUICK[-1]}), 73.0)
    assert agent.report().stalled is None
    assert agent.handle(Tick(), 198.9) == [], "the next limit knows of a step of 63 seconds"
    assert agent.handle(Tick(), 199.1) == [Examine(1, {0: 100, 1: 101})], "and there may be another silence"


def test_what_was_found_counts_no_more_when_they_have_spoken_meanwhile_or_another_generation_runs() -> None:
    agent = an_agent()
    agent.handle(Tick(), 70.1)
    agent.handle(Levels(pulses={0: beat(11, 70.5), 1: beat(11, 70.5)}), 70.5)
    agent.handle(Examined(1, FOUND), 72.0)
    assert agent.report().stalled is None
    agent = an_agent()
    agent.handle(Tick(), 70.1)
    agent.handle(Examined(1, FOUND), 72.0)
    agent.handle(Ordered(Order(Action.RUN, 2, nodes=1, processes_per_node=2)), 73.0)
    agent.handle(Gone(), 74.0)
    assert (agent.report().generation, agent.report().stalled, agent.report().paces) == (2, None, [])
    agent.handle(WorkerStarted(2, 0, 200), 75.0)
    assert agent.handle(Tick(), 75.0 + hang.FIRST_BEAT_SECONDS) == [Examine(2, {0: 200})]
    agent.handle(Examined(1, FOUND), 2000.0)
    assert agent.report().stalled is None


def test_a_worker_that_has_ended_is_not_waited_for() -> None:
    agent = an_agent()
    agent.handle(WorkerEnded(Exit(1, 0, 0)), 11.0)
    assert agent.handle(Tick(), 70.1) == [Examine(1, {1: 101})]
    agent.handle(WorkerEnded(Exit(1, 1, 0)), 71.0)
    assert agent.report().state.value == "Succeeded"
    assert agent.handle(Tick(), 1e6) == []


# Stacks, of real processes.

SHOWS_STACKS = """
import faulthandler, os, signal, sys, threading, time
path = os.path.join(os.environ["FINETUNE_STACKS_FOLDER"], "3-" + str(os.getpid()))
faulthandler.register(signal.SIGUSR1, file=open(path, "a"), all_threads=True)
threading.Thread(target=time.sleep, args=(1000,), name="beside", daemon=True).start()
def load_batch():
    open(path + ".ready", "w").close(); time.sleep(1000)
load_batch()
"""


@pytest.fixture
def sleeper(tmp_path: Path):
    """A worker of rank 3 that shows its stacks and sleeps in ``load_batch``."""
    environment = {**os.environ, "FINETUNE_STACKS_FOLDER": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", SHOWS_STACKS], env=environment)
    yield process
    process.kill()
    process.wait()


async def test_a_worker_that_runs_shows_where_it_stands_and_runs_on(sleeper, tmp_path: Path, capfd) -> None:
    await wait_for(lambda: list(tmp_path.glob("*.ready")))
    lengths = set()
    for _ in range(2):  # what it wrote before is not taken for its answer
        assert stacks.examine(tmp_path, {3: sleeper.pid}) == {3: Finding(Doing.WORKING, "<string>:7 in load_batch")}
        printed = capfd.readouterr().out.splitlines()
        assert printed[0] == "[rank 3] stacks of all threads, because of its silence:"
        assert '[rank 3]   File "<string>", line 7 in load_batch' in printed
        assert all(line.startswith("[rank 3] ") for line in printed)
        lengths.add(len(printed))
    assert len(lengths) == 1
    assert sleeper.poll() is None


async def test_a_stopped_worker_does_not_answer_and_is_told_so(sleeper, tmp_path: Path, capfd) -> None:
    await wait_for(lambda: list(tmp_path.glob("*.ready")))
    sleeper.send_signal(signal.SIGSTOP)
    asked = time.monotonic()
    assert stacks.examine(tmp_path, {3: sleeper.pid}) == {3: Finding(Doing.STOPPED)}
    assert time.monotonic() - asked < 2 * stacks.ANSWER_SECONDS
    assert "[rank 3] does not answer SIGUSR1: its process does not run" in capfd.readouterr().out


def test_a_worker_that_takes_part_and_does_not_answer_does_not_run(tmp_path: Path) -> None:
    """As one does that is stuck in the kernel, which this test cannot do: this one has blocked the signal."""
    blocks = (
        "import faulthandler, signal, time; faulthandler.register(10); signal.pthread_sigmask(signal.SIG_BLOCK, [10]); "
        "print(flush=True); time.sleep(1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", blocks], stdout=subprocess.PIPE)
    process.stdout.readline()
    (tmp_path / f"0-{process.pid}").touch()
    assert stacks.examine(tmp_path, {0: process.pid}) == {0: Finding(Doing.STOPPED)}
    process.kill()
    process.communicate()


def test_a_worker_on_its_way_out_is_not_ended_by_the_question(tmp_path: Path) -> None:
    """Python takes faulthandler's registrations back before it has ended, and what libraries do at exit may take long."""
    leaves = "import faulthandler, time; faulthandler.register(10); faulthandler.unregister(10); print(flush=True); time.sleep(1000)"
    process = subprocess.Popen([sys.executable, "-c", leaves], stdout=subprocess.PIPE)
    process.stdout.readline()
    (tmp_path / f"0-{process.pid}").touch()
    assert stacks.examine(tmp_path, {0: process.pid}) == {0: Finding(Doing.UNKNOWN)}
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_worker_that_does_not_take_part_gets_no_signal(tmp_path: Path, capfd) -> None:
    """SIGUSR1 would end it."""
    process = subprocess.Popen(["sleep", "1000"])
    assert stacks.examine(tmp_path, {0: process.pid}) == {0: Finding(Doing.UNKNOWN)}
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    assert stacks.examine(tmp_path, {0: process.pid}) == {0: Finding(Doing.STOPPED)}
    assert (process.poll(), capfd.readouterr().out) == (None, "")
    process.kill()
    process.wait()


THREADS = """Thread 0x00007f0000000001 (most recent call first):
  File "/env/torch/distributed/distributed_c10d.py", line 3900 in all_gather_object
  File "/app/finetune_trainer/checkpoint/saving.py", line 12 in upload

{current} 0x00007f0000000002 (most recent call first):
{frames}
  File "/env/torch/distributed/elastic/multiprocessing/api.py", line 5 in run
  File "/env/torch/distributed/fsdp/_runtime_utils.py", line 5 in forward
"""
COLLECTIVES = '  File "/env/torch/distributed/distributed_c10d.py", line 2 in all_reduce\n  File "/env/deepspeed/comm/comm.py", line 3 in g'
STANDS = {
    "in a collective": (COLLECTIVES, Finding(Doing.WAITING, "distributed/distributed_c10d.py:2 in all_reduce")),
    "on the device": (
        '  File "/app/finetune_trainer/ranks.py", line 7 in read\n  File "/app/finetune_trainer/train.py", line 9 in x',
        Finding(Doing.WAITING, "finetune_trainer/ranks.py:7 in read"),
    ),
    "in its own work, though peers wait for that": (
        '  File "/app/finetune_trainer/feed.py", line 7 in batch\n  File "/app/finetune_trainer/ranks.py", line 9 in once',
        Finding(Doing.WORKING, "finetune_trainer/feed.py:7 in batch"),
    ),
}


@pytest.mark.parametrize("current", ["Current thread", "Thread"], ids=["it took the signal", "another thread did"])
@pytest.mark.parametrize(("frames", "finding"), STANDS.values(), ids=STANDS.keys())
def test_where_the_main_thread_stands(current: str, frames: str, finding: Finding) -> None:
    assert stacks.read_stacks(THREADS.format(current=current, frames=frames)) == finding


@pytest.mark.parametrize("text", ["", "nonsense", "Current thread 0x1 (most recent call first):\n  <no Python frame>"])
def test_stacks_that_tell_nothing(text: str) -> None:
    assert stacks.read_stacks(text).doing is Doing.UNKNOWN
