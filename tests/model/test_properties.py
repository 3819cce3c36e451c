"""What holds for networks and clips of any kind."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vrt.evaluation.tiling import restore
from vrt.model.network import VRT

few_examples = settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def kinds(draw) -> dict[str, Any]:
    """Arguments of small networks of each kind."""
    pa_frames = draw(st.sampled_from([0, 2, 4, 6]))
    return {
        "pa_frames": pa_frames,
        "upscale": draw(st.sampled_from([1, 4])) if pa_frames else 1,
        "nonblind_denoising": draw(st.booleans()) if pa_frames else False,
        "window_size": (draw(st.integers(1, 3)), draw(st.sampled_from([3, 4])), draw(st.sampled_from([3, 4]))),
        "deformable_groups": max(pa_frames, 2),
        "embed_dims": (12,) * 8,
    }


@st.composite
def clips(draw, network: VRT, batch: int) -> torch.Tensor:
    depth = draw(st.integers(1, 4)) if network.reach else network.frames
    height, width = (8 * draw(st.integers(1, 3)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 100)))
    return torch.rand(batch, depth, network.in_chans + network.nonblind_denoising, height, width)


@few_examples
@given(data=st.data(), kind=kinds(), order=st.permutations(range(3)))
def test_permuting_the_batch_permutes_the_output(data, kind: dict[str, Any], order: list[int], make_network: Callable[..., VRT]) -> None:
    network = make_network(**kind).double().eval()
    clip = data.draw(clips(network, batch=3)).double()
    with torch.no_grad():
        torch.testing.assert_close(network(clip)[order], network(clip[order]), rtol=0, atol=1e-12)


@few_examples
@given(data=st.data(), kind=kinds())
def test_activation_checkpointing_changes_no_bit_of_the_gradients(data, kind: dict[str, Any], make_network: Callable[..., VRT]) -> None:
    results = []
    clip = None
    for use_checkpoint in (False, True):
        network = make_network(**kind, drop_path_rate=0.5, use_checkpoint=use_checkpoint).train()
        clip = data.draw(clips(network, batch=2)) if clip is None else clip
        torch.manual_seed(5)
        output = network(clip)
        output.square().mean().backward()
        # Both must leave the generator where the other does, or a training would depend on the memory it has.
        results.append({"output": output, "generator": torch.rand(3)} | {name: p.grad for name, p in network.named_parameters()})
    for name, plain in results[0].items():
        checkpointed = results[1][name]
        assert plain is checkpointed is None or torch.equal(plain, checkpointed), name


def test_tiles_that_overlap_give_the_whole_clip_away_from_the_cuts(make_network: Callable[..., VRT]) -> None:
    network = make_network().eval()
    # SpyNet sees the whole picture at once; all else has a reach of about 200 pixels here.
    torch.nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in network.spynet.parameters())), network.spynet.parameters())
    clip = torch.rand(1, 2, 3, 8, 640, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = network(clip)
    # Two tiles: columns 0 to 480 and 160 to 640.
    difference = (restore(network, clip, (2, 8, 480), (0, 0, 320), upscale=1) - whole).abs().amax((0, 1, 2, 3))
    assert max(difference[:160].max(), difference[480:].max()) < 1e-5 < difference[160:480].max()
