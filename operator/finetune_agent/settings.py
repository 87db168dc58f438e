"""What the pod tells its agent: environment, job file and the folder that agent.pyz lies in."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Tuple

from finetune_agent.stub import folder
from finetune_api import contract
from finetune_api.protocol import JobFile, from_wire


@dataclass(frozen=True)
class Settings:
    """All that an agent is told once. ``folder`` is its own, below the one of agent.pyz.

    ``job_document`` is the whole of the job file, ``job`` what this agent understands of it.
    """

    job: JobFile
    job_document: Dict[str, Any]
    pod_name: str
    pod_uid: str
    address: str
    agent_file: str
    folder: Path
    job_file: Path
    token_file: Path
    credentials_folder: Path
    termination_log: Path
    grace_seconds: float

    @property
    def ca_file(self) -> Path:
        """Where the CA bundle lies, beside the job file."""
        return self.job_file.parent / Path(contract.CA_FILE).name

    @property
    def recipe_file(self) -> Path:
        """Where the recipe lies, beside the job file."""
        return self.job_file.parent / Path(contract.RECIPE_FILE).name


def read_settings(environment: Mapping[str, str], agent_file: str) -> Settings:
    """Read what the operator rendered.

    Raises:
        ValueError: something is missing or wrong; the message names it.
    """
    job_file = Path(environment.get(contract.JOB_FILE_VARIABLE, contract.JOB_FILE))
    job, job_document = read_job(job_file)
    own_folder = folder(agent_file)
    own_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Settings(
        job=job,
        job_document=job_document,
        pod_name=environment.get(contract.POD_NAME, ""),
        pod_uid=_required(environment, contract.POD_UID),
        address=_required(environment, contract.POD_ADDRESS),
        agent_file=str(Path(agent_file).resolve()),
        folder=own_folder,
        job_file=job_file,
        token_file=Path(environment.get(contract.TOKEN_FILE_VARIABLE, contract.TOKEN_FILE)),
        credentials_folder=Path(environment.get(contract.CREDENTIALS_FOLDER_VARIABLE, contract.CREDENTIALS_FOLDER)),
        termination_log=Path(environment.get(contract.TERMINATION_LOG_VARIABLE, contract.TERMINATION_LOG)),
        grace_seconds=float(environment.get(contract.GRACE_SECONDS, contract.DEFAULT_GRACE_SECONDS)),
    )


def read_job(path: Path) -> Tuple[JobFile, Dict[str, Any]]:
    """Read job.json; return what is known of it, and the whole.

    Raises:
        ValueError: it is not there or makes no sense.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return from_wire(JobFile, document), document
    except (OSError, ValueError) as error:
        raise ValueError(str(path) + ": " + str(error)) from error


def _required(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise ValueError("the variable " + name + " must be set")
    return environment[name]
