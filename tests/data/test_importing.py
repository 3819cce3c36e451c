"""Importing real encoded videos and folders of frames: what is imported can be prepared, what can't is refused and leaves nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vrt.data.clips import DataError, PreparedData
from vrt.data.dataset import Clips, Frames, Video, load_dataset
from vrt.data.importing import MINIMUM_FRAMES, import_dataset, split_frames
from vrt.data.layouts import source_clips
from vrt.data.prepare import prepare


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (H, W, 3): a smooth pattern that moves with the number; no two edges look alike."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y + 5 * number) % 128 + 64], axis=-1).astype(np.uint8)


def encode(path: Path, frames: list[np.ndarray], codec: str, pixels: str, quarter_turns: int = 0, **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = pixels
        if quarter_turns:
            stream.set_display_rotation(90 * quarter_turns)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def lossless(tmp_path: Path) -> Path:
    return encode(tmp_path / "holiday.mkv", [picture(k) for k in range(40)], "ffv1", "bgr0")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of frames named 1.png, 2.png, ... 10.png, ..., sorted wrongly by anyone who sorts text."""

    def make(count: int = 30, suffix: str = "png") -> Path:
        (tmp_path / "shots").mkdir()
        for number in range(count):
            Image.fromarray(picture(number)).save(tmp_path / "shots" / f"{number + 1}.{suffix}")
        return tmp_path / "shots"

    return make


def imported_frames(raw: Path, tmp_path: Path) -> np.ndarray:
    """All frames of an imported data set after `prepare`, in the order of the source."""
    data: PreparedData = prepare(raw, tmp_path / "prepared")
    return np.concatenate([data.read_whole(clip) for clip in sorted(data.index.clips, key=lambda clip: clip.name)])


def refused(source: Path, tmp_path: Path, message: str, name: str = "mine") -> None:
    """The import is refused with that message, and leaves nothing."""
    before = sorted((tmp_path / "raw").rglob("*"))
    with pytest.raises(DataError, match=message):
        import_dataset(source, name, tmp_path / "raw")
    assert sorted((tmp_path / "raw").rglob("*")) == before


def test_a_lossless_video_comes_through_exactly(lossless: Path, tmp_path: Path):
    raw = import_dataset(lossless, "mine", tmp_path / "raw")
    assert raw == tmp_path / "raw" / "mine"
    assert isinstance(load_dataset(raw), Video)
    np.testing.assert_array_equal(imported_frames(raw, tmp_path), np.stack([picture(k) for k in range(40)]))


def test_an_h264_video_comes_through_up_to_its_compression(tmp_path: Path):
    frames = [picture(k) for k in range(50)]
    raw = import_dataset(encode(tmp_path / "phone.mp4", frames, "libx264", "yuv444p", crf="4"), "mine", tmp_path / "raw")
    found = imported_frames(raw, tmp_path)
    assert found.shape == (50, 48, 64, 3)
    assert np.abs(found.astype(int) - np.stack(frames)).mean() < 3


@pytest.mark.parametrize("quarter_turns", [1, 2, -1])
def test_rotation_metadata_is_honoured(tmp_path: Path, quarter_turns: int):
    """A phone stores what its sensor sees and says how to turn it: degrees counterclockwise."""
    upright = [picture(k) for k in range(24)]
    stored = [np.rot90(frame, -quarter_turns).copy() for frame in upright]
    video = encode(tmp_path / "phone.mp4", stored, "libx264", "yuv444p", quarter_turns, crf="4")
    found = imported_frames(import_dataset(video, "mine", tmp_path / "raw"), tmp_path)
    assert found.shape == (24, 48, 64, 3)
    assert np.abs(found.astype(int) - np.stack(upright)).mean() < 3


def test_a_folder_of_png_comes_through_exactly_in_natural_order(folder, tmp_path: Path):
    source = folder()
    (source / "notes.txt").write_text("ignored")
    raw = import_dataset(source, "mine", tmp_path / "raw")
    assert isinstance(load_dataset(raw), Frames)
    assert not (raw / "frames" / "notes.txt").exists()
    np.testing.assert_array_equal(imported_frames(raw, tmp_path), np.stack([picture(k) for k in range(30)]))


