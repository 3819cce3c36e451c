"""Stand-ins for the prepared data and the network: small, local and exactly known."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vrt.evaluation.run
from vrt.params import Bicubic, Params, load_params


@dataclass
class Data:
    """Stands in for PreparedData: {split: {clip: (degraded, truth)}}, each (D, C, H, W)."""

    splits: dict[str, dict[str, tuple[Tensor, Tensor]]]

    def clips(self, split: str) -> tuple[SimpleNamespace, ...]:
        return tuple(
            SimpleNamespace(split=split, name=name, frames=truth.shape[0], height=truth.shape[2], width=truth.shape[3])
            for name, (_, truth) in self.splits.get(split, {}).items()
        )


class Shift(nn.Module):
    """Adds a constant; knows how often it was called and in which mode."""

    def __init__(self, amount: float):
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(amount))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return x[:, :, :3] + self.amount


class Enlarge(nn.Module):
    """Repeats each pixel `scale` times, so that the output is exact whatever the tile."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :3].repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)


def texture(frames: int, height: int, width: int, seed: int) -> Tensor:
    """(D, 3, H, W) in [0, 1]: smooth random colours that change slowly."""
    noise = torch.rand(1, 3, 2 + frames // 4, 2 + height // 8, 2 + width // 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=(frames, height, width), mode="trilinear")[0].transpose(0, 1).contiguous()


@pytest.fixture
def params() -> Params:
    quickstart = load_params(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    # Windows no longer than the short clips of these tests, which are then restored as they are.
    return quickstart.model_copy(update={"network": quickstart.network.model_copy(update={"img_size": (2, 48, 48)})})


@pytest.fixture
def params_x4(params: Params) -> Params:
    return params.model_copy(update={"degradation": Bicubic(kind="bicubic", scale=4), "network": params.network.model_copy(update={"upscale": 4})})


class StandIn:
    """Of EvaluatedClip: whatever was given as a clip's degraded frames and truth."""

    def __init__(self, data: Data, params: Params, clip: SimpleNamespace):
        self.degraded, self.truth = data.splits[clip.split][clip.name]
        self.name, self.count, self.height, self.width = clip.name, clip.frames, clip.height, clip.width

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.degraded[start:stop], self.truth[start:stop]


@pytest.fixture
def make_data(monkeypatch):
    """Data from {split: {clip: (degraded, truth)}}, which `evaluate` reads through a stand-in of `EvaluatedClip`."""
    monkeypatch.setattr(vrt.evaluation.run, "EvaluatedClip", StandIn)
    return Data


@pytest.fixture
def noisy_data(make_data) -> Data:
    """Two validation clips whose input is 0.1 too bright everywhere (so PSNR is near 20 dB), and one test clip."""
    truths = {name: texture(5, 80, 100, seed) * 0.8 for seed, name in enumerate(("lake", "tree", "wall"))}
    pairs = {name: (truth + 0.1, truth) for name, truth in truths.items()}
    return make_data({"val": {name: pairs[name] for name in ("lake", "tree")}, "test": {"wall": pairs["wall"]}})


@pytest.fixture
def shift():
    return Shift


@pytest.fixture
def enlarge():
    return Enlarge


@pytest.fixture(name="texture")
def texture_fixture():
    return texture
