"""The commands of ``kubectl finetune``: options in, an answer and an exit code out. What they do stands in the files beside."""

import difflib
import functools
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from finetune_api.reasons import GROUPS, REASONS, Reason
from finetune_cli.errors import CannotTell
from finetune_cli.jobs import completion
from finetune_cli.jobs.cluster_options import CONTEXT, KUBECONFIG, NAMESPACE, on_cluster
from finetune_cli.jobs.listing import jobs_to_json, show_jobs, summary
from finetune_cli.jobs.live import show_progress
from finetune_cli.jobs.reading import Follower, show_logs
from finetune_cli.jobs.story import show_status, status_to_json
from finetune_cli.jobs.times import age
from finetune_cli.output import Output, fail, say, show_json, show_table, tell
from finetune_client import Goal, Job, Jobs, Manifest, Refused, read_manifests
from finetune_client.logs import chosen

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")

EXIT_CODES = (
    "Exit codes: 0 done; 1 refused, or the job has ended otherwise than waited for; 2 wrong usage, or the cluster cannot tell; "
    "3 not so within the time that was given."
)

Name = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.", autocompletion=completion.job_names)]
Form = Annotated[Output, typer.Option("--output", "-o", help="A table for people or a JSON document for programs.")]
Timeout = Annotated[
    str | None, typer.Option(metavar="DURATION", help="30s, 10m, 2h30m. Default: for ever.", show_default=False)
]


class DryRun(StrEnum):
    """Who checks a manifest that is not submitted."""

    CLIENT = "client"
    SERVER = "server"


def submit(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML or JSON of one or more jobs; - is stdin.")],
    *,
    dry_run: Annotated[
        DryRun | None,
        typer.Option(help="Check it only: here, without a cluster, or by the API server.", show_default=False),
    ] = None,
    wait_: Annotated[bool, typer.Option("--wait", help="Show the progress until the job has ended.")] = False,
    timeout: Timeout = None,
    output: Form = Output.TABLE,
    namespace: NAMESPACE = None,
    context: CONTEXT = None,
    kubeconfig: KUBECONFIG = None,
) -> None:
    """Create jobs. Everything in all of them is checked before the first is sent."""
    seconds = _seconds(timeout)
    manifests = _read(file)
    if dry_run is DryRun.CLIENT:
        _tell_valid([manifest.name for manifest in manifests], output)
        return
    jobs = Jobs.connect(namespace=namespace, context=context, kubeconfig=kubeconfig)
    for manifest in manifests:
        if namespace is not None and manifest.namespace not in (None, namespace):
            raise CannotTell(f"{manifest.name} is of namespace {manifest.namespace}, and --namespace says {namespace}")
    submitted = [_submit(jobs, manifest, file, output, dry_run=dry_run is not None) for manifest in manifests]
    if output is Output.JSON:
        show_json(jobs_to_json(submitted))
    for job in submitted if wait_ and dry_run is None else ():
        show_progress(jobs.of(job.namespace).progress(job.name, Goal.COMPLETE, timeout_seconds=seconds))


def _submit(jobs: Jobs, manifest: Manifest, file: str, output: Output, *, dry_run: bool) -> Job:
    """Submit one, and say so at once: the next one may be refused."""
    try:
        job = jobs.submit(manifest, dry_run=dry_run)
    except Refused as error:
        _refuse(error, file)
    if output is Output.TABLE:
        say(f"{job.namespace}/{job.name} is {'valid' if dry_run else 'submitted'}")
    return job


def _tell_valid(names: Sequence[str], output: Output) -> None:
    if output is Output.JSON:
        show_json({"valid": list(names)})
    else:
        say("\n".join(f"{name} is valid" for name in names))


@on_cluster
def get(
    jobs: Jobs,
    name: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="Only this one.", autocompletion=completion.job_names)
    ] = None,
    *,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of all namespaces.")] = False,
    output: Form = Output.TABLE,
) -> None:
    """List jobs."""
    found = [jobs.get(name)] if name is not None else jobs.list(all_namespaces=all_namespaces)
    if output is Output.JSON:
        show_json(jobs_to_json(found))
    elif found:
        show_jobs(found, _now(), namespaces=all_namespaces)
    else:
        tell("there are no jobs" + ("" if all_namespaces else f" in namespace {jobs.namespace}"))


