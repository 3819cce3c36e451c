"""The network as a whole: the published keys, numbers and gradients; what it takes and refuses."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vrt.model.network import VRT
from vrt.model.precision import computing

TASKS = ["001", "002", "003", "004", "005", "006", "007", "008", "009"]
LONG = ["sr_pa2_shift3d", "sr_pa4_d7", "sr_pa6_d9", "deblur_pa2_win8", "deblur_pa2_b2"]
CASES = ["sr_pa2", "denoise_nonblind", "vfi_pa0", *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]


@pytest.fixture(scope="module", params=TASKS)
def published_layout(request: pytest.FixtureRequest, layout: Callable[[str], dict[str, Any]]) -> tuple[dict[str, Any], VRT]:
    """A published task's layout, and the network built from its arguments."""
    task = layout(request.param)
    return task, VRT(**task["constructor_args"])


def test_state_dict_is_the_published_one(published_layout: tuple[dict[str, Any], VRT]) -> None:
    task, network = published_layout
    found = [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in network.state_dict().items()]
    assert found == [row[:3] for row in task["state_dict"]]


def test_buffers_are_the_published_bits_and_all_else_is_trained(published_layout: tuple[dict[str, Any], VRT]) -> None:
    task, network = published_layout
    expected = {key: sha for key, _, _, sha in task["state_dict"] if sha}
    found = {key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in network.named_buffers()}
    assert found == expected
    assert [key for key, _ in network.named_parameters()] == [key for key, _, _, sha in task["state_dict"] if not sha]


def test_parameter_count_is_the_published_one(published_layout: tuple[dict[str, Any], VRT]) -> None:
    task, network = published_layout
    assert sum(p.numel() for p in network.parameters()) == task["total_parameters"]


