"""What can end training for a known reason, one class for each exit code of the contract.

    TrainingError
    ├── BadData             65  the user's data: file, line, reason
    ├── StorageUnavailable  69  the object store stayed away past every retry
    ├── WrongWorld          71  WORLD_SIZE is not what the job says
    ├── Stale               73  a newer generation owns the checkpoint prefix
    ├── PortInUse           74  somebody else listens where rank 0 is to be found
    ├── SavedOnRequest      75  stopped on request, after a committed save
    ├── NumericFailure      76  NaN or infinity, again and again: rolling back did not help
    ├── NoPermission        77  the object store or a file refused us
    ├── BadConfig           78  the recipe, the model or the store cannot work
    ├── RolledBack          79  NaN or infinity: the next generation starts before it and skips what caused it
    └── CheckpointsLost     80  somebody deleted what was committed

Anything else that escapes is a bug or the machine's doing, and exits 1 with its traceback.
"""

from typing import ClassVar

from finetune_api.contract import ExitCode


class TrainingError(Exception):
    """A reason to stop that is known. The message is one line for the user: what, where, what to do."""

    exit_code: ClassVar[ExitCode] = ExitCode.ERROR


class BadData(TrainingError):
    """The user's data cannot be trained on."""

    exit_code = ExitCode.BAD_DATA


class StorageUnavailable(TrainingError):
    """The object store stayed away past every retry."""

    exit_code = ExitCode.STORAGE_UNAVAILABLE


class WrongWorld(TrainingError):
    """The process group is not the one that the job asked for."""

    exit_code = ExitCode.WRONG_WORLD


class Stale(TrainingError):
    """A newer generation owns the checkpoint prefix; nothing may be written any more."""

    exit_code = ExitCode.STALE


class PortInUse(TrainingError):
    """Somebody else listens where the other ranks are to find rank 0."""

    exit_code = ExitCode.PORT_IN_USE


class SavedOnRequest(TrainingError):
    """Training stopped because it was asked to, after a committed save."""

    exit_code = ExitCode.SAVED


class NumericFailure(TrainingError):
    """The loss or the gradients are not finite, and stepping over it did not help."""

    exit_code = ExitCode.NUMERIC


class NoPermission(TrainingError):
    """The object store or a file refused us."""

    exit_code = ExitCode.NO_PERMISSION


class BadConfig(TrainingError):
    """The recipe, the model or the store cannot work together."""

    exit_code = ExitCode.BAD_CONFIG


class RolledBack(TrainingError):
    """The numbers of a step are not finite; the next generation starts from the newest checkpoint without its samples."""

    exit_code = ExitCode.ROLLED_BACK


class CheckpointsLost(TrainingError):
    """Somebody deleted the job's checkpoints, or what says which there are; nothing is written until it is put back."""

    exit_code = ExitCode.CHECKPOINTS_LOST
