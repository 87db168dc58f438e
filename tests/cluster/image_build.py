"""From the project's Dockerfiles to images in an OCI layout, with buildah.

No registry is needed: the base image is made with debootstrap and handed to the Dockerfile as BASE_IMAGE. An image is tagged
with the hash of its inputs, so that nothing is built twice, and a new source can never be mistaken for an old one that a node
still has. How this machine reaches the package index (certificates, mirrors, proxies) goes into the build as secrets, which
leave no trace in the image.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from tests.cluster.console import step
from tests.cluster.mounts import unmount_below
from tests.cluster.places import CACHE, PROJECT
from tests.cluster.process import run

STORE = CACHE / "buildah"
_RUNROOT = Path("/run/finetune-buildah")
_BASE_SUITE = "bookworm"
_BASE_PACKAGES = "ca-certificates,python3,python3-venv,libgomp1"
_MACHINE_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    sources: tuple[str, ...]
    expected: str

    @property
    def dockerfile(self) -> Path:
        return PROJECT / f"Dockerfile.{self.name}"

    @property
    def repository(self) -> str:
        return f"localhost/finetune-{self.name}"

    @property
    def image(self) -> str:
        """The image's name for the inputs as they are now."""
        digest = hashlib.sha256(_base_key().encode())
        for file in self._inputs():
            digest.update(f"{file.relative_to(PROJECT)} {file.stat().st_mode & 0o111}\0".encode())
            digest.update(file.read_bytes())
        return f"{self.repository}:{digest.hexdigest()[:12]}"

    @property
    def dependencies(self) -> str:
        """A key of what the big layers are made of; images of other keys share none of them."""
        project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
        requirements = sorted([*project["dependencies"], *project["optional-dependencies"][self.name]])
        return hashlib.sha256(f"{_base_key()} {requirements}".encode()).hexdigest()[:12]

    def _inputs(self) -> Iterator[Path]:
        yield from (self.dockerfile, PROJECT / ".dockerignore", PROJECT / "pyproject.toml")
        for source in self.sources:
            files = (file for file in (PROJECT / source).rglob("*") if file.is_file())
            yield from sorted(file for file in files if "__pycache__" not in file.parts and file.suffix != ".pyc")


OPERATOR = Recipe("operator", ("crds", "operator"), "about 30 s the first time")
TRAINER = Recipe("trainer", ("crds", "trainer"), "about 8 min the first time")


def build(recipe: Recipe, image: str, layout: Path) -> None:
    """Build and put the image into the layout. Layers that are there already are neither built nor copied again."""
    clean()
    _discard_other_dependencies(recipe)
    base = _ensure_base()
    with step(f"building {image}", recipe.expected), TemporaryDirectory() as secrets:
        _buildah(
            "bud", "--layers", "--quiet", "--network", "host", "--build-arg", f"BASE_IMAGE={base}",
            *_secrets(Path(secrets)), *_uv_cache(),
            "--file", str(recipe.dockerfile), "--tag", image, str(PROJECT),
        )  # fmt: skip
    with step(f"packing {image}"):
        layout.mkdir(parents=True, exist_ok=True)
        # Uncompressed, a layer has the digest that the store knows it by, so one that the layout has is not even read: 0.1 s for
        # a change of source, where `buildah push` compresses everything anew and takes 90 s.
        source = f"containers-storage:[overlay@{STORE / 'store'}+{_RUNROOT}]{image}"
        run(
            [
                "nice",
                "-n",
                "5",
                "skopeo",
                "copy",
                "--quiet",
                "--dest-oci-accept-uncompressed-layers",
                source,
                f"oci:{layout}:{image}",
            ]
        )


def _discard_other_dependencies(recipe: Recipe) -> None:
    """Once the requirements have changed, gigabytes of layers are of no use any more, and buildah keeps them for ever."""
    record = STORE / f"dependencies-{recipe.name}"
    if record.exists() and record.read_text() != recipe.dependencies:
        _buildah("rmi", "--all", "--force")
    STORE.mkdir(parents=True, exist_ok=True)
    record.write_text(recipe.dependencies)


def forget(image: str) -> None:
    _buildah("rmi", "--force", image, check=False)