def test_blocks_have_the_published_windows_shifts_and_drop_rates(published_layout: tuple[dict[str, Any], VRT]) -> None:
    task, network = published_layout
    found = {name: [list(b.window), list(b.shift), b.mutual] for name, b in network.named_modules() if name in task["blocks"]}
    assert found == task["blocks"]
    assert {name: network.get_submodule(name).drop_path for name in task["drop_path"]} == pytest.approx(task["drop_path"], abs=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_float32_output_is_within_ten_times_the_published_rounding(case: str, device: torch.device, published: Callable) -> None:
    numbers, network = published(case).numbers, published(case).network(torch.float32).to(device)
    with torch.inference_mode(), computing("fp32"):
        output = network(numbers["input"].to(device)).cpu()
    assert list(output.shape) == numbers["output_shape"]
    difference = (output[:, numbers["output_frames"]] - numbers["output"]).abs().max().item()
    assert difference <= 10 * numbers["output64_max_abs_diff"]


@pytest.mark.parametrize("case", CASES)
def test_float64_stages_agree_with_the_published_ones(case: str, device: torch.device, published: Callable, assert_digest: Callable) -> None:
    numbers, run = published(case).numbers, published(case).run64(device)
    for name, expected in numbers["stage64_digests"].items():
        assert_digest(as_published(name, run.stages[name], run.clip.shape[0]), expected)


@pytest.mark.parametrize("case", CASES)
def test_float64_output_and_losses_agree_with_the_published_ones(
    case: str, device: torch.device, published: Callable, assert_digest: Callable, charbonnier_loss: Callable
) -> None:
    numbers, run = published(case).numbers, published(case).run64(device)
    for frame, expected in enumerate(numbers["output64_digest_per_frame"]):
        assert_digest(run.output[:, frame], expected)
    assert run.loss.item() == pytest.approx(numbers["loss64"], rel=1e-6)
    assert charbonnier_loss(run.output, far=False).item() == pytest.approx(numbers["loss64_near"], rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_float64_gradients_agree_with_the_published_ones(case: str, device: torch.device, published: Callable, assert_digest: Callable) -> None:
    numbers, run = published(case).numbers, published(case).run64(device)
    gradients = run.gradients
    assert list(gradients) == list(numbers["grad64_l2"])
    for name, gradient in gradients.items():
        assert_digest(gradient, {"l2": numbers["grad64_l2"][name], "probe": numbers["grad64_probe"][name]})
    for name, expected in numbers["grad64_full"].items():
        assert (gradients[name] - expected).norm() <= 1e-6 * expected.norm(), name
    assert_digest(run.clip.grad, numbers["input_grad64_digest"])


@pytest.mark.long
@pytest.mark.parametrize("case", ["sr_pa2", "vfi_pa0", "deblur_pa2_b2"])
def test_adam_follows_the_published_losses(case: str, published: Callable, charbonnier_loss: Callable) -> None:
    numbers, network = published(case).numbers, published(case).network(torch.float64)
    flow = [p for name, p in network.named_parameters() if "spynet" in name or "deform" in name]
    rest = [p for name, p in network.named_parameters() if not ("spynet" in name or "deform" in name)]
    adam = torch.optim.Adam([{"params": rest, "lr": 4e-4}, *([{"params": flow, "lr": 5e-5}] if flow else [])], betas=(0.9, 0.99))
    losses = []
    for _ in numbers["train_losses64"]:
        adam.zero_grad()
        loss = charbonnier_loss(network(numbers["input"].double()), far=False)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses == pytest.approx(numbers["train_losses64"], rel=1e-6)


def test_stochastic_depth_is_a_function_of_the_seed_and_off_in_evaluation(make_network: Callable[..., VRT]) -> None:
    network = make_network(drop_path_rate=0.5).train()
    clip = torch.rand(1, 2, 3, 16, 16)

    def output(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return network(clip)

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))
    network.eval()
    assert torch.equal(output(1), output(2))


def test_building_is_a_function_of_the_seed(make_network: Callable[..., VRT]) -> None:
    first, second = make_network().state_dict(), make_network().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_training_starts_from_small_weights_and_the_plain_flow() -> None:
    torch.manual_seed(0)
    network = VRT(upscale=1, depths=[1] * 8, embed_dims=[48] * 8, num_heads=[2] * 8, indep_reconsts=[], deformable_groups=4)
    state = network.state_dict()
    assert state["stage1.residual_group2.blocks.0.mlp.fc11.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state["stage1.residual_group2.blocks.0.attn.relative_position_bias_table"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state["stage1.linear1.bias"].eq(0).all() and state["norm.weight"].eq(1).all() and state["norm.bias"].eq(0).all()
    assert state["stage1.pa_deform.conv_offset.6.weight"].eq(0).all() and state["stage1.pa_deform.conv_offset.6.bias"].eq(0).all()
    assert state["stage1.pa_deform.conv_offset.4.weight"].std() > 0 and state["stage1.pa_deform.weight"].std() > 0


@pytest.mark.parametrize("pa_frames", [2, 4, 6])
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("upscale", [1, 4])
def test_clips_shorter_than_the_reach_and_smaller_than_a_window_are_restored(
    pa_frames: int, frames: int, upscale: int, make_network: Callable[..., VRT]
) -> None:
    network = make_network(pa_frames=pa_frames, upscale=upscale, deformable_groups=pa_frames, embed_dims=(12,) * 8).train()
    output = network(torch.rand(1, frames, 3, 8, 24))
    assert output.shape == (1, frames, 3, 8 * upscale, 24 * upscale)
    output.sum().backward()
    assert output.isfinite().all() and all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("level", [0, 3, 5])
@pytest.mark.parametrize("pa_frames", [2, 4])
def test_flows_that_are_no_numbers_make_an_output_that_is_none(level: int, pa_frames: int, make_network: Callable[..., VRT]) -> None:
    network = make_network(pa_frames=pa_frames, deformable_groups=4).train()
    with torch.no_grad():
        network.spynet.basic_module[level].basic_module[8].bias.fill_(float("nan"))
    clip = torch.rand(1, 4, 3, 16, 16)
    with torch.no_grad():
        assert network(clip).isnan().all()
    # A training takes this step too, and learns of it by its loss.
    output = network(clip)
    assert output.isnan().all()
    output.mean().backward()


def test_frozen_flow_carries_no_graph(make_network: Callable[..., VRT]) -> None:
    network = make_network()
    network.spynet.requires_grad_(False)
    assert not any(flow.requires_grad for flow in network.flows(torch.rand(1, 3, 3, 16, 16)))


def test_training_goes_on_after_a_validation_in_inference_mode(make_network: Callable[..., VRT]) -> None:
    # An image size no other test uses, so that what is cached for it is made in inference mode.
    network, clip = make_network(depths=(4,) * 8), torch.rand(1, 3, 3, 24, 40)
    with torch.inference_mode():
        network.eval()(clip)
    network.train()(clip).sum().backward()


COMPILED = [
    {},
    pytest.param({"pa_frames": 0}, marks=pytest.mark.long),
    pytest.param({"pa_frames": 4, "upscale": 4, "deformable_groups": 4}, marks=pytest.mark.long),
    pytest.param({"depths": (3,) + (2,) * 7, "drop_path_rate": 0.5, "use_checkpoint": True}, marks=pytest.mark.long),
]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("changes", COMPILED, ids=str)
def test_the_compiler_takes_the_network_in_one_piece(changes: dict[str, Any], make_network: Callable[..., VRT]) -> None:
    torch._dynamo.reset()
    network, clip = make_network(**{"depths": (2,) + (1,) * 7} | changes).train(), torch.rand(1, 3, 3, 16, 24)
    # Whole graphs or an error. The backend "eager" would draw anew what activation checkpointing computes again.
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    expected = network(clip)
    torch.manual_seed(1)
    found = compiled(clip)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    sources = list(network.parameters())
    for a, b in zip(*(torch.autograd.grad(out.square().mean(), sources, allow_unused=True) for out in (found, expected))):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)


def test_bfloat16_autocast_stays_close_and_trains(make_network: Callable[..., VRT], monkeypatch: pytest.MonkeyPatch) -> None:
    network, clip = make_network(), torch.rand(1, 3, 3, 16, 16)
    sampled: list[torch.dtype] = []
    network.spynet.register_forward_hook(lambda module, args, flows: sampled.extend(flow.dtype for flow in flows))
    grid_sample = torch.nn.functional.grid_sample
    monkeypatch.setattr(torch.nn.functional, "grid_sample", lambda x, grid, **options: sampled.append(grid.dtype) or grid_sample(x, grid, **options))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(clip)
    # Half precision would move flows and sampling points by whole pixels.
    assert set(sampled) == {torch.float32}
    output.float().mean().backward()
    assert (output - network(clip)).abs().max() < 0.02


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16, 16), "clip: expected 5 dimensions (B, D, C, H, W), found 4, (2, 3, 16, 16); add the missing with unsqueeze"),
        ((1, 2, 4, 16, 16), "clip: expected 3 channels (RGB), found 4 in (1, 2, 4, 16, 16); order it as (B, D, C, H, W)"),
        ((1, 0, 3, 16, 16), "clip: expected at least 1 frame, found 0; cut the video into such clips"),
        (
            (1, 2, 3, 20, 7),
            "clip: expected height and width as multiples of 8, 8 x 8 or more, found 20 x 7; pad it to 24 x 8 and crop the result",
        ),
    ],
)
def test_unusable_clips_are_refused_with_a_remedy(shape: tuple[int, ...], message: str, make_network: Callable[..., VRT]) -> None:
    with pytest.raises(ValueError) as error:
        make_network()(torch.rand(shape))
    assert str(error.value) == message


