"""Which of the programs in agent.pyz to be. Kept to syntax that any Python 3 parses, so that an old one can be told."""

import sys

OLDEST_PYTHON = (3, 9)
BAD_CONFIG = 78  # finetune_api.contract.ExitCode.BAD_CONFIG, which an old Python could not import


def main(arguments):  # type: ignore[no-untyped-def]  # annotations would be one more thing to parse  # noqa: ANN201, ANN001
    """Run the program that ``arguments`` name and return its exit code."""
    if sys.version_info < OLDEST_PYTHON:
        return refuse_python()  # type: ignore[no-untyped-call]
    program, rest = (arguments or ["stub"])[0], arguments[1:]
    if program == "torchrun":
        from finetune_agent import torchrun_wrapper

        return torchrun_wrapper.main(rest)
    if program == "worker":
        from finetune_agent import worker

        return worker.main(rest)
    if program == "fork-server":
        from finetune_agent import fork_server

        return fork_server.main(rest)
    if program == "agent":
        from finetune_agent import loop

        return loop.main(rest)
    from finetune_agent import stub

    return stub.main()


def refuse_python():  # type: ignore[no-untyped-def]  # noqa: ANN201
    """Say where kubectl shows it that this Python is too old."""
    import os

    message = "python3 in this image is %d.%d: the agent needs 3.9 or newer" % sys.version_info[:2]
    sys.stderr.write("finetune-agent: " + message + "\n")
    try:
        with open(os.environ.get("FINETUNE_TERMINATION_LOG", "/dev/termination-log"), "w") as log:  # noqa: PTH123  old Pythons
            log.write(message + "\n")
    except OSError:
        pass  # the line on stderr has to do
    return BAD_CONFIG


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))  # type: ignore[no-untyped-call]
