"""Write the generated files: ``python -m finetune_api [--check]`` from the root of the repository."""

import argparse
import sys
from pathlib import Path

from finetune_api.crd import crd_yaml
from finetune_api.reasons import troubleshooting_markdown
from finetune_api.reference import reference_markdown

GENERATED = {
    Path("crds/finetunejobs.finetune.dev.yaml"): crd_yaml,
    Path("charts/finetune-crds/files/finetunejobs.finetune.dev.yaml"): crd_yaml,
    Path("charts/finetune-operator/files/finetunejobs.finetune.dev.yaml"): crd_yaml,
    Path("docs/reference/finetunejob.md"): reference_markdown,
    Path("docs/troubleshooting.md"): troubleshooting_markdown,
}


def main() -> int:
    """Write the generated files, or with ``--check`` tell which are stale."""
    parser = argparse.ArgumentParser(prog="python -m finetune_api", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is stale")
    check = parser.parse_args().check
    stale = [path for path, render in GENERATED.items() if not path.is_file() or path.read_text() != render()]
    for path in stale:
        if check:
            sys.stderr.write(f"{path} is stale: run `make generate`\n")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(GENERATED[path]())
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
