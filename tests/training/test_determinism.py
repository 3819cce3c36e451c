"""Bit-identical steps, and the name of what prevents them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vrt.data.sampler import Batch
from vrt.params import load_params
from vrt.training.determinism import determinism
from vrt.training.loop import take_step
from vrt.training.session import build_network, build_state

# By torch.use_deterministic_algorithms' own list, of what a network like this might use.
REFUSED = {
    *("reflection_pad2d_backward", "replication_pad2d_backward", "reflection_pad3d_backward", "replication_pad3d_backward"),
    *("upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_nearest2d_backward", "upsample_trilinear3d_backward"),
    *("grid_sampler_2d_backward", "adaptive_avg_pool2d_backward", "avg_pool3d_backward", "max_pool3d_with_indices_backward", "put_", "cumsum"),
}
PROJECT = Path(__file__).resolve().parents[2]


def test_an_operator_without_a_deterministic_form_is_named_with_the_way_out():
    with pytest.raises(ValueError) as error, determinism(True):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert str(error.value) == (
        "train.deterministic: PyTorch has no deterministic put_ for this device; "
        "set train.deterministic to false (steps then vary in their last bits), or train on a CPU"
    )
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_pass_and_nothing_is_refused_unless_wanted():
    with pytest.raises(RuntimeError, match="shape"), determinism(True):
        torch.zeros(3) @ torch.zeros(4, 4).reshape(2, 9)
    with determinism(False):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


@pytest.fixture
def weights_after_two_steps() -> Callable[[torch.device], dict[str, torch.Tensor]]:
    """Trains the real network, small, everything unfrozen."""
    params = load_params(PROJECT / "recipes" / "quickstart.yaml")
    small = params.network.model_copy(update={"depths": (2,) + (1,) * 7, "embed_dims": (8,) * 8, "num_heads": (2,) * 8, "indep_reconsts": (7,)})
    unfrozen = params.optimizer.model_copy(update={"flow_frozen_steps": 0})
    params = params.model_copy(update={"network": small, "optimizer": unfrozen})
    truth = torch.rand(1, 3, 3, 24, 24, generator=torch.Generator().manual_seed(1))

    def train(device: torch.device) -> dict[str, torch.Tensor]:
        state = build_state(params, device)
        for step in (1, 2):
            take_step(params, state, step, Batch(truth + 0.1 * step, truth))
        return state.network.state_dict()

    return train


def test_the_real_network_trains_to_the_same_bits_with_and_without_it(weights_after_two_steps):
    weights = []
    for wanted in (True, False, True):
        with determinism(wanted):
            weights.append(weights_after_two_steps(torch.device("cpu")))
    assert all(torch.equal(weights[0][key], other[key]) for other in weights[1:] for key in weights[0])


class Called(TorchDispatchMode):
    """The operators that were called, by name."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.add(function._schema.name.removeprefix("aten::"))
        return function(*arguments, **(named or {}))


def test_training_on_frames_in_between_calls_nothing_that_pytorch_refuses_on_a_gpu():
    network = build_network(
        load_params(PROJECT / "recipes" / "009_videofi_Vimeo_4frames.yaml").network.model_copy(
            update={"depths": (1,) * 8, "embed_dims": (8,) * 8, "num_heads": (2,) * 8, "indep_reconsts": (7,)}
        )
    )
    with Called() as called:
        network(torch.rand(1, network.frames, 3, 16, 16)).sum().backward()
    assert {"convolution", "convolution_backward"} <= called.names
    assert not called.names & REFUSED


def test_on_a_gpu_the_real_network_trains_to_the_same_bits(gpu, weights_after_two_steps):
    with determinism(True):
        weights = [weights_after_two_steps(gpu) for _ in range(3)]
    assert all(torch.equal(weights[0][key], other[key]) for other in weights[1:] for key in weights[0])
