"""The pod contract: every name, path, port, label and exit code on which operator, agent and trainer rely.

Standard library only, Python 3.9 syntax: the agent carries this file into images that the project did not build.
"""

import re
from enum import IntEnum

GROUP = "finetune.dev"
VERSION = "v1alpha1"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"

# Labels and annotations of a job's children.
JOB_LABEL = GROUP + "/job"
JOB_UID_LABEL = GROUP + "/job-uid"
RANK_LABEL = GROUP + "/rank"
GENERATION_LABEL = GROUP + "/generation"  # the one that the pod was created for
PROFILE_ANNOTATION = GROUP + "/profile"  # of a pod: the administrator's profile that it was made by, whole
SHAPE_ANNOTATION = GROUP + "/shape"  # of a pod: a digest of what of spec it was made with
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGER = "finetune-operator"
LEADER_LABEL = GROUP + "/leader"

# Containers of a training pod.
AGENT_CONTAINER = "agent"
TRAINER_CONTAINER = "trainer"

# Files of a training pod.
CONFIG_FOLDER = "/etc/finetune"  # the job's ConfigMap, read-only
RECIPE_FILE = CONFIG_FOLDER + "/recipe.json"  # spec.recipe as the API server stored it
JOB_FILE = CONFIG_FOLDER + "/job.json"  # see finetune_api.protocol.JobFile
CA_FILE = CONFIG_FOLDER + "/ca.crt"  # certificates that the job server may show
TOKEN_FOLDER = "/var/run/secrets/finetune"  # noqa: S105  a folder, not a secret
TOKEN_FILE = TOKEN_FOLDER + "/token"
AGENT_FOLDER = "/finetune"  # emptyDir, writable: the agent, its journal, sockets, logs of workers
AGENT_FILE = AGENT_FOLDER + "/agent.pyz"
SCRATCH_FOLDER = "/scratch"  # emptyDir, writable: HOME, caches, downloads
CLAIMS_FOLDER = "/claims"  # pvc://claim/path is mounted read-only at /claims/claim
STAGING_FOLDER = "/staging"  # emptyDir in memory: checkpoints on their way to storage, and back after a worker's death
SHARED_MEMORY_FOLDER = "/dev/shm"  # noqa: S108  emptyDir in memory
TERMINATION_LOG = "/dev/termination-log"
# The job's secret once more, as files: the environment of a container keeps what it had at its start, a mounted secret follows.
CREDENTIALS_FOLDER = "/var/run/secrets/storage"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": False, "AWS_SECRET_ACCESS_KEY": False, "AWS_SESSION_TOKEN": True}  # → optional

