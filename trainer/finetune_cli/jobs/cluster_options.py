"""Which cluster and which namespace: the options of kubectl, on every command that needs one.

kubectl hands a plugin all arguments after its name, so these must be understood behind the command, where its users write them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from finetune_client import Jobs

NAMESPACE = Annotated[
    str | None,
    typer.Option("--namespace", "-n", metavar="NAMESPACE", help="Default: that of the context.", show_default=False),
]
CONTEXT = Annotated[
    str | None, typer.Option("--context", metavar="CONTEXT", help="Of the kubeconfig.", show_default=False)
]
KUBECONFIG = Annotated[
    str | None,
    typer.Option("--kubeconfig", metavar="FILE", help="Default: KUBECONFIG, ~/.kube/config.", show_default=False),
]
_OPTIONS = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    for name, annotation in (("namespace", NAMESPACE), ("context", CONTEXT), ("kubeconfig", KUBECONFIG))
]


def on_cluster(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options, and the client that they stand for as its first argument."""

    @functools.wraps(command)
    def run(*, namespace: str | None, context: str | None, kubeconfig: str | None, **own: Any) -> None:
        command(Jobs.connect(namespace=namespace, context=context, kubeconfig=kubeconfig), **own)

    signature = inspect.signature(command)
    parameters = [*list(signature.parameters.values())[1:], *_OPTIONS]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