def test_jpeg_frames_are_turned_as_their_exif_says(folder, tmp_path: Path):
    source = folder(suffix="jpg")
    for path in source.iterdir():
        with Image.open(path) as image:
            tags = image.getexif()
            tags[0x0112] = 6  # shown turned a quarter clockwise
            image.save(path, exif=tags)
    assert imported_frames(import_dataset(source, "mine", tmp_path / "raw"), tmp_path).shape == (30, 64, 48, 3)


def test_the_splits_are_contiguous_disjoint_and_complete(lossless: Path, tmp_path: Path):
    splits = load_dataset(import_dataset(lossless, "mine", tmp_path / "raw")).splits
    assert splits.ordered() == [("train", 0, 24), ("val", 24, 32), ("test", 32, 40)]


@pytest.mark.parametrize("count, train", [(24, 8), (80, 64), (1000, 800), (1005, 805)])
def test_about_80_percent_are_for_training(count: int, train: int):
    splits = split_frames(count, Path("video.mp4"))
    edges = [edge for [span] in splits.values() for edge in span]
    assert edges[0] == 0 and edges[-1] == count and edges[1:5:2] == edges[2:5:2] and edges[1] == train
    assert min(end - first for [(first, end)] in splits.values()) >= MINIMUM_FRAMES


def test_a_video_too_short_is_refused(tmp_path: Path):
    video = encode(tmp_path / "short.mkv", [picture(k) for k in range(23)], "ffv1", "bgr0")
    refused(video, tmp_path, r"short.mkv: expected at least 24 frames \(8 for each of train, val, test\), found 23; import a longer video")


def test_a_missing_source_is_refused(tmp_path: Path):
    refused(tmp_path / "no.mp4", tmp_path, r"no.mp4: expected a video or a folder of frames, found nothing; check the path")


def test_an_empty_folder_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, r"empty: expected frames \(.png, .jpg, .jpeg\), found none; export the video's frames as PNG")


@pytest.mark.parametrize("content", [b"this is no video\n" * 50, b""])
def test_a_text_named_like_a_video_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "fake.mp4").write_bytes(content)
    refused(tmp_path / "fake.mp4", tmp_path, r"fake.mp4: expected a video, found a file that can't be decoded \(.+\); get an undamaged copy")


def test_a_truncated_mp4_is_refused(tmp_path: Path):
    video = encode(tmp_path / "cut.mp4", [picture(k) for k in range(40)], "libx264", "yuv420p")
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    refused(video, tmp_path, r"cut.mp4: expected a video, found a file that can't be decoded")


