"""The manifest: whoever altered it, or a file it names, is found out."""

import dataclasses
import json
from pathlib import Path

import pytest

from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.manifest import FileEntry, Manifest

MANIFEST = Manifest(
    lineage="tiny-0123456789",
    step=40,
    files=(FileEntry("40_G.pth", 1234, "ab" * 32), FileEntry("40_E.pth", 1000, "cd" * 32)),
    metrics={"val/psnr": 31.25, "train/loss": 0.1},
    identity={"seed": 1, "network.depths": [2, 2], "optimizer.lr": 1e-3},
    origin={"host": "here", "attempt": "1"},
)


def test_it_reads_back_as_it_was_written():
    read = Manifest.from_bytes(MANIFEST.to_bytes(), "x")
    assert read == MANIFEST
    assert (read.size, read.file("_E.pth"), read.file("_optimizerG.pth")) == (2234, MANIFEST.files[1], None)


def test_the_digest_tells_the_content_not_its_origin():
    assert dataclasses.replace(MANIFEST, origin={"host": "there", "attempt": "2"}).digest == MANIFEST.digest
    other_file = dataclasses.replace(MANIFEST.files[0], sha256="ef" * 32)
    for change in ({"step": 41}, {"lineage": "tiny-9876543210"}, {"files": MANIFEST.files[:1]}, {"files": (other_file, MANIFEST.files[1])}):
        assert dataclasses.replace(MANIFEST, **change).digest != MANIFEST.digest, change


def test_an_altered_manifest_is_refused():
    altered = MANIFEST.to_bytes().replace(b"ab" * 32, b"ac" * 32)
    with pytest.raises(CheckpointError, match="here: the manifest's own digest does not match its content; it was altered or damaged"):
        Manifest.from_bytes(altered, "here")


@pytest.mark.parametrize(
    "content",
    [b"", MANIFEST.to_bytes()[:-20], b"[]", b"null", b'{"format": 1}', b"\xff", MANIFEST.to_bytes().replace(b'"lineage"', b'"linage"')],
    ids=["empty", "truncated", "list", "null", "bare", "binary", "misspelt"],
)
def test_what_is_no_manifest_is_named(content: bytes):
    with pytest.raises(CheckpointError, match=r"here: no readable manifest \("):
        Manifest.from_bytes(content, "here")


def test_a_manifest_of_a_later_version_asks_for_an_update():
    later = json.loads(MANIFEST.to_bytes()) | {"format": 2, "new": 1}
    with pytest.raises(CheckpointError, match="here: manifest format 2; this version reads format 1: update vrt"):
        Manifest.from_bytes(json.dumps(later).encode(), "here")


@pytest.mark.parametrize("name", ["../40_G.pth", "/etc/passwd", "40_/../../G.pth", "..", ".lock", "20_G.pth", "40_manifest.json", "", 40])
def test_a_name_that_is_not_of_this_checkpoint_is_forged(name: object, tmp_path: Path):
    # The forger knows how to make the digest right.
    forged = dataclasses.replace(MANIFEST, files=(FileEntry(name, 1, "ab" * 32),)).to_bytes()
    with pytest.raises(CheckpointError, match="here: .*the manifest was forged|here: no readable manifest"):
        Manifest.from_bytes(forged, "here")
