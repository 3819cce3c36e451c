"""Published data sets as they unpack: which clips belong to which split, and what is said of an incomplete copy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vrt.data.clips import SPLITS, DataError
from vrt.data.layouts import source_clips

# What each layout makes of `published_copy`: the clips of each split, and the folders of degraded frames, if any.
EXPECTED = {
    "reds": ({"train": ["001"], "val": ["240", "241", "246", "257"], "test": ["000", "011", "015", "020"]}, None),
    "reds-blur": ({"train": ["001"], "val": ["240", "241", "246", "257"], "test": ["000", "011", "015", "020"]}, "blur"),
    "gopro": ({"train": ["GOPR0372_07_00"], "val": ["GOPR0374_11_00"], "test": ["GOPR0384_11_00"]}, "blur"),
    "davis": ({"train": ["bear", "blackswan"], "val": ["bmx-bumps"], "test": ["aerobatics"]}, None),
    "vimeo": ({"train": ["00001_0001"], "val": ["00002_0001"], "test": ["00001_0002"]}, None),
}


@pytest.fixture
def make_copy(published_copy) -> Callable[[str], Path]:
    return lambda layout: published_copy(layout, frames=1, size=(8, 8))


def splits_of(root: Path, layout: str) -> dict[str, list[str]]:
    clips = source_clips(layout, root)
    return {split: [clip.name for clip in clips if clip.split == split] for split in SPLITS}


@pytest.mark.parametrize("layout", EXPECTED)
def test_every_clip_is_found_and_split_as_published(layout: str, make_copy):
    root = make_copy(layout)
    splits, recorded = EXPECTED[layout]
    assert splits_of(root, layout) == splits
    clips = source_clips(layout, root)
    assert all(any(clip.sharp.iterdir()) for clip in clips)
    assert all(recorded in str(clip.recorded.relative_to(root)) and any(clip.recorded.iterdir()) if recorded else not clip.recorded for clip in clips)


def test_the_validation_clips_of_reds_are_numbered_on_from_the_training_clips(make_copy):
    root = make_copy("reds")
    found = {clip.name: clip.sharp.relative_to(root) for clip in source_clips("reds", root)}
    assert found["246"] == Path("val/val_sharp/006") and found["011"] == Path("train/train_sharp/011")


def test_the_test_clips_of_dvd_are_those_its_authors_named(make_copy):
    root = make_copy("dvd")
    splits = splits_of(root, "dvd")
    assert len(splits["test"]) == 10 and "720p_240fps_2" in splits["test"]
    assert sorted(splits["train"] + splits["val"]) == ["GOPR9633", "IMG_0001"]
    clip = source_clips("dvd", root)[0]
    assert (clip.sharp.name, clip.recorded.name) == ("GT", "input")


def test_archives_may_unpack_without_the_folder_around(make_copy):
    reds, dvd = make_copy("reds"), make_copy("dvd")
    expected = splits_of(reds, "reds"), splits_of(dvd, "dvd")
    for part in ("train", "val"):
        (reds / part / f"{part}_sharp").rename(reds / f"{part}_sharp")
        (reds / part).rmdir()
    assert (splits_of(reds, "reds"), splits_of(dvd / "quantitative_datasets", "dvd")) == expected


@pytest.mark.parametrize("count, held", [(2, 1), (22, 3), (61, 7), (90, 8)])
def test_a_tenth_of_the_training_clips_is_held_out_for_validation(count: int, held: int, tmp_path: Path):
    for number in range(count):
        (tmp_path / f"train/clip{number:03}").mkdir(parents=True)
    (tmp_path / "test/other").mkdir(parents=True)
    splits = splits_of(tmp_path, "gopro")
    assert (len(splits["val"]), len(splits["train"])) == (held, count - held)
    numbers = [int(name[4:]) for name in splits["val"]]
    assert all(later - earlier >= count // held - 1 for earlier, later in zip(numbers, numbers[1:])), "they are spread over the list"


def test_clips_of_ones_own_are_split_by_their_folders(tmp_path: Path):
    for clip in ("train/a", "train/b", "val/c", "test/d"):
        (tmp_path / clip).mkdir(parents=True)
    assert splits_of(tmp_path, "clips") == {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
    assert all(clip.recorded is None for clip in source_clips("clips", tmp_path))
    for clip in ("train/a", "train/b", "val/c", "test/d"):
        (tmp_path / clip / "sharp").mkdir()
        (tmp_path / clip / "degraded").mkdir()
    assert {(clip.sharp.name, clip.recorded.name) for clip in source_clips("clips", tmp_path)} == {("sharp", "degraded")}
    shutil.rmtree(tmp_path / "val/c/degraded")
    with pytest.raises(
        DataError, match="val/c: expected the folders sharp and degraded as in other clips, found one folder of frames; add the other"
    ):
        source_clips("clips", tmp_path)


@pytest.mark.parametrize(
    "layout, removed, message",
    [
        ("reds", "val", r"val/val_sharp: expected this folder of the chosen layout, found none; check the path and --layout"),
        (
            "reds",
            "train/train_sharp/011",
            r"expected the clips 000, 011, .* \(validation clips count from 240\), found none of 011; complete your copy",
        ),
        ("reds-blur", "train/train_blur", r"train_blur: expected this folder of the chosen layout, found none"),
        ("dvd", "quantitative_datasets/IMG_0003", r"expected the clips 720p_240fps_2, .*, found none of IMG_0003; complete your copy"),
        ("vimeo", "sep_testlist.txt", r"sep_testlist.txt: expected this list of the chosen layout, found none"),
        ("davis", "ImageSets", r"ImageSets/2017/train.txt: expected this list of the chosen layout, found none"),
        (
            "gopro",
            "test/GOPR0384_11_00",
            r"expected clips for test in the layout gopro \(\{train,test\}/CLIP/\{blur,sharp\}/...\), found none; add some",
        ),
    ],
)
def test_what_a_copy_lacks_is_named(layout: str, removed: str, message: str, make_copy):
    root = make_copy(layout)
    (shutil.rmtree if (root / removed).is_dir() else Path.unlink)(root / removed)
    with pytest.raises(DataError, match=message):
        source_clips(layout, root)


def test_a_clip_in_two_splits_is_refused(make_copy):
    root = make_copy("vimeo")
    (root / "sep_testlist.txt").write_text("00001/0001\n")
    with pytest.raises(DataError, match="clip 00001_0001 is both in train and in test; expected each once"):
        source_clips("vimeo", root)


def test_a_folder_that_is_no_clip_of_reds_is_named(make_copy):
    root = make_copy("reds")
    (root / "train/train_sharp/preview").mkdir()
    with pytest.raises(DataError, match="preview: expected a clip named by its number, such as 000, found 'preview'; move it away"):
        source_clips("reds", root)
