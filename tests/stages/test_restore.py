"""`vrt restore` on real videos and pictures of every kind: right, or refused before any work is lost. All with tiny untrained networks."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.footage import moving, write_video
from vrt.checkpoint.errors import CheckpointError
from vrt.data.clips import DataError
from vrt.data.decoding import image_frames, image_paths, video_frames
from vrt.evaluation.between import Interpolating, group
from vrt.lifecycle import EXIT_CONTINUE_ME
from vrt.model.network import VRT
from vrt.params import load_params
from vrt.stages import restore as restoring
from vrt.stages.footage import PictureTarget, VideoTarget
from vrt.stages.restore import alone_in, run_restore
from vrt.training.session import build_network

PARAMS = Path("params.yaml")
BETWEEN = {
    "degradation": {"kind": "between"},
    **{"network__pa_frames": 0, "network__deformable_groups": 0, "optimizer__flow_names": [], "evaluate__overlap": [0, 8, 8]},
}


def write_weights(project) -> None:
    torch.manual_seed(3)
    torch.save(build_network(load_params(project.root / "params.yaml").network).state_dict(), project.root / "net.pth")


@pytest.fixture(scope="module")
def project(make_project):
    made = make_project("restore")
    write_weights(made)
    return made


@pytest.fixture(scope="module")
def interpolating(make_project):
    made = make_project("interpolate", **BETWEEN)
    write_weights(made)
    return made


@pytest.fixture
def here(project, monkeypatch):
    """This process stands in a project with the weights net.pth; returns it."""
    monkeypatch.chdir(project.root)
    return project


def restore(source: Path, target: Path, **options) -> int:
    return run_restore(source, target, "net.pth", PARAMS, **options)


def waves(count: int, height: int, width: int, length: int = 9) -> np.ndarray:
    """Colours so smooth that a codec with half the resolution of colour keeps them, the better the longer the waves."""
    time, y, x, channel = np.meshgrid(*(np.arange(size) for size in (count, height, width, 3)), indexing="ij")
    return (127 + 100 * np.sin((x + y + time) / length + channel)).astype(np.uint8)


def decoded(path: Path, deep: bool = False) -> np.ndarray:
    return np.stack(list(video_frames(path, deep, exact=True)))


def first_frame(path: Path) -> av.VideoFrame:
    with av.open(str(path)) as container:
        return next(container.decode(video=0))


def shown_at(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        return [float(frame.time) for frame in container.decode(video=0)]


def test_a_video_comes_back_restored_with_its_times_and_its_sound(here, tmp_path):
    frames = waves(9, 21, 34)
    # A camera that dropped frames: the times are as uneven afterwards.
    write_video(tmp_path / "in.mp4", frames, sound=1, times=[0, 1, 2, 5, 6, 7, 9, 10, 14])
    for name in ("out.mp4", "out.mkv"):
        assert restore(tmp_path / "in.mp4", tmp_path / name) == 0
    exact, close = (decoded(tmp_path / name) for name in ("out.mkv", "out.mp4"))
    assert exact.shape == frames.shape
    assert np.abs(exact.astype(int) - close).mean() < 3, "what is lossy is near what is lossless"
    for name in ("out.mp4", "out.mkv"):
        assert np.allclose(shown_at(tmp_path / "in.mp4"), shown_at(tmp_path / name), atol=2e-3)
        with av.open(str(tmp_path / "in.mp4")) as before, av.open(str(tmp_path / name)) as after:
            sounds = [[bytes(packet) for packet in container.demux(audio=0) if packet.size] for container in (before, after)]
        assert sounds[0] and sounds[0] == sounds[1], "the sound is copied, not encoded again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mkv", "out.mp4"]


@pytest.mark.parametrize(
    "pixels, look",
    [
        ("yuv444p", (1, 1, 1, 1)),
        ("yuv444p", (6, 1, 6, 6)),
        ("yuv444p", (1, 2, 1, 1)),
        ("yuv444p", None),
        ("yuv420p10le", (9, 1, 9, 16)),
    ],
    ids=["BT.709", "BT.601", "BT.709 of full range", "untagged", "BT.2020 PQ of 10 bits"],
)
def test_colours_are_those_of_the_source(here, tmp_path, pixels: str, look, monkeypatch):
    """With a network that changes nothing, whatever matrix and range the source has, and however many bits."""
    monkeypatch.setattr(VRT, "forward", lambda self, clip: clip[:, :, :3])
    deep = "10" in pixels
    frames = waves(3, 96, 128, length=40)
    frames = frames.astype(np.uint16) * 257 if deep else frames
    write_video(tmp_path / "in.mp4", frames, pixels=pixels, look=look)
    for name in ("out.mp4", "out.mkv"):
        assert restore(tmp_path / "in.mp4", tmp_path / name) == 0
        before, after = decoded(tmp_path / "in.mp4", deep).astype(int), decoded(tmp_path / name, deep).astype(int)
        level = 257 if deep else 1
        assert np.abs(before - after).mean() < 1.5 * level * (name == "out.mp4") + 1e-9, "lossless is exact, H.264 near"
        assert abs((before - after).mean(axis=(0, 1, 2))).max() < level, "no shift of any colour"
    one, other = first_frame(tmp_path / "in.mp4"), first_frame(tmp_path / "out.mp4")
    assert (one.colorspace, one.color_range, one.color_primaries, one.color_trc) == (
        *(other.colorspace, other.color_range, other.color_primaries, other.color_trc),
    )
    assert other.format.components[0].bits == (10 if deep else 8)


def test_a_turned_video_comes_back_upright(here, tmp_path):
    write_video(tmp_path / "in.mp4", moving(3), turned=90)
    assert decoded(tmp_path / "in.mp4").shape == (3, 32, 24, 3)
    assert restore(tmp_path / "in.mp4", tmp_path / "out.mkv") == 0
    assert first_frame(tmp_path / "out.mkv").rotation == 0
    assert decoded(tmp_path / "out.mkv").shape == (3, 32, 24, 3)


def test_a_folder_of_pictures_gives_one_of_the_same_names_grey_or_of_sixteen_bits(here, tmp_path):
    (tmp_path / "in").mkdir()
    first, second, third = moving(3)
    Image.fromarray(first).save(tmp_path / "in" / "frame0.png")
    Image.fromarray(second).convert("L").save(tmp_path / "in" / "frame1.png")
    Image.fromarray(third).convert("RGBA").save(tmp_path / "in" / "unfinished-2.png")
    assert restore(tmp_path / "in", tmp_path / "out") == 0
    names = ["frame0.png", "frame1.png", "unfinished-2.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    with pytest.raises(DataError, match="expected a new file or folder, found an existing one"):
        restore(tmp_path / "in", tmp_path / "out")

    # One of them in 16 bits: all come back so.
    (tmp_path / "out").rename(tmp_path / "in16")
    deep = np.random.default_rng(2).integers(0, 65536, (24, 32, 3)).astype(np.uint16)
    PictureTarget(["frame1"]).keep(tmp_path / "in16", 0, deep[None])
    found = list(image_frames(image_paths(tmp_path / "in16"), deep=True))
    assert np.array_equal(found[1], deep) and np.array_equal(found[0] % 257, np.zeros_like(deep))
    assert restore(tmp_path / "in16", tmp_path / "out16") == 0
    out = list(image_frames(image_paths(tmp_path / "out16"), deep=True))
    assert [frame.dtype for frame in out] == [np.uint16] * 3 and any((frame % 257).any() for frame in out)


def test_interrupted_it_goes_on_where_it_stopped_and_gives_the_same_preview_included(here, tmp_path, monkeypatch):
    write_video(tmp_path / "in.mkv", moving(14), codec="ffv1")
    assert restore(tmp_path / "in.mkv", tmp_path / "whole.mkv", preview=True) == 0
    looks, real, made = iter([False, False, True]), restoring.restore_into, []

    def interrupted(outputs, source, chosen, level, stop):
        return real(outputs, source, chosen, level, lambda: next(looks))

    monkeypatch.setattr(restoring, "restore_into", interrupted)
    assert restore(tmp_path / "in.mkv", tmp_path / "out.mkv", preview=True) == EXIT_CONTINUE_ME
    assert not (tmp_path / "out.mkv").exists() and not (tmp_path / "out-preview.mkv").exists()
    # With other tiles the rest would not go with it.
    plan = (tmp_path / ".restoring-out.mkv/plan.json").read_text()
    assert json.loads(plan)["tile"] and json.loads(plan)["overlap"]
    monkeypatch.setattr(restoring, "restore_into", real)
    assert len(list((tmp_path / ".restoring-out.mkv/restored").glob("*.mkv"))) == 3
    keep = VideoTarget.keep
    monkeypatch.setattr(VideoTarget, "keep", lambda self, work, first, frames: (made.append(first), keep(self, work, first, frames)))
    assert restore(tmp_path / "in.mkv", tmp_path / "out.mkv", preview=True) == 0
    assert min(made) >= 3, "what was done is not done again"
    for name in ("out.mkv", "out-preview.mkv"):
        assert np.array_equal(decoded(tmp_path / name.replace("out", "whole")), decoded(tmp_path / name))
    both = decoded(tmp_path / "out-preview.mkv")
    assert both.shape == (14, 24, 64, 3)
    assert np.array_equal(both[:, :, :32], moving(14)) and np.array_equal(both[:, :, 32:], decoded(tmp_path / "out.mkv"))


@pytest.mark.long
def test_killed_it_goes_on_and_gives_the_same(here, tmp_path):
    write_video(tmp_path / "in.mkv", moving(60), codec="ffv1")
    command = [sys.executable, "-m", "vrt", "restore", str(tmp_path / "in.mkv"), "--checkpoint", "net.pth", "-o"]
    options = {"cwd": here.root, "env": here.environment}
    for number, how in enumerate((signal.SIGKILL, signal.SIGTERM)):
        running = subprocess.Popen([*command, str(tmp_path / "out.mkv")], **options)
        while len(list((tmp_path / ".restoring-out.mkv/restored").glob("[0-9]*"))) < 2 + 5 * number:
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(how)
        assert running.wait() == (-signal.SIGKILL if how == signal.SIGKILL else EXIT_CONTINUE_ME)
    assert subprocess.run([*command, str(tmp_path / "out.mkv")], check=False, **options).returncode == 0
    assert restore(tmp_path / "in.mkv", tmp_path / "whole.mkv") == 0
    assert np.array_equal(decoded(tmp_path / "whole.mkv"), decoded(tmp_path / "out.mkv"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mkv", "out.mkv", "whole.mkv"]


def test_of_a_clip_shorter_than_windows_that_are_longer_than_a_tile_each_tile_gets_its_frames(here, tmp_path, monkeypatch):
    frames, seen = moving(4, 24, 32), []
    write_video(tmp_path / "in.mkv", frames, codec="ffv1")
    real = VRT.forward
    monkeypatch.setattr(VRT, "forward", lambda self, clip: seen.append(clip) or real(self, clip))
    here.edit(network__img_size=[16, 48, 48], evaluate__tile=[12, 40, 40])
    try:
        write_weights(here)
        assert restore(tmp_path / "in.mkv", tmp_path / "out.mkv", preview=True) == 0
    finally:
        here.edit(network__img_size=[6, 48, 48], evaluate__tile=[3, 40, 40])
        write_weights(here)
    assert len(decoded(tmp_path / "out.mkv")) == len(decoded(tmp_path / "out-preview.mkv")) == 4
    # There and back again, with each end twice.
    whole = torch.from_numpy(np.concatenate([frames, frames[::-1]] * 2)).permute(0, 3, 1, 2).float() / 255
    assert [clip.shape[1] for clip in seen] == [12, 12]
    assert torch.equal(seen[0][0], whole[:12]) and torch.equal(seen[1][0], whole[4:])


def test_what_another_process_restores_into_is_left_to_it_and_a_note_cut_off_is_no_note(here, tmp_path, caplog):
    write_video(tmp_path / "in.mkv", moving(2), codec="ffv1")
    work = tmp_path / ".restoring-out.mkv"
    with alone_in(work), pytest.raises(DataError) as error:
        restore(tmp_path / "in.mkv", tmp_path / "out.mkv")
    assert str(error.value) == f"{work}: another process is restoring into it; wait for that, or choose another name for the output"
    assert not work.exists()
    (work / "restored").mkdir(parents=True)
    (work / "plan.json").write_text("")
    assert restore(tmp_path / "in.mkv", tmp_path / "out.mkv") == 0
    assert not work.exists()


def test_too_little_memory_for_a_tile_means_smaller_tiles(here, tmp_path, monkeypatch, caplog):
    (tmp_path / "in").mkdir()
    for number, pixels in enumerate(moving(3, 40, 80)):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    here.edit(evaluate__tile=[3, 32, 32])
    assert restore(tmp_path / "in", tmp_path / "expected") == 0
    here.edit(evaluate__tile=[3, 64, 64])
    real = VRT.forward

    def with_little_memory(self, clip):
        if clip.shape[-1] > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, clip)

    monkeypatch.setattr(VRT, "forward", with_little_memory)
    restoring.log.propagate = True
    try:
        assert restore(tmp_path / "in", tmp_path / "out") == 0
    finally:
        here.edit(evaluate__tile=[3, 40, 40])
        restoring.log.propagate = False
    assert "going on with tiles of 32 x 32 pixels" in caplog.text
    pairs = [[np.stack(list(image_frames(image_paths(tmp_path / name))))] for name in ("expected", "out")]
    assert np.array_equal(*(frames for (frames,) in pairs))


def test_a_network_for_frames_in_between_doubles_their_number(interpolating, tmp_path, monkeypatch):
    monkeypatch.chdir(interpolating.root)
    given = moving(7)
    write_video(tmp_path / "in.mkv", given, codec="ffv1", times=[0, 1, 2, 5, 6, 7, 9])
    assert restore(tmp_path / "in.mkv", tmp_path / "out.mkv", preview=True) == 0
    out, chosen = decoded(tmp_path / "out.mkv"), restoring.choose("net.pth", PARAMS)
    assert np.array_equal(out[::2], given), "given frames stay as they are"
    # Two given frames around each: no neighbour is missing at the ends.
    clip = torch.from_numpy(given).permute(0, 3, 1, 2)[None].float() / 255
    with torch.no_grad():
        made = Interpolating(chosen.network.eval(), 2)(group(clip, 2))[0]
    expected = (made.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert out.shape[0] == 13 and np.abs(out[1::2] - expected).max() <= 1
    assert np.allclose(shown_at(tmp_path / "out.mkv"), [0, 0.05, 0.1, 0.15, 0.2, 0.35, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9], atol=2e-3)
    shown = decoded(tmp_path / "out-preview.mkv")
    means = (given[:-1].astype(float) + given[1:]) / 2
    assert np.array_equal(shown[::2, :, :32], given) and np.abs(shown[1::2, :, :32] - means).max() <= 1

    (tmp_path / "in").mkdir()
    for number, pixels in enumerate(given):
        Image.fromarray(pixels).save(tmp_path / "in" / f"im{number}.png")
    assert restore(tmp_path / "in", tmp_path / "out") == 0
    assert [path.name for path in image_paths(tmp_path / "out")] == [f"{number:08}.png" for number in range(13)]
    assert np.array_equal(np.stack(list(image_frames(image_paths(tmp_path / "out")))), out)
    (tmp_path / "one").mkdir()
    Image.fromarray(given[0]).save(tmp_path / "one/a.png")
    with pytest.raises(DataError, match="one: expected at least 2 frames to make others in between, found 1"):
        restore(tmp_path / "one", tmp_path / "ones")


def test_neighbours_that_are_missing_at_the_ends_are_the_frames_at_the_ends(make_project, tmp_path, monkeypatch):
    four = make_project("four", **BETWEEN, network__img_size=[4, 16, 16], train__frames=4)
    write_weights(four)
    monkeypatch.chdir(four.root)
    given = moving(5)
    write_video(tmp_path / "in.mkv", given, codec="ffv1")
    assert restore(tmp_path / "in.mkv", tmp_path / "out.mkv") == 0
    network = restoring.choose("net.pth", PARAMS).network.eval()
    clip = torch.from_numpy(given[[0, 0, 1, 2, 3, 4, 4]]).permute(0, 3, 1, 2)[None].float() / 255
    with torch.no_grad():
        made = Interpolating(network, 4)(group(clip, 4))[0]
    expected = (made.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(decoded(tmp_path / "out.mkv")[1::2] - expected).max() <= 1


def test_what_can_not_be_restored_is_refused_before_any_work(here, tmp_path):
    write_video(tmp_path / "in.mkv", moving(40), codec="ffv1")
    content = (tmp_path / "in.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        heard = container.add_stream("aac", rate=8000)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 8000
        container.mux([*heard.encode(tone), *heard.encode()])
    write_video(tmp_path / "see-through.mkv", np.zeros((2, 16, 16, 3), np.uint8), codec="ffv1")
    with av.open(str(tmp_path / "see-through.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "bgra"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16, 4), 128, np.uint8), format="rgba")))
        container.mux(stream.encode())
    for folder, mode in (("clear", "RGBA"), ("twice", "RGB"), ("sizes", "RGB"), ("nothing", None)):
        (tmp_path / folder).mkdir()
        if mode:
            Image.fromarray(moving(1)[0]).convert(mode).save(tmp_path / folder / "0.png")
    see_through = Image.fromarray(np.full((24, 32, 4), 128, np.uint8))
    see_through.save(tmp_path / "clear" / "1.png")
    Image.fromarray(moving(1)[0]).save(tmp_path / "twice" / "0.jpg")
    Image.fromarray(moving(1, 40, 40)[0]).save(tmp_path / "sizes" / "1.png")
    before = sorted(path.name for path in tmp_path.iterdir())
    for source, target, sigma, message in (
        ("cut.mkv", "out.mp4", None, r"cut.mkv: expected 4.0 s of video, found [\d.]+ s; the file is cut off"),
        ("text.mp4", "out.mp4", None, "found a file that can't be decoded"),
        ("empty.mp4", "out.mp4", None, "empty.mp4: expected a video, found a file that can't be decoded"),
        ("sound.mp4", "out.mp4", None, "sound.mp4: expected a video, found a file without a picture stream"),
        ("see-through.mkv", "out.mp4", None, "expected opaque pixels, found transparent ones in frame 0; put it onto a background first"),
        ("missing.mp4", "out.mp4", None, "expected a video, found no such file"),
        ("clear", "out", None, "1.png: expected opaque pixels, found transparent ones in the picture"),
        ("twice", "out", None, "expected one picture of each name, found two called 0"),
        ("sizes", "out", None, "expected frames of one size, 24x32 as in frame 0; found 40x40 in frame 1"),
        ("nothing", "out", None, r"nothing: expected frames \(.png, .jpg, .jpeg\), found none"),
        ("in.mkv", "out.avi", None, "out.avi: expected a name that ends in .mkv, .mp4, .mov"),
    ):
        with pytest.raises(DataError, match=message):
            restore(tmp_path / source, tmp_path / target, sigma=sigma)
    with pytest.raises(CheckpointError, match="it finds out about the noise by itself; leave --sigma out"):
        restore(tmp_path / "in.mkv", tmp_path / "out.mp4", sigma=20.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


PEAK = """
import sys
from pathlib import Path
from vrt.model.network import VRT
from vrt.stages import restore
# Memory is what counts here, not pictures.
VRT.forward = lambda self, clip: clip[:, :, :3]
assert restore.run_restore(Path(sys.argv[1]), Path(sys.argv[2]), "net.pth", Path("params.yaml"), preview=True) == 0
# Not getrusage, whose peak a child inherits from its parent.
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.long
def test_a_clip_ten_times_as_long_needs_no_more_memory(here, tmp_path):
    peaks = {}
    # Without it glibc keeps what was freed, more or less of it from run to run.
    gives_back = here.environment | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for frames in (6, 60):
        # The longer one alone is 41 MB, four times that as floats.
        write_video(tmp_path / f"{frames}.mp4", waves(1, 360, 640).repeat(frames, 0), pixels="yuv420p")
        command = [sys.executable, "-c", PEAK, str(tmp_path / f"{frames}.mp4"), str(tmp_path / f"{frames}-out.mp4")]
        ended = subprocess.run(command, cwd=here.root, env=gives_back, stdout=subprocess.PIPE, check=True)
        peaks[frames] = int(ended.stdout.splitlines()[-1])
    assert peaks[60] < peaks[6] + 20, peaks