@on_cluster
def status(
    jobs: Jobs,
    name: Name,
    *,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show the progress until the job has ended.")] = False,
    output: Form = Output.TABLE,
) -> None:
    """Tell what a job does or waits for, what is wrong and what follows, what was lost, and what ended when."""
    job = jobs.get(name)
    if watch and not job.is_final:
        job = show_progress(jobs.progress(name, Goal.ENDED))
    show_json(status_to_json(job)) if output is Output.JSON else show_status(job, _now())


@on_cluster
def logs(
    jobs: Jobs,
    name: Name,
    *,
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", min=0, metavar="N", help="Only this rank.", show_default=False)
    ] = None,
    attempt: Annotated[
        int | None,
        typer.Option("--attempt", min=1, metavar="N", help="Only while this attempt lasted.", show_default=False),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", min=0, metavar="N", help="The newest lines of each pod.", show_default=False)
    ] = None,
) -> None:
    """Print what the ranks have printed, in the order of time. A pod that was replaced has taken its log with it."""
    job = jobs.get(name)
    choose = functools.partial(chosen, rank=rank, attempt=attempt)
    if follow and tail is not None and (rank is not None or attempt is not None):
        raise typer.BadParameter(
            "with --follow, --tail counts the lines of all ranks: leave out --rank and --attempt, or --tail"
        )
    if follow:
        Follower(jobs, job, choose=choose, tail=tail, tagged=rank is None).show()
        return
    show_logs(jobs, job, choose=choose, tail=tail, tagged=rank is None)
    for ended in job.status.attempts:
        if ended.generation == attempt:
            tell(f"attempt {attempt} ended: {ended.reason}: {ended.message}")


@on_cluster
def events(jobs: Jobs, name: Name, *, output: Form = Output.TABLE) -> None:
    """Print what Kubernetes says of a job and its pods. It forgets that after about an hour; status does not."""
    found = jobs.events(jobs.get(name))
    if output is Output.JSON:
        fields = ("time", "type", "reason", "object", "message", "count")
        show_json({"events": [{field: getattr(event, field) for field in fields} for event in found]})
    elif found:
        now = _now()
        rows = [
            (age(event.time, now), str(event.count), event.type, event.reason, event.object, event.message)
            for event in found
        ]
        show_table(("LAST SEEN", "TIMES", "TYPE", "REASON", "OBJECT", "MESSAGE"), rows, wraps="MESSAGE")
    else:
        tell(f"there are no events of {name}")


@on_cluster
def suspend(jobs: Jobs, name: Name) -> None:
    """Have a job save and give its pods back."""
    job = jobs.suspend(name)
    say(f"{job.namespace}/{name} saves, and gives its pods back; {_newest_checkpoint(job)}")


@on_cluster
def resume(jobs: Jobs, name: Name) -> None:
    """Have a suspended job go on."""
    job = jobs.resume(name)
    say(f"{job.namespace}/{name} goes on; {_newest_checkpoint(job)}")


@on_cluster
def wait(
    jobs: Jobs,
    name: Name,
    *,
    goal: Annotated[Goal, typer.Option("--for", help="What to wait for.")] = Goal.COMPLETE,
    timeout: Timeout = None,
    output: Form = Output.TABLE,
) -> None:
    """Wait until a job is as wanted, and show its progress on stderr."""
    job = show_progress(jobs.progress(name, goal, timeout_seconds=_seconds(timeout)))
    show_json(summary(job)) if output is Output.JSON else say(f"{job.namespace}/{name} is {goal.value}")


