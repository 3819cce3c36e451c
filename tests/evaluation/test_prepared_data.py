"""`evaluate` on prepared clips as `vrt.data` stores and degrades them."""

import numpy as np
import pytest

from vrt.data.clips import PreparedData, writing
from vrt.evaluation.run import evaluate


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
