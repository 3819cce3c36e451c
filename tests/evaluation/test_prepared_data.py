"""`evaluate` on prepared clips as `vrt.data` stores and degrades them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from vrt.data.clips import PreparedData
from vrt.data.writing import writing
from vrt.evaluation.metrics import PERFECT_DB, quality
from vrt.evaluation.report import verdict
from vrt.evaluation.run import evaluate
from vrt.params import Degradation, Evaluate, Params


@pytest.fixture
def prepared(tmp_path, texture) -> PreparedData:
    """A test clip whose sides are no multiples of 4."""
    pixels = (texture(4, 66, 81, seed=9) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    with writing(tmp_path / "prepared", "sample") as writer:
        writer.add("test", "lake", 4, [np.ascontiguousarray(frame) for frame in pixels])
    return PreparedData.open(tmp_path / "prepared")


def test_noise_is_measured_as_noise(prepared, params, shift):
    evaluation = evaluate(shift(0.0), prepared, params, "test")
    assert evaluation.means.input.psnr == pytest.approx(20 * np.log10(255 / 30), abs=0.5)
    assert evaluation.means.restored == evaluation.means.input
    assert evaluation.input_label == "noisy input"


def test_a_noise_map_reaches_the_network_and_no_picture(prepared, params, shift):
    blind = evaluate(shift(0.0), prepared, params, "test")
    informed = params.model_copy(update={"network": params.network.model_copy(update={"nonblind_denoising": True})})
    assert evaluate(shift(0.0), prepared, informed, "test").metrics() == blind.metrics()


def test_sides_that_do_not_divide_by_the_scale_are_cut(prepared, params_x4, enlarge):
    evaluation = evaluate(enlarge(4), prepared, params_x4, "test")
    assert evaluation.preview_frames.truth.shape == evaluation.preview_frames.restored.shape == (3, 64, 80)
    assert evaluation.means.input.psnr > evaluation.means.restored.psnr > 20


def kind(params: Params, degradation: dict, frames: int, upscale: int = 1) -> Params:
    """The params with another degradation, and a network for clips of so many frames."""
    network = params.network.model_copy(update={"img_size": (frames, 48, 48), "upscale": upscale})
    return params.model_copy(update={"degradation": TypeAdapter(Degradation).validate_python(degradation), "network": network})


def test_a_short_clip_is_continued_backwards_and_measured_as_it_is(prepared, params, shift):
    class Counts(nn.Module):
        """Returns its input; knows the red of the first pixel of every frame it got."""

        def forward(self, clip):
            self.seen = clip[0, :, 0, 0, 0].tolist()
            return clip[:, :, :3]

    counts, clean = Counts(), kind(params, {"kind": "noise", "sigma_min": 0, "sigma_max": 0, "sigma_test": 0}, frames=6)
    evaluation = evaluate(counts, prepared, clean, "test")
    assert len(counts.seen) == 6 and counts.seen[4:] == [counts.seen[3], counts.seen[2]]
    assert evaluation.rows[0].frames == 4
    assert evaluation.means.restored.psnr == PERFECT_DB


def test_blur_down_is_measured_against_the_whole_truth(prepared, params, enlarge):
    evaluation = evaluate(enlarge(4), prepared, kind(params, {"kind": "blur_down", "scale": 4, "sigma": 1.6}, 4, upscale=4), "test")
    assert evaluation.input_label == "enlarged input"
    assert evaluation.preview_frames.truth.shape == (3, 64, 80)
    assert evaluation.means.input.psnr > 20


def test_a_recording_is_the_input(tmp_path, params, shift, texture):
    pixels = (texture(3, 40, 48, seed=3) * 200).byte().permute(0, 2, 3, 1).contiguous().numpy()
    with writing(tmp_path / "pairs", "sample") as writer:
        writer.add("test", "lake", 3, pixels, pixels + 20)
    evaluation = evaluate(shift(-20 / 255), PreparedData.open(tmp_path / "pairs"), kind(params, {"kind": "recorded"}, 2), "test")
    assert evaluation.means.input.psnr == pytest.approx(20 * np.log10(255 / 20), abs=1e-6)
    assert evaluation.means.restored.psnr == PERFECT_DB
    assert verdict(evaluation).startswith("restored clips gain 97.89 dB PSNR over the recorded input (22.11 -> ")


class MiddleOfFour(nn.Module):
    """Makes the frame between the second and the third of four as their mean; knows the sizes it got."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, clip):
        self.sizes.append(tuple(clip.shape))
        return clip[:, 1:3].mean(1, keepdim=True)


@pytest.mark.parametrize("tile, tiles", [((1, 96, 96), 5), ((3, 96, 96), 2), ((2, 40, 40), 3 * 2 * 2)])
def test_every_frame_in_between_is_made_from_its_own_neighbours(tmp_path, params, texture, tile, tiles):
    pixels = (texture(15, 50, 66, seed=4) * 255).round().byte()
    with writing(tmp_path / "video", "sample") as writer:
        writer.add("test", "lake", 15, pixels.permute(0, 2, 3, 1).contiguous().numpy())
    between = kind(params, {"kind": "between"}, 4).model_copy(update={"evaluate": Evaluate(tile=tile, overlap=(0, 8, 8), measured="all")})
    network = MiddleOfFour()
    evaluation = evaluate(network, PreparedData.open(tmp_path / "video"), between, "test")
    assert len(network.sizes) == tiles and {size[1:3] for size in network.sizes} == {(4, 3)}
    # Frames 0, 2, ... 14 are given: 8, so 5 groups of 4, whose middles are 3, 5, ... 11.
    means = torch.stack([(pixels[k - 1].float() + pixels[k + 1]) / 510 for k in (3, 5, 7, 9, 11)])
    truth = pixels[3:12:2] / 255
    assert evaluation.rows[0].frames == 5
    assert evaluation.means.restored.psnr == pytest.approx(quality(means, truth).psnr, abs=0.02)
    # Means of two levels often lie right between two, and either is as good.
    assert evaluation.means.input.psnr == pytest.approx(quality(means, truth).psnr, abs=0.02)
    assert evaluation.input_label == "mean of the two neighbours"


PEAK = """
import sys
from pathlib import Path
import torch
from vrt.data.clips import PreparedData
from vrt.evaluation.run import evaluate
from vrt.params import load_params
torch.set_num_threads(1)
class Nothing(torch.nn.Module):
    def forward(self, clip):
        return clip[:, :, :3]
evaluate(Nothing(), PreparedData.open(Path(sys.argv[1])), load_params(Path(sys.argv[2])), "test")
# Not getrusage, whose peak a child inherits from its parent.
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


# Without it glibc keeps what was freed, in holes that grow with time, and more or less of it from run to run.
GIVES_BACK = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}


@pytest.mark.long
def test_a_clip_ten_times_as_long_is_evaluated_in_no_more_memory(tmp_path):
    peaks = {}
    for frames in (6, 60):
        with writing(tmp_path / str(frames), "sample") as writer:
            # As floats, the longer one alone is 37 MB, and there are three of them.
            writer.add("test", "long", frames, (np.full((160, 320, 3), number, np.uint8) for number in range(frames)))
        recipe = Path(__file__).parents[2] / "recipes/quickstart.yaml"
        command = [sys.executable, "-c", PEAK, str(tmp_path / str(frames)), str(recipe)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=recipe.parents[1], env=GIVES_BACK)
        peaks[frames] = int(ended.stdout.splitlines()[-1])
    assert peaks[60] < peaks[6] + 28, peaks
