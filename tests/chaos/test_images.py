"""An image that is another one with some files more: the layers below it are the other's own, so that nodes have them already."""

import io
import json
import tarfile
from pathlib import Path

from tests.cluster.oci import Layout, write_thin_archive

FILES = {"opt/one.py": b"1", "opt/two/three.py": b"23"}


def test_a_derived_image_has_the_layers_of_the_other_and_one_of_its_own(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    program = tmp_path / "program"
    program.write_bytes(b"#!")
    layout.directory.mkdir()
    layout.write_single_file_image("localhost/base:1", program)
    layout.derive("localhost/more:1", "localhost/base:1", FILES)
    below, more = layout.blobs_of("localhost/base:1"), layout.blobs_of("localhost/more:1")
    assert more[2:-1] == below[2:]
    config = json.loads(layout.blob(more[1]).read_text())
    assert config["config"]["Entrypoint"] == ["/program"]
    assert config["rootfs"]["diff_ids"] == more[2:], "layers that are not compressed have one digest"
    with tarfile.open(layout.blob(more[-1])) as archive:
        assert {entry.name: archive.extractfile(entry).read() for entry in archive} == FILES


def test_only_the_new_layer_is_brought_to_a_node_that_has_the_others(tmp_path: Path) -> None:
    layout, node = Layout(tmp_path / "layout"), tmp_path / "containerd"
    program = tmp_path / "program"
    program.write_bytes(b"#!")
    layout.directory.mkdir()
    layout.write_single_file_image("localhost/base:1", program)
    layout.derive("localhost/more:1", "localhost/base:1", FILES)
    stored = node / "io.containerd.content.v1.content/blobs/sha256"
    stored.mkdir(parents=True)
    for digest in layout.blobs_of("localhost/base:1"):
        (stored / digest.removeprefix("sha256:")).write_bytes(layout.blob(digest).read_bytes())
    archive = io.BytesIO()
    write_thin_archive(layout, "localhost/more:1", node, archive)
    archive.seek(0)
    with tarfile.open(fileobj=archive) as thin:
        blobs = ["sha256:" + name.rpartition("/")[2] for name in thin.getnames() if name.startswith("blobs/")]
    theirs = layout.blobs_of("localhost/base:1")
    assert blobs == [digest for digest in layout.blobs_of("localhost/more:1") if digest not in theirs]
