"""Every reason that status gives: what it means, what happens by itself, and what somebody can do.

``kubectl finetune explain`` and ``status`` show this table, and docs/troubleshooting.md is made from it. A test holds it against the
operator's source, so a reason cannot be given there that is not explained here.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason. ``then`` is what the operator does about it by itself; ``to_do`` is empty where nothing need be done."""

    name: str
    meaning: str
    then: str
    to_do: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Reasons that are met in the same place."""

    title: str
    seen: str
    reasons: tuple[Reason, ...]


ENDINGS = Group(
    "Why an incarnation of the gang ended",
    "In `status.attempts` and `status.restarts`, and in `Failed` when it was the last.",
    (
        Reason(
            "WorkerFailed",
            "A program ended with an error: an exception, or an exit code without a meaning of its own.",
            "The gang starts again in its pods and uses a restart. Three times in a row at one step: Failed.",
            "Read the message, then `kubectl finetune logs --attempt`.",
        ),
        Reason(
            "WorkerKilled",
            "A worker was ended by a signal that is not the memory limit's.",
            "The gang starts again in its pods and uses a restart.",
            "On one node again and again: drain it.",
        ),
        Reason(
            "CollectiveFailed",
            "A collective between the ranks broke, and no rank said why.",
            "The gang starts again in its pods and uses a restart.",
            "If it comes back: look at the network between the nodes.",
        ),
        Reason(
            "OutOfMemory",
            "A pod reached its memory limit.",
            "The gang starts again and uses a restart. Twice in a row at one step: Failed.",
            "A new job with more workers.resources.memory, or a smaller microBatchSize; the message has the `resumeFrom` for it.",
        ),
        Reason(
            "Hang",
            "All ranks stood still. The stacks of all ranks are in their logs, and the attempt names the rank the others waited for.",
            "The gang starts again in its pods and uses a restart.",
            "Read the place in the message, then the stacks. A node that turns up again and again is to be drained.",
        ),
        Reason(
            "PodDeleted",
            "A pod was deleted before it could save.",
            "The pod is replaced, and a restart is used.",
            "If nobody deleted it: the pod's events say who did.",
        ),
        Reason(
            "PodFailed",
            "A pod ended by itself.",
            "The pod is replaced, and a restart is used.",
            "The message has the kubelet's words: a full disk, an eviction.",
        ),
        Reason(
            "NodeLost",
            "The node is not ready, and the agent on it is silent.",
            "The pod is replaced on another node or by a spare, and a restart is used. The node is avoided for an hour.",
        ),
        Reason(
            "PodSilent",
            "A pod's agent fell silent and its gang stands still, while the node is well.",
            "The pod is replaced on another node or by a spare, and a restart is used. The node is avoided for an hour.",
            "If it comes back: look at the network between that node and the operator.",
        ),
        Reason(
            "PodNeverHeard",
            "A pod's agent was never heard, while others are: it cannot reach the operator from its node, or the node cannot set up its network"
            " or its volumes.",
            "The pod is replaced on another node. No restart is used. The node is avoided for an hour.",
            "Look at the network of pods on that node (its CNI, its DNS, its way to the operator's service) and at the events of the pod.",
        ),
        Reason(
            "NotStarted",
            "A pod's agent is heard, and did not start the generation that it was told to within two minutes: most often a process of the one"
            " before cannot be killed, for it hangs in a driver or a file system.",
            "The pod is replaced on another node or by a spare, and a restart is used. The node is avoided for an hour.",
            "Look at the node's kernel log for the driver or the file system; such a process often goes only with a restart of the node.",
        ),
        Reason(
            "DeviceError",
            "A GPU or the fabric of a node is broken, by what CUDA, NCCL or the driver said.",
            "The pod is replaced elsewhere, and a restart is used. The node is avoided for an hour.",
            "Take the node out until its device is well.",
        ),
        Reason(
            "Preempted",
            "A pod had to go, or was asked to stop, and the workers saved.",
            "Only that pod is replaced. No restart is used, no step lost.",
        ),
        Reason(
            "Resized",
            "workers.nodes asks for another number of nodes, and all ranks have saved.",
            "The next attempt has the new size. No restart is used, no step lost.",
        ),
        Reason(
            "PortInUse",
            "The port on which the ranks meet was taken meanwhile.",
            "The gang starts again on another one. No restart is used.",
        ),
        Reason(
            "RolledBack",
            "The loss jumped, or a number was not finite.",
            "The gang starts again before it and leaves out the samples that caused it, at most five times. No restart is used.",
            "Often: a lower learning rate or broken samples. recipe.training.onLossSpike: Ignore trains through jumps.",
        ),
        Reason(
            "WrongWorldSize",
            "The workers found another number of ranks than the job has.",
            "The gang starts again and uses a restart.",
            "Only if it comes back: report it.",
        ),
        Reason(
            "Stale",
            "The workers found a newer incarnation of the job at its checkpoints, so they must not write.",
            "The gang starts again above it and uses a restart.",
            "Only if it comes back: another cluster may run a copy of the job on the same checkpoints.",
        ),
        Reason(
            "StorageUnavailable",
            "The store stayed away past every retry. Also told by `CheckpointsDelayed`, while training goes on without commits.",
            "No worker runs, the pods stay, and another incarnation tries after 15 seconds, then ever more slowly, up to every five "
            "minutes. No restart is used.",
            "If it stays: ask whoever runs the store, and see whether the pods may reach it.",
        ),
    ),
)

GROUPS: tuple[Group, ...] = (
    Group(
        "All goes well",
        "In `Ready`, and the message says what the job does.",
        (
            Reason("Starting", "All pods are there, and the workers are being started.", "Training begins."),
            Reason("Running", "The gang trains.", "It trains to its end."),
            Reason(
                "Resizing",
                "workers.nodes asks for more nodes; the gang trains on while their pods are being made.",
                "When they are there all ranks save, and the next attempt has the new size. No restart is used.",
                "If it stays: the message says what is missing.",
            ),
            Reason(
                "Reshaping",
                "What pods are made with has changed, and the job was suspended for it when no operator looked; the pods of before save and "
                "leave.",
                "When the last one is gone new ones are made, and the next attempt goes on from the save. No restart is used.",
            ),
            Reason(
                "Suspending",
                "spec.suspend is true; the pods save and leave.",
                "When the last one is gone the job is Suspended.",
            ),
            Reason(
                "Suspended",
                "spec.suspend is true; no pod is kept.",
                "Nothing, until spec.suspend is false again.",
                "Go on with `kubectl finetune resume`.",
            ),
            Reason("Succeeded", "Every worker has ended with exit code 0.", "Nothing more: this is final."),
        ),
    ),
    Group(
        "The gang waits",
        "In `Ready` and `Reconciling` while the gang is not complete. No restart is used.",
        (
            Reason("Creating", "Pods are being created.", "The gang starts when all of them have reported in."),
            Reason(
                "ContainerCreating",
                "A pod is being started on its node: volumes are mounted, images are pulled.",
                "The gang starts when all pods have reported in.",
                "If it stays: the pod's events (`kubectl finetune events`) have the kubelet's words.",
            ),
            Reason(
                "WaitingForAgent",
                "A pod runs, and its agent has not reported to the operator yet, or not for a while.",
                "The gang starts when all agents have reported in.",
                "If it stays: `kubectl finetune logs` shows what the agent says. Often a network policy keeps pods from the operator's "
                "job server.",
            ),
            Reason(
                "Unschedulable",
                "No node fits a pod; the message has the scheduler's words.",
                "The pod is placed as soon as a node fits. With pendingDeadlineSeconds the gang gives its pods back when that is over.",
                "Ask for less (workers.resources, workers.nodes), wait for others to end, or add nodes.",
            ),
            Reason(
                "QuotaExceeded",
                "The namespace's quota has no room for all pods.",
                "Tried again every 15 seconds.",
                "Free quota, ask for less, or have the ResourceQuota raised.",
            ),
            Reason(
                "PodRefused",
                "The API server refuses to create a pod; the message says why.",
                "Tried again every 15 seconds.",
                "It is mostly an admission policy of the cluster: show the message to its administrator.",
            ),
            Reason(
                "NameTaken",
                "A pod with the name that one of this job's must have is somebody else's.",
                "Tried again every 15 seconds.",
                "Delete the pod that the message names.",
            ),
            Reason(
                "BackingOff",
                "The pods are ready, and the last incarnations of the gang failed quickly.",
                "The next one starts when the time in the message is over: 2, 4, 8 … seconds, at most five minutes.",
                "Read why they failed: `kubectl finetune status` lists the attempts.",
            ),
            Reason(
                "PendingDeadlineExceeded",
                "The gang was not complete within pendingDeadlineSeconds.",
                "All pods are given back, and the gang is tried again ever more slowly, up to every five minutes.",
                "Ask for less, or wait until the cluster has room.",
            ),
            Reason(
                "GaveWay",
                "Only a part of the gang could be placed, while another job waits that goes first, or has waited for long.",
                "All pods are given back, and the gang is tried again ever more slowly, up to every five minutes.",
                "Nothing, if the cluster has room for one job after the other; else ask for less.",
            ),
            Reason(
                "PodLeaving",
                "A pod must go: a drain, an eviction, a preemption, a deletion.",
                "All ranks save the same step first; then only that pod is replaced. No restart is used.",
            ),
            Reason(
                "AgentSilent",
                "A pod's agent is silent, and its peers train on, so nobody knows how it is. `Ready` is Unknown.",
                "Training goes on. The pod is replaced if its peers' steps stand still too.",
                "If it stays: look at the network between that node and the operator.",
            ),
            Reason(
                "NoAgentHeard",
                "The operator hears no agent of any job, so the fault is likely its own. `Ready` is Unknown.",
                "Training goes on; nothing is restarted for it. Status is late until agents are heard again.",
                "Look at the operator's Service and the network policies around it.",
            ),
        ),
    ),
    Group(
        "Somebody must act",
        "In `Stalled`. No restart is used, and the job goes on by itself once the cause is gone.",
        (
            Reason(
                "UnknownProfile",
                "workers.profile names a profile that the administrator has not made.",
                "Nothing is started.",
                "Use one of those in the message.",
            ),
            Reason(
                "EndpointNotAllowed",
                "storage.endpoint is not on the administrator's list.",
                "Nothing is started.",
                "Use one of those in the message in a new job (storage never changes), or have yours allowed (`allowedEndpoints`).",
            ),
            Reason(
                "ResumeFromNotAllowed",
                "checkpoint.resumeFrom lies outside of what this namespace may read.",
                "Nothing is started.",
                "Use a prefix below those in the message, or have it shared (`allowedResumePrefixes`).",
            ),
            Reason(
                "SecretMissing",
                "A pod waits for a secret, or for a key in it, that is not there.",
                "The kubelet looks again every few seconds.",
                "Create the secret that the message names in the job's namespace, with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
            ),
            Reason(
                "ClaimMissing",
                "A pod waits for a volume claim (pvc://…) that is not there.",
                "The pod is placed when the claim is there.",
                "Create the claim that the message names in the job's namespace.",
            ),
            Reason(
                "ContainerConfigError",
                "A container cannot be configured; the message has the kubelet's words.",
                "The kubelet looks again every few seconds.",
                "Mend what the message names.",
            ),
            Reason(
                "ImagePullFailed",
                "An image cannot be pulled.",
                "The kubelet tries again ever more slowly.",
                "Check name and tag, and that the nodes may pull it (`imagePullSecrets` of the profile).",
            ),
            Reason(
                "InvalidImage",
                "The name of an image is not one.",
                "Nothing is started.",
                "Correct script.image in a new job, or the profile's image.",
            ),
            Reason(
                "StartFailed",
                "A container does not start, or ends again at once.",
                "The kubelet tries again ever more slowly.",
                "The message has the kubelet's words; `kubectl finetune logs` has those of the container.",
            ),
            Reason(
                "NoPermission",
                "The store, or a file, refuses the job. Also told by `CheckpointsDelayed`, while training goes on without commits.",
                "No worker runs, the pods stay, and another incarnation tries after 15 seconds, then ever more slowly, up to every five "
                "minutes, for ever.",
                "Give the permission back, or put new keys into the same secret; pods see them within about a minute.",
            ),
            Reason(
                "CheckpointsLost",
                "Somebody deleted what was committed: `HEAD`, or all below the prefix. Also told by `CheckpointsDelayed`, while training goes on "
                "without commits.",
                "Nothing starts afresh. No worker runs, the pods stay with what they hold in memory, and another incarnation tries after 15 "
                "seconds, then ever more slowly, up to every five minutes, for ever.",
                "Put back what was deleted, also from a backup: see checkpoints.md. To start from nothing: a new job, in an empty prefix.",
            ),
        ),
    ),
    ENDINGS,
    Group(
        "Why a job failed",
        "In `Failed`. Final: a new job goes on where this one ended with `checkpoint.resumeFrom`.",
        (
            Reason(
                "BadData",
                "The data cannot be read as the recipe says (the message has file, line and reason), or it is not what the job's "
                "checkpoints were trained on: somebody changed it.",
                "Failed at once, without a restart.",
                "Mend the data or the recipe, and submit a new job. One with checkpoint.resumeFrom goes on from the last checkpoint.",
            ),
            Reason(
                "BadConfig",
                "Recipe, model or store cannot work together; the message says what.",
                "Failed at once, without a restart.",
                "Mend what the message names, and submit a new job.",
            ),
            Reason(
                "NumericFailure",
                "Numbers were not finite again and again, however often the job went back.",
                "Failed at once.",
                "A lower learning rate, more warm-up, BF16 in place of FP16; then a new job from an early checkpoint.",
            ),
            Reason(
                "RestartsExhausted",
                "recovery.maxRestarts restarts for one reason, and no checkpoint of a later step among them.",
                "Failed.",
                "Explain the reason that the message names; then a new job with `checkpoint.resumeFrom`.",
            ),
            Reason(
                "DeadlineExceeded",
                "The job ran for longer than activeDeadlineSeconds.",
                "Failed.",
                "A new job with a later deadline and `checkpoint.resumeFrom`.",
            ),
        ),
    ),
    Group(
        "Checkpoints and pace",
        "In `CheckpointsDelayed`, `CheckpointFallback` and `Straggler`. Training goes on.",
        (
            Reason(
                "SavePutOff",
                "Saves are due sooner than the store takes them.",
                "A save is put off until there is room for it; nothing else.",
                "A longer checkpoint.interval (status.saves.recommendedIntervalSeconds), more stagingMemory, or a faster store.",
            ),
            Reason(
                "SaveFailed",
                "A save could not be written or committed; the message says why.",
                "It is tried again when the next one is due.",
                "Mend what the message names.",
            ),
            Reason(
                "CheckpointUnreadable",
                "The gang could not start from the newest checkpoint, so it took an older one.",
                "Training goes on from there; the condition ends with the next commit.",
                "`kubectl finetune checkpoints verify --all` says what is damaged.",
            ),
            Reason(
                "SlowRank",
                "One rank steadily holds up all others; the message names it, its pod and its node.",
                "Nothing: its numbers are right.",
                "Drain the node or delete the pod: the workers save first, and no restart is used.",
            ),
        ),
    ),
    Group(
        "What does not hold",
        "In a condition that is False. They are no news.",
        (
            Reason("Reconciled", "The operator has nothing left to bring about.", "Nothing."),
            Reason("NotStalled", "Nobody's help is needed.", "Nothing."),
            Reason("NotSuspended", "spec.suspend is false.", "Nothing."),
            Reason("NotComplete", "The job has not succeeded.", "Nothing."),
            Reason("NotFailed", "The job has not failed.", "Nothing."),
            Reason("NotDelayed", "No save fails or has to wait.", "Nothing."),
            Reason(
                "NoFallback", "The gang began at the newest checkpoint, or there is a newer one by now.", "Nothing."
            ),
            Reason("NoStraggler", "No rank is known to hold up the others.", "Nothing."),
        ),
    ),
)

REASONS: dict[str, Reason] = {reason.name: reason for group in GROUPS for reason in group.reasons}


def troubleshooting_markdown() -> str:
    """Return the page of all reasons as Markdown."""
    lines = [
        "# Troubleshooting by reason",
        "",
        "<!-- Generated from crds/finetune_api/reasons.py by `make generate`. Do not edit. -->",
        "",
        "Whatever becomes of a job is said in its conditions, each with a reason, and in `status.attempts`. `kubectl finetune status JOB` shows",
        "those that matter with what follows from them, and `kubectl finetune explain REASON` one row of this page.",
    ]
    for group in GROUPS:
        lines += ["", f"## {group.title}", "", group.seen, ""]
        lines += ["| Reason | It means | What happens by itself | What to do |", "|---|---|---|---|"]
        lines += [
            f"| `{reason.name}` | {reason.meaning} | {reason.then} | {reason.to_do or 'nothing'} |"
            for reason in group.reasons
        ]
    return "\n".join(lines) + "\n"
