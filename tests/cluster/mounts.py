"""Mounts below our directories, and their end."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from tests.cluster.console import ClusterError
from tests.cluster.process import run


def mounts_below(*directories: Path) -> list[Path]:
    """Deepest first. The kernel writes spaces in paths as octal."""
    points = [Path(line.split()[1].replace("\\040", " ")) for line in Path("/proc/mounts").read_text().splitlines()]
    ours = [point for point in points if any(point.is_relative_to(directory) for directory in directories)]
    return sorted(ours, key=lambda point: len(point.parts), reverse=True)


def unmount_below(*directories: Path) -> None:
    """Lazily, since a filesystem may be busy until the last of its killed users is gone, and more than once: mounts stack."""
    for _ in range(50):
        points = mounts_below(*directories)
        if not points:
            return
        for point in points:
            with suppress(ClusterError):
                run(["umount", "--lazy", str(point)])
        time.sleep(0.02)
    raise ClusterError(f"cannot unmount {', '.join(map(str, mounts_below(*directories)))}")