def _buildah(*arguments: str, check: bool = True) -> str:
    stores = ["--root", str(STORE / "store"), "--runroot", str(_RUNROOT), "--storage-driver", "overlay"]
    # chroot: a container within the machine's limits, where runc would want rights that it may not have.
    return run(["nice", "-n", "5", "buildah", *stores, *arguments], env={"BUILDAH_ISOLATION": "chroot"}, check=check)


def clean() -> None:
    """Remove what an interrupted build has left: working containers and their mounts."""
    if STORE.exists():
        if shutil.which("buildah"):
            _buildah("rm", "--all", check=False)
        unmount_below(STORE, _RUNROOT)
    shutil.rmtree(_RUNROOT, ignore_errors=True)


def _base_key() -> str:
    return hashlib.sha256(f"{_BASE_SUITE} {_BASE_PACKAGES}".encode()).hexdigest()[:12]


def _ensure_base() -> str:
    image = f"localhost/finetune-base:{_base_key()}"
    if _buildah("images", "--quiet", image, check=False).strip():
        return image
    tarball = _ensure_base_tarball()
    with step("importing the base image"):
        container = _buildah("from", "scratch").strip()
        _buildah("add", "--quiet", container, str(tarball), "/")
        _buildah("commit", "--quiet", container, image)
        _buildah("rm", container)
    return image


def _ensure_base_tarball() -> Path:
    tarball = CACHE / f"base-{_base_key()}.tar.gz"
    if tarball.exists():
        return tarball
    CACHE.mkdir(parents=True, exist_ok=True)
    root = Path(mkdtemp(prefix=".debootstrap-", dir=CACHE))
    try:
        with step("making the base image with debootstrap", "about 1 min the first time"):
            run(["debootstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", _BASE_SUITE, str(root)])
            _strip(root)
            root.chmod(0o755)
            scratch = tarball.with_suffix(".part")
            run(["tar", "-C", str(root), "--numeric-owner", "-czf", str(scratch), "."])
            scratch.rename(tarball)
    finally:
        unmount_below(root)
        shutil.rmtree(root, ignore_errors=True)
    return tarball


def _strip(root: Path) -> None:
    """Nothing of this machine's (its name, its resolver), and no package archives."""
    for name in ("etc/resolv.conf", "etc/hostname"):
        (root / name).write_text("")
    for directory in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / directory, ignore_errors=True)
        (root / directory / "partial").mkdir(parents=True)


def _uv_cache() -> list[str]:
    """Packages that this machine has fetched before are not fetched again; the mount is no part of the image."""
    cache = Path(os.environ.get("UV_CACHE_DIR") or CACHE.parent / "uv")
    cache.mkdir(parents=True, exist_ok=True)
    return ["--volume", f"{cache}:/var/cache/uv"]


def _secrets(directory: Path) -> list[str]:
    """The build secrets that the Dockerfiles describe, for this machine."""
    exports = {"UV_CACHE_DIR": "/var/cache/uv"}
    index = re.compile(
        r"^(PIP|UV)_.*(INDEX|TRUSTED_HOST|INSECURE_HOST|TIMEOUT).*$|^(https?|all|no)_proxy$", re.IGNORECASE
    )
    exports |= {name: value for name, value in os.environ.items() if index.match(name)}
    files = {}
    if _MACHINE_CERTIFICATES.exists():
        files["ca-bundle"] = _MACHINE_CERTIFICATES
        exports |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"), "/run/secrets/ca-bundle")
    configurations = {
        "pip-config": (
            "PIP_CONFIG_FILE",
            (Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf", Path("/etc/pip.conf")),
        ),
        "uv-config": ("UV_CONFIG_FILE", (Path.home() / ".config/uv/uv.toml", Path("/etc/uv/uv.toml"))),
    }
    for secret, (variable, places) in configurations.items():
        found = next((place for place in places if place.exists()), None)
        if found is not None:
            files[secret] = found
            exports[variable] = f"/run/secrets/{secret}"
    environment = directory / "build-environment"
    environment.write_text("".join(f"export {name}={_quoted(value)}\n" for name, value in exports.items()))
    files["build-environment"] = environment
    return [word for secret, file in files.items() for word in ("--secret", f"id={secret},src={file}")]


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"
