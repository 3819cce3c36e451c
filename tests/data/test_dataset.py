"""dataset.yaml: each kind is read, and what is wrong in it is named."""

from pathlib import Path

import pytest

from vrt.data.clips import DataError
from vrt.data.dataset import Clips, Frames, Synthetic, Video, listed_clips, load_dataset
from vrt.typed_yaml import ParamsError

QUICKSTART = Path(__file__).parents[2] / "data" / "raw" / "quickstart"
VIDEO = """
kind: video
file: holiday.mp4
splits:
  train: [[0, 80], [120, 140]]
  val: [[80, 90]]
  test: [[90, 100]]
"""


def raw(folder: Path, text: str) -> Path:
    (folder / "holiday").mkdir()
    (folder / "holiday" / "dataset.yaml").write_text(text)
    return folder / "holiday"


def test_the_quickstart_is_synthetic():
    dataset = load_dataset(QUICKSTART)
    assert isinstance(dataset, Synthetic)
    assert [dataset.splits.train.clips, dataset.splits.val.clips, dataset.splits.test.clips] == [12, 2, 4]


def test_a_video_lists_its_ranges_in_the_order_of_the_source(tmp_path: Path):
    dataset = load_dataset(raw(tmp_path, VIDEO))
    assert isinstance(dataset, Video)
    assert dataset.splits.ordered() == [("train", 0, 80), ("val", 80, 90), ("test", 90, 100), ("train", 120, 140)]


def test_a_folder_of_frames_is_read(tmp_path: Path):
    dataset = load_dataset(raw(tmp_path, VIDEO.replace("kind: video\nfile: holiday.mp4", "kind: frames\nfolder: frames")))
    assert isinstance(dataset, Frames) and dataset.folder == "frames"


def test_a_missing_data_set_names_those_there_are(tmp_path: Path):
    raw(tmp_path, VIDEO)
    expected = r"birthday/dataset.yaml: expected a data set, found no such file; set data.dataset in params.yaml to one of: holiday; or import one"
    with pytest.raises(DataError, match=expected):
        load_dataset(tmp_path / "birthday")


@pytest.mark.parametrize("kind", ["kind: film", "kind: [video]", ""])
def test_an_unknown_kind_names_the_known_ones(tmp_path: Path, kind: str):
    with pytest.raises(DataError, match=r"dataset.yaml: kind: found .*; expected one of: synthetic, video, frames, clips"):
        load_dataset(raw(tmp_path, VIDEO.replace("kind: video", kind)))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[80, 90]", "[79, 90]", r"splits: train \[0, 80\] and val \[79, 90\] share frames; expected disjoint ranges"),
        ("[80, 90]", "[90, 80]", r"splits: val has the range \[90, 80\]; expected \[first frame, frame after the last\]"),
        ("[[80, 90]]", "[]", r"splits.val: found \[\]"),
        ("  val: [[80, 90]]\n", "", r"splits.val: found nothing; expected a value"),
        ("file:", "flie:", r"flie: found an unknown key, did you mean 'file'"),
        ("holiday.mp4", "../holiday.mp4", r"file: found \"../holiday.mp4\""),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, old: str, new: str, message: str):
    with pytest.raises(ParamsError, match=message):
        load_dataset(raw(tmp_path, VIDEO.replace(old, new)))


def test_regions_of_two_splits_may_not_share_a_pixel(tmp_path: Path):
    text = (QUICKSTART / "dataset.yaml").read_text()
    assert "china.jpg: [20, 40, 407, 300]" in text and "china.jpg: [230, 340, 197, 150]" in text
    shifted = text.replace("china.jpg: [20, 40, 407, 300]", "china.jpg: [20, 40, 407, 301]")
    with pytest.raises(ParamsError, match=r"train \[20, 40, 407, 301\] and test \[230, 340, 197, 150\] share pixels of china.jpg"):
        load_dataset(raw(tmp_path, shifted))


@pytest.fixture
def clip_lists(tmp_path: Path) -> Path:
    folder = raw(tmp_path, "kind: clips\nrecorded: false\n")
    for split, names in {"train": "b\na\n", "val": "c", "test": "\nd\n"}.items():
        (folder / f"{split}.txt").write_text(names)
    return folder


def test_many_clips_are_listed_by_split(clip_lists: Path):
    assert load_dataset(clip_lists) == Clips(kind="clips", recorded=False)
    assert listed_clips(clip_lists) == [("train", "b"), ("train", "a"), ("val", "c"), ("test", "d")]


@pytest.mark.parametrize(
    "names, message",
    [
        ("", r"val.txt: expected a clip name on each line, found none; enter at least one clip of sharp/"),
        ("../a", r"val.txt: expected the name of a folder of sharp/, found '../a'; correct or remove that line"),
        ("c\na", r"val.txt: clip a is listed in train.txt already; expected each clip once: remove one of the lines"),
        ("c\nc", r"val.txt: clip c is listed in val.txt already"),
    ],
)
def test_a_wrong_list_of_clips_is_named(names: str, message: str, clip_lists: Path):
    (clip_lists / "val.txt").write_text(names)
    with pytest.raises(DataError, match=message):
        listed_clips(clip_lists)


def test_a_test_set_has_one_list_and_a_data_set_at_least_one(clip_lists: Path):
    (clip_lists / "train.txt").unlink(), (clip_lists / "val.txt").unlink()
    assert listed_clips(clip_lists) == [("test", "d")]
    (clip_lists / "test.txt").unlink()
    with pytest.raises(DataError, match=r"expected lists of its clips \(train.txt, val.txt, test.txt\), one name a line, found none"):
        listed_clips(clip_lists)
