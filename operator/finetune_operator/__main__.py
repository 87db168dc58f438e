"""``finetune-operator``: run the operator, or put the agent into a pod.

python -m finetune_operator run                      until stopped (the default)
python -m finetune_operator install-agent PATH       write the agent to PATH (init container of training pods)
"""

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from pydantic import ValidationError

logger = logging.getLogger(__name__)


def main() -> int:
    """Run what the command line says, and return the exit code."""
    parser = argparse.ArgumentParser(prog="finetune-operator", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("run", help="run the operator (the default)")
    install = commands.add_parser("install-agent", help="write the agent, for an init container")
    install.add_argument("path", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "install-agent":
        return _install_agent(arguments.path)
    return _run()


def _install_agent(path: Path) -> int:
    from finetune_agent.build import build_agent

    build_agent(path)
    return 0


def _run() -> int:
    from finetune_operator.kube.errors import KubeError
    from finetune_operator.observability.logs import configure_logging
    from finetune_operator.settings import Logging, read_settings
    from finetune_operator.watch import run_operator

    configure_logging(Logging())  # until the settings are read
    try:
        settings = read_settings()
    except (OSError, ValidationError, ValueError) as error:
        logger.error("the configuration cannot be used: %s", error)  # noqa: TRY400  the message is the whole story
        return 78
    configure_logging(settings.logging)
    try:
        asyncio.run(run_operator(settings))
    except KubeError as error:
        logger.error("%s", error)  # noqa: TRY400  the message is the whole story
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