def test_a_truncated_mkv_is_refused_though_it_decodes(lossless: Path, tmp_path: Path):
    lossless.write_bytes(lossless.read_bytes()[: lossless.stat().st_size * 3 // 4])
    refused(lossless, tmp_path, r"holiday.mkv: expected 1.6 s of video, found 1.[0-3] s; the file is cut off: get an undamaged copy")


def test_a_sound_file_is_refused(tmp_path: Path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux([*stream.encode(silence), *stream.encode()])
    refused(tmp_path / "song.mp4", tmp_path, r"song.mp4: expected a video, found a file without a picture stream")


def test_frames_of_mixed_size_are_refused(folder, tmp_path: Path):
    source = folder()
    Image.fromarray(picture(0, height=50)).save(source / "12.png")
    refused(source, tmp_path, r"12.png: expected frames of one size, 48x64 as in frame 0; found 50x64 in frame 11; cut or scale the source")


def test_a_video_of_changing_size_is_refused(tmp_path: Path):
    """Two MPEG transport streams one after the other are one again."""
    parts = [encode(tmp_path / f"{h}.ts", [picture(k, height=h) for k in range(20)], "libx264", "yuv420p") for h in (48, 64)]
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    refused(tmp_path / "joined.ts", tmp_path, r"joined.ts: expected frames of one size, 48x64 as in frame 0; found 64x64 in frame \d+")


def test_an_unreadable_frame_is_refused(folder, tmp_path: Path):
    source = folder()
    path = source / "7.png"
    path.write_bytes(path.read_bytes()[:100])
    refused(source, tmp_path, r"7.png: expected an image, found a file that can't be read \(.+\); replace it or take it out")


def test_grey_frames_of_16_bits_are_refused(folder, tmp_path: Path):
    source = folder()
    Image.fromarray(np.full((48, 64), 40000, np.uint16)).save(source / "1.png")
    refused(source, tmp_path, r"1.png: expected 8 bits per channel, found 16; convert the frames to 8-bit RGB")


def test_an_existing_name_is_refused_and_kept(lossless: Path, tmp_path: Path):
    import_dataset(lossless, "mine", tmp_path / "raw")
    refused(lossless, tmp_path, r"raw/mine: expected a new data set, found an existing one; choose another --name")


@pytest.mark.parametrize("name", ["", ".", "../mine", "a b", "-x", "a/b", "mine\n"])
def test_an_odd_name_is_refused(lossless: Path, tmp_path: Path, name: str):
    refused(lossless, tmp_path, r"name '.*': expected letters, digits, '.', '_' and '-', starting with a letter or digit; choose another", name)


def test_a_folder_that_a_killed_import_left_is_replaced(lossless: Path, tmp_path: Path):
    (tmp_path / "raw" / ".mine.new").mkdir(parents=True)
    (tmp_path / "raw" / ".mine.new" / "video.mkv").write_text("half")
    import_dataset(lossless, "mine", tmp_path / "raw")
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["mine"]


def clip_frames(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


@pytest.mark.parametrize("layout, pairs", [("gopro", True), ("vimeo", False)])
def test_the_clips_of_a_layout_come_through_exactly(layout: str, pairs: bool, published_copy, tmp_path: Path):
    source = published_copy(layout, 5, (12, 20))
    raw = import_dataset(source, "mine", tmp_path / "raw", layout)
    assert load_dataset(raw) == Clips(kind="clips", recorded=pairs)
    data = prepare(raw, tmp_path / "prepared")
    clips = source_clips(layout, source)
    assert {(clip.split, clip.name) for clip in data.index.clips} == {(clip.split, clip.name) for clip in clips}
    for clip, original in zip(sorted(data.index.clips, key=lambda clip: clip.name), sorted(clips, key=lambda clip: clip.name)):
        np.testing.assert_array_equal(data.read_whole(clip), clip_frames(original.sharp))
        assert (clip.recorded is not None) == pairs
        if pairs:
            np.testing.assert_array_equal(data.read_whole(clip, recorded=True), clip_frames(original.recorded))
    data.verify()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda clip: (clip / "blur/00000002.png").unlink(),
            r"sharp/00000002.png: expected a frame 00000002 in .*blur too, found none; add it there",
        ),
        (
            lambda clip: (clip / "sharp/00000002.png").unlink(),
            r"blur/00000002.png: expected a frame 00000002 in .*sharp too, found none; add it there",
        ),
        (lambda clip: (clip / "blur/00000002.png").write_bytes(b"no image"), r"00000002.png: expected an image, found a file that can't be read"),
        (
            lambda clip: shutil.copy(clip / "blur/00000002.png", clip / "blur/00000002.jpg"),
            r"blur: expected one frame of each name, found 3 sharp and 4 degraded ones; remove the copies",
        ),
        (lambda clip: shrink(clip / "blur"), r"blur: expected frames of the size of the sharp ones, 12x20; found 6x10; use pairs of one size"),
        (lambda clip: clip.rename(clip.with_name("a clip")), r"expected a clip name of letters, digits, .*, found 'a clip'; rename that folder"),
        (lambda clip: shutil.rmtree(clip / "blur"), r"blur: expected a folder of frames, found none"),
    ],
)
def test_a_damaged_copy_of_pairs_is_refused(spoil: Callable[[Path], object], message: str, published_copy, tmp_path: Path):
    source = published_copy("gopro", 3, (12, 20))
    spoil(source / "test/GOPR0384_11_00")
    with pytest.raises(DataError, match=message):
        import_dataset(source, "mine", tmp_path / "raw", "gopro")
    assert list((tmp_path / "raw").iterdir()) == []


def shrink(folder: Path) -> None:
    for path in folder.iterdir():
        Image.open(path).resize((10, 6)).save(path)
