"""``load`` and ``refusal`` do what the lines of the files ``load`` and ``refusal`` in the test's folder say."""

import os
import runpy
import sys
from pathlib import Path

FOLDER = Path(os.environ["TEST_FOLDER"])
WORKER = Path(__file__).parents[2] / "scripts" / "worker.py"
PARENT = os.getpid()


def load():
    (FOLDER / f"loaded-{PARENT}").touch()
    obey("load")


def refusal():
    return obey("refusal").get("refusal", "")


def obey(name):
    file = FOLDER / name
    variables = {"in_child": os.getpid() != PARENT, "folder": FOLDER}
    if file.exists():
        exec(file.read_text(), variables)
    return variables


def main():
    sys.argv = [str(WORKER), str(FOLDER)]
    try:
        runpy.run_path(str(WORKER), {"was_forked": os.getpid() != PARENT}, "__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
