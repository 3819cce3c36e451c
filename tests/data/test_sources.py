"""Data sets in the forms that their users have: LMDBs, video files, lists of clips, test sets."""

from pathlib import Path

import av
import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from vrt.data.clips import SPLITS, DataError, PreparedData
from vrt.data.importing import import_dataset
from vrt.data.layouts import _clips_below, source_clips
from vrt.data.meta_info import read_meta_info
from vrt.data.prepare import prepare
from vrt.data.sources import _meta_info
from vrt.evaluation.run import evaluate
from vrt.params import load_params


def pictures(count: int, seed: int, height: int = 24, width: int = 32) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8))


def write_folder(folder: Path, frames: list[np.ndarray], name: str = "{:08}.png") -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(number))


def write_lmdb(path: Path, clips: dict[str, list[np.ndarray]], scratch: Path) -> None:
    """As BasicSR's and KAIR's scripts do."""
    lines = []
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for clip, frames in clips.items():
            write_folder(scratch / path.name / clip, frames)
            for image in sorted((scratch / path.name / clip).iterdir()):
                transaction.put(f"{clip}/{image.stem}".encode(), image.read_bytes())
                lines.append(f"{clip}/{image.name} (24,32,3) 1\n")
    (path / "meta_info.txt").write_text("".join(lines))


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 24, 32, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def prepared(copy: Path, layout: str, tmp_path: Path, meta_info: Path | None = None) -> PreparedData:
    raw = import_dataset(copy, "mine", tmp_path / "raw", layout, meta_info)
    return prepare(raw, tmp_path / "prepared")


def names(data: PreparedData) -> dict[str, list[str]]:
    return {split: [clip.name for clip in data.clips(split)] for split in SPLITS if data.clips(split)}


def test_clips_from_lmdbs_are_those_that_were_packed(tmp_path: Path):
    clips = {split: {f"{split}-{k}": pictures(3, 10 * n + k) for k in range(2)} for n, split in enumerate(SPLITS)}
    for split, of_split in clips.items():
        write_lmdb(tmp_path / "copy" / f"{split}.lmdb", of_split, tmp_path / "scratch")
    data = prepared(tmp_path / "copy", "clips", tmp_path)
    for split, of_split in clips.items():
        for clip in data.clips(split):
            np.testing.assert_array_equal(data.read_whole(clip), np.stack(of_split[clip.name]))
    stored = next((tmp_path / "raw/mine/sharp/test-0").iterdir())
    assert stored.read_bytes() == (tmp_path / "scratch/test.lmdb/test-0" / stored.name).read_bytes(), "bytes as they were stored"


def test_reds_and_vimeo_as_kair_packs_them(tmp_path: Path):
    numbers = [*("000", "011", "015", "020"), *("240", "241", "246", "257"), "100"]
    for kind in ("sharp", "blur"):
        write_lmdb(tmp_path / "reds" / f"train_{kind}_with_val.lmdb", {name: pictures(2, 5) for name in numbers}, tmp_path / kind)
    found = {clip.name: (clip.split, str(clip.recorded).split("/")[-1]) for clip in source_clips("reds-blur", tmp_path / "reds")}
    assert found["100"] == ("train", "train_blur_with_val.lmdb, clip 100") and found["011"][0] == "test" and found["246"][0] == "val"
    write_lmdb(tmp_path / "vimeo/vimeo90k_train_GT_all.lmdb", {"00001/0001": pictures(7, 1), "00001/0002": pictures(7, 2)}, tmp_path / "scratch")
    write_folder(tmp_path / "vimeo/sequences/00009/0001", pictures(7, 3))
    (tmp_path / "vimeo/sep_trainlist.txt").write_text("00001/0001\n00001/0002\n")
    (tmp_path / "vimeo/sep_testlist.txt").write_text("00009/0001\n")
    assert names(prepared(tmp_path / "vimeo", "vimeo", tmp_path)) == {"train": ["00001_0001"], "val": ["00001_0002"], "test": ["00009_0001"]}


