"""What this worker is to do: the recipe, the job's contract values and the places it may use, read once at start."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api import contract
from finetune_api.protocol import JobFile, JobStorage, from_wire
from finetune_api.recipe import Recipe
from finetune_trainer.errors import BadConfig

# Only tests and runs outside a pod set these; in a pod the folders are the contract's.
SCRATCH_VARIABLE = "FINETUNE_SCRATCH_FOLDER"
STAGING_VARIABLE = "FINETUNE_STAGING_FOLDER"
CLAIMS_VARIABLE = "FINETUNE_CLAIMS_FOLDER"


@dataclass(frozen=True, slots=True)
class Job:
    """One generation of one job, as this worker sees it."""

    recipe: Recipe
    file: JobFile
    storage: JobStorage
    generation: int
    has_checkpoint: bool
    scratch: Path
    staging: Path
    claims: Path
    ranks_in_pod: int = 1

    @property
    def upload_bytes_per_second(self) -> int | None:
        """What this rank may upload: its share of what its pod may."""
        of_pod = self.file.checkpoint.upload_bytes_per_second
        return None if of_pod is None else max(1, of_pod // self.ranks_in_pod)

    @property
    def recipe_digest(self) -> str:
        """SHA-256 of the recipe in canonical JSON, defaults included."""
        canonical = json.dumps(self.recipe.to_wire(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def read_job(environment: Mapping[str, str]) -> Job:
    """Read the files that the environment names, or the contract's defaults.

    Raises:
        BadConfig: a file is missing or wrong; the message names the file and the field.
    """
    recipe_file = Path(environment.get(contract.RECIPE_FILE_VARIABLE, contract.RECIPE_FILE))
    job_file = Path(environment.get(contract.JOB_FILE_VARIABLE, contract.JOB_FILE))
    recipe = _read_recipe(recipe_file)
    file = _read_job_file(job_file)
    if file.storage is None:
        raise BadConfig(f"{job_file}: $.storage: is missing; a recipe needs a place for its checkpoints and its model")
    return Job(
        recipe=recipe,
        file=file,
        storage=file.storage,
        generation=_read_generation(environment),
        has_checkpoint=environment.get(contract.HAS_CHECKPOINT) == "1",
        scratch=Path(environment.get(SCRATCH_VARIABLE, contract.SCRATCH_FOLDER)),
        staging=Path(environment.get(STAGING_VARIABLE, contract.STAGING_FOLDER)),
        claims=Path(environment.get(CLAIMS_VARIABLE, contract.CLAIMS_FOLDER)),
        ranks_in_pod=int(environment.get("LOCAL_WORLD_SIZE", "1")),
    )


def _read_recipe(path: Path) -> Recipe:
    try:
        return Recipe.model_validate(_read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in ("recipe", *first["loc"]))
        raise BadConfig(f"{path}: {field}: {first['msg'].removeprefix('Value error, ')}") from None


def _read_job_file(path: Path) -> JobFile:
    try:
        return from_wire(JobFile, _read_json(path))
    except ValueError as error:
        raise BadConfig(f"{path}: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise BadConfig(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadConfig(f"{path}: not valid JSON: {error}") from None


def _read_generation(environment: Mapping[str, str]) -> int:
    text = environment.get(contract.GENERATION, "")
    if not text.isdigit() or int(text) < 1:
        raise BadConfig(f"{contract.GENERATION}={text!r}: must be a whole number from 1; the agent sets it")
    return int(text)