def test_a_clip_without_noise_level_8_bit_frames_or_another_length_is_refused(make_network: Callable[..., VRT]) -> None:
    with pytest.raises(ValueError, match=r"expected 4 channels \(RGB and the noise level\), found 3"):
        make_network(nonblind_denoising=True)(torch.rand(1, 2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"expected floating point in \[0, 1\], found torch.uint8; divide 8-bit frames by 255"):
        make_network()(torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected 3 frames, as the network was built for, found 2"):
        make_network(pa_frames=0)(torch.rand(1, 2, 3, 16, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pa_frames": 3}, "pa_frames: expected 0, 2, 4 or 6, found 3"),
        ({"upscale": 2}, "upscale: expected 1 or 4"),
        ({"depths": (1,) * 7}, "depths: expected 7 entries for the body and at least 1 more, found 7"),
        ({"num_heads": (2,) * 7}, "num_heads: expected 8 entries, one per entry of depths, found 7"),
        ({"num_heads": (3,) * 8}, r"embed_dims\[0\]: expected a multiple of num_heads\[0\] = 3, found 8"),
        ({"embed_dims": (6,) * 8}, r"embed_dims\[0\]: expected a multiple of 4"),
        ({"embed_dims": (8,) * 8, "pa_frames": 6, "deformable_groups": 6}, r"embed_dims\[0\]: expected a multiple of 3 \(pa_frames / 2\), found 8"),
        ({"deformable_groups": 3}, "deformable_groups: expected a multiple of 1 .* divides .* = 8, found 3"),
        ({"indep_reconsts": (8,)}, r"indep_reconsts: expected entries from 7 to 7, found \[8\]"),
        ({"deformable_groups": 0}, "deformable_groups: expected a multiple of 1 .* divides .* = 8, found 0"),
        ({"deformable_groups": -2}, "deformable_groups: expected a multiple of 1 .* divides .* = 8, found -2"),
        ({"num_heads": (2, 0) + (2,) * 6}, r"num_heads\[1\]: expected 1 or more, found 0"),
        ({"embed_dims": (8,) * 7 + (0,)}, r"embed_dims\[7\]: expected 1 or more, found 0"),
        ({"embed_dims": (8, 8, 16) + (8,) * 5}, r"embed_dims\[4\]: expected 16, as embed_dims\[2\], whose features are added to it, found 8"),
        ({"embed_dims": (8, 16) + (8,) * 6}, r"embed_dims\[5\]: expected 16, as embed_dims\[1\], whose features are added to it, found 8"),
        ({"embed_dims": (8,) * 6 + (12, 8)}, r"embed_dims\[6\]: expected 8, as embed_dims\[0\], whose features are added to it, found 12"),
        (
            {"depths": (1,) * 9, "num_heads": (2,) * 9, "embed_dims": (8,) * 8 + (12,)},
            r"embed_dims\[8\]: expected 8, as embed_dims\[7\], since all reconstruction groups are equally wide, found 12",
        ),
        ({"in_chans": 1}, "in_chans: expected 3, found 1; a noise level is asked for by nonblind_denoising"),
        ({"pa_frames": 0, "nonblind_denoising": True}, "nonblind_denoising: expected False with pa_frames 0, which takes RGB alone, found True"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate: expected a number in \[0, 1\), found 1.0"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate: expected a number in \[0, 1\), found -0.1"),
        ({"mul_attn_ratio": 1.5}, r"mul_attn_ratio: expected a number in \[0, 1\], found 1.5"),
        ({"mul_attn_ratio": -1.0}, r"mul_attn_ratio: expected a number in \[0, 1\], found -1.0"),
        ({"out_chans": 6}, "out_chans: expected 3"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, make_network: Callable[..., VRT]) -> None:
    with pytest.raises(ValueError, match=message):
        make_network(**changes)


def test_widths_that_differ_from_scale_to_scale_fit(make_network: Callable[..., VRT]) -> None:
    network = make_network(embed_dims=(8, 12, 16, 20, 16, 12, 8, 10, 10), num_heads=(2,) * 9, depths=(1,) * 9, deformable_groups=4)
    assert network(torch.rand(1, 2, 3, 16, 16)).shape == (1, 2, 3, 16, 16)


def as_published(name: str, x: Tensor, batch: int) -> Tensor:
    """A stage's output in the order of axes in which the published numbers were taken."""
    if name == "conv_first":
        return x.unflatten(0, (batch, -1)).transpose(1, 2)
    if name == "conv_after_body":
        return x.permute(0, 3, 1, 2, 4)
    return x if name == "norm" else x.permute(0, 4, 1, 2, 3)
