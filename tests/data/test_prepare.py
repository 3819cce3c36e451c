"""`prepare`: the same bytes every time, all or nothing."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import vrt.data.prepare
import vrt.data.side_by_side
from vrt.data.clips import DataError, PreparedData
from vrt.data.prepare import CLIP_FRAMES, prepare

QUICKSTART = Path(__file__).parents[2] / "data" / "raw" / "quickstart"
FRAMES = """
kind: frames
folder: frames
splits:
  train: [[0, 20], [24, 234]]
  val: [[22, 24]]
  test: [[234, 240]]
"""
KILLED_PREPARE = """
import os, signal, sys
from pathlib import Path
import vrt.data.prepare as prepare
render = prepare.render_clip
def dying(dataset, split, number, regions):
    if split == "val":
        os.kill(os.getpid(), signal.SIGKILL)
    return render(dataset, split, number, regions)
prepare.render_clip = dying
prepare.prepare(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def frame(number: int) -> np.ndarray:
    """uint8 (4, 6, 3), different for each number below 256."""
    return np.full((4, 6, 3), (number, 255 - number, 7), np.uint8)


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """The quickstart with fewer and smaller clips, as a raw data set."""
    raw = tmp_path / "raw" / "few"
    raw.mkdir(parents=True)
    text = (QUICKSTART / "dataset.yaml").read_text()
    (raw / "dataset.yaml").write_text(re.sub(r"(clips|frames): \d+", r"\1: 2", re.sub(r"(height|width): \d+", r"\1: 32", text)))
    return raw


@pytest.fixture
def images(tmp_path: Path) -> Path:
    raw = tmp_path / "raw" / "images"
    (raw / "frames").mkdir(parents=True)
    for number in range(240):
        Image.fromarray(frame(number)).save(raw / "frames" / f"{number}.png")
    (raw / "dataset.yaml").write_text(FRAMES)
    return raw


def test_the_quickstart_has_the_clips_its_recipe_needs(quickstart: PreparedData):
    assert [len(quickstart.clips(split)) for split in ("train", "val", "test")] == [12, 2, 4]
    assert {clip.shape for clip in quickstart.clips("train")} == {(16, 128, 128, 3)}
    assert {clip.shape for clip in quickstart.clips("test")} == {(10, 96, 96, 3)}
    quickstart.verify()


def test_data_that_are_prepared_anew_under_a_reader_are_refused_by_it(few: Path, images: Path, tmp_path: Path):
    data = prepare(few, tmp_path / "data")
    (clip, *_) = data.clips("train")
    data.read_whole(clip)
    text = (few / "dataset.yaml").read_text()
    (few / "dataset.yaml").write_text(re.sub(r"seed: (\d+)", r"seed: 1\1", text))
    prepare(few, tmp_path / "data")
    with pytest.raises(DataError, match="the file has changed"):
        data.read_whole(clip)


def test_prepared_twice_is_byte_identical(few: Path, tmp_path: Path):
    one = prepare(few, tmp_path / "one")
    two = prepare(few, tmp_path / "two")
    assert contents(one.root) == contents(two.root)
    assert one.digest == two.digest


def test_a_killed_prepare_leaves_the_old_data_set(few: Path, tmp_path: Path, coordinates: PreparedData):
    before = contents(coordinates.root)
    killed = subprocess.run([sys.executable, "-c", KILLED_PREPARE, str(few), str(coordinates.root)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert contents(coordinates.root) == before
    assert prepare(few, coordinates.root).index.dataset == "few"
    assert contents(coordinates.root) == contents(prepare(few, tmp_path / "fresh").root)


def test_a_failed_prepare_leaves_the_old_data_set_and_the_next_goes_on(images: Path, coordinates: PreparedData, tmp_path: Path, monkeypatch):
    before = contents(coordinates.root)
    (images / "frames" / "100.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"100.png: expected an image"):
        prepare(images, coordinates.root)
    assert contents(coordinates.root) == before

    Image.fromarray(frame(100)).save(images / "frames" / "100.png")
    Image.fromarray(frame(50)).save(images / "frames" / "0.png")
    packed = []
    pack = vrt.data.prepare.pack_clip
    monkeypatch.setattr(vrt.data.prepare, "pack_clip", lambda *args, **kwargs: packed.append(args[2]) or pack(*args, **kwargs))
    prepare(images, coordinates.root)
    # The first clip was finished, but its source has changed since; the third was finished and is taken over.
    assert sorted(packed) == ["000000", "000094", "000164", "000234"]
    assert contents(coordinates.root) == contents(prepare(images, tmp_path / "fresh").root)
    assert [path.name for path in coordinates.root.parent.iterdir() if path.suffix not in {".lock", ""}] == []


def test_processes_side_by_side_make_the_same(images: Path, tmp_path: Path, monkeypatch):
    alone = prepare(images, tmp_path / "alone")
    monkeypatch.setattr(vrt.data.side_by_side, "FRAMES_WORTH_PROCESSES", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert contents(prepare(images, tmp_path / "together").root) == contents(alone.root)


def test_a_killed_process_is_an_error_that_says_what_to_do(images: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(vrt.data.side_by_side, "FRAMES_WORTH_PROCESSES", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(vrt.data.prepare, "_packed", _die)
    with pytest.raises(RuntimeError, match="a process that read clips was killed, .*; run the same again: finished clips stay"):
        prepare(images, tmp_path / "prepared")


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


KILLED_WITH_PROCESSES = """
import os, sys
from pathlib import Path
import vrt.data.prepare as prepare
import vrt.data.side_by_side as side_by_side
if __name__ == "__main__":
    side_by_side.FRAMES_WORTH_PROCESSES = 1
    os.sched_getaffinity = lambda _: {0, 1}
    prepare.prepare(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def spawned_by(parent: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(child.cmdline())]


def test_processes_end_with_their_killed_parent(tmp_path: Path):
    raw = tmp_path / "raw"
    (raw / "sharp").mkdir(parents=True)
    (raw / "dataset.yaml").write_text("kind: clips\nrecorded: false\n")
    os.mkfifo(raw / "pipe")
    for number, split in enumerate(["train", "val", "test"]):
        (raw / "sharp" / str(number)).mkdir()
        # Nobody ever writes into it: who reads it waits for ever.
        os.link(raw / "pipe", raw / "sharp" / str(number) / "0.png")
        (raw / f"{split}.txt").write_text(f"{number}\n")
    script = tmp_path / "script.py"
    script.write_text(KILLED_WITH_PROCESSES)
    parent = subprocess.Popen([sys.executable, script, raw, tmp_path / "prepared"])
    deadline = time.monotonic() + 60
    while len(workers := spawned_by(parent)) < 2:
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    for worker in alive:
        worker.kill()
    assert not alive


def test_ranges_become_clips_of_limited_even_length(images: Path, tmp_path: Path):
    data = prepare(images, tmp_path / "prepared")
    assert [(clip.name, clip.frames) for clip in data.clips("train")] == [("000000", 20), ("000024", 70), ("000094", 70), ("000164", 70)]
    assert all(clip.frames <= CLIP_FRAMES for clip in data.index.clips)


def test_every_frame_lands_in_the_split_that_names_it(images: Path, tmp_path: Path):
    data = prepare(images, tmp_path / "prepared")
    for split, wanted in {"train": [*range(20), *range(24, 234)], "val": [22, 23], "test": [*range(234, 240)]}.items():
        found = np.concatenate([data.read_whole(clip) for clip in data.clips(split)])
        np.testing.assert_array_equal(found, np.stack([frame(number) for number in wanted]))


def test_frames_that_are_gone_are_missed(images: Path, tmp_path: Path):
    for number in range(237, 240):
        (images / "frames" / f"{number}.png").unlink()
    with pytest.raises(DataError, match="clip test/000234: expected 6 frames, found 3; check the frame ranges in dataset.yaml"):
        prepare(images, tmp_path / "prepared")


def test_a_missing_folder_of_frames_is_named(images: Path, tmp_path: Path):
    shutil.rmtree(images / "frames")
    with pytest.raises(DataError, match="images/frames: expected a folder of frames, found none"):
        prepare(images, tmp_path / "prepared")
