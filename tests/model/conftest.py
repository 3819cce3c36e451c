"""The published network's numbers, and small networks to try things on."""

import json
import lzma
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vrt.model.network import VRT

FIXTURES = Path(__file__).parents[1] / "fixtures"
DERIVED = ("relative_position_index", "position_bias", "spynet.mean", "spynet.std")
"""Buffers that the published numbers leave out, since they follow from the configuration."""


def load_numbers(name: str) -> Any:
    """The content of a file of published numbers; skips where only VRT_FIXTURES could have it and that is not set."""
    packed = FIXTURES / "network" / f"{name}.pt.xz"
    if packed.exists():
        return torch.load(BytesIO(lzma.decompress(packed.read_bytes())), weights_only=True)
    folder = os.environ.get("VRT_FIXTURES")
    if not folder:
        pytest.skip(f"VRT_FIXTURES is not set: the folder that holds {name}.pt")
    return torch.load(Path(folder) / f"{name}.pt", weights_only=True)


def digest(x: Tensor) -> dict[str, float]:
    """What the published numbers keep of a large tensor: sums that any change of a value or of the order changes."""
    flat = x.detach().double().flatten()
    probe = torch.sin(0.37 * torch.arange(flat.numel(), dtype=torch.float64) + 1)
    return {"sum": flat.sum().item(), "abs_sum": flat.abs().sum().item(), "l2": flat.norm().item(), "probe": (flat @ probe).item()}


def target(shape: torch.Size, far: bool) -> Tensor:
    """The target of the published losses: pseudo-random values in [0, 1], with `far` 3 above or below that."""
    i = torch.arange(math.prod(shape), dtype=torch.int64)
    t = (((i * i) % 65521 * 31 + i * 17 + 7) % 251).float() / 250.0
    if far:
        t = t + 3.0 * (2 * (((i * 40503 + (i * i) % 65521 * 7) >> 4) & 1) - 1).float()
    return t.reshape(shape)


def charbonnier(output: Tensor, far: bool) -> Tensor:
    return ((output - target(output.shape, far)) ** 2 + 1e-9).sqrt().mean()


@dataclass
class Run:
    """A forward and backward pass of a published case."""

    gradients: dict[str, Tensor]
    clip: Tensor
    output: Tensor
    stages: dict[str, Tensor]
    loss: Tensor


@dataclass
class PublishedCase:
    """One configuration of the published network, its weights and its numbers."""

    numbers: dict[str, Any]
    spynet: dict[str, Tensor] = field(repr=False)
    _runs: dict[torch.device, Run] = field(default_factory=dict, repr=False)

    def network(self, dtype: torch.dtype) -> VRT:
        """The network with the published weights, in evaluation mode."""
        network = VRT(**json.loads(self.numbers["cfg_json"]))
        assert list(network.state_dict()) == self.numbers["state_dict_keys"]
        weights = self.numbers["state_dict_fp16"] | {f"spynet.{key}": value for key, value in self.spynet.items()}
        keys = network.load_state_dict({key: value.float() for key, value in weights.items()}, strict=False)
        assert not keys.unexpected_keys
        assert all(key.endswith(DERIVED) for key in keys.missing_keys)
        return network.to(dtype).eval()

    def run64(self, device: torch.device) -> Run:
        """In float64, forward and backward; made once for each device and shared by the tests. All it holds is on the CPU."""
        if device not in self._runs:
            self._runs[device] = self._run64(device)
        return self._runs[device]

    def _run64(self, device: torch.device) -> Run:
        network = self.network(torch.float64).to(device)
        stages: dict[str, Tensor] = {}
        for name in self.numbers["stage64_digests"]:
            network.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: stages.update({name: out.detach().cpu()}))
        clip = self.numbers["input"].double().requires_grad_()
        output = network(clip.to(device)).cpu()
        loss = charbonnier(output, far=True)
        loss.backward()
        gradients = {name: parameter.grad.cpu() for name, parameter in network.named_parameters()}
        return Run(gradients, clip, output.detach(), stages, loss.detach())


@pytest.fixture(scope="session")
def published() -> Callable[[str], PublishedCase]:
    """Loads a published case by name, once per session."""
    cases: dict[str, PublishedCase] = {}

    def load(name: str) -> PublishedCase:
        if name not in cases:
            numbers = load_numbers(name)
            spynet = load_numbers(Path(numbers["spynet_file"]).stem) if numbers["spynet_file"] else {}
            cases[name] = PublishedCase(numbers, spynet)
        return cases[name]

    return load


@pytest.fixture(scope="session")
def numbers() -> Callable[[str], Any]:
    """Loads a file of published numbers by name."""
    return load_numbers


@pytest.fixture
def assert_digest() -> Callable[[Tensor, dict[str, Any]], None]:
    """Asserts that a tensor has a published shape and digest, to 1e-6 relative."""

    def check(x: Tensor, expected: dict[str, Any]) -> None:
        found = digest(x)
        assert list(x.shape) == list(expected.get("shape", x.shape))
        # Sums of both signs may cancel; they are compared at the scale of what was summed.
        scales = {"sum": "abs_sum", "abs_sum": "abs_sum", "l2": "l2", "probe": "l2"}
        for key, scale in scales.items():
            if key in expected:
                assert abs(found[key] - expected[key]) <= 1e-6 * expected[scale if scale in expected else key], key

    return check


@pytest.fixture
def charbonnier_loss() -> Callable[[Tensor, bool], Tensor]:
    """The published loss of an output: loss(output, far)."""
    return charbonnier


@pytest.fixture
def make_network() -> Callable[..., VRT]:
    """Makes small networks; every parameter is random, so that no path is multiplied by zero."""

    def make(**changes: Any) -> VRT:
        small = {
            "upscale": 1,
            "img_size": (3, 16, 16),
            "window_size": (2, 4, 4),
            "depths": (3, 2, 2, 2, 2, 2, 2, 1),
            "indep_reconsts": (),
            "embed_dims": (8,) * 8,
            "num_heads": (2,) * 8,
            "drop_path_rate": 0.0,
            "pa_frames": 2,
            "deformable_groups": 2,
        }
        torch.manual_seed(0)
        network = VRT(**(small | changes))
        for name, parameter in network.named_parameters():
            if "conv_offset.6" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        return network

    return make


@pytest.fixture(scope="session")
def layout() -> Callable[[str], dict[str, Any]]:
    """Loads what is known of a published task's state dict: layout("001")."""
    return lambda task: json.loads(lzma.decompress((FIXTURES / "layouts" / f"{task}.json.xz").read_bytes()))