def checkpoints(
    rest: typer.Context,
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="ls, verify, export or prune.")],
    target: Annotated[
        str,
        typer.Argument(
            metavar="JOB[@STEP]", help="The job, and perhaps one step of it.", autocompletion=completion.job_names
        ),
    ],
    *,
    namespace: NAMESPACE = None,
    context: CONTEXT = None,
    kubeconfig: KUBECONFIG = None,
) -> None:
    """Run `finetune checkpoints COMMAND` on what a job has saved, with all options of that; see `finetune checkpoints --help`."""
    from finetune_cli.checkpoints.commands import app  # boto3 takes a while, and only this command needs it

    name, at, step = target.partition("@")
    if at and not step.isdecimal():
        raise CannotTell(f"{step!r} is no step: write {name}, or {name}@100")
    job = Jobs.connect(namespace=namespace, context=context, kubeconfig=kubeconfig).get(name)
    if job.prefix is None:
        raise CannotTell(f"{name} has no spec.storage: the checkpoints of a script are its own")
    endpoint = (job.spec["storage"].get("endpoint"), *(os.environ.get(variable) for variable in ENDPOINT_VARIABLES))
    chosen = endpoint[0] if not any(endpoint[1:]) and "--endpoint" not in rest.args else None
    arguments = [command, f"{job.prefix}{at}{step}", *(("--endpoint", chosen) if chosen else ()), *rest.args]
    raise typer.Exit(int(app(arguments, prog_name="finetune checkpoints", standalone_mode=False) or 0))


def explain(
    reason: Annotated[
        str | None,
        typer.Argument(metavar="[REASON]", help="Default: all of them.", autocompletion=completion.reasons),
    ] = None,
    *,
    output: Form = Output.TABLE,
) -> None:
    """Tell what a reason in a job's status means, what happens by itself, and what to do. Needs no cluster."""
    if reason is None:
        if output is Output.JSON:
            show_json({"reasons": [_explained(known) for known in REASONS.values()]})
            return
        for group in GROUPS:
            say(f"{group.title}. {group.seen}\n", style="bold")
            show_table(("REASON", "MEANING"), [(known.name, known.meaning) for known in group.reasons], wraps="MEANING")
            say("")
        return
    known = {name.lower(): name for name in REASONS}
    if reason.lower() not in known:
        near = difflib.get_close_matches(reason.lower(), known, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(known[name] for name in near)}?" if near else ""
        raise CannotTell(f"{reason} is no reason that a job's status gives{hint}")
    found = REASONS[known[reason.lower()]]
    if output is Output.JSON:
        show_json(_explained(found))
        return
    say(found.name, style="bold")
    say(f"  {found.meaning}")
    say(f"  next:  {found.then}")
    if found.to_do:
        say(f"  to do: {found.to_do}")


def _explained(reason: Reason) -> dict[str, str]:
    return {"reason": reason.name, "meaning": reason.meaning, "then": reason.then, "toDo": reason.to_do}


def _read(file: str) -> list[Manifest]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        return read_manifests(text)
    except UnicodeDecodeError:
        raise Refused(f"{file} is not UTF-8 text") from None
    except Refused as error:
        _refuse(error, file)


def _refuse(error: Refused, file: str) -> NoReturn:
    """End with one line for each fault, in the form that editors jump to."""
    if not error.faults:
        raise error
    for fault in error.faults:
        place = ("stdin" if file == "-" else file) + (f":{fault.line}" if fault.line else "")
        fail(": ".join(filter(None, [place, fault.path, fault.message])))
    raise typer.Exit(1)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise CannotTell(f"--timeout {text!r}: write 30s, 10m or 2h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return hours * 3600.0 + minutes * 60 + seconds


def _newest_checkpoint(job: Job) -> str:
    kept = job.status.checkpoint
    return f"the newest checkpoint is of step {kept.step}" if kept else "it has no checkpoint yet"


def _now() -> datetime:
    return datetime.now(UTC)


app = typer.Typer(
    name="kubectl-finetune",
    help=f"FineTuneJobs in a cluster: `kubectl finetune`. {EXIT_CODES}",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (submit, get, status, logs, events, suspend, resume, wait, explain):
    app.command(epilog=EXIT_CODES)(command)
app.command(epilog=EXIT_CODES, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(checkpoints)
