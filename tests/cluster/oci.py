"""OCI image layouts: writing one by hand, and packing one for containerd without the layers that it has already.

A layout is a folder of blobs named after their SHA-256, with an index of names. containerd's own store of blobs has the same
names, so what is missing on a node is a question of which files exist.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
_REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_BLOBS = Path("io.containerd.content.v1.content/blobs/sha256")


@dataclass(frozen=True, slots=True)
class Layout:
    directory: Path

    def blob(self, digest: str) -> Path:
        return self.directory / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def index(self) -> list[dict[str, Any]]:
        """Descriptors of manifests, each annotated with its image's name."""
        file = self.directory / "index.json"
        return list(json.loads(file.read_text())["manifests"]) if file.exists() else []

    def manifest(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.index() if entry["annotations"][_REF_NAME] == name)

    def blobs_of(self, name: str) -> list[str]:
        descriptor = self.manifest(name)
        manifest = json.loads(self.blob(descriptor["digest"]).read_text())
        return [descriptor["digest"], manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]

    def forget_all_but(self, names: set[str]) -> None:
        """Drop the other images and the blobs that only they use."""
        kept = [entry for entry in self.index() if entry["annotations"][_REF_NAME] in names]
        self._write_index(kept)
        used = {
            digest.removeprefix("sha256:")
            for entry in kept
            for digest in self.blobs_of(entry["annotations"][_REF_NAME])
        }
        for file in (self.directory / "blobs" / "sha256").glob("*"):
            if file.name not in used:
                file.unlink()

    def share_blobs_with(self, containerd_root: Path) -> None:
        """Keep one copy of each blob for both stores. Both write blobs once, under their digest, and never change them."""
        for file in (self.directory / "blobs" / "sha256").glob("*"):
            theirs = containerd_root / CONTAINERD_BLOBS / file.name
            if theirs.exists() and not theirs.samefile(file):
                link = file.with_name(f".{file.name}.link")
                link.unlink(missing_ok=True)
                os.link(theirs, link)
                link.replace(file)

    def write_single_file_image(self, name: str, program: Path) -> None:
        """An image of one static program: all there is to a pause container."""
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": [f"/{program.name}"], "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": []},
        }
        self._write_image(name, config, [], _tar_of({program.name: program.read_bytes()}, mode=0o755))

    def derive(self, name: str, base: str, files: Mapping[str, bytes]) -> None:
        """An image that is another one of this layout with some files more."""
        manifest = json.loads(self.blob(self.manifest(base)["digest"]).read_text())
        config = json.loads(self.blob(manifest["config"]["digest"]).read_text())
        self._write_image(name, config, manifest["layers"], _tar_of(files, mode=0o644))

    def _write_image(
        self, name: str, config: Mapping[str, Any], below: Sequence[Mapping[str, Any]], layer: bytes
    ) -> None:
        filesystem = config["rootfs"]
        diff_ids = [*filesystem["diff_ids"], f"sha256:{hashlib.sha256(layer).hexdigest()}"]
        config = {**config, "rootfs": {**filesystem, "diff_ids": diff_ids}, "history": []}
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                **self._add(json.dumps(config).encode()),
            },
            "layers": [*below, {"mediaType": "application/vnd.oci.image.layer.v1.tar", **self._add(layer)}],
        }
        entry = {"mediaType": _MANIFEST, **self._add(json.dumps(manifest).encode()), "annotations": {_REF_NAME: name}}
        self._write_index([other for other in self.index() if other["annotations"][_REF_NAME] != name] + [entry])

    def _add(self, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        file = self.blob(digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():  # else perhaps containerd's too, and read just now
            file.write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    def _write_index(self, entries: list[dict[str, Any]]) -> None:
        (self.directory / "oci-layout").write_bytes(_LAYOUT)
        scratch = self.directory / ".index.json"
        scratch.write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
        scratch.replace(self.directory / "index.json")


def _tar_of(files: Mapping[str, bytes], *, mode: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            _add_bytes(archive, name, content, mode)
    return buffer.getvalue()


def write_thin_archive(layout: Layout, name: str, containerd_root: Path, out: IO[bytes]) -> int:
    """Write what `ctr images import` needs of an image, leaving out the blobs below `containerd_root`; bytes of blobs written.

    containerd unpacks a layer only if its snapshot is missing, so a layer that it has needs no bytes. Manifest and config
    always go along: the import reads them from the archive.
    """
    entry = layout.manifest(name)
    annotated = {**entry, "annotations": {_REF_NAME: name, "io.containerd.image.name": name}}
    needed = layout.blobs_of(name)
    needed = needed[:2] + [blob for blob in needed[2:] if not _is_stored(containerd_root, blob)]
    with tarfile.open(fileobj=out, mode="w|") as archive:
        _add_bytes(archive, "oci-layout", _LAYOUT)
        _add_bytes(archive, "index.json", json.dumps({"schemaVersion": 2, "manifests": [annotated]}).encode())
        for digest in dict.fromkeys(needed):
            archive.add(layout.blob(digest), arcname=f"blobs/sha256/{digest.removeprefix('sha256:')}")
    return sum(layout.blob(digest).stat().st_size for digest in set(needed))


def _is_stored(containerd_root: Path, digest: str) -> bool:
    return (containerd_root / CONTAINERD_BLOBS / digest.removeprefix("sha256:")).exists()


def _add_bytes(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    archive.addfile(info, io.BytesIO(content))
