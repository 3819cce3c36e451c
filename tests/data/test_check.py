"""`vrt data check` tells all that is missing or damaged, at once."""

import os
from pathlib import Path

import pytest
from PIL import Image

from vrt import cli
from vrt.data.check import check_copy, check_params, check_prepared, check_raw
from vrt.data.importing import import_dataset
from vrt.data.prepare import prepare
from vrt.lifecycle import EXIT_BAD_INPUT, EXIT_DONE


@pytest.fixture
def gopro(published_copy, tmp_path: Path) -> Path:
    return import_dataset(published_copy("gopro", frames=4, size=(24, 32)), "gopro", tmp_path / "raw", "gopro")


def problems(found) -> list[str]:
    return [problem for one in found for problem in one.problems]


def test_a_sound_data_set_has_no_problem(gopro: Path):
    found = check_raw(gopro)
    assert problems(found) == []
    assert [(one.split, one.frames, one.sizes, one.recorded) for one in found] == [
        ("train", 4, ((24, 32),), True),
        ("val", 4, ((24, 32),), True),
        ("test", 4, ((24, 32),), True),
    ]


def test_everything_that_is_wrong_is_told_at_once(gopro: Path):
    train, val, test = "GOPR0372_07_00", "GOPR0374_11_00", "GOPR0384_11_00"
    (gopro / "sharp" / train / "00000002.png").write_bytes(b"no image")
    (gopro / "sharp" / train / "00000004.png").write_bytes(b"")
    damaged = gopro / "recorded" / train / "00000003.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    (gopro / "recorded" / val / "00000004.png").unlink()
    for path in (gopro / "sharp" / test).iterdir():
        path.unlink()
    told = problems(check_raw(gopro))
    assert len(told) == 5
    for part in (
        f"{train}/00000002.png: expected an image, found a file that can't be read",
        f"{train}/00000004.png: expected an image, found a file that can't be read",
        f"recorded/{train}/00000003.png: expected an image",
        f"sharp/{val}/00000004.png: expected a frame 00000004 in",
        f"sharp/{test}: expected frames (.png, .jpg, .jpeg), found none",
    ):
        assert sum(part in problem for problem in told) == 1, (part, told)


def test_frames_of_several_sizes_and_a_missing_clip_are_told(gopro: Path):
    Image.new("RGB", (16, 16)).save(gopro / "sharp" / "GOPR0372_07_00" / "00000001.png")
    (gopro / "test.txt").write_text("GOPR0384_11_00\nGOPR9999\n")
    told = problems(check_raw(gopro))
    assert any("sharp/GOPR0372_07_00: expected frames of one size, found 16x16, 24x32" in problem for problem in told)
    assert any("sharp/GOPR9999: expected a folder of frames or a video file of that name, found neither" in problem for problem in told)


def test_a_copy_is_checked_before_it_is_imported(published_copy):
    copy = published_copy("reds", frames=2, size=(16, 16))
    assert problems(check_copy(copy, "reds")) == []
    (copy / "train/train_sharp/011/00000001.png").write_bytes(b"")
    (told,) = problems(check_copy(copy, "reds"))
    assert "train_sharp/011/00000001.png: expected an image" in told


def test_what_a_training_needs_is_told(gopro: Path, make_params):
    found = check_raw(gopro)
    assert check_params(found, make_params({"train.frames": 4, "train.crop": 16})) == []
    told = check_params(found, make_params({"train.frames": 5, "train.crop": 32}))
    assert told == [
        "clip GOPR0372_07_00: expected at least 5 frames, found 4; lower train.frames or use longer clips",
        "clip GOPR0372_07_00: expected frames of at least train.crop = 32 pixels, found 24x32; lower train.crop or use larger frames",
    ]
    (gopro / "val.txt").unlink()
    told = check_params(check_raw(gopro), make_params({"train.frames": 4, "train.crop": 16}))
    assert told == ["expected clips in the split val, found none; a training needs all of train, val, test"]


def test_a_test_clip_may_be_as_short_as_the_trainer_takes_it(gopro: Path, make_params):
    """Two blurred frames of three sharp ones are trained on; of a validation or test clip one is enough."""
    params = make_params({"train.frames": 2, "train.crop": 16, "degradation": {"kind": "motion_blur", "frames": 3}})
    assert check_params(check_raw(gopro), params) == [
        "clip GOPR0372_07_00: expected at least 6 frames, found 4; lower train.frames or use longer clips"
    ]


def test_a_prepared_clip_that_is_cut_off_is_told_once(gopro: Path, tmp_path: Path):
    data = prepare(gopro, tmp_path / "prepared")
    os.truncate(data.root / data.index.clips[0].file, 100)
    (told,) = data.problems()
    assert "found 100; the file is cut off or damaged" in told


def test_every_damaged_prepared_clip_is_told(gopro: Path, tmp_path: Path):
    data = prepare(gopro, tmp_path / "prepared")
    assert check_prepared(data.root) == [] == check_prepared(tmp_path / "nothing")
    for clip in data.index.clips[:2]:
        content = bytearray((data.root / clip.file).read_bytes())
        content[-1] ^= 1
        (data.root / clip.file).write_bytes(content)
    told = check_prepared(data.root)
    assert len(told) == 2 and all("expected SHA-256" in problem and "run `dvc repro prepare`" in problem for problem in told)


def test_the_command_says_what_it_found_in_words_and_by_its_exit_code(gopro: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/raw").symlink_to(tmp_path / "raw")
    assert cli.main(["data", "check", "gopro"]) == EXIT_DONE
    assert "nothing is missing or damaged" in capsys.readouterr().out
    os.truncate(gopro / "sharp/GOPR0372_07_00/00000002.png", 50)
    assert cli.main(["data", "check", "gopro"]) == EXIT_BAD_INPUT
    shown = capsys.readouterr().out
    assert "00000002.png: expected an image" in shown and "1 problems: see above" in shown
