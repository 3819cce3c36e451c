"""Registered checkpoints at work: restoring, evaluating elsewhere, and choosing a champion; all with one small training."""

import json
import shutil

import av
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from vrt.checkpoint.curator import Curator, lineage_named
from vrt.checkpoint.errors import CheckpointError
from vrt.data.clips import DataError
from vrt.data.decoding import video_frames
from vrt.lifecycle import EXIT_BAD_INPUT, EXIT_CONTINUE_ME, EXIT_NOT_BETTER
from vrt.stages import restore as restoring
from vrt.stages.promote import judge
from vrt.stages.restore import run_restore
from vrt.stages.selector import choose

PARAMS = restoring.Path("params.yaml")


@pytest.fixture(scope="module")
def trained(make_workspace):
    workspace = make_workspace("used")
    workspace.edit(train__total_steps=8)
    ended = workspace.run("vrt", "train")
    assert ended.returncode == 0, ended.stdout
    return workspace


@pytest.fixture
def here(trained, services, monkeypatch, tmp_path):
    """This process stands in the workspace; returns it."""
    monkeypatch.chdir(trained.root)
    return trained


@pytest.fixture
def lineage(trained) -> str:
    return next(path.name for path in (trained.root / "checkpoints").iterdir() if path.is_dir() and path.name.startswith(trained.name))


def write_video(path, frames: np.ndarray, sound: bool = False, codec: str = "libx264", rate: int = 10) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if codec == "libx264" else "bgr0"
        heard = container.add_stream("aac", rate=8000) if sound else None
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
        if heard:
            tone = av.AudioFrame.from_ndarray(np.sin(np.arange(8000)[None] / 5).astype(np.float32), format="fltp", layout="mono")
            tone.sample_rate = 8000
            for packet in [*heard.encode(tone), *heard.encode()]:
                container.mux(packet)


