"""The operator as a process of its own, kopf and all, in a pod that a kubelet starts again whenever it ends."""

import asyncio
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from finetune_agent.processes import die_with_parent

RESTART_SECONDS = 0.2


async def spawn_operator(
    folder: Path, name: str, *, uid: str, kubeconfig: Path, settings: Mapping[str, Any]
) -> asyncio.subprocess.Process:
    """Start one replica in the pod called ``name``, which logs to ``folder``/``name``.log."""
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(dict(settings)))
    environment = {"KUBECONFIG": kubeconfig, "FINETUNE_OPERATOR_CONFIG": config, "POD_NAME": name, "POD_UID": uid}
    with (folder / f"{name}.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "finetune_operator", "run"),
            env={**os.environ, **{key: str(value) for key, value in environment.items()}},
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
        )


class OperatorProcess:
    """One replica. While ``keep_running`` runs, it is started again whenever it ends."""

    def __init__(self, folder: Path, name: str, *, uid: str, kubeconfig: Path, settings: Mapping[str, Any]) -> None:
        self._folder, self._name, self._uid = folder, name, uid
        self._kubeconfig, self._settings = kubeconfig, settings
        self._process: asyncio.subprocess.Process | None = None
        self.ends: list[int] = []  # exit codes

    @property
    def log(self) -> str:
        file = self._folder / f"{self._name}.log"
        return file.read_text() if file.exists() else ""

    async def keep_running(self) -> None:
        """Be the kubelet, until cancelled; then nothing of it is left."""
        try:
            while True:
                self._process = await spawn_operator(
                    self._folder, self._name, uid=self._uid, kubeconfig=self._kubeconfig, settings=self._settings
                )
                self.ends.append(await self._process.wait())
                await asyncio.sleep(RESTART_SECONDS)
        finally:
            await self.kill()

    async def kill(self) -> None:
        """Kill it, and wait for its end."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


_given: set[int] = set()


def free_port() -> int:
    """Return a port that nobody uses now. Nor will others until it is used: those that ask the kernel for any get one from 32768 on."""
    while True:
        port = 12000 + secrets.randbelow(8000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