def test_reds_blur_lacking_a_partner_is_named_with_it(tmp_path: Path):
    for kind, numbers in (("sharp", ["000", "001"]), ("blur", ["000"])):
        write_lmdb(tmp_path / f"train_{kind}_with_val.lmdb", {name: pictures(2, 5) for name in numbers}, tmp_path / kind)
    with pytest.raises(DataError, match=r"train_blur_with_val.lmdb: expected the clips .* \(those of train_sharp_with_val.lmdb\), found none of 001"):
        source_clips("reds-blur", tmp_path)


def test_two_that_would_be_one_clip_are_named(tmp_path: Path):
    for name in ("a.mp4", "a.mov", "b.mp4"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).touch()
    with pytest.raises(DataError, match=r"set: a.mov and a.mp4 are both the clip a; expected each once: rename or remove one"):
        _clips_below(tmp_path / "set")


def test_gopro_as_kair_packs_it_has_pairs(tmp_path: Path):
    for kind, seed in (("GT", 1), ("GT_blurred", 2)):
        write_lmdb(tmp_path / "copy" / f"train_{kind}.lmdb", {"a": pictures(2, seed), "b": pictures(2, seed + 5)}, tmp_path / "scratch")
        write_folder(tmp_path / "copy" / f"test_{kind}" / "c", pictures(2, seed))
    data = prepared(tmp_path / "copy", "gopro", tmp_path)
    assert names(data) == {"train": ["a"], "val": ["b"], "test": ["c"]}
    np.testing.assert_array_equal(data.read_whole(data.clips("train")[0], recorded=True), np.stack(pictures(2, 2)))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: (path / "data.mdb").write_bytes(b"\0" * 9000), r"train.lmdb, clip a: .*train.lmdb: expected an LMDB, found a damaged one \("),
        (lambda path: (path / "meta_info.txt").write_text("a/1.png\n"), r"meta_info.txt, line 1: expected CLIP/NAME.png .*, found 'a/1.png'; make"),
        (lambda path: (path / "meta_info.txt").unlink(), r"train.lmdb: expected an LMDB with data.mdb and meta_info.txt, found another folder; make"),
        (
            lambda path: (path / "meta_info.txt").write_text("a/9.png (24,32,3) 1\n"),
            r"expected the image a/9 that meta_info.txt lists, found none",
        ),
    ],
)
def test_a_damaged_lmdb_is_named_and_nothing_is_left(spoil, message: str, tmp_path: Path):
    for split in SPLITS:
        write_lmdb(tmp_path / "copy" / f"{split}.lmdb", {split[0]: pictures(2, 1)} if split != "train" else {"a": pictures(2, 1)}, tmp_path / "s")
    _meta_info.cache_clear()
    spoil(tmp_path / "copy/train.lmdb")
    with pytest.raises(DataError, match=message):
        import_dataset(tmp_path / "copy", "mine", tmp_path / "raw", "clips")
    assert not (tmp_path / "raw/mine").exists()


def test_clips_and_pairs_may_be_video_files(tmp_path: Path):
    for number, split in enumerate(SPLITS):
        write_video(tmp_path / "copy" / split / f"shot{number}.mkv", pictures(4, number))
        for kind, seed in (("sharp", number), ("degraded", number + 10)):
            write_video(tmp_path / "pairs" / split / f"shot{number}" / f"{kind}.mkv", pictures(4, seed))
    data = prepared(tmp_path / "copy", "clips", tmp_path)
    assert names(data) == {"train": ["shot0"], "val": ["shot1"], "test": ["shot2"]}
    np.testing.assert_array_equal(data.read_whole(data.clips("val")[0]), np.stack(pictures(4, 1)))
    pairs = prepare(import_dataset(tmp_path / "pairs", "pairs", tmp_path / "raw", "clips"), tmp_path / "prepared-pairs")
    np.testing.assert_array_equal(pairs.read_whole(pairs.clips("test")[0], recorded=True), np.stack(pictures(4, 12)))


