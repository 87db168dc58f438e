"""Which ends were for want of memory, by what the kernel counts."""

from pathlib import Path

import pytest

from finetune_agent.memory import MemoryKills
from finetune_api.protocol import Exit, Memory

FILES = {
    "v2": {
        "memory.max": "3221225472",
        "memory.peak": "3221000000",
        "memory.events": "low 0\nhigh 0\nmax 7\noom 1\noom_kill {kills}\noom_group_kill 0\n",
    },
    "v1": {
        "memory/memory.limit_in_bytes": "3221225472",
        "memory/memory.max_usage_in_bytes": "3221000000",
        "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n",
    },
}
MEMORY = Memory(3221225472, 3221000000)
KILLED = Exit(1, 0, None, 9)
CHILD = Exit(1, 0, 1, None, "RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed. ")
every_version = pytest.mark.parametrize("version", FILES)


def write(cgroup: Path, version: str, kills: int) -> None:
    for name, text in FILES[version].items():
        (cgroup / name).parent.mkdir(exist_ok=True)
        (cgroup / name).write_text(text.format(kills=kills))


@every_version
def test_a_kill_that_the_kernel_counts_is_for_memory_and_each_is_counted_once(tmp_path: Path, version: str) -> None:
    write(tmp_path, version, 2)
    kills = MemoryKills(tmp_path)
    assert kills.blamed(KILLED).memory is None, "those before"
    write(tmp_path, version, 3)
    assert kills.blamed(Exit(1, 0, 1, None, "RuntimeError: connection reset")).memory is None, "an echo"
    assert kills.blamed(KILLED).memory == MEMORY
    assert kills.blamed(KILLED).memory is None
    write(tmp_path, version, 4)
    assert kills.blamed(CHILD).memory == MEMORY


@every_version
def test_what_was_killed_in_a_generation_before_is_forgotten(tmp_path: Path, version: str) -> None:
    write(tmp_path, version, 0)
    kills = MemoryKills(tmp_path)
    write(tmp_path, version, 1)
    kills.begin()
    assert kills.blamed(KILLED).memory is None


def test_without_a_limit_or_without_a_cgroup_nothing_is_made_up(tmp_path: Path) -> None:
    kills = MemoryKills(tmp_path)
    assert kills.blamed(KILLED) == KILLED
    write(tmp_path, "v2", 1)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.peak").unlink()  # before Linux 5.19
    assert kills.blamed(KILLED).memory == Memory(None, None)
