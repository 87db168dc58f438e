"""The commands of ``finetune checkpoints``: options in, an answer and an exit code out. What they do stands in the files beside."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune_cli.checkpoints.export import Wish
from finetune_cli.checkpoints.export import export as export_checkpoint
from finetune_cli.checkpoints.kept import choose, read_head
from finetune_cli.checkpoints.listing import list_checkpoints, listing_to_json, show_listing
from finetune_cli.checkpoints.pruning import Best, Pruning, carry_out, plan_pruning, pruning_to_json, show_pruning
from finetune_cli.checkpoints.target import Target, parse_target
from finetune_cli.checkpoints.verification import show_verdicts, verdicts_to_json, verify_all
from finetune_cli.errors import EXIT_CODES, CannotTell, Damaged
from finetune_cli.output import Output, say, show_json, size
from finetune_trainer.object_store import ObjectStore, S3ObjectStore

RETRY_SECONDS = 30.0
"""How long an unavailable store is asked again: somebody is waiting."""

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

app = typer.Typer(
    help=f"What a job has saved: list it, verify it, make a model of it, remove what is old. {EXIT_CODES}",
    rich_markup_mode=None,
)

Prefix = Annotated[str, typer.Argument(metavar="PREFIX", help="The job's prefix: s3://bucket/path.")]
PrefixAtStep = Annotated[
    str, typer.Argument(metavar="PREFIX[@STEP]", help="The job's prefix, s3://bucket/path; without a step: the newest.")
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        help="URL of an S3-compatible store. Default: AWS.",
        metavar="URL",
        envvar=["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"],
    ),
]
Form = Annotated[Output, typer.Option("--output", "-o", help="A table for people or a JSON document for programs.")]


@app.command(
    help=f"List the checkpoints that HEAD keeps, newest first, and saves that were never committed. {EXIT_CODES}"
)
def ls(prefix: Prefix, endpoint: Endpoint = None, output: Form = Output.TABLE) -> None:
    """List checkpoints."""
    listing = list_checkpoints(_store(endpoint), _prefix(prefix))
    show_json(listing_to_json(listing)) if output is Output.JSON else show_listing(listing)
    if listing.problem is not None:
        raise listing.problem


@app.command(
    help="Read a checkpoint whole: sizes, hashes of every chunk, headers, and that every parameter is there exactly once. "
    + EXIT_CODES
)
def verify(
    target: PrefixAtStep,
    every: Annotated[bool, typer.Option("--all", help="Verify each checkpoint that HEAD keeps, not only one.")] = False,
    endpoint: Endpoint = None,
    output: Form = Output.TABLE,
) -> None:
    """Verify checkpoints."""
    store, wanted = _store(endpoint), parse_target(target)
    if every and wanted.step is not None:
        raise CannotTell(f"--all and @{wanted.step} contradict one another: leave one of them out")
    head = read_head(store, wanted.prefix)
    newest = choose(head, wanted)
    verdicts = verify_all(store, wanted.prefix, head.kept if every else (newest,))
    show_json(verdicts_to_json(wanted.prefix, verdicts)) if output is Output.JSON else show_verdicts(verdicts)
    broken = [verdict.kept.step for verdict in verdicts if verdict.faults]
    if broken:
        steps = ", ".join(str(step) for step in broken)
        raise Damaged(f"broken below {wanted.prefix}: step {steps}; a job that resumes passes over it")


@app.command(
    help=f"Write a checkpoint as a Hugging Face directory into a new FOLDER. Needs neither GPU nor torch. {EXIT_CODES}"
)
def export(
    target: PrefixAtStep,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that is not there yet, or empty.")],
    *,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A copy of the model that the job started from, where that is not in S3."),
    ] = None,
    max_file_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Split the weights into files of this size: 500MB, 5GB.")
    ] = "50GB",
    endpoint: Endpoint = None,
    output: Form = Output.TABLE,
) -> None:
    """Export a checkpoint."""
    store, wanted = _store(endpoint), parse_target(target)
    kept = choose(read_head(store, wanted.prefix), wanted)
    done = export_checkpoint(store, Wish(wanted.prefix, kept, model, _bytes(max_file_size)), folder)
    if output is Output.JSON:
        show_json(
            {"folder": str(done.folder), "step": done.step, "files": list(done.files), "sizeBytes": done.size_bytes}
        )
    else:
        say(f"step {done.step} is a model in {done.folder}: {len(done.files)} files, {size(done.size_bytes)}")


@app.command(
    help="Delete all but the newest checkpoints, and what saves left behind that can never be committed. Safe beside a running job. "
    + EXIT_CODES
)
def prune(
    prefix: Prefix,
    *,
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="How many checkpoints stay.")],
    keep_best: Annotated[
        Best | None, typer.Option(help="The best by its evaluation stays too; to be said where the job keeps its best.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and leave it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    endpoint: Endpoint = None,
    output: Form = Output.TABLE,
) -> None:
    """Prune checkpoints."""
    store = _store(endpoint)
    pruning = plan_pruning(store, _prefix(prefix), keep, keep_best)
    done = not dry_run
    if done and (pruning.doomed or pruning.remains):
        if not yes:
            _ask(pruning, output)
        carry_out(store, pruning)
    show_json(pruning_to_json(pruning, done=done)) if output is Output.JSON else show_pruning(pruning, done=done)


def _ask(pruning: Pruning, output: Output) -> None:
    if not sys.stdin.isatty() or output is Output.JSON:
        raise CannotTell("nobody can be asked here: say --yes, or --dry-run")
    show_pruning(pruning, done=False)
    if not typer.confirm("Delete these?", err=True):
        raise Damaged("nothing was deleted")


def _store(endpoint: str | None) -> ObjectStore:
    return S3ObjectStore(endpoint, retry_seconds=RETRY_SECONDS)


def _prefix(text: str) -> str:
    target: Target = parse_target(text)
    if target.step is not None:
        raise CannotTell(f"this command is about all checkpoints of a job: leave out @{target.step}")
    return target.prefix


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if match is None or int(match[1]) == 0:
        raise CannotTell(f"--max-file-size {text!r}: write a number and a unit: 500MB, 5GB")
    return int(match[1]) * UNITS[match[2]]