# Environment that the operator gives the agent.
POD_NAME = "FINETUNE_POD_NAME"
POD_UID = "FINETUNE_POD_UID"
POD_ADDRESS = "FINETUNE_POD_ADDRESS"
JOB_FILE_VARIABLE = "FINETUNE_JOB_FILE"  # job.json; the agent's lies beside ca.crt and recipe.json; default JOB_FILE
TOKEN_FILE_VARIABLE = "FINETUNE_TOKEN_FILE"  # noqa: S105  default TOKEN_FILE
TERMINATION_LOG_VARIABLE = "FINETUNE_TERMINATION_LOG"  # default TERMINATION_LOG
CREDENTIALS_FOLDER_VARIABLE = "FINETUNE_CREDENTIALS_FOLDER"  # default CREDENTIALS_FOLDER
GRACE_SECONDS = "FINETUNE_GRACE_SECONDS"  # from SIGTERM until workers are killed: the pod's grace period less a margin
DEFAULT_GRACE_SECONDS = 25
GRACE_MARGIN_SECONDS = 10  # what the agent keeps of the grace period for its own end
# Environment that the agent gives the workers, beside torchrun's own.
RECIPE_FILE_VARIABLE = "FINETUNE_RECIPE_FILE"  # where recipe.json lies; default RECIPE_FILE
GENERATION = "FINETUNE_GENERATION"
EXPECTED_WORLD_SIZE = "FINETUNE_WORLD_SIZE"  # the trainer refuses to start when WORLD_SIZE differs
HAS_CHECKPOINT = "FINETUNE_HAS_CHECKPOINT"  # 1 where status has one: the trainer refuses to start afresh; else 0
PROGRESS_SOCKET = "FINETUNE_PROGRESS_SOCKET"  # Unix datagram socket for finetune_api.protocol.Beat
SAVE_NOW = "FINETUNE_SAVE_NOW"  # a path where a file appears when the workers get SIGTERM, for who cannot take signals
# A folder. A worker that shows the stacks of its threads on SIGUSR1 makes a file RANK-PID there, to which it then appends them.
STACKS_FOLDER = "FINETUNE_STACKS_FOLDER"
# What a job's own environment may never set: the operator, the agent, torchrun or the administrator own these.
RESERVED_ENVIRONMENT = (
    "LD_PRELOAD",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "PATH",
    "HOME",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
RESERVED_ENVIRONMENT_PREFIXES = ("FINETUNE_", "AWS_", "KUBEFLOW_TRAINER_", "KUBERNETES_", "TORCHELASTIC_", "PET_")
RESERVED_ENVIRONMENT_PATTERN = "NCCL_.*_PLUGIN"

# What an agent writes into its pod's log when a generation begins or ends there: lines from then on are that one's.
GENERATION_LINE = "generation %d is %s"

# The job server, which agents talk to.
JOB_SERVER_PORT = 9443
TOKEN_AUDIENCE = "job-server." + GROUP
TOKEN_SECONDS = 3600
REPORT_PATH = "/v1/report"
ORDER_PATH = "/v1/order"
REPORT_BYTES_LIMIT = 65536
ORDER_POLL_SECONDS = 20

# Limits of names and identifiers.
JOB_NAME_LIMIT = 40
MESSAGE_LIMIT = 1024  # characters of an error message in a report and in status


class ExitCode(IntEnum):
    """How a worker says why it ended (sysexits where they fit). Any other code is the script's own."""

    OK = 0
    ERROR = 1  # a Python traceback
    BAD_DATA = 65  # the user's data: file, line and reason in the message
    STORAGE_UNAVAILABLE = 69  # the object store stayed away past every retry
    WRONG_WORLD = 71  # WORLD_SIZE is not what the job says
    STALE = 73  # a newer generation owns the checkpoint prefix
    PORT_IN_USE = 74  # the generation's master port is taken on rank 0's node: the agent's word (rank -1), or rank 0's
    SAVED = 75  # stopped on request, after a committed save
    NUMERIC = 76  # NaN or infinity, again and again: rolling back did not help
    NO_PERMISSION = 77  # the object store or a file refused us
    BAD_CONFIG = 78  # the recipe, the model or the store cannot work
    ROLLED_BACK = 79  # NaN or infinity: the next generation starts before it and skips what caused it
    CHECKPOINTS_LOST = 80  # somebody deleted what was committed: a person has to put it back


def is_job_name(name: str) -> bool:
    """Tell whether a job may have this name: a DNS label that leaves room for the suffixes of pod names."""
    return len(name) <= JOB_NAME_LIMIT and re.match(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?\Z", name) is not None


def job_prefix(storage_uri: str, namespace: str, name: str, uid: str) -> str:
    """Return the ``s3://`` prefix that a job writes under, and nowhere else."""
    return storage_uri + "/" + namespace + "/" + name + "-" + uid[:8]


def is_reserved_environment(name: str) -> bool:
    """Tell whether an environment variable belongs to the operator, torchrun or the administrator."""
    return (
        name in RESERVED_ENVIRONMENT
        or name.startswith(RESERVED_ENVIRONMENT_PREFIXES)
        or re.match(RESERVED_ENVIRONMENT_PATTERN + r"\Z", name) is not None
    )
