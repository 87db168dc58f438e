"""The images that nodes have: a containerd root as a template, filled once, from which every node's is cloned.

Filling takes two minutes for the trainer's 6 GB, cloning no time. When only the source has changed, the new image shares all
big layers with an old one, and the template and each running node import an archive of the few kilobytes that they lack.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.cluster import image_build, oci
from tests.cluster.binaries import exclusive
from tests.cluster.console import ClusterError, step
from tests.cluster.image_build import Recipe
from tests.cluster.node import PAUSE_IMAGE, Node, containerd_configuration
from tests.cluster.places import CACHE, RUN, SOCKETS
from tests.cluster.process import ControlGroup, Supervisor, run, wait_for

_DIRECTORY = CACHE / "images"
TEMPLATE = _DIRECTORY / "containerd"
_LAYOUT = oci.Layout(_DIRECTORY / "layout")
_RECORD = _DIRECTORY / "loaded.json"
_KEPT_VERSIONS = 3
_LOCK = CACHE / "locks" / "images"
GROUP = ControlGroup("finetune-images")


@contextmanager
def lock() -> Iterator[None]:
    """Nobody may clone the template while somebody else writes to it."""
    with exclusive(_LOCK, "building or loading images"):
        yield


def ensure(recipes: tuple[Recipe, ...], programs: Mapping[str, Path]) -> dict[str, str]:
    """Build and put into the template what is missing there; recipe → image. Call with the lock held."""
    names = {recipe.name: recipe.image for recipe in recipes}
    loaded = _loaded()
    missing = [recipe for recipe in recipes if names[recipe.name] not in loaded]
    pause_is_missing = loaded.get(PAUSE_IMAGE) != str(programs["pause"])
    for recipe in missing:
        image_build.build(recipe, names[recipe.name], _LAYOUT.directory)
    if pause_is_missing:
        _LAYOUT.directory.mkdir(parents=True, exist_ok=True)
        _LAYOUT.write_single_file_image(PAUSE_IMAGE, programs["pause"])
    if missing or pause_is_missing:
        wanted = [names[recipe.name] for recipe in missing] + [PAUSE_IMAGE] * pause_is_missing
        loaded |= {names[recipe.name]: recipe.dependencies for recipe in recipes}
        loaded |= {PAUSE_IMAGE: str(programs["pause"])}
        _fill_template(wanted, loaded)
    return names


def _loaded() -> dict[str, str]:
    """Images in the template, oldest first: name → key of its dependencies (of the pause image: its program)."""
    return dict(json.loads(_RECORD.read_text())) if _RECORD.exists() else {}


def _fill_template(wanted: list[str], loaded: dict[str, str]) -> None:
    # The layers of running nodes are the template's own: none may go while there is a node.
    outdated = [] if any(RUN.glob("*/node*")) else _outdated(loaded)
    with _template_containerd() as socket:
        for image in wanted:
            with step(f"importing {image} into the template"):
                _import(image, TEMPLATE, socket)
        for image in outdated:
            run(
                ["ctr", "--address", str(socket), "--namespace", "k8s.io", "images", "rm", "--sync", image], check=False
            )
            image_build.forget(image)
    kept = {image: key for image, key in loaded.items() if image not in outdated}
    _RECORD.write_text(json.dumps(kept, indent=1))
    _LAYOUT.forget_all_but(set(kept))
    _LAYOUT.share_blobs_with(TEMPLATE)
    image_build.clean()


def _outdated(loaded: Mapping[str, str]) -> list[str]:
    """All but the newest versions, and those of older dependencies at once: they share nothing and are big."""
    repositories: dict[str, list[str]] = {}
    for image in loaded:
        repositories.setdefault(image.rsplit(":", 1)[0], []).append(image)
    return [
        image
        for versions in repositories.values()
        for age, image in enumerate(reversed(versions))
        if age >= _KEPT_VERSIONS or loaded[image] != loaded[versions[-1]]
    ]


@contextmanager
def _template_containerd() -> Iterator[Path]:
    """A containerd on the template, without its Kubernetes side, for as long as the import takes."""
    remove_template_containerd()
    GROUP.create()
    SOCKETS.mkdir(parents=True, exist_ok=True)
    socket = SOCKETS / "images.sock"
    configuration = _DIRECTORY / "containerd.toml"
    disabled = 'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
    configuration.write_text(disabled + containerd_configuration(TEMPLATE, SOCKETS / "images", socket))
    supervisor = Supervisor(_DIRECTORY / "run", GROUP)
    try:
        process = supervisor.start("containerd", ["containerd", "--config", configuration])
        wait_for("containerd is not ready", _look(socket), 30, supervisor, "containerd")
        yield socket
        process.end(grace_seconds=20)
    finally:
        remove_template_containerd()


def remove_template_containerd() -> None:
    GROUP.kill()
    GROUP.remove()
    shutil.rmtree(SOCKETS / "images", ignore_errors=True)
    for socket in SOCKETS.glob("images.sock*"):
        socket.unlink()
    with suppress(OSError):
        SOCKETS.rmdir()


def _look(socket: Path) -> Iterator[bool]:
    while True:
        try:
            run(["ctr", "--address", str(socket), "--connect-timeout", "1s", "version"])
            yield True
        except ClusterError:
            yield False


def _import(image: str, root: Path, socket: Path) -> None:
    command = ["ctr", "--address", str(socket), "--namespace", "k8s.io", "images", "import", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        broken = None
        try:
            oci.write_thin_archive(_LAYOUT, image, root, child.stdin)
            child.stdin.close()
        except BrokenPipeError as error:
            broken = error
        said = child.stderr.read().decode()
    if child.returncode or broken:
        raise ClusterError(f"importing {image} failed: {said.strip()}")


def derive(name: str, base: str, files: Mapping[str, bytes]) -> None:
    """Make an image that is another one with some files more. Call with the lock held."""
    _LAYOUT.derive(name, base, files)


def load_on_node(image: str, node: Node) -> None:
    """Bring an image of the layout to a node that runs already."""
    if image not in node.ctr("images", "ls", "-q").split():
        _import(image, node.containerd_root, node.socket)
