"""Storage of prepared clips: what is read is what was written, and damage is named."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vrt.data.clips import DataError, PreparedData, content_digest
from vrt.data.writing import writing


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(7, 19, 23, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def noise_data(noise: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    root = tmp_path_factory.mktemp("noise") / "prepared"
    with writing(root, "noise") as writer:
        writer.add("train", "only", len(noise), noise)
    return PreparedData.open(root)


@settings(deadline=None)
@given(data=st.data())
def test_a_crop_equals_a_slice(noise_data: PreparedData, noise: np.ndarray, data: st.DataObject):
    spans = []
    for size in noise.shape[:3]:
        first = data.draw(st.integers(0, size - 1))
        spans.append((first, data.draw(st.integers(1, size - first))))
    (frame, frames), (top, height), (left, width) = spans
    crop = noise_data.read(noise_data.clips("train")[0], frame, frames, top, left, height, width)
    np.testing.assert_array_equal(crop, noise[frame : frame + frames, top : top + height, left : left + width])


def test_a_whole_clip_is_read_as_it_was_written(coordinates: PreparedData, coordinate_clip):
    first, second = coordinates.clips("train")
    np.testing.assert_array_equal(coordinates.read_whole(first), coordinate_clip(9, 24, 28))
    np.testing.assert_array_equal(coordinates.read_whole(second), coordinate_clip(7, 30, 20, first=100))
    assert coordinates.read_whole(first).flags.writeable


def test_blosc2_alone_reads_a_clip(coordinates: PreparedData, coordinate_clip):
    stored = blosc2.open(str(coordinates.root / "test" / "a.b2nd"))[:]
    np.testing.assert_array_equal(stored["green"], coordinate_clip(8, 21, 26, first=220)[..., 1])


@pytest.mark.parametrize(
    "part, found",
    [
        ((8, 2, 0, 0, 4, 4), "expected frames within 0 to 9, found 8 to 10"),
        ((0, 1, 21, 0, 4, 4), "expected rows within 0 to 24, found 21 to 25"),
        ((0, 1, 0, -1, 4, 4), "expected columns within 0 to 28, found -1 to 3"),
    ],
)
def test_a_crop_outside_the_clip_is_refused(coordinates: PreparedData, part: tuple, found: str):
    with pytest.raises(DataError, match=found):
        coordinates.read(coordinates.clips("train")[0], *part)


def test_the_digest_changes_with_a_pixel_and_not_with_the_packing(tmp_path: Path, coordinate_clip, write_data):
    clip = coordinate_clip(3, 8, 8)
    data = write_data(tmp_path / "a", {"train/a": clip})
    packed_otherwise = data.index.clips[0].model_copy(update={"sha256": "0" * 64, "bytes": 1})
    assert content_digest(data.index.model_copy(update={"clips": (packed_otherwise,)})) == data.digest
    clip[2, 7, 7, 2] += 1
    assert write_data(tmp_path / "b", {"train/a": clip}).digest != data.digest


def test_the_index_does_not_depend_on_the_order_of_writing(tmp_path: Path, coordinate_clip, write_data):
    clips = {"test/b": coordinate_clip(2, 4, 4), "train/z": coordinate_clip(3, 4, 4), "train/a": coordinate_clip(4, 4, 4)}
    one = write_data(tmp_path / "one", clips)
    two = write_data(tmp_path / "two", dict(reversed(clips.items())))
    assert one.digest == two.digest
    assert [clip.file for clip in one.index.clips] == ["train/a.b2nd", "train/z.b2nd", "test/b.b2nd"]


def test_the_data_set_travels_to_other_processes(coordinates: PreparedData):
    assert pickle.loads(pickle.dumps(coordinates)) == coordinates


def test_a_missing_data_set_says_what_to_run(tmp_path: Path):
    with pytest.raises(DataError, match="expected a prepared data set, found no index.json; run `dvc repro prepare`"):
        PreparedData.open(tmp_path / "prepared")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1, "dataset": "x", "clips": []}', "\x00\x00"])
def test_a_damaged_index_is_named(coordinates: PreparedData, content: str):
    path = coordinates.root / "index.json"
    path.write_text(content)
    with pytest.raises(DataError, match="index.json: expected an index of format 2, found a damaged or foreign file; run `dvc repro prepare`"):
        PreparedData.open(coordinates.root)


def test_an_index_that_points_outside_the_data_set_is_refused(coordinates: PreparedData):
    path = coordinates.root / "index.json"
    path.write_text(path.read_text().replace("train/a.b2nd", "train/../../a.b2nd"))
    with pytest.raises(DataError, match="damaged or foreign"):
        PreparedData.open(coordinates.root)


def test_a_truncated_clip_is_named_at_open(coordinates: PreparedData):
    path = coordinates.root / "train" / "b.b2nd"
    os.truncate(path, 500)
    with pytest.raises(DataError, match=r"train/b.b2nd: expected \d+ bytes, found 500; the file is cut off or damaged: run `dvc repro prepare`"):
        PreparedData.open(coordinates.root)


def test_a_missing_clip_is_named_at_open(coordinates: PreparedData):
    (coordinates.root / "val" / "a.b2nd").unlink()
    with pytest.raises(DataError, match=r"val/a.b2nd: expected clip val/a \(6 frames of 20x24\), found no file"):
        PreparedData.open(coordinates.root)


def test_a_clip_truncated_after_open_is_named_by_the_read(coordinates: PreparedData):
    clip = coordinates.clips("train")[1]
    os.truncate(coordinates.root / clip.file, 500)
    with pytest.raises(DataError, match=r"train/b.b2nd: expected SHA-256 .*; the file has changed; run `dvc repro prepare`"):
        coordinates.read_whole(clip)


def test_verify_names_a_clip_with_a_changed_byte(coordinates: PreparedData):
    coordinates.verify()
    path = coordinates.root / "val" / "a.b2nd"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    PreparedData.open(coordinates.root)
    with pytest.raises(DataError, match=r"val/a.b2nd: expected SHA-256 .* the file has changed; run `dvc repro prepare`"):
        coordinates.verify()


@pytest.mark.parametrize("frames, found", [(4, "expected 4 frames, found 3"), (2, "expected 2 frames, found more than 2")])
def test_a_source_of_another_length_is_refused(tmp_path: Path, coordinate_clip, frames: int, found: str):
    with pytest.raises(DataError, match=f"clip train/a: {found}; check the frame ranges"), writing(tmp_path / "prepared", "x") as writer:
        writer.add("train", "a", frames, coordinate_clip(3, 4, 4))
    # The lock file alone stays: a writer that waits for it may hold it open.
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_frames_of_changing_size_are_refused(tmp_path: Path, coordinate_clip):
    frames = [*coordinate_clip(2, 4, 4), *coordinate_clip(1, 4, 6)]
    with (
        pytest.raises(DataError, match=r"expected each frame as uint8 \(4, 4, 3\), found uint8 \(4, 6, 3\)"),
        writing(tmp_path / "prepared", "x") as writer,
    ):
        writer.add("train", "a", 3, frames)


def test_an_error_while_writing_leaves_the_old_data_set_alone(coordinates: PreparedData):
    before = contents(coordinates.root.parent)
    with pytest.raises(RuntimeError, match="on purpose"), writing(coordinates.root, "new") as writer:
        writer.add("train", "a", 1, np.zeros((1, 4, 4, 3), np.uint8))
        raise RuntimeError("on purpose")
    assert contents(coordinates.root.parent) == before


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
import numpy as np
from vrt.data.writing import writing
with writing(Path(sys.argv[1]), "new") as writer:
    writer.add("train", "a", 1, np.zeros((1, 4, 4, 3), np.uint8))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def besides_the_lock(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_a_kill_while_writing_leaves_the_old_data_set_and_the_next_writer_tidies_up(coordinates: PreparedData, coordinate_clip, write_data):
    before = contents(coordinates.root)
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(coordinates.root)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(besides_the_lock(coordinates.root.parent)) == 2
    assert contents(coordinates.root) == before
    write_data(coordinates.root, {"train/a": coordinate_clip(2, 4, 4)})
    assert besides_the_lock(coordinates.root.parent) == [coordinates.root.name]


def test_a_data_set_that_a_kill_left_aside_comes_back(coordinates: PreparedData):
    """Killed between moving the old data set away and the new one in."""
    before = contents(coordinates.root)
    coordinates.root.rename(coordinates.root.parent / f".{coordinates.root.name}.old")
    with pytest.raises(RuntimeError), writing(coordinates.root, "new"):
        raise RuntimeError("on purpose")
    assert contents(coordinates.root) == before


def test_the_index_is_canonical_json(coordinates: PreparedData):
    text = (coordinates.root / "index.json").read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) + "\n"


def test_degraded_frames_are_stored_beside_the_sharp_ones(negatives: PreparedData, coordinate_clip):
    clip = negatives.clips("test")[0]
    np.testing.assert_array_equal(negatives.read_whole(clip), coordinate_clip(8, 21, 26, first=220))
    np.testing.assert_array_equal(negatives.read_whole(clip, recorded=True), 255 - coordinate_clip(8, 21, 26, first=220))
    negatives.verify()


def test_the_digest_stands_for_the_degraded_frames_too(tmp_path: Path, coordinate_clips, write_data):
    digests = {
        write_data(tmp_path / name, coordinate_clips, recorded).digest
        for name, recorded in {"none": None, "negative": lambda pixels: 255 - pixels, "other": lambda pixels: 254 - pixels}.items()
    }
    assert len(digests) == 3


def test_a_data_set_without_degraded_frames_keeps_the_digest_it_always_had(coordinates: PreparedData):
    # Trainings are told apart by it: they must find their lineage again under newer code.
    assert b"recorded" not in (coordinates.root / "index.json").read_bytes()
    assert coordinates.digest == "dd3b75891ae86bf2433e3fb1fca91eaa5201334b33cdc3a741b7affe97df9adf"


def test_damaged_degraded_frames_are_named(negatives: PreparedData):
    path = negatives.root / "recorded/val/a.b2nd"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"recorded/val/a.b2nd: expected SHA-256 .*; the file has changed"):
        negatives.verify()
    os.truncate(path, 300)
    with pytest.raises(DataError, match=r"recorded/val/a.b2nd: expected \d+ bytes, found 300; the file is cut off"):
        PreparedData.open(negatives.root)
    path.unlink()
    with pytest.raises(DataError, match=r"recorded/val/a.b2nd: expected clip val/a .*, found no file"):
        PreparedData.open(negatives.root)


def test_reading_degraded_frames_that_there_are_none_of_is_refused(coordinates: PreparedData):
    with pytest.raises(DataError, match=r"clip test/a .*: expected degraded frames recorded beside it, found none; import pairs"):
        coordinates.read_whole(coordinates.clips("test")[0], recorded=True)


@pytest.mark.parametrize(
    "recorded, message",
    [
        (lambda pixels: pixels[:-1], r"clip recorded/train/a: expected 3 frames, found 2"),
        (lambda pixels: pixels[:, :, :-1], r"clip recorded/train/a: expected each frame as uint8 \(4, 6, 3\), found uint8 \(4, 5, 3\) in frame 1"),
    ],
)
def test_degraded_frames_that_do_not_fit_the_sharp_ones_are_refused(recorded, message: str, tmp_path: Path, coordinate_clip, write_data):
    with pytest.raises(DataError, match=message):
        write_data(tmp_path / "data", {"train/a": coordinate_clip(3, 4, 6)}, recorded)
    assert not (tmp_path / "data").exists()