def test_a_list_of_kair_says_what_is_trained_on(tmp_path: Path):
    for part, clips in {"train": ("a", "b", "c", "d"), "val": ("v",), "test": ("t",)}.items():
        for clip in clips:
            write_folder(tmp_path / "copy" / part / clip, pictures(3, 1))
    listed = tmp_path / "meta_info_mine.txt"
    listed.write_text("a 3 (24,32,3)\nc 3 (24,32,3) 0\nt 3 (24,32,3)\n\n")
    assert names(prepared(tmp_path / "copy", "clips", tmp_path, listed)) == {"train": ["a", "c"], "val": ["v"], "test": ["t"]}
    assert read_meta_info(listed)["c"] == (3, 24, 32)
    for text, message in (
        (
            "a 4 (24,32,3)\n",
            r"train/a: expected 4 frames of 24x32 as the meta-info list says, found 3 frames of 24x32; complete",
        ),
        ("a 3 (24,32,3)\nz 3 (24,32,3)\n", r"mine.txt: expected 2 clips, found no z in your copy; complete it, or correct the list"),
        ("a 3\n", r"mine.txt, line 1: expected CLIP FRAMES \(HEIGHT,WIDTH,CHANNELS\), found 'a 3'; correct or remove that line"),
        ("t 3 (24,32,3)\n", r"mine.txt: expected at least one clip to train on, found validation and test clips only; list some others"),
    ):
        listed.write_text(text)
        with pytest.raises(DataError, match=message):
            import_dataset(tmp_path / "copy", "other", tmp_path / "raw", "clips", listed)


@pytest.mark.parametrize(
    "layout, folders, recorded",
    [
        ("reds4", [f"GT/{name}" for name in ("000", "011", "015", "020")], None),
        ("vid4", [f"GT/{name}" for name in ("calendar", "city", "foliage", "walk")], None),
        ("udm10", ["GT/archpeople", "GT/caffe"], None),
        ("dvd10", ["test_GT/IMG_0003"], "test_GT_blurred/IMG_0003"),
        ("gopro11", ["test_GT/GOPR0384_11_00"], "test_GT_blurred/GOPR0384_11_00"),
        ("set8", ["tractor", "snowboard"], None),
    ],
)
def test_test_sets_have_test_clips_alone(layout: str, folders: list[str], recorded: str | None, tmp_path: Path):
    for number, folder in enumerate([*folders, *([recorded] if recorded else [])]):
        write_folder(tmp_path / "copy" / folder, pictures(2, number))
    data = prepared(tmp_path / "copy", layout, tmp_path)
    assert names(data) == {"test": sorted(Path(folder).name for folder in folders)}
    assert (data.clips("test")[0].recorded is not None) == (recorded is not None)


def test_an_incomplete_test_set_is_refused(tmp_path: Path):
    write_folder(tmp_path / "copy/GT/city", pictures(2, 1))
    with pytest.raises(DataError, match=r"copy: expected the clips calendar, city, foliage, walk .*, found none of calendar, foliage, walk"):
        source_clips("vid4", tmp_path / "copy")


def test_a_quintuplet_is_measured_by_its_middle_alone(tmp_path: Path):
    f0, f1, t, f2, f3 = pictures(5, 1)
    write_folder(tmp_path / "copy/0001", [f0])
    (tmp_path / "copy/0001/00000000.png").rename(tmp_path / "copy/0001/frame0.png")
    for name, frame in (("1", f1), ("t", t), ("2", f2), ("3", f3)):
        Image.fromarray(frame).save(tmp_path / f"copy/0001/frame{name}.png")
    data = prepared(tmp_path / "copy", "quintuplets", tmp_path)
    params = load_params(Path(__file__).parents[2] / "recipes/009_videofi_Vimeo_4frames.yaml")

    class Told(torch.nn.Module):
        """Knows the truth; checks what it is given."""

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            seen = (given[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            np.testing.assert_array_equal(seen, np.stack([f0, f1, f2, f3]))
            return torch.from_numpy(t).permute(2, 0, 1)[None, None].float() / 255

    row = evaluate(Told(), data, params, "test").rows[0]
    assert (row.frames, row.scores.restored.psnr) == (1, 120.0)
    (tmp_path / "copy/0001/framet.png").unlink()
    with pytest.raises(DataError, match=r"0001: expected the images frame0, frame1, framet, frame2 and frame3, found no framet; complete your copy"):
        import_dataset(tmp_path / "copy", "other", tmp_path / "raw", "quintuplets")
