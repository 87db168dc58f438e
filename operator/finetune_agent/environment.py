"""The environment of workers: the container's own, without what would change torchrun's mind, and with the contract's."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple

from finetune_api import contract
from finetune_api.protocol import Order

# torchrun reads its options from PET_*, and a worker of an outer torchrun (an image that is run by one) sets the others.
LAUNCHER_NAMES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
LAUNCHER_PREFIXES = ("PET_", "TORCHELASTIC_", "TORCH_ELASTIC_", "KUBEFLOW_TRAINER_")
AGENT_NAMES = (
    *(contract.POD_UID, contract.POD_ADDRESS, contract.TOKEN_FILE_VARIABLE, contract.TERMINATION_LOG_VARIABLE),
    contract.CREDENTIALS_FOLDER_VARIABLE,
)
SHUTDOWN_SECONDS = "5"  # torchrun waits 30 between SIGTERM and SIGKILL unless told
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Endpoints:
    """Where workers reach their agent, and it them."""

    save_now: str
    stacks_folder: str
    progress_socket: str
    exits_socket: str
    kubeflow_url: str
    kubeflow_token_file: str


def worker_environment(
    base: Mapping[str, str],
    *,
    order: Order,
    endpoints: Endpoints,
    job_file: str,
    recipe_file: str,
    credentials: Optional[Mapping[str, str]],
    cpus: float,
) -> Dict[str, str]:
    """Return the whole environment of launcher and workers. What ``base`` sets for OMP_NUM_THREADS stays.

    ``credentials`` take the place of all those that ``base`` holds.
    """
    from finetune_agent.worker import EXITS_SOCKET

    environment = {name: value for name, value in base.items() if not _is_ours(name)}
    if credentials is not None:
        environment = {name: value for name, value in environment.items() if name not in contract.CREDENTIALS}
        environment.update(credentials)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, int(cpus / order.processes_per_node))))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    environment.update(
        {
            contract.GENERATION: str(order.generation),
            contract.EXPECTED_WORLD_SIZE: str(order.nodes * order.processes_per_node),
            contract.HAS_CHECKPOINT: str(int(order.has_checkpoint)),
            contract.SAVE_NOW: endpoints.save_now,
            contract.STACKS_FOLDER: endpoints.stacks_folder,
            contract.PROGRESS_SOCKET: endpoints.progress_socket,
            contract.JOB_FILE_VARIABLE: job_file,
            contract.RECIPE_FILE_VARIABLE: recipe_file,
            EXITS_SOCKET: endpoints.exits_socket,
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SHUTDOWN_SECONDS,
            "KUBEFLOW_TRAINER_SERVER_URL": endpoints.kubeflow_url,
            "KUBEFLOW_TRAINER_SERVER_TOKEN": endpoints.kubeflow_token_file,
        }
    )
    _keep_loopback_from_proxies(environment)
    return environment


def rank_environment(base: Mapping[str, str], order: Order, local_rank: int, folder: Path) -> Dict[str, str]:
    """Return one worker's environment as torchrun would make it, but for who holds the store: rank 0's worker does."""
    rank = order.rank * order.processes_per_node + local_rank
    world_size = order.nodes * order.processes_per_node
    return {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        **base,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(order.processes_per_node),
        "GROUP_RANK": str(order.rank),
        "GROUP_WORLD_SIZE": str(order.nodes),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": order.master_address,
        "MASTER_PORT": str(order.master_port),
        "TORCHELASTIC_RUN_ID": "g" + str(order.generation),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_ERROR_FILE": str(folder / ("error-" + str(local_rank) + ".json")),
    }


def read_credentials(folder: Path) -> Optional[Dict[str, str]]:
    """Return the job's secret as it is now, or None where it is not mounted, is gone or lacks something.

    The kubelet swaps a whole new set of files in by one link, ``..data``: following it once keeps old and new from being mixed.
    """
    data = folder / "..data"
    folder = data.resolve() if data.exists() else folder
    found = {}
    for name, is_optional in contract.CREDENTIALS.items():
        try:
            found[name] = (folder / name).read_text(encoding="utf-8")
        except (OSError, ValueError):
            if not is_optional:
                return None
    return found


def _is_ours(name: str) -> bool:
    return name in LAUNCHER_NAMES or name in AGENT_NAMES or name.startswith(LAUNCHER_PREFIXES)


def _keep_loopback_from_proxies(environment: Dict[str, str]) -> None:
    """KubeflowCallback posts with urllib, which would send even 127.0.0.1 through a proxy."""
    if not any(name.lower().endswith("_proxy") for name in environment):
        return
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in environment.get(name, "").split(",") if host]
        environment[name] = ",".join([*hosts, "127.0.0.1"])


def available_cpus() -> float:
    """Return the CPUs that the container may use: its cgroup's limit (v2 or v1), else those it may be scheduled on."""
    usable = float(len(os.sched_getaffinity(0)))
    limit = _cgroup_limit()
    return min(usable, limit) if limit else usable


def _cgroup_limit() -> Optional[float]:
    quota, period = _read_v2() or _read_v1() or ("max", "")
    try:
        return float(quota) / float(period) if float(quota) > 0 and float(period) > 0 else None
    except ValueError:
        return None  # "max"


def _read_v2() -> Optional[Tuple[str, str]]:
    try:
        words: List[str] = (CGROUP / "cpu.max").read_text().split()
        return words[0], words[1]
    except (OSError, IndexError):
        return None


def _read_v1() -> Optional[Tuple[str, str]]:
    try:
        folder = CGROUP / "cpu"
        return (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
    except OSError:
        return None