def moving(count: int, height: int = 24, width: int = 32) -> np.ndarray:
    texture = np.random.default_rng(1).integers(0, 256, (height // 4, width // 4 + count, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    return np.stack([texture[:height, number : number + width] for number in range(count)])


def waves(count: int, height: int, width: int) -> np.ndarray:
    """Colours so smooth that a codec with half the resolution of colour keeps them."""
    time, y, x, channel = np.meshgrid(*(np.arange(size) for size in (count, height, width, 3)), indexing="ij")
    return (127 + 100 * np.sin((x + y + time) / 9 + channel)).astype(np.uint8)


def test_every_way_to_name_a_checkpoint_leads_to_the_same_weights(here, lineage, tmp_path):
    latest = choose("latest", PARAMS)
    assert latest.name == f"{lineage}@8"
    run = MlflowClient().search_model_versions(f"name = 'vrt-{here.name}'")[0].run_id
    for selector in (f"{lineage}@8", f"{run}@8", f"checkpoints/{lineage}/8_E.pth"):
        assert choose(selector, PARAMS).sha256 == latest.sha256
    assert choose("best", PARAMS).name.startswith(f"{lineage}@")
    # Its network is its own, whatever the params file says now; and it is fetched where it is not here.
    here.edit(network__num_heads=[1] * 8)
    local = (here.root / "checkpoints" / lineage).rename(tmp_path / "elsewhere")
    try:
        elsewhere = choose(f"{lineage}@8", PARAMS)
        assert elsewhere.sha256 == latest.sha256 and elsewhere.params.network.num_heads == (2,) * 8
        assert (here.root / "checkpoints/fetched" / lineage / "8_E.pth").exists()
    finally:
        here.edit(network__num_heads=[2] * 8)
        local.rename(here.root / "checkpoints" / lineage)


@pytest.mark.parametrize(
    "selector, message",
    [
        ("champion", "no version has the alias champion; make one with `vrt promote`, or name a checkpoint as LINEAGE@STEP"),
        ("LINEAGE@7", "there is no step 7; found: 8, 4, 1"),
        ("no-such-0123456789@7", "there is no lineage no-such-0123456789 with checkpoints"),
        ("00000000000000000000000000000000@7", "MLflow has no training of that id"),
        ("newest", "checkpoint 'newest': expected latest, best, champion, LINEAGE@STEP, RUN@STEP, or a file of weights"),
        ("nothing.pth", "nothing.pth: no such file; expected network weights"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_named_with_what_there_is(here, lineage, selector, message):
    with pytest.raises(CheckpointError) as error:
        choose(selector.replace("LINEAGE", lineage), PARAMS)
    assert message in str(error.value)


def test_a_video_comes_back_restored_with_its_times_and_its_sound(here, tmp_path):
    frames = waves(12, 21, 34)
    write_video(tmp_path / "in.mp4", frames, sound=True)
    assert here.run("vrt", "restore", str(tmp_path / "in.mp4"), "-o", str(tmp_path / "out.mp4")).returncode == 0
    assert run_restore(tmp_path / "in.mp4", tmp_path / "out.mkv", "latest", PARAMS) == 0
    exact, close = (np.stack(list(video_frames(tmp_path / name))) for name in ("out.mkv", "out.mp4"))
    assert exact.shape == frames.shape
    assert np.abs(exact.astype(int) - close).mean() < 3, "what is lossy is near what is lossless"
    with av.open(str(tmp_path / "in.mp4")) as before, av.open(str(tmp_path / "out.mp4")) as after:
        times = [[float(frame.time) for frame in container.decode(video=0)] for container in (before, after)]
        assert np.allclose(*times, atol=1e-3)
        before.seek(0), after.seek(0)
        sounds = [[bytes(packet) for packet in container.demux(audio=0) if packet.size] for container in (before, after)]
        assert sounds[0] and sounds[0] == sounds[1], "the sound is copied, not encoded again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mkv", "out.mp4"]


def test_interrupted_it_goes_on_where_it_stopped_and_gives_the_same(here, tmp_path, monkeypatch):
    write_video(tmp_path / "in.mkv", moving(14), codec="ffv1")
    assert run_restore(tmp_path / "in.mkv", tmp_path / "whole.mkv", "latest", PARAMS) == 0
    looks = iter([False, False, True])
    real, restored = restoring.restore_into, []

    def interrupted(work, clip, chosen, level, stop):
        return real(work, clip, chosen, level, lambda: next(looks))

    monkeypatch.setattr(restoring, "restore_into", interrupted)
    assert run_restore(tmp_path / "in.mkv", tmp_path / "out.mkv", "latest", PARAMS) == EXIT_CONTINUE_ME
    assert not (tmp_path / "out.mkv").exists()
    monkeypatch.setattr(restoring, "restore_into", real)
    kept = len(list((tmp_path / ".restoring-out.mkv").glob("*.mkv")))
    assert kept == 3
    real_keep = restoring.Video.keep
    monkeypatch.setattr(restoring.Video, "keep", lambda self, work, first, frames: (restored.append(first), real_keep(self, work, first, frames)))
    assert run_restore(tmp_path / "in.mkv", tmp_path / "out.mkv", "latest", PARAMS) == 0
    assert min(restored) >= 3, "what was done is not done again"
    one, other = (np.stack(list(video_frames(tmp_path / name))) for name in ("whole.mkv", "out.mkv"))
    assert np.array_equal(one, other)


def test_a_folder_of_pictures_gives_one_of_the_same_names(here, tmp_path):
    (tmp_path / "in").mkdir()
    for number, pixels in enumerate(moving(3)):
        Image.fromarray(pixels).save(tmp_path / "in" / f"frame{number}.png")
    assert run_restore(tmp_path / "in", tmp_path / "out", "latest", PARAMS) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["frame0.png", "frame1.png", "frame2.png"]
    with pytest.raises(DataError, match="expected a new file or folder, found an existing one"):
        run_restore(tmp_path / "in", tmp_path / "out", "latest", PARAMS)


def test_too_little_memory_for_a_tile_means_smaller_tiles(here, tmp_path, monkeypatch, caplog):
    (tmp_path / "in").mkdir()
    for number, pixels in enumerate(moving(3, 40, 80)):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    here.edit(evaluate__tile=[3, 64, 64])
    real = restoring.AnySize.forward

    def with_little_memory(self, clip):
        if clip.shape[-1] > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, clip)

    monkeypatch.setattr(restoring.AnySize, "forward", with_little_memory)
    restoring.log.propagate = True
    try:
        assert run_restore(tmp_path / "in", tmp_path / "out", "latest", PARAMS) == 0
    finally:
        here.edit(evaluate__tile=[3, 40, 40])
        restoring.log.propagate = False
    assert "going on with tiles of 32 x 32 pixels" in caplog.text
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_what_can_not_be_restored_is_refused_before_any_work(here, tmp_path):
    write_video(tmp_path / "in.mkv", moving(40), codec="ffv1")
    content = (tmp_path / "in.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    for source, target, sigma, message in (
        ("cut.mkv", "out.mp4", None, "expected"),
        ("text.mp4", "out.mp4", None, "found a file that can't be decoded"),
        ("missing.mp4", "out.mp4", None, "expected a video, found no such file"),
        ("in.mkv", "out.avi", None, "out.avi: expected a name that ends in .mkv, .mp4, .mov"),
        ("in.mkv", "out.mp4", 20.0, "it finds out about the noise by itself; leave --sigma out"),
    ):
        with pytest.raises(ValueError, match=message):
            run_restore(tmp_path / source, tmp_path / target, "latest", PARAMS, sigma)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.mkv", "in.mkv", "text.mp4"]


def test_any_checkpoint_is_measured_on_any_test_set_and_the_better_one_is_the_champion(here, lineage, monkeypatch):
    shutil.copytree("data/raw/tiny", "data/raw/other", dirs_exist_ok=True)
    measured = here.run("vrt", "evaluate", "--checkpoint", f"{lineage}@4", "--dataset", "other")
    assert measured.returncode == 0, measured.stdout
    report = json.loads((here.root / f"reports/evaluation-of-{lineage}@4-on-other/metrics.json").read_text())
    registry = Curator(lineage_named(lineage))
    assert registry.attach()
    assert float(registry.tags_of(4)["test_other_psnr"]) == pytest.approx(report["psnr"], rel=1e-5)

    assert here.run("vrt", "promote", "--checkpoint", f"{lineage}@1", "--dry-run").returncode == 0
    assert registry.led_to("champion") is None
    first = here.run("vrt", "promote", "--checkpoint", f"{lineage}@1")
    assert first.returncode == 0 and "promoted: there was no champion" in first.stdout, first.stdout
    assert registry.led_to("champion") == (lineage, 1)
    # It outlives what the policy would keep.
    assert registry.registered()[1].champion
    better = here.run("vrt", "promote", "--checkpoint", "best", "--json")
    assert better.returncode == 0, better.stdout
    assert registry.led_to("champion") == registry.led_to("best") != (lineage, 1)
    worse = here.run("vrt", "promote", "--checkpoint", f"{lineage}@1")
    assert worse.returncode == EXIT_NOT_BETTER and "not promoted: its gain is -" in worse.stdout, worse.stdout
    back = here.run("vrt", "promote", "--checkpoint", f"{lineage}@1", "--least-gain", "-100")
    assert back.returncode == 0 and registry.led_to("champion") == (lineage, 1)
    file = here.run("vrt", "promote", "--checkpoint", f"checkpoints/{lineage}/8_G.pth")
    assert file.returncode == EXIT_BAD_INPUT and "only a registered checkpoint can become the champion" in file.stdout


@pytest.mark.parametrize(
    "measured, champion, to_beat, least_gain, promoted",
    [
        (30.0, None, None, 0.0, True),
        (30.0, "a@1", 29.0, 0.0, True),
        (30.0, "a@1", 30.0, 0.0, False),
        (30.0, "a@1", 29.95, 0.1, False),
        (30.0, "a@1", 29.9, 0.1, True),
        (30.0, "a@1", 31.0, -2.0, True),
        (30.0, "b@2", 30.0, -2.0, False),
    ],
)
def test_the_gate(measured, champion, to_beat, least_gain, promoted):
    assert judge("b@2", measured, champion, to_beat, "psnr", least_gain).promote is promoted
