"""Makes agent.pyz: ``python -m finetune_agent.build DEST/agent.pyz``.

The same source gives the same bytes (sorted names, one date), so that a version is recognised by its digest.
"""

import os
import sys
import zipfile
from pathlib import Path
from typing import Dict

from finetune_api import contract, protocol

SHEBANG = b"#!/usr/bin/env python3\n"
DATE = (1980, 1, 1, 0, 0, 0)
EXECUTABLE = 0o755
PLAIN_FILE = 0o100644
API_INIT = '"""The part of the FineTuneJob API that agents carry."""\n'
MAIN = "import sys\n\nfrom finetune_agent.__main__ import main\n\nsys.exit(main(sys.argv[1:]))\n"


def build_agent(destination: Path) -> None:
    """Write agent.pyz to ``destination``; there is never a part of it there."""
    new = destination.with_name(destination.name + ".new")
    with new.open("wb") as file:
        file.write(SHEBANG)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in sorted(contents().items()):
                member = zipfile.ZipInfo(name, DATE)
                member.external_attr = PLAIN_FILE << 16
                member.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(member, text)
        file.flush()
        os.fsync(file.fileno())
    new.chmod(EXECUTABLE)
    new.replace(destination)


def contents() -> Dict[str, str]:
    """Return the archive's files by name."""
    package = Path(__file__).parent
    files = {"finetune_agent/" + file.name: file for file in package.glob("*.py") if file.name != "build.py"}
    for module in (contract, protocol):
        assert module.__file__ is not None
        file = Path(module.__file__)
        files["finetune_api/" + file.name] = file
    texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    return {**texts, "__main__.py": MAIN, "finetune_api/__init__.py": API_INIT}


if __name__ == "__main__":
    build_agent(Path(sys.argv[1]))
